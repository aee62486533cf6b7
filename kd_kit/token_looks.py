"""What both models say next at one place of a text, and how the two tokenizers cut it."""

from __future__ import annotations

import numbers
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_kit.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    LARGE,
    NORMAL,
    ORANGE,
    SKY,
    SMALL,
    VERMILION,
    new_figure,
    new_panel,
)
from kd_kit.head import body_of, head_of
from kd_kit.passes import as_in_evaluation
from kd_kit.readings import BridgeReading, Needs
from kd_kit.token_text import WindowTokens, drawable, readable, window_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PER_ROW = 60  # bytes of the alignment in one line: 15 pixels each
_KINDS = {"aligned": SKY, "inside": ORANGE, "untaught": FAINT, "": "white"}


def checked_window(where: str, trainer, window: int, *, teacher: bool = True) -> WindowTokens:
    """The tokens of a training window of a run at rest.

    Raises:
        ValueError: it is not there, the run trains, or has no teacher.
    """
    if trainer.running:
        raise ValueError(
            f"looks.{where}: expected a run at rest, got one that trains in the background; trainer.stop() and "
            "trainer.wait() first"
        )
    if teacher and trainer.teacher is None:
        raise ValueError(f"looks.{where}: expected a run with a teacher, got one without; pass it to build_trainer")
    windows = trainer.data.train
    whole = isinstance(window, numbers.Integral) and not isinstance(window, bool)
    if not whole or not 0 <= window < len(windows):
        raise ValueError(
            f"looks.{where}: expected a window of the training text, from 0 to {len(windows) - 1}, got {window!r}"
        )
    return window_tokens(windows, int(window))


# --- next tokens


def next_tokens(trainer, tokens: WindowTokens, position: int) -> tuple[Tensor, Tensor | None]:
    """Both models' distributions over the student's vocabulary at one position.

    Shapes:
        returns: student [V'] float32; teacher [V' + 1], the last what has no student token; None where it is not heard
    """
    device, row = trainer.session.device, torch.tensor([position])
    batch = tokens.batch
    with as_in_evaluation(trainer), torch.no_grad():
        hidden = body_of(trainer.student)(input_ids=batch.student_ids.to(device), use_cache=False).last_hidden_state
        logits = head_of(trainer.student).logits(hidden[0, position].unsqueeze(0))[0]
    size = trainer.data.pair.student_vocab.size
    # over what the tokenizer has: rows behind it stand for no token, but they take part in the sum
    student = torch.softmax(logits, dim=-1)[:size].cpu()
    place = (batch.taught_rows == position).nonzero().squeeze(-1)
    if not len(place):
        return student, None
    reading = next((r for r in trainer.module.needs.readings if isinstance(r, BridgeReading)), None)
    bridge = trainer.data.pair.bridge if reading is None else reading.bridge
    over = "taught" if tokens.kinds[position] == "inside" else "aligned"
    whole = BridgeReading("look", bridge, None, over=over)
    none = batch.taught_rows[:0]
    aligned = row if tokens.kinds[position] == "aligned" else none
    one = replace(batch, taught_rows=row, prefix=batch.prefix[place], aligned_rows=aligned, same_rows=none)
    cells = trainer.teacher.asked(Needs((whole,))).signal(one).cells[whole.key]
    teacher = torch.zeros(size + 1)
    teacher[cells.ids[0].cpu()] = cells.log_probs[0].exp().cpu()
    teacher[-1] = cells.tail[0].exp().cpu()
    return student, teacher


def distribution(trainer, position: int = 0, window: int = 0, token: int | None = None, top: int = 12) -> Figure:
    """Teacher against student: what each says comes next at one position, in the student's tokens.

    The tokens that either of them finds likeliest, the one that the text has, and everything else in one bar. At a
    position inside one of the teacher's tokens it is what the teacher says given the bytes read so far.

    Args:
        position: student position of the window, the document-start token being 0; it predicts the token after it.
        window: number of a training window.
        token: a student token to show in any case.
        top: how many tokens are shown.

    Raises:
        ValueError: a window, position or token that is not there; a run that trains, or has no teacher.
    """
    tokens = checked_window("distribution", trainer, window)
    last, vocab = len(tokens.student.ids) - 2, trainer.data.pair.student_vocab
    for name, value, most in (("position", position, last), ("token", token, vocab.size - 1)):
        if value is not None and not (isinstance(value, numbers.Integral) and 0 <= value <= most):
            raise ValueError(f"looks.distribution: expected a {name} from 0 to {most}, got {value!r}")
    if not 1 <= top <= 40:
        raise ValueError(f"looks.distribution: expected top= from 1 to 40, got {top!r}")
    student, teacher = next_tokens(trainer, tokens, position)
    follows = tokens.student.ids[position + 1]
    likely = student if teacher is None else torch.maximum(student, teacher[:-1])
    forced = [i for i in dict.fromkeys((follows, token)) if i is not None]
    chosen = [i for i in likely.topk(min(top, vocab.size)).indices.tolist() if i not in forced]
    chosen = [*chosen[: max(top - len(forced), 0)], *forced]
    by = student if teacher is None else teacher
    chosen.sort(key=lambda i: (-float(by[i]), -float(student[i])))

    height = 1.75 + 0.3 * (len(chosen) + 1)
    figure = new_figure(10, height)
    text = f"Window {window}, position {position}: what comes next?"
    figure.text(0.012, 1 - 0.26 / height, text, size=LARGE, weight="bold", color=INK)
    _write_before(figure, tokens, position, 1 - 0.58 / height)
    ax = new_panel(figure, (0.16, 0.5 / height, 0.56, 1 - 1.42 / height), "")
    ax.grid(False)
    rows = [(drawable(readable(vocab.tokens[i])) or f"id {i}", float(student[i]), by is teacher and float(teacher[i]))
            for i in chosen]  # fmt: skip
    rest = 1 - float(student[chosen].sum()), teacher is not None and float(teacher[[*chosen, vocab.size]].sum())
    rows.append(("everything else", rest[0], teacher is not None and 1 - rest[1] + float(teacher[-1])))
    for at, (_, ours, theirs) in enumerate(rows):
        bars = [(ours, 0.19, BLUE)] + ([] if theirs is False else [(theirs, -0.19, VERMILION)])
        for value, shift, colour in bars:
            value = max(value, 0.0)
            ax.barh(at + shift, 100 * value, 0.34, color=colour, lw=0)
            shown = "<0.1" if 0 < value < 0.0005 else f"{100 * value:.1f}"
            ax.text(100 * value, at + shift, f" {shown}", va="center", size=SMALL - 1, color=INK)
    ax.set_yticks(range(len(rows)), [name[:18] for name, *_ in rows], family="DejaVu Sans Mono")
    at = chosen.index(follows)
    ax.get_yticklabels()[at].set_weight("bold")
    ax.text(1.0, at, "← the text has this", transform=ax.get_yaxis_transform(), va="center", size=SMALL, color=INK)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 112 * max(max(s, t or 0.0) for _, s, t in rows) or 1)
    ax.set_xlabel("probability, %")
    ax.yaxis.set_label_coords(0, 0)
    _write_beside(figure, tokens, position, student, teacher, height)
    return figure


def _write_before(figure, tokens: WindowTokens, position: int, y: float) -> None:
    """The text before the position, as tokens, and the one that follows."""
    before = [drawable(readable(t)) for t in tokens.student.texts[: position + 1]]
    text = "".join(before)
    text = ("…" if len(text) > 78 else "") + text[-78:]
    follows = drawable(readable(tokens.student.texts[position + 1]))
    look = {"size": NORMAL, "family": "DejaVu Sans Mono", "va": "center", "parse_math": False}
    one = figure.text(0.012, y, text or "(start)", color=GREY, **look)
    width = one.get_window_extent().width / figure.bbox.width
    box = {"facecolor": "white", "edgecolor": INK, "lw": 0.8, "pad": 1.5}
    figure.text(0.016 + width, y, follows[:20], color=INK, weight="bold", bbox=box, **look)


def _write_beside(figure, tokens, position, student, teacher, height) -> None:
    """Which bar is whose, how far apart they are, and why a teacher may be missing."""
    from matplotlib.patches import Patch

    handles = [Patch(color=VERMILION, label="teacher"), Patch(color=BLUE, label="student")]
    figure.legend(handles=handles[teacher is None :], loc="upper left", bbox_to_anchor=(0.84, 1 - 0.8 / height),
                  fontsize=SMALL, frameon=False)  # fmt: skip
    kind = tokens.kinds[position]
    words = "the teacher is not heard\nhere: a run of white space,\na mark, or no target"
    if teacher is not None:
        alike = "aligned: both stand\nat the same byte"
        words = alike if kind == "aligned" else "inside a teacher token:\ngiven its first bytes"
    if teacher is not None:
        tiny = 1e-10
        apart = (teacher[:-1] * ((teacher[:-1] + tiny).log() - (student + tiny).log())).sum()
        words += f"\n\nKL(teacher || student)\n{float(apart):.2f} nats"
        words += f"\n\n{100 * float(teacher[-1]):.1f} % of what the\nteacher says has no\nstudent token"
    figure.text(0.845, 1 - 1.45 / height, words, size=SMALL, color=INK, va="top", linespacing=1.35)


# --- alignment


def alignment(trainer, window: int = 0, start: int = 0, length: int = 60, position: int | None = None) -> Figure:
    """A piece of text as both tokenizers cut it, one above the other over its bytes.

    A student token has the colour of the position that predicts it: aligned with the teacher, inside one of its tokens,
    or not taught. Lines through both rows are boundaries in common: spans lie between them.

    Args:
        window: number of a training window. start, length: bytes of it to show.
        position: a student position; the token that it predicts is framed.

    Raises:
        ValueError: a window, byte or position that is not there; a run that trains.
    """
    from matplotlib.patches import Patch, Rectangle

    tokens = checked_window("alignment", trainer, window, teacher=False)
    whole = all(isinstance(x, numbers.Integral) for x in (start, length))
    if not whole or not 0 <= start < tokens.bytes:
        raise ValueError(f"looks.alignment: expected start= from byte 0 to {tokens.bytes - 1}, got {start!r}")
    if not 1 <= length <= 6 * _PER_ROW:
        raise ValueError(f"looks.alignment: expected a length from 1 to {6 * _PER_ROW} bytes, got {length!r}")
    last = len(tokens.student.ids) - 2
    if position is not None and not (isinstance(position, numbers.Integral) and 0 <= position <= last):
        raise ValueError(f"looks.alignment: expected a position from 0 to {last}, got {position!r}")
    end = min(start + length, tokens.bytes)
    lines = _lines(tokens, int(start), end)
    height = 0.62 + 1.3 * len(lines)
    figure = new_figure(10, height)
    title = f"Window {window}, bytes {start} to {end}"
    figure.text(0.012, 1 - 0.26 / height, title, size=LARGE, weight="bold", color=INK)
    handles = [
        Patch(facecolor=SKY, label="aligned"),
        Patch(facecolor=ORANGE, label="inside a teacher token"),
        Patch(facecolor=FAINT, label="not taught"),
        Patch(facecolor="white", edgecolor=GREY, label="not predicted"),
    ]
    figure.legend(handles=handles, loc="upper right", ncols=4, fontsize=SMALL, frameon=False,
                  bbox_to_anchor=(0.99, 1 - 0.1 / height), borderaxespad=0, columnspacing=1.2)  # fmt: skip
    for number, (first, stop) in enumerate(lines):
        bottom = height - 0.55 - 1.3 * (number + 1) + 0.42
        ax = new_panel(figure, (0.075, bottom / height, 0.905, 0.84 / height), "")
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        ax.set(xlim=(first, first + _PER_ROW), ylim=(0, 2))
        ax.set_yticks([1.5, 0.5], ["student", "teacher"])
        ax.tick_params(axis="y", length=0)
        ax.spines["bottom"].set_bounds(first, stop)
        ax.set_xticks([b for b in range(0, tokens.bytes + 1, 10) if first <= b <= stop])
        for side, bottom_of in ((tokens.student, 1.08), (tokens.teacher, 0.1)):
            for i, (a, b) in enumerate(zip(side.starts, side.ends, strict=True)):
                if not (b > first and a < stop and b > a):
                    continue
                ours = side is tokens.student
                colour = _KINDS[tokens.kinds[i - 1] if i else ""] if ours else "white"
                chosen = ours and position is not None and i == position + 1
                left, right = max(a, first), min(b, stop)
                look = {"edgecolor": GREY, "lw": 0.7, "zorder": 2}
                if chosen:
                    look = {"edgecolor": INK, "lw": 2.4, "zorder": 6}
                box = Rectangle((left, bottom_of), right - left, 0.82, facecolor=colour, **look)
                box.set_gid(f"position {i - 1}" if chosen else None)
                ax.add_patch(box)
                _write_token(ax, drawable(readable(side.texts[i])), left, right, bottom_of + 0.41)
        for byte in tokens.common:
            if first <= byte <= stop:
                ax.plot([byte, byte], [0, 2], color=INK, lw=1.1, zorder=4, label="common boundary")
        ax.set_xlabel("byte of the window; lines through both rows: boundaries in common" if stop == end else "")
        ax.xaxis.set_label_coords(0.5, -0.28)
    return figure


def _lines(tokens: WindowTokens, start: int, end: int) -> list[tuple[int, int]]:
    """First and last byte of every line, broken where both tokenizers have a boundary if there is one."""
    lines = []
    while start < end:
        stop = min(start + _PER_ROW, end)
        if stop < end:
            stop = max([b for b in tokens.common if start < b <= stop], default=stop)
        lines.append((start, stop))
        start = stop
    return lines


def _write_token(ax, text: str, left: float, right: float, y: float) -> None:
    """Lengthwise where it fits, upright where that fits, cut otherwise."""
    pixels = ax.bbox.width / _PER_ROW * (right - left)
    fits, upright = int(pixels // 7.0), int(0.4 * ax.bbox.height // 7.0)
    turned = len(text) > fits and upright > fits
    room = upright if turned else max(fits, 1)
    text = text if len(text) <= room else text[: max(room - 1, 1)] + ("…" if room > 1 else "")
    ax.text((left + right) / 2, y, text, size=SMALL, color=INK, ha="center", va="center", family="DejaVu Sans Mono",
            rotation=90 if turned else 0, zorder=7, clip_on=True, parse_math=False)  # fmt: skip
