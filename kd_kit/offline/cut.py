"""Prefix cuts: a small tokenizer that behaves like the real one it was taken from.

Byte-level BPE tokenizers number their base symbols first and then one token per merge, in merge order.
Keeping the first ids therefore keeps the first merges, and the result has the real normaliser and pattern,
the real ids, and exact round trips. Since a merge's parts are of lower rank than the merge, a text whose real
ids all lie below the cut has the same ids after it.

Not a way to fit a tokenizer to a text: the kept merges are the ones that were learnt first.
"""

from collections.abc import Sequence


def prefix_cut(tokenizer: dict, *, entries: int, specials: Sequence[str]) -> dict:
    """A copy of a ``tokenizer.json`` with the first ``entries`` ids of its model, plus ``specials``.

    Args:
        tokenizer: the parsed file, with a BPE model.
        entries: how many of the model's ids to keep; at least all base symbols.
        specials: the added tokens to keep. One that has an id below ``entries`` keeps it (as in SmolLM2,
            where specials come first) and must be named; the others are numbered on from ``entries`` in this
            order (as in Qwen, where they come last).

    Raises:
        ValueError: another model than BPE, specials that do not fit, a base symbol beyond the cut, or merges
            that are not numbered one after the other in their order.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"prefix_cut: expected a BPE model, got {model['type']}; give a byte-level BPE tokenizer")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    numbers = [model["vocab"]["".join(merge)] for merge in merges]
    kept = max(0, entries - min(numbers))
    vocabulary = {token: number for token, number in model["vocab"].items() if number < entries}
    if not base_symbols(tokenizer) <= vocabulary.keys():
        raise ValueError(
            f"prefix_cut: expected all {len(base_symbols(tokenizer))} base symbols below id {entries}, got "
            f"{len(base_symbols(tokenizer) & vocabulary.keys())} there; keep more entries"
        )
    if numbers[:kept] != list(range(entries - kept, entries)):
        raise ValueError(
            f"prefix_cut: expected merges numbered in their order up to id {entries}, got another order; "
            "use another tokenizer, this one has no prefix that is one"
        )
    return {
        **tokenizer,
        "added_tokens": cut_added_tokens(tokenizer["added_tokens"], entries=entries, specials=specials),
        "model": {**model, "vocab": vocabulary, "merges": merges[:kept]},
    }


def cut_added_tokens(added_tokens: Sequence[dict], *, entries: int, specials: Sequence[str]) -> list[dict]:
    """The added tokens named in ``specials``, in order of their ids after the cut."""
    by_content = {token["content"]: token for token in added_tokens}
    first = [token for token in added_tokens if token["id"] < entries]
    if unnamed := {token["content"] for token in first}.difference(specials):
        raise ValueError(
            f"prefix_cut: expected every added token below id {entries} in specials, got none of "
            f"{sorted(unnamed)}; name it, or its id would be left empty"
        )
    if unknown := [special for special in specials if special not in by_content]:
        raise ValueError(
            f"prefix_cut: expected added tokens of this tokenizer in specials, got {unknown}; "
            f"choose from {list(by_content)}"
        )
    last = [by_content[special] for special in specials if by_content[special] not in first]
    return [*first, *({**token, "id": entries + place} for place, token in enumerate(last))]


def base_symbols(tokenizer: dict) -> set[str]:
    """The one-character tokens: in a byte-level BPE, the bytes that the tokenizer knows.

    Often fewer than 256: SmolLM2's training text never held some bytes, so it has no symbol for them.
    """
    return {token for token in tokenizer["model"]["vocab"] if len(token) == 1}
