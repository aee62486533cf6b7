"""The expert routing of a mixture-of-experts teacher: where its routers are, what they say, how many experts they take.

Routers are found by structure, a module ``router`` or ``gate`` beside ``experts``, and read by hooks: nothing is asked
of the model (no ``output_router_logits``), and nothing stays in it. How a router turns logits into scores cannot be
seen from outside, so it is written down by family, and a family that is not listed is an error and not a guess.
Layers are counted from 1 over all layers, as in :mod:`kd_kit.taps`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional

from kd_kit.head import alone_with, body_of
from kd_kit.taps import layers_of

# ---- how families score, as their code of transformers 4.56 to 5.23 does

# a softmax over all experts, or over the chosen ones, which has the same ratios
SOFTMAX = (
    "aria_text dbrx deepseek_v2 ernie4_5_moe flex_olmo gemma4_text gpt_oss granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared hunyuan_v1_moe jamba jetmoe longcat_flash mellum minimax mixtral olmoe phimoe qwen2_moe "
    "qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text zaya"
)
# every expert scored by itself
SIGMOID = (
    "afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note_text exaone_moe flint glm4_moe "
    "glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 inkling_text kimi_linear kolibri1 laguna lfm2_moe llama4_text mimo_v2_flash "
    "minimax_m2 minimax_m3_vl_text nemotron_h solar_open"
)
KNOWN = dict.fromkeys(SOFTMAX.split(), "softmax") | dict.fromkeys(SIGMOID.split(), "sigmoid")
"""What the routers of a family make of their logits."""

IN_CONFIG = {"cohere2_moe": "expert_selection_fn", "deepseek_v4": "scoring_func", "inkling2_text": "scoring_func"}
"""Families that say it in a field of their config."""

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")

FIXED = {
    "phimoe": "its sparse mixer takes two experts whatever the config says",
    "zaya": "transformers supports one expert per token only",
}
"""Families whose number of active experts cannot be changed, and why."""


class NoExperts(ValueError):
    """A dense model was asked about its experts."""


def _scores_of(model: nn.Module, scores: str | None) -> str:
    config = model.config.get_text_config()
    family = config.model_type
    if scores is None:
        scores = getattr(config, IN_CONFIG[family]) if family in IN_CONFIG else KNOWN.get(family)
    if scores not in SCORES:
        raise ValueError(
            f"find_routing: expected a family whose scores are known, got {family!r} with scores={scores!r}; read what "
            f"its router does with its logits, then pass scores= one of {', '.join(SCORES)}"
        )
    return scores


def _normalised(logits: Tensor, scores: str) -> Tensor:
    """[..., X] float32 logits to probabilities: the scores over their sum, through their logarithm for safety."""
    if scores == "sigmoid":
        logits = functional.logsigmoid(logits)
    elif scores == "sqrtsoftplus":
        logits = functional.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).log() / 2
    return torch.softmax(logits, dim=-1)


# ---- finding


@dataclass(frozen=True)
class _Router:
    """One layer's router.

    Attributes:
        layer: its number. block: the module that holds gate and experts. gate: the router.
        linear: the part of the gate with the weight [X, width] of the logits, often the gate itself.
        heard: the module whose input meets that weight.
        experts: X, all that compete for a token, with "zero" or "skip" experts where a family has them.
        shared: something stands beside the routed experts that every token passes.
    """

    layer: int
    block: nn.Module
    gate: nn.Module
    linear: nn.Module
    heard: nn.Module
    experts: int
    shared: bool

    def dials(self) -> list[tuple[object, str]]:
        """The attributes that the forward pass may read the number of active experts from."""
        modules = (self.gate, self.block)
        # families read their config at every call too; its `top_k` is about sampling text
        names = [(part, name) for part in modules for name in ("top_k", "moe_top_k", "num_experts_per_tok")]
        configs = [part.config for part in modules if hasattr(part, "config")]
        names += [(c, name) for c in configs for name in ("num_experts_per_tok", "moe_topk", "top_k_experts")]
        return [(part, name) for part, name in names if isinstance(getattr(part, name, None), int)]

    @property
    def active(self) -> int:
        dials = self.dials()
        if not dials:
            raise ValueError(
                "find_routing: expected an attribute top_k of the router, of its block or in their config, how many "
                f"experts a token gets, got {type(self.gate).__name__} in layer {self.layer} without one; leave the "
                "router term out"
            )
        part, name = dials[0]
        return getattr(part, name)

    def _says(self, *names: str):
        """The first of the attributes that the gate or its block has and that is not None."""
        values = (getattr(part, name, None) for part in (self.gate, self.block) for name in names)
        return next((value for value in values if value is not None), None)

    @property
    def room(self) -> int:
        """How many experts a token can get: fewer than X where it first chooses groups of them (DeepSeek)."""
        groups = self._says("num_group", "n_group")
        if not groups or self._says("topk_method") == "greedy":
            return self.experts
        return self.experts // groups * self._says("topk_group")

    def probabilities(self, hidden: Tensor, scores: str) -> Tensor:
        """[..., width] what it hears -> [n, X] float32."""
        hidden = hidden.detach().flatten(0, -2).float()
        bias = getattr(self.heard, "bias", None)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logits = functional.linear(hidden, self.linear.weight.float(), None if bias is None else bias.float())
            cap = getattr(self.gate, "router_logit_softcapping", 0.0)  # Laguna
            logits = cap * torch.tanh(logits / cap) if cap else logits
            return _normalised(logits[:, : self.experts], scores)


def _router_in(number: int, layer: nn.Module) -> _Router | None:
    """The router of one layer, or None for a dense one.

    Raises:
        ValueError: it has several.
    """
    found = []
    for path, block in layer.named_modules():
        if "attention" in path or "experts." in path:  # JetMoE routes its attention too; inside experts are thousands
            continue
        parts = dict(block.named_children())
        gate = parts.get("router", parts.get("gate"))
        if gate is None or not {"experts", "input_linear"} & parts.keys():  # the latter: JetMoE, older Granite
            continue
        weights = ((part, getattr(part, "weight", None)) for part in gate.modules())
        linears = [part for part, w in weights if isinstance(w, Tensor) and w.dim() == 2 and w.is_floating_point()]
        if not linears:
            continue
        linear = linears[-1]  # Zaya's router is an MLP
        # LongCat multiplies with its linear's weight without calling it; elsewhere both hear the same, or only it does
        alone = {id(p) for p in gate.parameters()} == {id(p) for p in linear.parameters()}
        experts = linear.weight.shape[0]
        if hasattr(gate, "n_total_experts"):  # Inkling scores its shared experts too, after the others
            experts -= gate.n_shared_experts
        beside = [name for part in (block, layer) for name, _ in part.named_children()]
        shared = any("shared" in name for name in beside) or (block is layer and "mlp" in beside)  # the latter: Gemma 4
        found.append(_Router(number, block, gate, linear, gate if alone else linear, experts, shared))
    if len(found) > 1:
        raise ValueError(
            f"find_routing: expected at most one router in a layer, got {len(found)} in layer {number} "
            f"({', '.join(type(r.block).__name__ for r in found)}); leave the router term out"
        )
    return found[0] if found else None


def _routers(model: nn.Module) -> dict[int, _Router]:
    layers = layers_of(model)
    found = {n: router for n, layer in enumerate(layers, 1) if (router := _router_in(n, layer)) is not None}
    if found:
        return found
    fields = {name: n for name, n in model.config.get_text_config().to_dict().items() if "expert" in str(name) and n}
    if not any(isinstance(n, int) and n > 1 and "per_tok" not in name for name, n in fields.items()):
        raise NoExperts(
            f"find_routing: expected a mixture of experts, got {type(model).__name__}, which is dense: no config field "
            "counts experts and no layer has a router; leave the router term out"
        )
    parts = [(path, type(part).__name__) for layer in layers for path, part in layer.named_modules()]
    near = dict.fromkeys(name for path, name in parts if path and "att" not in path and "norm" not in path)
    raise ValueError(
        "find_routing: expected in some layer a module `router` or `gate` with a weight [experts, width] beside "
        f"`experts`, got {type(model).__name__} whose layers hold {', '.join(near)} and whose config says "
        f"{', '.join(f'{name}={n}' for name, n in fields.items())}; leave the router term out"
    )


def _one(values: Iterable[int]) -> int | tuple[int, ...]:
    """The number that all layers share, or one for each."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values


@dataclass(frozen=True)
class Routing:
    """What was found of a model's expert routing.

    Attributes:
        layers: the layers with a router, counted from 1 over all layers; dense ones are left out.
        experts: X, how many compete for a token; one number for each of ``layers`` where they differ (HunYuan).
        active: how many of them a token gets; likewise.
        shared: beside them stands something that every token passes.
        scores: what the router makes of its logits: softmax, sigmoid or sqrtsoftplus.
        source: how it was found, in words.
    """

    layers: tuple[int, ...]
    experts: int | tuple[int, ...]
    active: int | tuple[int, ...]
    shared: bool
    scores: str
    source: str

    def __repr__(self) -> str:
        runs = (
            [n for n in self.layers if n - 1 not in self.layers],
            [n for n in self.layers if n + 1 not in self.layers],
        )
        layers = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(*runs, strict=True))
        return (
            f"Routing({len(self.layers)} layers: {layers}; {self.active} of {self.experts} experts per token"
            f"{', and shared ones' if self.shared else ''}; {self.scores} scores;\n  {self.source})"
        )


def find_routing(model: nn.Module, *, scores: str | None = None) -> Routing:
    """Where a causal language model of transformers routes tokens to experts, and among how many. Print it.

    Args:
        scores: for a family that is not listed here, what its router makes of its logits.

    Raises:
        ValueError: the model is dense, has routers of an unknown form, or is of an unlisted family.
    """
    routers = list(_routers(model).values())
    first = routers[0]
    rows, width = first.linear.weight.shape
    inner = "" if first.linear is first.gate else f"{type(first.linear).__name__}, "
    return Routing(
        layers=tuple(r.layer for r in routers),
        experts=_one(r.experts for r in routers),
        active=_one(r.active for r in routers),
        shared=any(r.shared for r in routers),
        scores=_scores_of(model, scores),
        source=f"routers {type(first.gate).__name__} ({inner}weight [{rows}, {width}]) in {type(first.block).__name__}",
    )


def expert_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """{layer: the module that holds its router and its experts}, layers counted from 1.

    Raises:
        ValueError: what :func:`find_routing` raises.
    """
    return {layer: router.block for layer, router in _routers(model).items()}


def of_layer(value: int | tuple[int, ...], routing: Routing, layer: int) -> int:
    """``routing.experts`` or ``routing.active`` of one layer, where layers may differ."""
    return value[routing.layers.index(layer)] if isinstance(value, tuple) else value


# ---- reading


class RoutingTap:
    """Keeps the routers' distributions over all experts while the body of a model runs.

    Before the choice of the best, in float32 whatever the model computes in, at every position, padding too. Scores
    that do not sum to 1 (sigmoid) are divided by their sum. A router's own bias is part of the scores. The bias with
    which DeepSeek-V3 and others balance the load only steers the choice and is left out, as are its groups of experts:
    there the best of these probabilities need not be the chosen. No gradient.

    Each call of the body inside ``with`` replaces what the one before it left, and that stays readable after the exit.

    Args:
        layers: which, counted from 1; all that have a router if left out.
        scores: as in :func:`find_routing`.

    Attributes:
        probabilities: {layer: [B, S, X] float32}, rows sum to 1.

    Raises:
        ValueError: what :func:`find_routing` raises; a layer without a router.
        RuntimeError: reading before a body ran inside ``with``; a router that the pass skipped.

    Example:
        with RoutingTap(model, layers=(12, 24)) as tap:
            body_of(model)(input_ids=ids)
        tap.probabilities[24]
    """

    def __init__(self, model: nn.Module, layers: Iterable[int] | None = None, *, scores: str | None = None):
        self._body = body_of(model)
        self._alone = alone_with(model)
        routers = _routers(model)
        self._scores = _scores_of(model, scores)
        chosen = tuple(routers if layers is None else layers)
        for layer in chosen:
            if layer not in routers:
                raise ValueError(
                    f"RoutingTap: expected layers with a router, any of {', '.join(map(str, routers))}, got {layer!r}; "
                    "see find_routing(model)"
                )
        self._routers = {layer: routers[layer] for layer in chosen}
        self._handles: list[list] = []
        self._raw: dict[int, Tensor] | None = None  # a dict only while the body runs
        self._passed: dict[int, Tensor] = {}  # what blocks heard whose router has not been called yet
        self._found: dict[int, Tensor] | None = None

    @property
    def probabilities(self) -> dict[int, Tensor]:
        if self._found is None:
            raise RuntimeError(
                "RoutingTap: expected a finished forward pass of the body, got none; "
                "call body_of(model)(...) or model(...) inside `with RoutingTap(model, ...) as tap:`"
            )
        return self._found

    def __enter__(self) -> RoutingTap:
        self._alone.acquire()
        handles: list = []
        try:
            if not self._handles:  # entered again inside itself, it listens already
                handles.append(self._body.register_forward_pre_hook(self._open))
                handles.append(self._body.register_forward_hook(self._close))
                for router in self._routers.values():
                    hooks = [(router.heard, self._hear)]
                    hooks += [(router.block, self._pass)] if type(router.gate) is nn.Linear else []
                    for module, hook in hooks:
                        handles.append(module.register_forward_pre_hook(partial(hook, router.layer), with_kwargs=True))
            self._handles.append(handles)
        except BaseException:  # an interrupt: nobody will leave what was not entered
            for handle in handles:
                handle.remove()
            self._alone.release()
            raise
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles.pop():
            handle.remove()
        self._raw, self._passed = None, {}
        self._alone.release()

    def _open(self, module, args) -> None:
        self._raw, self._passed, self._found = {}, {}, None

    def _pass(self, layer: int, module, args, kwargs) -> None:
        """DeepSeek-V2 of transformers 5.0 multiplies with its router's weight without calling it."""
        if self._raw is not None:
            self._passed[layer] = args[0] if args else kwargs["hidden_states"]

    def _hear(self, layer: int, module, args, kwargs) -> None:
        if self._raw is not None:
            self._passed.pop(layer, None)
            hidden = args[0] if args else kwargs["hidden_states"]
            self._raw[layer] = self._routers[layer].probabilities(hidden, self._scores)

    def _close(self, module, args, output) -> None:
        raw, self._raw = self._raw, None
        for layer, hidden in self._passed.items():
            raw[layer] = self._routers[layer].probabilities(hidden, self._scores)
        self._passed = {}
        missing = self._routers.keys() - raw.keys()
        if missing:
            raise RuntimeError(
                f"RoutingTap: expected every router to run, got no call in layers {sorted(missing)}; "
                "the model skipped them: switch layer drop off, or leave these layers out"
            )
        self._found = {layer: raw[layer].unflatten(0, output[0].shape[:2]) for layer in self._routers}


# ---- more experts


@contextlib.contextmanager
def more_experts(model: nn.Module, active: int) -> Iterator[None]:
    """Inside ``with``, every router gives each token ``active`` experts; fewer than the model's own is allowed too.

    For knowledge augmentation: experts that were not chosen know something as well, so a second pass of the teacher
    with more of them is averaged with the first in probability space. Weights of the chosen are scaled as the family
    scales them; one that does not normalise them (Qwen2-MoE, Jamba) adds up more than before.

    Raises:
        ValueError: ``active`` outside 1..X, more than the groups that a token chooses hold, or a family whose number is
            fixed; and what :func:`find_routing` raises of the model.

    Source: https://arxiv.org/abs/2502.12947
    """
    routers = _routers(model).values()
    family = model.config.get_text_config().model_type
    reason = FIXED.get(family)
    if any(hasattr(router.gate, "tid2eid") for router in routers):
        reason = "some of its layers look experts up by token"
    if reason is not None:
        raise ValueError(
            f"more_experts: expected routers that can take another number of experts, got {family}: {reason}; "
            "leave the second pass out"
        )
    for router in routers:
        if isinstance(active, bool) or not isinstance(active, int) or not 1 <= active <= router.room:
            held = "" if router.room == router.experts else " (what the groups that a token chooses hold)"
            raise ValueError(
                f"more_experts: expected an integer from 1 to {router.room}{held}, got {active!r} "
                f"in layer {router.layer}, which has {router.experts} experts; choose a number in that range"
            )
    with alone_with(model):
        dials = [(part, name, getattr(part, name)) for router in routers for part, name in router.dials()]
        try:
            for part, name, _ in dials:
                setattr(part, name, active)
            yield
        finally:
            for part, name, before in reversed(dials):
                setattr(part, name, before)


# ---- a diagnosis


@dataclass(frozen=True, eq=False)
class Load:
    """How evenly each layer's experts are used.

    Attributes:
        layers: their numbers.
        entropy: [L] float32, of the share f of choices that each expert got, over log X: 1 even, 0 all on one.
        dead: [L] int64, how many experts were never chosen.
        largest: [L] float32, the largest share; 1 / X where even.
    """

    layers: tuple[int, ...]
    entropy: Tensor
    dead: Tensor
    largest: Tensor

    def __repr__(self) -> str:
        rows = zip(self.layers, self.entropy.tolist(), self.dead.tolist(), self.largest.tolist(), strict=True)
        lines = [f"{layer:>5}  {entropy:>7.3f}  {dead:>4}  {share:>13.3f}" for layer, entropy, dead, share in rows]
        return "\n".join(["layer  entropy  dead  largest share", *lines])


def count_chosen(probabilities: Tensor, active: int, mask: Tensor | None = None) -> Tensor:
    """[X] int64, how often each expert is among the ``active`` most probable.

    The teacher's own choice only where nothing but the scores steers it: see :class:`RoutingTap`.

    Shapes:
        probabilities: [B, S, X] of one layer
        mask: [B, S] bool, the positions that count; all if left out
    """
    rows = probabilities.flatten(0, 1) if mask is None else probabilities[mask]
    return rows.topk(active, dim=-1).indices.flatten().bincount(minlength=rows.shape[-1])


def routing_balance(chosen_counts: Tensor, layers: Iterable[int] | None = None) -> Load:
    """How evenly a frozen teacher uses its experts: per layer, and never pooled.

    Layers that each collapsed on an expert of their own look perfectly even together. This is a diagnosis and no loss.

    Shapes:
        chosen_counts: [L, X], how often each expert was chosen
        layers: L numbers; 1..L if left out

    Raises:
        ValueError: another shape, fewer than two experts, counts that are negative or not finite, a layer without any.
    """
    if chosen_counts.dim() != 2 or chosen_counts.shape[1] < 2:
        raise ValueError(
            "routing_balance: expected counts [layers, experts] of at least two experts, got "
            f"{tuple(chosen_counts.shape)}; stack one row for each layer"
        )
    layers = tuple(range(1, len(chosen_counts) + 1) if layers is None else layers)
    if len(layers) != len(chosen_counts):
        raise ValueError(
            f"routing_balance: expected a number for each of {len(chosen_counts)} layers, got {len(layers)}; "
            "give as many as there are rows"
        )
    counts = chosen_counts.double()
    totals = counts.sum(-1, keepdim=True)
    good = (counts.isfinite() & (counts >= 0)).all(-1) & (totals.squeeze(-1) > 0)
    if not good.all():
        bad = [layer for layer, fine in zip(layers, good.tolist(), strict=True) if not fine]
        raise ValueError(
            "routing_balance: expected counts of 0 or more, some of them positive in every layer, got others in "
            f"layers {bad}; count positions that are no padding, see count_chosen"
        )
    share = counts / totals
    return Load(
        layers=layers,
        entropy=(torch.special.entr(share).sum(-1) / log(share.shape[-1])).float(),
        dead=(counts == 0).sum(-1),
        largest=share.amax(-1).float(),
    )
