"""Taps: what the layers of a causal language model hold during a forward pass, read by hooks.

The model runs as it always does: nothing is asked of it (no ``output_hidden_states``, no ``output_attentions``, which
would leave the fast attention), and nothing stays in it. Layers are counted from 1: layer ``l`` is the state after the
``l``-th layer, and the last one is the body's final hidden state, after the last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from operator import index

import torch
from torch import Tensor, nn

from kd_kit.head import alone_with, body_of

LayerMap = tuple[tuple[int, int], ...]
"""Pairs (student layer, teacher layer), counted from 1, rising on both sides."""


# ---- which layers


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a causal language model of transformers, first to last.

    Raises:
        ValueError: the config does not say how many there are, or not exactly one list in the body has as many.
    """
    config = model.config.get_text_config()
    body = body_of(model)
    # LongCat's num_hidden_layers counts the two attentions of each of its num_layers
    counts = (getattr(config, name, None) for name in ("num_layers", "num_hidden_layers", "n_layer", "n_layers"))
    count = next((n for n in counts if n is not None), None)
    lists = {name: part for name, part in body.named_modules() if isinstance(part, nn.ModuleList)}
    fitting = [name for name, part in lists.items() if len(part) == count]
    depth = min((name.count(".") for name in fitting), default=0)  # as many experts in each layer are no layers
    fitting = [name for name in fitting if name.count(".") == depth]
    if len(fitting) != 1:
        there = ", ".join(f"{name} ({len(part)})" for name, part in lists.items() if name.count(".") <= depth)
        raise ValueError(
            f"layers_of: expected one ModuleList of {count} layers (the config's num_hidden_layers) in the body, "
            f"got {type(body).__name__} with {there or 'no ModuleList'}; tap a model whose layers are one list"
        )
    return lists[fitting[0]]


def layer_map(student_layers: int, teacher_layers: int, *, taps: int = 4) -> LayerMap:
    """Which teacher layer teaches which student layer: proportional, rising, last to last.

    Pair ``i`` of ``n = min(taps, student_layers, teacher_layers)`` is (floor(L i / n), floor(L' i / n)).

    Raises:
        ValueError: a number below 1.

    Example:
        >>> layer_map(30, 24)
        ((7, 6), (15, 12), (22, 18), (30, 24))
    """
    n = min(taps, student_layers, teacher_layers)
    if n < 1:
        raise ValueError(
            f"layer_map: expected at least 1 layer on each side and 1 tap, got student {student_layers}, teacher "
            f"{teacher_layers}, taps={taps}; give the layers that the configs say"
        )
    return tuple((student_layers * i // n, teacher_layers * i // n) for i in range(1, n + 1))


def check_layer_map(
    pairs: Iterable[tuple[int, int]] | Mapping[int, int], student_layers: int, teacher_layers: int
) -> LayerMap:
    """A map given by hand, in the form of :func:`layer_map`. A mapping is read by rising student layer.

    Raises:
        ValueError: it is empty, no pairs of integers, outside 1 .. layers, or does not rise on both sides.
    """
    items = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not items:
        raise ValueError("check_layer_map: expected at least one pair of layers, got none; see layer_map for a default")
    found = []
    for item in items:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ValueError(
                f"check_layer_map: expected pairs (student layer, teacher layer), got {item!r}; write ((15, 12), ...)"
            )
        student = _layer("check_layer_map: student", item[0], student_layers)
        found.append((student, _layer("check_layer_map: teacher", item[1], teacher_layers)))
    if isinstance(pairs, Mapping):
        found.sort()
    for before, after in pairwise(found):
        if not (before[0] < after[0] and before[1] < after[1]):
            raise ValueError(
                f"check_layer_map: expected layers that rise on both sides, got {before} then {after}; "
                "a later student layer needs a later teacher layer, and each layer stands once"
            )
    return tuple(found)


def _layer(where: str, layer, layers: int) -> int:
    try:
        number = None if isinstance(layer, bool) else index(layer)
    except TypeError:
        number = None
    if number is None or not 1 <= number <= layers:
        raise ValueError(
            f"{where}: expected a layer, an integer from 1 to {layers}, got {layer!r}; the last is {layers}"
        )
    return number


# ---- where queries, keys and values come from

FLAT = {"gpt2": "c_attn", "phi3": "qkv_proj", "phi4_multimodal": "qkv_proj", "mpt": "Wqkv", "dbrx": "Wqkv"}
"""Families with one projection for q, k and v, all queries first (q q q q | k k | v v), and its name."""

GROUPED = {"gpt_bigcode": "c_attn"} | dict.fromkeys(
    ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon"), "query_key_value"
)
"""The same where each key head stands with its queries (q q k v | q q k v). By family: one name has several layouts."""

Split = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _projections_of(model: nn.Module, layer: int) -> tuple[dict[str, nn.Module], Split]:
    """The modules of a layer's attention to listen to, and how their outputs become q, k and v."""
    config = model.config.get_text_config()
    fused = (FLAT | GROUPED).get(config.model_type, "")
    heads = getattr(config, "num_attention_heads", None)
    block = layers_of(model)[layer - 1]
    for part in block.modules():
        there = dict(part.named_children())
        width = getattr(part, "head_dim", None) or getattr(part, "head_size", None)
        if fused in there:
            split = partial(_split_fused, heads=heads, width=width, grouped=config.model_type in GROUPED)
            return {"qkv": there[fused]}, split
        if {"q_proj", "k_proj", "v_proj"} <= there.keys():
            inner = getattr(there.get("o_proj"), "in_features", None)
            gated = width and heads and inner == heads * width and _out_features(there["q_proj"]) == 2 * inner
            return {n: there[f"{n}_proj"] for n in "qkv"}, partial(_split_gated, width=width) if gated else dict
        if "kv_b_proj" in there and (q := there.get("q_proj", there.get("q_b_proj"))) is not None:
            split = partial(_split_latent, widths=(part.qk_nope_head_dim, part.v_head_dim))
            return {"q": q, "kv": there["kv_b_proj"]}, split
    offered = "; ".join(f"{n}: {', '.join(dict(m.named_children())) or 'no parts'}" for n, m in block.named_children())
    raise ValueError(
        f"attention of layer {layer}: expected q_proj, k_proj and v_proj, or kv_b_proj and q_proj or q_b_proj, or the "
        f"one projection of {', '.join(FLAT | GROUPED)}, got a layer of {config.model_type} with {offered}; "
        "tap the attention of another layer, or states only"
    )


def _split_fused(raw: dict[str, Tensor], *, heads: int, width: int, grouped: bool) -> dict[str, Tensor]:
    qkv = raw["qkv"]
    kv_heads = (qkv.shape[-1] // width - heads) // 2
    groups = kv_heads if grouped else 1
    sizes = [n // groups * width for n in (heads, kv_heads, kv_heads)]
    parts = qkv.unflatten(-1, (groups, -1)).split(sizes, dim=-1)
    return {name: part.flatten(-2) for name, part in zip("qkv", parts, strict=True)}


def _split_gated(raw: dict[str, Tensor], *, width: int) -> dict[str, Tensor]:
    return raw | {"q": raw["q"].unflatten(-1, (-1, 2 * width))[..., :width].flatten(-2)}


def _split_latent(raw: dict[str, Tensor], *, widths: tuple[int, int]) -> dict[str, Tensor]:
    q, kv = raw["q"], raw["kv"]
    kv = kv.flatten(1, -2)  # transformers 5 projects [B, 1, T, rank]
    k, v = kv.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
    return {"q": q, "k": k.flatten(-2), "v": v.flatten(-2)}


def _out_features(module: nn.Module) -> int:
    return getattr(module, "out_features", None) or module.nf  # GPT-2's Conv1D


def attention_widths(model: nn.Module, layer: int | None = None) -> dict[str, int]:
    """The widths of q, k and v as :class:`Taps` gives them, without running the model.

    Args:
        layer: which layer; None where all layers are alike.

    Raises:
        ValueError: a layer has no such attention, or ``layer`` is None and the layers differ.
    """
    layers = len(layers_of(model))
    if layer is None:
        found = [attention_widths(model, number) for number in range(1, layers + 1)]
        for number, widths in enumerate(found, 1):
            if widths != found[0]:
                raise ValueError(
                    f"attention_widths: expected layers alike, got {found[0]} in layer 1 "
                    f"and {widths} in layer {number}; name the layer"
                )
        return found[0]
    modules, split = _projections_of(model, _layer("attention_widths", layer, layers))
    raw = {name: torch.empty(1, 1, _out_features(module), device="meta") for name, module in modules.items()}
    return {name: tensor.shape[-1] for name, tensor in split(raw).items()}


# ---- the taps


class Taps:
    """Keeps states, queries, keys and values of some layers while the body of a model runs.

    Each call of the body inside ``with`` replaces what the one before it left; what stood there then remains readable
    after the exit. Gradients flow where the call had them. Works with gradient checkpointing that is not reentrant.

    Attributes:
        states: {layer: [B, T, D]}, after the layer; the last layer's after the final norm.
        attention: {layer: {"q": [B, T, Wq], "k": [B, T, Wk], "v": [B, T, Wv]}}, the projections' outputs with heads
            side by side: before any norm of queries or keys, and before positions are rotated in. Keys and values may
            have fewer heads than queries. An output gate that shares the projection of q (Qwen3-Next) is left out. Of
            latent attention (DeepSeek) k is the part without positions, narrower than q.

    Raises:
        ValueError: a layer that is not there, or an attention of an unknown form.
        RuntimeError: reading before a body ran inside ``with``; a tapped module that the pass skipped; reentrant
            checkpointing, which would cut the tap off the gradient.

    Example:
        with Taps(model, states=(7, 30), attention=(30,)) as taps:
            body_of(model)(input_ids=ids)
        taps.states[7], taps.attention[30]["q"]
    """

    def __init__(self, model: nn.Module, *, states: Iterable[int] = (), attention: Iterable[int] = ()):
        states, attention = tuple(states), tuple(attention)
        # a model whose layers cannot be told apart may still be run without any of them
        layers = layers_of(model) if states or attention else ()
        count = len(layers)
        self._body = body_of(model)
        self._alone = alone_with(model)
        self._last = count
        self._state_layers = tuple(_layer("Taps: states", layer, count) for layer in states)
        self._projections = {
            number: _projections_of(model, number)
            for number in (_layer("Taps: attention", layer, count) for layer in attention)
        }
        self._listen = {(n, "state"): layers[n - 1] for n in self._state_layers if n != count}
        for n, (modules, _) in self._projections.items():
            self._listen |= {(n, name): module for name, module in modules.items()}
        self._handles: list[list] = []
        self._raw: dict | None = None  # a dict only while the body runs, so that a recomputation is not heard
        self._grad = False
        self._found: tuple[dict, dict] | None = None

    @property
    def states(self) -> dict[int, Tensor]:
        return self._read()[0]

    @property
    def attention(self) -> dict[int, dict[str, Tensor]]:
        return self._read()[1]

    def _read(self) -> tuple[dict, dict]:
        if self._found is None:
            raise RuntimeError(
                "Taps: expected a finished forward pass of the body, got none; "
                "call body_of(model)(...) or model(...) inside `with Taps(model, ...) as taps:`"
            )
        return self._found

    def __enter__(self) -> Taps:
        self._alone.acquire()
        handles: list = []
        try:
            if not self._handles:  # entered again inside itself, it listens already
                handles.append(self._body.register_forward_pre_hook(self._open))
                handles.append(self._body.register_forward_hook(self._close))
                for key, module in self._listen.items():
                    handles.append(module.register_forward_hook(partial(self._keep, key)))
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
        self._raw = None
        self._alone.release()

    def _open(self, module, args) -> None:
        self._raw, self._found, self._grad = {}, None, torch.is_grad_enabled()

    def _keep(self, key, module, args, output) -> None:
        """Nothing is computed here: what a hook saves for backward inside a checkpoint would be missed later on."""
        if self._raw is None:
            return
        if self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"Taps: expected layer {key[0]} to run with gradient, got reentrant checkpointing, which cuts it off; "
                'switch it on with gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        self._raw[key] = output[0] if isinstance(output, tuple) else output

    def _close(self, module, args, output) -> None:
        raw, self._raw = self._raw, None
        missing = self._listen.keys() - raw.keys()
        if missing:
            raise RuntimeError(
                f"Taps: expected every tapped part to run, got no call of (layer, part) {sorted(missing)}; "
                "the model skipped it: switch layer drop off, or tap another layer"
            )
        raw[self._last, "state"] = output[0]
        states = {n: raw[n, "state"] for n in self._state_layers}
        attention = {n: split({m: raw[n, m] for m in parts}) for n, (parts, split) in self._projections.items()}
        self._found = (states, attention)
