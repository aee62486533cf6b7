"""Plain language-model training of the embedded teacher, and the figure it is judged by.

One short loop: no early stopping and no choice among checkpoints, so the held-out text never picks weights.
Windows are cut at random places, so that the seven or so passes over the text differ.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def token_stream(tokenizer: Any, texts: Sequence[str], *, start: int) -> Tensor:
    """All texts as one row of ids, ``start`` before each text.

    Shapes:
        returns: [N], int64
    """
    ids: list[int] = []
    for text in texts:
        ids += [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids)


def random_windows(stream: Tensor, *, start: int, window: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Windows at random places of the stream, each begun with ``start`` in place of what came before.

    That token stands for "no context", as it does in front of every window that the distillation gives the
    teacher.

    Shapes:
        stream: [N]
        returns: [batch_size, window], int64
    """
    places = torch.randint(len(stream) - window + 1, (batch_size, 1), generator=generator)
    windows = stream[places + torch.arange(window)]
    windows[:, 0] = start
    return windows


def learning_rate_factor(step: int, *, steps: int, warm_up: int) -> float:
    """Share of the peak learning rate at a step: linear up, then half a cosine down to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(
    model: torch.nn.Module,
    stream: Tensor,
    *,
    start: int,
    steps: int,
    window: int = 256,
    batch_size: int = 4,
    peak: float = 3e-3,
    weight_decay: float = 0.3,
    warm_up: int = 200,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> None:
    """Train ``model`` in place with AdamW on random windows. The loss is its own, with the experts' balance.

    Args:
        stream: [N] ids, as ``token_stream`` makes them.
        start: the id put first in every window.
        peak: highest learning rate, reached after ``warm_up`` steps; down to 0 at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # norms: pulled to 0 they would only be slower
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps=steps, warm_up=min(warm_up, steps // 2))
    )
    model.train()
    running = 0.0
    for step in range(1, steps + 1):
        ids = random_windows(stream, start=start, window=window, batch_size=batch_size, generator=generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % 100 == 0 or step == steps:
            log(f"step {step:5d} of {steps}  loss {running / ((step - 1) % 100 + 1):.3f} nats per token")
            running = 0.0
    model.eval()


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], *, start: int, window: int = 256
) -> float:
    """Bits that the model needs per UTF-8 byte of the texts, read in neighbouring windows.

    Every token counts, the first of each window too, which has only ``start`` before it. A figure per byte
    can be compared across tokenizers, one per token cannot.
    """
    model.eval()
    nats, size = 0.0, 0
    for text in texts:
        size += len(text.encode("utf-8"))
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        for piece in ids.split(window - 1):
            row = torch.cat([torch.tensor([start]), piece])[None]
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, piece, reduction="sum").item()
    return nats / math.log(2) / size


@torch.no_grad()
def expert_shares(model: torch.nn.Module, tokenizer: Any, texts: Sequence[str], *, start: int) -> Tensor:
    """Share of the router's choices that each expert gets, per layer, in the first 1,000 tokens of each text.

    The model's own balance loss pools all layers: it is content with layers that each leave experts idle.

    Shapes:
        returns: [L, X], rows sum to 1
    """
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for text in texts:
        ids = torch.tensor([[start, *tokenizer(text, add_special_tokens=False)["input_ids"][:1000]]])
        rows = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        for layer, row in enumerate(rows):
            chosen = row.topk(model.config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
    return counts / counts.sum(-1, keepdim=True)
