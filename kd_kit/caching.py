"""Phase one of a run in two phases: the teacher reads the training text once, and what the terms need of it is kept.

Phase two then costs about what training without a teacher costs, and the teacher is away from the card.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kd_kit.cache import FORMAT, MANIFEST, PER_SHARD, Cache
from kd_kit.cached_teacher import CachedTeacher
from kd_kit.kaggle_place import attached, room
from kd_kit.session import StopRequests, check_writable, shown
from kd_kit.signal_pieces import counts_of, cut
from kd_kit.table import short, span
from kd_kit.teacher import LiveTeacher
from kd_kit.types import DistillBatch, TeacherSignal

_SAMPLE = 8
"""Windows that the size is forecast from, and that a finished cache is compared with the live teacher on."""

_LINES = 30.0
"""Seconds between two lines of progress."""

_SPARE = 8
"""Times the size of a checkpoint that stays free beside a cache: those that a run and its control keep."""


def build_cache(
    trainer, folder: str | os.PathLike | None = None, *, precision: str = "half", per_shard: int | None = None
) -> Cache:
    """Let the teacher read the training text once, keep what the run's terms need, and train from that.

    Worth it for a run of several epochs, or where teacher and student do not fit on the card together. May be called
    again at any time: it goes on after the last whole shard, also after a kill, and shards that an attached input holds
    are copied. When it is complete the trainer reads it instead of asking the teacher, whose weights leave the card.

    Args:
        trainer: whose data, teacher and terms it is for.
        folder: where it is kept; ``cache`` in the run's folder if left out.
        precision: "half" (float16, ids of two bytes where they fit) or "full" (float32).
        per_shard: windows of a shard; 256, fewer of a small text.

    Returns:
        the cache; ``complete`` is False where the session's time was over, or Interrupt was pressed, before its end.

    Raises:
        ValueError: the trainer trains, has no teacher, or a term needs what cannot be cached (attention); the folder
            holds a cache of something else; or the disk has no room for all of it.

    Source: for few targets per position, kept once and read many times, https://arxiv.org/abs/2503.16870
    """
    _refuse(trainer, precision, per_shard)
    teacher, windows = trainer.teacher, trainer.data.train
    live = LiveTeacher(teacher.model, teacher.bridge, trainer.module.needs, more_experts=teacher.more_experts)
    place = Path(folder) if folder is not None else trainer.session.folder / "cache"
    check_writable(place)
    per_shard = per_shard or min(PER_SHARD, max(16, len(windows) // 16))
    with trainer._locked(), StopRequests() as requests:
        with contextlib.ExitStack() as model:  # is fetched back to its card only if it is asked anything
            cache = _opened(place, trainer, live, precision, per_shard, lambda: model.enter_context(teacher.awake()))
            cache.clear_leftovers()
            if damaged := cache.drop_damaged():
                print(f"cache: damaged, deleted and made again: {', '.join(damaged)}")
            _take_attached(cache)
            if not cache.complete:
                model.enter_context(teacher.awake())
                _build(cache, trainer, live, requests)
            if cache.complete and cache.manifest["fidelity"] is None:
                model.enter_context(teacher.awake())
                cache.manifest["fidelity"] = _fidelity(cache, trainer, live)
                cache.write_manifest()
        if cache.complete and getattr(teacher, "cache", None) is not cache:
            _use(cache, trainer, live, teacher.home)
    return cache


def cache_report(folder: str | os.PathLike) -> Cache:
    """What a cache holds, how large it is per token, and how far its targets are from the live teacher's; prints well.

    Args:
        folder: of the cache, or of the run that it lies in.

    Raises:
        ValueError: no cache there.
    """
    inside = Path(folder) / "cache"
    return Cache.open(inside if (inside / MANIFEST).is_file() else folder)


# --- before -----------------------------------------------------------------------------------------------------------


def _refuse(trainer, precision: str, per_shard: int | None) -> None:
    if trainer.running:
        raise ValueError("build_cache: expected a trainer at rest, got one that trains; trainer.stop(), trainer.wait()")
    if trainer.teacher is None or not trainer.module.needs.teacher:
        raise ValueError(
            "build_cache: expected a run whose terms need a teacher, got one without; there is nothing to keep"
        )
    if precision not in ("half", "full"):
        raise ValueError(f"build_cache: expected precision 'half' or 'full', got {precision!r}")
    if per_shard is not None and (not isinstance(per_shard, int) or per_shard < 1):
        raise ValueError(f"build_cache: expected per_shard of at least 1, got {per_shard!r}")
    if trainer.module.needs.teacher_attention:
        names = [t.name for t in trainer.terms if t.needs.teacher_attention]
        raise ValueError(
            f"build_cache: expected terms that can be read from a cache, got {', '.join(names)}, which wants queries, "
            "keys and values of every position; leave it out, or train with the teacher beside the student"
        )


def content(trainer, live) -> dict[str, Any]:
    """Everything that decides what a cache holds, as plain JSON."""
    needs = live.needs
    return {
        "teacher": _teacher_digest(live.model),
        "more_experts": live.more_experts,
        "tokenizers": trainer.data.pair.fingerprint,
        "text": trainer.data.train.fingerprint,
        "readings": sorted(r.key for r in needs.readings),
        "row_states": needs.row_states,
        "span_log_probs": needs.span_log_probs,
        "states": sorted(needs.teacher_states),
        "routing": sorted(needs.routing),
        "routing_scores": needs.routing_scores,
        "kd_kit": metadata.version("kd_kit").split("+")[0],
    }


def _teacher_digest(model) -> str:
    digest, size = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        few = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + few)
        size += parameter.numel()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{type(model).__name__} of {size:,} parameters in {dtype}, {digest.hexdigest()[:12]}"


def _opened(place: Path, trainer, live, precision: str, per_shard: int, wake: Callable[[], object]) -> Cache:
    """The cache of this content in a folder; a new one, if there is none and the disk has room for it."""
    made_of = content(trainer, live)
    if (place / MANIFEST).exists():
        cache = Cache.open(place)
        _refuse_other(cache, made_of | {"precision": precision})
        return cache
    windows = trainer.data.train
    manifest = {
        "format": FORMAT,
        "made_of": made_of,
        "precision": precision,
        "ids": "uint16" if trainer.data.pair.student_vocab.size <= 2**16 else "int32",
        "windows": len(windows),
        "per_shard": per_shard,
        "tokens": sum(len(windows.ids(n)[0]) for n in range(len(windows))),
        "fidelity": None,
    }
    cache = Cache(place, manifest)
    wake()
    manifest["bytes_per_token"] = _forecast(cache, trainer, live)
    cache.write_manifest()
    return cache


def _refuse_other(cache: Cache, wanted: dict[str, Any]) -> None:
    held = cache.manifest["made_of"] | {"precision": cache.manifest["precision"]}
    other = [name for name in wanted if held.get(name) != wanted[name]]
    if other:
        shows = "; ".join(f"{name}: {_short(held.get(name))} there, {_short(wanted[name])} here" for name in other)
        raise ValueError(
            f"build_cache: expected a cache of this run's content in {str(cache.folder)!r}, got another one ({shows}); "
            "give another folder=, or delete that one"
            + (f", or pass precision={held['precision']!r}" if other == ["precision"] else "")
        )


def _short(value: Any) -> str:
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):  # a fingerprint
        return text[:12]
    return text if len(text) <= 70 else f"{text[:66]} ..."


def _forecast(cache: Cache, trainer, live) -> dict[str, float]:
    """Bytes per student token by what they are for, from a few windows; refuses what the disk has no room for."""
    chosen = _spread(len(trainer.data.train))
    sizes: dict[str, float] = {}
    for batch, signal in _signals(trainer, live, chosen):
        for name, rows in cut(signal, batch, live.needs).items():
            group = name.rsplit("/", 1)[0] if "/" in name else name
            size = sum(cache.stored(name, part).nbytes for part in rows)
            sizes[group] = sizes.get(group, 0) + size
    tokens = sum(len(trainer.data.train.ids(n)[0]) for n in chosen)
    each = {name: size / tokens for name, size in sizes.items()}
    size = int(sum(each.values()) * cache.manifest["tokens"])
    needed = size + _SPARE * trainer._state_bytes()
    free = room(cache.folder, shutil.disk_usage(cache.folder).free)
    print(
        f"cache: {cache.manifest['windows']:,} windows, {cache.manifest['tokens']:,} student tokens, about "
        f"{size / 1e6:,.1f} MB at {sum(each.values()):,.0f} bytes per token"
    )
    if needed > free:
        shows = ", ".join(f"{name} {size:,.0f}" for name, size in sorted(each.items(), key=lambda item: -item[1]))
        raise ValueError(
            f"build_cache: expected {needed / 1e9:,.2f} GB free in {str(cache.folder)!r}, of which checkpoints take "
            f"{(needed - size) / 1e9:,.2f}, got {free / 1e9:,.2f}; "
            "leave out what costs most, lower top_k=, read fewer documents, or give another folder=. Bytes per token: "
            f"{shows}"
        )
    return {name: round(size, 1) for name, size in each.items()}


def _take_attached(cache: Cache) -> None:
    """Shards of the same content that an input holds, as the output of an earlier session."""
    for folder in attached(MANIFEST):
        if cache.complete or folder.resolve() == cache.folder.resolve():
            continue
        with contextlib.suppress(ValueError):  # of another format: none of ours
            other = Cache.open(folder)
            wanted = cache.manifest["made_of"] | {key: cache.manifest[key] for key in ("precision", "per_shard")}
            held = other.manifest["made_of"] | {key: other.manifest[key] for key in ("precision", "per_shard")}
            if differs := [name for name in wanted if held.get(name) != wanted[name]]:
                print(f"cache: the one in {folder} has another content ({', '.join(differs)}) and is not used")
            elif taken := cache.take_from(other):
                print(f"cache: {taken:,} shards copied from {folder}")
                cache.manifest["fidelity"] = cache.manifest["fidelity"] or other.manifest.get("fidelity")
                cache.write_manifest()


# --- the work ---------------------------------------------------------------------------------------------------------


def _build(cache: Cache, trainer, live, requests: StopRequests) -> None:
    """Make the missing shards, one after the other, for as long as the session lasts."""
    session, longest, done = trainer.session, 0.0, 0
    begun = told = session.now()
    todo = cache.missing
    whole = sum(len(cache.windows_of(number)) for number in todo)
    for number in todo:
        if requests.reason is not None:
            print(f"cache: {requests.reason}; {len(cache.shards):,} of {cache.count:,} shards are there, call it again")
            return
        if session.remaining() < 1.5 * longest + trainer._margin():
            print(
                f"cache: the session's time is nearly over; {len(cache.shards):,} of {cache.count:,} shards are there. "
                "Run the notebook again, with this output as its input"
            )
            return
        started = session.now()
        inside = list(cache.windows_of(number))
        pieces: dict[str, list] = {}
        counts: dict[str, list[int]] = {}
        found: dict[int, tuple[dict, dict]] = {}
        for batch, signal in _signals(trainer, live, inside):
            parts, each = cut(signal, batch, live.needs), counts_of(batch)
            for row, window in enumerate(batch.sample.tolist()):
                of_window = {name: cache.stored(name, rows[row]) for name, rows in parts.items()}
                found[window] = of_window, {kind: int(n[row]) for kind, n in each.items()}
        for window in inside:
            for name, rows in found[window][0].items():
                pieces.setdefault(name, []).append(rows)
            for kind, n in found[window][1].items():
                counts.setdefault(kind, []).append(n)
        cache.write(number, pieces, counts)
        done += len(inside)
        longest = max(longest, session.now() - started)
        if session.now() - told > _LINES or number == todo[-1]:
            told = session.now()
            pace = (told - begun) / done
            print(
                f"cache: {len(cache.shards):,} of {cache.count:,} shards, {short(1 / pace)} windows/s, about "
                f"{span(pace * (whole - done))} to go"
            )


def _signals(trainer, live, windows: list[int]) -> Iterator[tuple[DistillBatch, TeacherSignal]]:
    """Batches of these windows, those of like length together so that little is padded, with the teacher's signal."""
    data = trainer.data.train
    size = data.table[windows, 3] - data.table[windows, 1]
    order = [window for _, window in sorted(zip(size.tolist(), windows, strict=True))]
    at = 0
    while at < len(order):

        def work(at=at):
            batch = data.collate(order[at : at + data.fitting(order[at:], trainer.micro_batch)])
            return batch, live.signal(batch.to(live.device)).to("cpu")

        batch, signal = trainer.within_memory(work, "teacher cache")
        at += len(batch.sample)
        yield batch, signal


def _spread(count: int) -> list[int]:
    """A few windows, evenly over all of them."""
    return sorted({round(n) for n in torch.linspace(0, count - 1, min(_SAMPLE, count)).tolist()})


# --- after ------------------------------------------------------------------------------------------------------------


def _fidelity(cache: Cache, trainer, live) -> dict[str, str]:
    """How far the stored targets are from what the live teacher says, on a few windows, in words."""
    sums: dict[str, list[float]] = {}
    cached = CachedTeacher(live, cache, trainer.data.train, home=live.device)
    for batch, truth in _signals(trainer, live, _spread(len(trainer.data.train))):
        told = cached.signal(batch)
        for key, cells in truth.cells.items():
            sums.setdefault(f"KL in nats, {key}", []).append(_divergence(cells, told.cells[key]))
        for layer, states in truth.states.items():
            gap = 1 - torch.cosine_similarity(states, told.states[layer], dim=-1)
            sums.setdefault(f"1 - cos, states of layer {layer}", []).append(float(gap.clamp(min=0).mean()))
    return {name: f"{sum(values) / len(values):.1e}" for name, values in sums.items()}


def _divergence(truth, told) -> float:
    """Mean KL(live || stored) over cells and tail, the stored ones renormalised, in nats per position."""
    ours = torch.cat([truth.log_probs, truth.tail[:, None]], dim=-1).double()
    theirs = torch.cat([told.log_probs, told.tail[:, None]], dim=-1).double()
    theirs = theirs - theirs.logsumexp(-1, keepdim=True)
    terms = ours.exp() * (ours - theirs)
    return float(torch.where(ours.isfinite() & (ours.exp() > 0), terms, 0.0).sum(-1).mean())


def _use(cache: Cache, trainer, live, home: torch.device) -> None:
    """Let a trainer read the cache from here on."""
    trainer.teacher = CachedTeacher(live, cache, trainer.data.train, home=home)
    trainer.teacher.rest()
    trainer.floor_seconds = None  # was measured with the teacher's part of a step
    trainer.history.append(
        {
            "kind": "event",
            "step": trainer.step,
            "what": "cache",
            "text": f"the teacher's knowledge is read from {shown(cache.folder)}",
        }
    )
