"""What models write: continuations of one prompt, side by side."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch

from kd_kit.head import alone_with
from kd_kit.likelihood import evaluating
from kd_kit.spelling import read_vocabulary

_WIDTH, _NARROWEST = 120, 26  # characters of a printed comparison, and of one of its columns at least


@dataclass(frozen=True)
class Continuations:
    """A prompt and what each model made of it; printed in columns, shown as a table in a notebook."""

    prompt: str
    texts: dict[str, str]

    def __repr__(self) -> str:
        most = max(1, (_WIDTH + 3) // (_NARROWEST + 3))
        names = list(self.texts)
        bands = [self._columns(names[i : i + most]) for i in range(0, len(names), most)]
        return "\n\n".join([f"prompt: {self.prompt}", *bands])

    def _columns(self, names: list[str]) -> str:
        """These models beside each other, as text."""
        width = (_WIDTH + 3) // len(names) - 3
        columns = [[*textwrap.wrap(name, width), "-" * width, *_lines(f"…{self.texts[name]}", width)] for name in names]
        return "\n".join(
            " | ".join(cell.ljust(width) for cell in row).rstrip() for row in zip_longest(*columns, fillvalue="")
        )

    def _repr_html_(self) -> str:
        cell = f"text-align:left;vertical-align:top;white-space:pre-wrap;width:{100 / max(1, len(self.texts)):.0f}%"
        names = "".join(f'<th style="{cell}">{html.escape(name)}</th>' for name in self.texts)
        texts = "".join(f'<td style="{cell}">…{html.escape(text)}</td>' for text in self.texts.values())
        return (
            f'<div><div style="white-space:pre-wrap"><b>{html.escape(self.prompt)}</b></div>'
            f'<table style="width:100%;table-layout:fixed"><thead><tr>{names}</tr></thead>'
            f"<tbody><tr>{texts}</tr></tbody></table></div>"
        )


def _lines(text: str, width: int) -> list[str]:
    """A text cut into lines of so many characters at most; its own line ends stay."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, width) or [""]]


def compare_text(
    models: Mapping[str, tuple],
    prompt: str,
    *,
    tokens: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
) -> Continuations:
    """Continue one prompt with several models, each drawing with the same seed and by the same rules.

    The rules are these arguments, and the most likely tokens that make up 95% of the mass. What a model's own
    generation settings say besides (a penalty for repetition, another top-k) is left out, or the models could not be
    compared. A model that ends its text stops there.

    Args:
        models: {name: (model, tokenizer)}.
        tokens: new tokens of each. temperature: 0 takes the most likely token every time.

    Raises:
        ValueError: an empty prompt, models of another form, or more tokens than a model has places for.
    """
    if not prompt:
        raise ValueError("compare_text: expected a prompt, got an empty one; give the models a few words")
    if tokens < 1 or not temperature >= 0:
        raise ValueError(
            f"compare_text: expected tokens of at least 1 and a temperature of at least 0, got {tokens} and "
            f"{temperature}"
        )
    pairs = models.items() if isinstance(models, Mapping) else ()
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for _, pair in pairs):
        raise ValueError(
            f"compare_text: expected models as {{name: (model, tokenizer)}}, got {type(models).__name__}; "
            "kd.compare_text({'distilled': (trainer.student, tokenizers.student)}, \"Anne had been\")"
        )
    return Continuations(
        prompt, {name: _continued(name, *pair, prompt, tokens, temperature, seed) for name, pair in pairs}
    )


def _continued(name: str, model, tokenizer, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """What one model makes of the prompt."""
    vocab = read_vocabulary(tokenizer, name)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = [] if vocab.start_id is None else [vocab.start_id]
    device = next(model.parameters()).device
    given = torch.tensor([start + ids], device=device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and given.shape[1] + tokens > context:
        raise ValueError(
            f"compare_text: expected a prompt and new tokens within {name}'s context of {context} tokens, got "
            f"{given.shape[1]} and {tokens}; lower tokens=, or shorten the prompt"
        )
    draw = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        draw = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "top_k": 0}
    with alone_with(model), evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            min_new_tokens=None,
            pad_token_id=vocab.pad_id,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            **draw,
        )
    return vocab.bytes_of(out[0, given.shape[1] :].tolist()).decode(errors="replace")
