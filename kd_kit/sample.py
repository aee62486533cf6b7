"""What models write: continuations of one prompt, side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kd_kit.head import alone_with
from kd_kit.likelihood import evaluating
from kd_kit.spelling import read_vocabulary


@dataclass(frozen=True)
class Continuations:
    """A prompt and what each model made of it."""

    prompt: str
    texts: dict[str, str]

    def __repr__(self) -> str:
        return "\n\n".join([f"prompt: {self.prompt}", *(f"{name}:\n  {text}" for name, text in self.texts.items())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left;vertical-align:top;white-space:nowrap'>{html.escape(name)}</th>"
            f"<td style='text-align:left'><b>{html.escape(self.prompt)}</b>{html.escape(text)}</td></tr>"
            for name, text in self.texts.items()
        )
        return f"<table>{rows}</table>"


def compare_text(
    models: Mapping[str, tuple],
    prompt: str,
    *,
    tokens: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
) -> Continuations:
    """Continue one prompt with several models, each drawing with the same seed.

    Args:
        models: {name: (model, tokenizer)}.
        tokens: new tokens of each. temperature: 0 takes the most likely token every time.

    Raises:
        ValueError: an empty prompt.
    """
    if not prompt:
        raise ValueError("compare_text: expected a prompt, got an empty one; give the models a few words")
    texts = {}
    for name, (model, tokenizer) in models.items():
        vocab = read_vocabulary(tokenizer, name)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = [] if vocab.start_id is None else [vocab.start_id]
        device = next(model.parameters()).device
        given = torch.tensor([start + ids], device=device)
        draw = {"do_sample": temperature > 0}
        if temperature > 0:
            draw |= {"temperature": temperature, "top_p": 0.95}
        with alone_with(model), evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=tokens,
                pad_token_id=vocab.pad_id,
                **draw,
            )
        texts[name] = vocab.bytes_of(out[0, given.shape[1] :].tolist()).decode(errors="replace")
    return Continuations(prompt, texts)
