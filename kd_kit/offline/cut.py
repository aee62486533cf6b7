"""Prefix cuts: a small tokenizer that behaves like the real one it was taken from.

Byte-level BPE tokenizers number their base symbols first and then one token per merge, in merge order. Keeping
the first ids therefore keeps the first merges, and the result has the real normaliser and pattern, the real ids,
and exact round trips. Since every merge needs tokens of lower rank only, a text whose real ids all lie below the
cut has the same ids after it.

Not a way to shrink a tokenizer for a given text: the kept merges are the ones that were learnt first.
"""

from collections.abc import Sequence
from copy import deepcopy


def prefix_cut(tokenizer: dict, *, entries: int, specials: Sequence[str]) -> dict:
    """A copy of a ``tokenizer.json`` with the first ``entries`` ids of its model, plus ``specials``.

    Args:
        tokenizer: the parsed file, with a BPE model.
        entries: how many of the model's ids to keep; at least all base symbols.
        specials: the added tokens to keep. One that has an id below ``entries`` keeps it (as in SmolLM2, where
            specials come first); the others are numbered on from ``entries`` in this order (as in Qwen, where
            they come last).

    Raises:
        ValueError: not a BPE, an unknown special, a kept added token that is missing in ``specials``, a base
            symbol beyond the cut, or merges that are not numbered in merge order.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"prefix_cut: expected a BPE model, got {model['type']}; use a byte-level BPE tokenizer")
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    kept_first = {content for content, token in added.items() if token["id"] < entries}
    if unknown := [special for special in specials if special not in added]:
        raise ValueError(f"prefix_cut: expected specials of this tokenizer, got {unknown}; it has {list(added)}")
    if unnamed := kept_first.difference(specials):
        raise ValueError(
            f"prefix_cut: expected every special below id {entries} to be named, got none of {sorted(unnamed)}; "
            "add them to specials"
        )

    vocabulary = {token: index for token, index in model["vocab"].items() if index < entries}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    kept = len(vocabulary) - len(base_symbols(tokenizer)) - len(kept_first & set(vocabulary))
    products = ["".join(merge) for merge in merges[: max(kept, 0)]]
    if kept < 0 or not base_symbols(tokenizer) <= set(vocabulary):
        raise ValueError(
            f"prefix_cut: expected all {len(base_symbols(tokenizer))} base symbols below id {entries}, got a cut "
            "among them; keep more entries"
        )
    if [vocabulary.get(product) for product in products] != list(range(entries - kept, entries)):
        raise ValueError(
            f"prefix_cut: expected the ids up to {entries} to follow the order of the merges, got another order; "
            "this tokenizer cannot be cut at a prefix"
        )

    cut = deepcopy({key: value for key, value in tokenizer.items() if key != "model"})
    cut["model"] = {**model, "vocab": vocabulary, "merges": merges[:kept]}
    first = [special for special in specials if special in kept_first]
    last = [special for special in specials if special not in kept_first]
    cut["added_tokens"] = [dict(added[special]) for special in first] + [
        {**added[special], "id": entries + place} for place, special in enumerate(last)
    ]
    return cut


def base_symbols(tokenizer: dict) -> set[str]:
    """The one-character tokens: in a byte-level BPE, the bytes that the tokenizer knows.

    Often fewer than 256: SmolLM2's training text never held some bytes, so it has no symbol for them.
    """
    return {token for token in tokenizer["model"]["vocab"] if len(token) == 1}
