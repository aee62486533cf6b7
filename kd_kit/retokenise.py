"""Another tokenizer for a model: rows for its tokens, made of the rows of the old tokens that spell them.

A student of another vocabulary then starts from what it knows instead of from nothing: SmolLM2-135M with Qwen3's
151,669 tokens reads 5,000 bytes of a speech of 2025 at 1.49 bits per byte, with its own tokens at 1.24, with random
rows at 3.9 (`tests/real/test_missions.py` prints all three).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_kit.head import head_of
from kd_kit.spelling import read_vocabulary
from kd_kit.vocab import Vocabulary, homes_of


def retokenised(model, old_tokenizer, new_tokenizer, *, rows: int | None = None):
    """The model with embeddings and a head for another tokenizer; it is changed, and returned.

    The bytes of each new token are cut into old tokens by the byte-prefix table (the longest one first), and its row
    is the mean of theirs: the row itself where the old tokenizer has the same token, which most of a text is. A head of
    its own weights gets that mean, moved towards the mean of all rows, by 1/sqrt(n) for n old tokens: many long tokens
    begin with one old token, and would take its mass. Special tokens keep the row of the special token that is spelled
    alike; those without one, tokens without an old token and rows behind the tokenizer get the mean row.

    Args:
        model: a causal language model of transformers. old_tokenizer: its own. new_tokenizer: the one that it gets.
        rows: of the embedding, the entries of the tokenizer if left out; more where another model's padding is wanted
            (Qwen's is 151,936).

    Raises:
        ValueError: a tokenizer that cannot be read as bytes, an old one that is not the model's, or too few rows.

    Source: Gee et al. 2022, "Fast Vocabulary Transfer", section 3, https://arxiv.org/abs/2402.09977, with a
        segmentation by bytes; the step towards the mean is this kit's, and was measured
    """
    old, new = read_vocabulary(old_tokenizer, "the old one"), read_vocabulary(new_tokenizer, "the new one")
    had = head_of(model).weight.shape[0]
    if old.size > had:
        raise ValueError(
            f"retokenised: expected the model's own tokenizer as old_tokenizer, got one of {old.size:,} entries beside "
            f"{had:,} rows"
        )
    rows = new.size if rows is None else rows
    if rows < new.size:
        raise ValueError(f"retokenised: expected at least {new.size:,} rows, one per token, got rows={rows:,}")
    pieces = spelled_by(new, old)
    source, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    made = _means(source[: old.size].float().cpu(), pieces, rows)
    made_head = None if tied else _means(head.weight.detach()[: old.size].float().cpu(), pieces, rows, shrink=True)
    bias = getattr(head, "bias", None)
    made_bias = None if bias is None else _means(bias.detach()[: old.size, None].float().cpu(), pieces, rows)[:, 0]

    model.resize_token_embeddings(rows, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.padding_idx = None  # the old pad's number is another token's now, and would get no gradient
    with torch.no_grad():
        embedding.weight.copy_(made)
        if made_head is not None:
            head.weight.copy_(made_head)
        if made_bias is not None:
            head.bias.copy_(made_bias)
    name_specials(model.config.get_text_config(), new_tokenizer)
    if getattr(model, "generation_config", None) is not None:
        name_specials(model.generation_config, new_tokenizer)
        model.generation_config.pad_token_id = new.pad_id
    return model


def name_specials(config, tokenizer) -> None:
    """Write a tokenizer's start and end into a configuration, and no padding: a padding row would not be trained."""
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = None


def spelled_by(new: Vocabulary, old: Vocabulary) -> list[list[int]]:
    """For every token of ``new`` the tokens of ``old`` that spell it, longest first; none where there is none.

    A byte that no old token begins with is left out.
    """
    found: list[list[int]] = [[] for _ in range(new.size)]
    names = {old.tokens[i]: i for i in old.special}
    for i in new.special:
        found[i] = [names[new.tokens[i]]] if new.tokens[i] in names else []
    rest = {i: token for i, token in enumerate(new.tokens) if token and i not in new.special}
    while rest:
        homes = homes_of(list(rest.values()), old).tolist()
        after = {}
        for (i, token), home in zip(rest.items(), homes, strict=True):
            known = home < old.size
            if known:
                found[i].append(home)
            if left := token[len(old.tokens[home]) if known else 1 :]:
                after[i] = left
        rest = after
    return found


def _means(table: Tensor, pieces: Sequence[Sequence[int]], rows: int, *, shrink: bool = False) -> Tensor:
    """[rows, D]: the mean of the rows of ``table`` that each entry of ``pieces`` names, their overall mean for none."""
    overall = table.mean(0)
    counts = torch.tensor([len(some) for some in pieces])
    owners = torch.arange(len(pieces)).repeat_interleave(counts)
    flat = torch.tensor([i for some in pieces for i in some], dtype=torch.int64)
    out = overall.repeat(rows, 1)
    sums = torch.zeros(len(pieces), table.shape[1]).index_add_(0, owners, table[flat] - overall)
    out[: len(pieces)] += sums / counts.clamp(min=1).unsqueeze(1) ** (1.5 if shrink else 1.0)
    return out
