"""The body of a model over a batch, with short windows side by side in its rows where that saves places.

Each window counts its positions from 0. transformers takes that for several texts in one row and lets none of them
attend to another, where a model builds its mask with ``masking_utils`` and nothing but attention looks back. Whether a
model does is not asked but measured, once. What comes out stands where the windows stand: nothing downstream changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from kd_kit.head import alone_with, body_of
from kd_kit.modes import modes_kept

Back = Callable[[Tensor], Tensor]
"""[R, L, ...] of packed rows to [B, T, ...] of windows, 0 at padding; [B, T, ...] stays what it is."""

_LEAK = 0.1
"""Of the difference that a window's neighbour makes when it is read, how much may be seen when it must not be."""

_APART: weakref.WeakKeyDictionary[nn.Module, dict[str, str | None]] = weakref.WeakKeyDictionary()


def run_body(model: nn.Module, ids: Tensor, packed: Tensor) -> tuple[Tensor, Back]:
    """The final hidden states of the windows of a batch, in the rows that the model saw, and the way back.

    Args:
        packed: ``DistillBatch.student_packed`` or ``teacher_packed``. Without any place in it, or with a model that
            does not keep windows apart, the rows are the padded windows.

    Shapes:
        ids: [B, T] int64
        packed: [R, L] int64
        returns: [R, L, D] or [B, T, D]
    """
    body = body_of(model)
    if not packed.numel() or why_not_packed(model, packed.shape[1]) is not None:
        return body(input_ids=ids, use_cache=False).last_hidden_state, _unchanged
    taken = packed.clamp(min=0)  # where nothing stands, a text of one token that nobody reads
    rows = body(input_ids=ids.flatten()[taken], position_ids=taken % ids.shape[1], use_cache=False)
    return rows.last_hidden_state, partial(_back, packed, tuple(ids.shape))


def hidden_states(model: nn.Module, ids: Tensor, packed: Tensor) -> Tensor:
    """[B, T, D], the final hidden states of the windows of a batch; see :func:`run_body`."""
    hidden, back = run_body(model, ids, packed)
    return back(hidden)


def _unchanged(states: Tensor) -> Tensor:
    return states


def _back(packed: Tensor, shape: tuple[int, int], states: Tensor) -> Tensor:
    places = shape[0] * shape[1]
    # one row more, for what stands nowhere: no mask, and so no count that the device must be waited for
    to = torch.where(packed < 0, places, packed).flatten()
    out = states.new_zeros(places + 1, *states.shape[2:]).index_copy(0, to, states.flatten(0, 1))
    return out[:-1].unflatten(0, shape)


def why_not_packed(model: nn.Module, width: int = 0) -> str | None:
    """Why windows cannot stand side by side in rows of this model, in words; None where they can.

    Measured once per model and kind of attention, on four made-up windows: side by side each must give what it gives
    alone, within the rounding of the model's dtype and far less than what reading its neighbour would change.

    Args:
        width: of the rows. Attention in chunks counts them from the beginning of a row.
    """
    config = model.config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and width > chunk:
        return f"it attends in chunks of {chunk} tokens"
    known = _APART.setdefault(model, {})
    kind = str(getattr(config, "_attn_implementation", None))
    if kind not in known:
        with alone_with(model), modes_kept(model):
            model.eval()
            known[kind] = _measure(model)
    return known[kind]


def _measure(model: nn.Module) -> str | None:
    body, table = body_of(model), model.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    first, second, third, fourth, other = (
        torch.randint(table.shape[0], (n,), generator=draw).to(table.device) for n in (5, 7, 4, 6, 5)
    )

    def run(*rows: list[Tensor], apart: bool = True) -> list[Tensor]:
        """The states of all windows, each row some of them side by side and then padding."""
        length = max(sum(map(len, row)) for row in rows)
        ids, positions = torch.zeros(2, len(rows), length, dtype=torch.long, device=table.device)
        spots = []
        for number, row in enumerate(rows):
            at = 0
            for window in row:
                ids[number, at : at + len(window)] = window
                positions[number, at : at + len(window)] = torch.arange(len(window))
                spots.append((number, slice(at, at + len(window))))
                at += len(window)
        given = {"position_ids": positions} if apart else {}
        hidden = body(input_ids=ids, use_cache=False, **given).last_hidden_state
        return [hidden[spot] for spot in spots]

    with torch.no_grad(), torch.autocast(table.device.type, enabled=False):
        alone = run([first], [second], [third], [fourth], apart=False)
        read = run([first, second], apart=False)
        try:
            packed = run([first, second], [third, fourth])
            changed = run([other, second], [third, fourth])
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            return f"it takes no positions ({type(error).__name__})"
    rounding = torch.finfo(alone[0].dtype).eps ** 0.5
    neighbour = _difference(read[1], alone[1])
    found = max(*map(_difference, packed, alone), *map(_difference, changed[1:], packed[1:]))
    if found <= min(rounding, _LEAK * neighbour):
        return None
    return f"windows side by side differ by {found:.1g} from each alone"


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative, of two states of a window."""
    one, other = one.float(), other.float()
    return float((one - other).norm() / other.norm().clamp(min=1e-30))
