"""A dense model out of a mixture of experts: its attention, embeddings and head as they are, its experts as one MLP.

Only the MLPs are new. Their neurons are taken from the experts, averaged or chosen, and the matrix behind the
neurons is fitted by least squares to what the mixture gave on some text. Without that fit an average of experts that
learnt different things starts worse than new weights do: neuron 7 of one has nothing to do with neuron 7 of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kd_kit.data import WindowSet
from kd_kit.head import alone_with, body_of
from kd_kit.likelihood import evaluating
from kd_kit.pruning import kept_layers, shorter_config
from kd_kit.routing import RoutingTap, expert_blocks
from kd_kit.taps import layers_of

FAMILIES = {
    "qwen3_moe": ("Qwen3Config", "Qwen3ForCausalLM"),
    "qwen2_moe": ("Qwen2Config", "Qwen2ForCausalLM"),
    "mixtral": ("MistralConfig", "MistralForCausalLM"),
}
"""Families of mixtures, and the dense model of the same attention."""

EXPERTS = ("chosen", "averaged")
RIDGE = 1e-3  # of the mean square of a neuron; from 1e-1 to 1e-4 the embedded teacher's students hardly differ
POOL = 3  # neurons that are looked through for each that is wanted


@dataclass(frozen=True)
class Neurons:
    """Gated neurons, x -> act(gate x) * (up x), and what each adds to the output.

    Attributes:
        gate, up: [n, D]. down: [D, n].
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def __len__(self) -> int:
        return len(self.gate)

    def __getitem__(self, chosen) -> Neurons:
        return Neurons(self.gate[chosen], self.up[chosen], self.down[:, chosen])

    def activity(self, inputs: Tensor, act) -> Tensor:
        """[N, D] -> [N, n]"""
        return act(inputs @ self.gate.T) * (inputs @ self.up.T)


def _joined(parts: Sequence[Neurons]) -> Neurons:
    return Neurons(
        torch.cat([p.gate for p in parts]), torch.cat([p.up for p in parts]), torch.cat([p.down for p in parts], dim=1)
    )


def _mlp_neurons(mlp: nn.Module) -> Neurons:
    """Of an MLP with the names of Llama's, or of Mixtral's experts before transformers 5."""
    names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
    return Neurons(*(getattr(mlp, name).weight.detach().float() for name in names))


def _experts_of(block: nn.Module) -> list[Neurons]:
    """A list of modules before transformers 5, stacked tensors since."""
    experts = block.experts
    if isinstance(experts, nn.ModuleList):
        return [_mlp_neurons(expert) for expert in experts]
    gates, ups = experts.gate_up_proj.detach().float().chunk(2, dim=1)  # [X, m, D]
    return [Neurons(*one) for one in zip(gates, ups, experts.down_proj.detach().float(), strict=True)]


@dataclass(frozen=True)
class _Heard:
    """What one layer's mixture was given and gave on the text.

    Attributes:
        inputs, outputs: [N, D]. weights: [N, X], the router's weight of every expert, 0 where it was not chosen.
    """

    inputs: Tensor
    outputs: Tensor
    weights: Tensor

    @property
    def mass(self) -> Tensor:
        """[X], the share of the router's weight that each expert has; sums to 1."""
        mass = self.weights.mean(0)
        return mass / mass.sum()


def _listen(moe: nn.Module, windows: WindowSet, layers: Sequence[int], tokens: int) -> dict[int, _Heard]:
    """What the mixtures of these layers say while the model reads windows, spread evenly over the text."""
    blocks = expert_blocks(moe)
    config = moe.config.get_text_config()
    # Mixtral divides by the sum whatever its configuration says
    divided = getattr(config, "norm_topk_prob", True)
    found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {n: [] for n in layers}
    device = next(moe.parameters()).device
    last: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, module, given, out) -> None:
        out = out[0] if isinstance(out, tuple) else out  # with the router's logits, before transformers 5
        last[layer] = given[0].flatten(0, -2), out.flatten(0, -2)

    read, spread = 0, torch.linspace(0, len(windows) - 1, min(len(windows), tokens)).round().long()
    order = spread[torch.randperm(len(spread), generator=torch.Generator().manual_seed(0))].tolist()
    hooks = []
    with alone_with(moe), evaluating(moe), RoutingTap(moe, layers) as tap:
        try:
            hooks = [blocks[n].register_forward_hook(partial(keep, n)) for n in layers]
            for number in order:
                ids = torch.from_numpy(windows.ids(number)[1]).to(device).unsqueeze(0)
                body_of(moe)(input_ids=ids, use_cache=False)
                for n, probabilities in tap.probabilities.items():
                    weights, chosen = probabilities.flatten(0, 1).topk(config.num_experts_per_tok, dim=-1)
                    if divided:
                        weights = weights / weights.sum(-1, keepdim=True)
                    every = torch.zeros_like(probabilities.flatten(0, 1)).scatter(1, chosen, weights)
                    found[n].append((*last.pop(n), every))
                read += ids.numel()
                if read >= tokens:
                    break
        finally:
            for hook in hooks:
                hook.remove()
    return {n: _Heard(*(torch.cat(parts) for parts in zip(*some, strict=True))) for n, some in found.items()}


def _averaged(block: nn.Module, mass: Tensor) -> Neurons:
    """Experts averaged neuron by neuron, each with its share of the router's mass."""
    experts = _experts_of(block)
    return Neurons(*(sum(w * getattr(e, name) for w, e in zip(mass, experts, strict=True)) for name in _PARTS))


_PARTS = ("gate", "up", "down")


def _beside(block: nn.Module, inputs: Tensor) -> Neurons | None:
    """The neurons of an expert that every token passes, with its mean weight; None where there is none."""
    shared = getattr(block, "shared_expert", None)
    if shared is None:
        return None
    neurons = _mlp_neurons(shared)
    weight = torch.sigmoid(inputs @ block.shared_expert_gate.weight.detach().float().T).mean()
    return Neurons(neurons.gate, neurons.up, neurons.down * weight)


def _pool(block: nn.Module, heard: _Heard, inputs: Tensor, act, size: int) -> Neurons:
    """The neurons that matter most on this text, of all experts, their average, and the shared one.

    How much one matters: the root mean square of what it adds to the output.
    """
    ones = torch.ones(len(inputs), device=inputs.device)
    parts = [(expert, heard.weights[:, e].float()) for e, expert in enumerate(_experts_of(block))]
    parts.append((_averaged(block, heard.mass), ones))
    if (beside := _beside(block, inputs)) is not None:
        parts.append((beside, ones))
    matters = [
        (neurons.activity(inputs, act) * weight.unsqueeze(-1)).square().mean(0).sqrt() * neurons.down.norm(dim=0)
        for neurons, weight in parts
    ]
    largest = torch.cat(matters).topk(min(size, sum(map(len, matters)))).indices
    return _joined([neurons for neurons, _ in parts])[largest.sort().values]


def _choose(gram: Tensor, cross: Tensor, width: int) -> Tensor:
    """[width] the neurons that explain the output best, one after the other, each by what the earlier ones leave open.

    Forward selection for least squares, by a pivoted Cholesky factorisation: of two neurons that say the same only one
    is taken.

    Shapes:
        gram: [P, P], products of the neurons' activities, with the ridge
        cross: [P, D], products with the output
    """
    left, open_ = gram.diagonal().clone(), cross.clone()
    rows = gram.new_zeros(width, len(gram))
    taken, least = [], 1e-7 * gram.diagonal().mean()
    for k in range(width):
        gain = torch.where(left > least, open_.square().sum(-1) / left.clamp(min=least), -1.0)
        gain[taken] = -2.0
        j = int(gain.argmax())
        root = left[j].clamp(min=least).sqrt()
        rows[k] = (gram[j] - rows[:k, j] @ rows[:k]) / root
        open_ -= rows[k].unsqueeze(-1) * (open_[j] / root)
        left = left - rows[k].square()
        taken.append(j)
    return torch.tensor(taken, device=gram.device)


def _fitted(neurons: Neurons, inputs: Tensor, outputs: Tensor, act, like: Tensor | None) -> Neurons:
    """The same neurons with the ``down`` that comes closest to the outputs; as ``like`` where the text does not say."""
    activity = neurons.activity(inputs, act)
    gram, cross = activity.T @ activity, activity.T @ outputs
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    gram.diagonal().add_(ridge)
    if like is not None:
        cross = cross + ridge * like.T
    return Neurons(neurons.gate, neurons.up, torch.linalg.solve(gram.double(), cross.double()).float().T)


def _layer_neurons(block: nn.Module, heard: _Heard, act, experts: str, width: int) -> Neurons:
    inputs, outputs = heard.inputs.float(), heard.outputs.float()
    if experts == "averaged":
        parts = [_averaged(block, heard.mass), _beside(block, inputs)]
        neurons = _joined([part for part in parts if part is not None])
        return _fitted(neurons, inputs, outputs, act, like=neurons.down)
    pool = _pool(block, heard, inputs, act, POOL * width)
    activity = pool.activity(inputs, act)
    gram = activity.T @ activity
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    chosen = _choose(gram, activity.T @ outputs, min(width, len(pool)))
    return _fitted(pool[chosen], inputs, outputs, act, like=None)


def _family(moe: nn.Module) -> tuple[str, str]:
    config = moe.config.get_text_config()
    known = ", ".join(FAMILIES)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"dense_student: expected a mixture of one of the families {known}, got {config.model_type}; distil it "
            "into a dense model of its own: build_student(name)"
        )
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"dense_student: expected a {config.model_type} that attends to all tokens, got use_sliding_window=True; "
            "the dense family slides in other layers than this one"
        )
    if getattr(config, "qkv_bias", True) is False:
        raise ValueError(
            "dense_student: expected a qwen2_moe whose queries, keys and values have a bias, as Qwen2's do, got "
            "qkv_bias=False; there is no dense model of this attention here"
        )
    return FAMILIES[config.model_type]


def dense_from_experts(
    moe: nn.Module,
    windows: WindowSet,
    *,
    layers: int | Sequence[int] | None = None,
    keep: str = "ends",
    experts: str = "chosen",
    width: int | None = None,
    tokens: int = 8192,
) -> nn.Module:
    """A dense model of a mixture's own attention, whose MLPs stand for its experts, float32, on the mixture's device.

    Args:
        windows: text, in the tokens of the teacher's side, on which routers, inputs and outputs are heard.
        layers, keep: which layers stay, see :func:`kd_kit.pruning.kept_layers`; all if left out.
        experts: "chosen", the neurons of all experts that explain the mixture's output best; or "averaged", the experts
            averaged by the router's mass, which is the same neurons where experts are alike, and one expert wide.
        width: neurons of every MLP with "chosen"; what a token passes in the mixture if left out.
        tokens: how many are read.

    Raises:
        ValueError: a dense model or another family, layers that are not there, a text of fewer tokens than neurons, or
            a width that does not go with ``experts``.
    """
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in _family(moe))
    blocks = expert_blocks(moe)
    if experts not in EXPERTS:
        raise ValueError(f"dense_student: expected experts= 'chosen' or 'averaged', got {experts!r}")
    whole = layers_of(moe)
    kept = tuple(range(1, len(whole) + 1)) if layers is None else kept_layers(len(whole), layers, keep)
    mixed = [n for n in kept if n in blocks]
    dense = {n: _mlp_neurons(whole[n - 1].mlp) for n in kept if n not in blocks}
    width = _width(moe, blocks, experts, width, [len(neurons) for neurons in dense.values()])
    heard = _listen(moe, windows, mixed, tokens) if mixed else {}
    if heard and len(heard[mixed[0]].inputs) < width:
        raise ValueError(
            f"dense_student: expected a text of at least {width:,} tokens, one for each neuron of an MLP, got "
            f"{len(heard[mixed[0]].inputs):,}; give more text, tokens= of that many, or a smaller width="
        )
    short = shorter_config(moe.config.get_text_config(), kept).to_dict()
    short.setdefault("head_dim", getattr(whole[0].self_attn, "head_dim", None))  # not every version writes it down
    taken = config_class().to_dict().keys() - {"model_type", "architectures", "layer_types", "transformers_version"}
    config = config_class(**{name: short[name] for name in taken if name in short} | {"intermediate_size": width})
    config.dtype = torch.float32
    config._attn_implementation = moe.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        student = model_class(config).float()
    student.to(next(moe.parameters()).device)
    _copy_rest(moe, student, kept)
    act = student.model.layers[0].mlp.act_fn
    with torch.no_grad():
        for new, old in enumerate(kept):
            neurons = dense.get(old)
            if neurons is None:
                neurons = _layer_neurons(blocks[old], heard.pop(old), act, experts, width)
            _put(student.model.layers[new].mlp, neurons)
    return student.train()


def _width(moe: nn.Module, blocks: dict[int, nn.Module], experts: str, width: int | None, dense: list[int]) -> int:
    """Neurons of every MLP of the student: at least those of the mixture's dense layers."""
    first = next(iter(blocks.values()))
    one = len(_experts_of(first)[0])
    beside = len(_mlp_neurons(first.shared_expert)) if hasattr(first, "shared_expert") else 0
    if experts == "averaged":
        if width not in (None, one + beside):
            raise ValueError(
                f"dense_student: expected no width= with experts='averaged', which gives {one + beside:,} neurons, got "
                f"{width}; experts='chosen' takes any"
            )
        return max([one + beside, *dense])
    there = one * len(_experts_of(first)) + one + beside
    active = moe.config.get_text_config().num_experts_per_tok
    wanted = min(active * one + beside, there) if width is None else width
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= there:
        raise ValueError(
            f"dense_student: expected a width= from 1 to {there:,}, the neurons of all experts and of their average, "
            f"got {width!r}; left out it is {min(active * one + beside, there):,}, what a token passes"
        )
    return max([wanted, *dense])


def _copy_rest(moe: nn.Module, student: nn.Module, kept: Sequence[int]) -> None:
    """All weights but those of the MLPs."""
    state = {}
    for name, tensor in moe.state_dict().items():
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            if int(number) + 1 not in kept or rest.startswith(("mlp.", "block_sparse_moe.")):
                continue
            name = f"model.layers.{kept.index(int(number) + 1)}.{rest}"
        state[name] = tensor.float()
    lacking = student.load_state_dict(state, strict=False)
    wrong = [name for name in lacking.missing_keys if ".mlp." not in name] + lacking.unexpected_keys
    if wrong:
        raise ValueError(
            f"dense_student: expected {type(moe).__name__} and {type(student).__name__} to have the same attention, "
            f"got {', '.join(wrong[:3])} in only one of them; no dense student can be made of it"
        )


def _put(mlp: nn.Module, neurons: Neurons) -> None:
    """Neurons into an MLP, the first of it; those left over stay as they were drawn and say nothing."""
    n = len(neurons)
    mlp.gate_proj.weight[:n] = neurons.gate
    mlp.up_proj.weight[:n] = neurons.up
    mlp.down_proj.weight[:, :n] = neurons.down
    mlp.down_proj.weight[:, n:] = 0.0
