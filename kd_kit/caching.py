"""Phase one of a run in two phases: the teacher reads the training text once, and what the terms need of it is kept.

Several processes may make one cache: each claims a missing shard, makes it, and looks for the next. A shard holds the
same windows in the same batches whoever makes it, so the result does not depend on who did. Phase two then costs about
what training without a teacher costs, and the teacher is away from the card.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kd_kit.cache import FORMAT, MANIFEST, PER_SHARD, Cache, ids_type
from kd_kit.cache_fidelity import Fidelity
from kd_kit.cached_teacher import CachedTeacher, unserved
from kd_kit.kaggle_place import attached, room
from kd_kit.session import StopRequests, check_writable, shown
from kd_kit.shard_claims import Claims
from kd_kit.signal_pieces import counts_of, cut
from kd_kit.table import short, span
from kd_kit.teacher import LiveTeacher
from kd_kit.types import DistillBatch, TeacherSignal

_SAMPLE = 8
"""Windows that the size is forecast from, and that a finished cache is compared with the live teacher on."""

_LINES = 30.0
"""Seconds between two lines of progress."""

_PAUSE = 0.5
"""Seconds between two looks at what other processes are making."""

_SPARE = 8
"""Times the size of a checkpoint that stays free beside a cache: those that a run and its control keep."""


def build_cache(
    trainer, folder: str | os.PathLike | None = None, *, precision: str = "half", per_shard: int | None = None
) -> Cache:
    """Let the teacher read the training text once, keep what the run's terms need, and train from that.

    Worth it for a run of several epochs, or where teacher and student do not fit on the card together. May be called
    again at any time: it goes on after the last whole shard, also after a kill, and shards that an attached input holds
    are copied. When it is complete the trainer reads it instead of asking the teacher, whose weights leave the card.

    Several processes share the work: they take shards in turn, and each returns when all is there. Those of one run
    (``accelerate launch --num_processes 2 script.py``, on one machine or with a folder that all machines see) as well
    as programs that give one ``folder``, each with a trainer of a run of its own and the same batch size, where the
    shards of one that was killed are taken over by the others.

    A finished cache is compared with the live teacher on a few windows, see :mod:`kd_kit.cache_fidelity`: how far what
    is read back is from what a live run would train on now, and by K, what fewer cells would leave unsaid.

    Args:
        trainer: whose data, teacher and terms it is for.
        folder: where it is kept; ``cache`` in the run's folder if left out.
        precision: "half" (float16, ids of two bytes where they fit) or "full" (float32).
        per_shard: windows of a shard of a new cache; 256, fewer of a small text.

    Returns:
        the cache; ``complete`` is False where the session's time was over, or Interrupt was pressed, before its end.

    Raises:
        ValueError: the trainer trains, has no teacher, or a term needs what cannot be cached (attention); the folder
            holds a cache of something else; or the disk has no room for all of it.

    Source: for few targets per position, kept once and read many times, https://arxiv.org/abs/2503.16870
    """
    _refuse(trainer, precision, per_shard)
    say = trainer.processes.say
    teacher, windows = trainer.teacher, trainer.data.train
    live = LiveTeacher(teacher.model, teacher.bridge, trainer.module.needs, more_experts=teacher.more_experts)
    place = Path(folder) if folder is not None else trainer.session.folder / "cache"
    check_writable(place)
    per_shard = per_shard or min(PER_SHARD, max(16, len(windows) // 16))
    with trainer._locked(), StopRequests(quiet=not trainer.processes.leads) as requests, Claims(place) as claims:
        with contextlib.ExitStack() as model:  # is fetched back to its card only if it is asked anything

            def wake() -> None:
                model.enter_context(teacher.awake())

            def opened() -> Cache:
                with claims.folder():  # of several that begin a cache at once, one does
                    return _opened(place, trainer, live, precision, per_shard, wake)

            # of several processes of a run the first one begins it: what it says, or refuses, is said once
            first: list[Cache] = []
            trainer.processes.led(f"build_cache of {trainer.session.name}", lambda: first.append(opened()))
            cache = first[0] if first else opened()
            cache.clear_leftovers(claims)
            if not claims.certain:
                say(f"cache: no locks in {shown(place)}: let one process at a time work on this cache")
            if damaged := cache.drop_damaged(claims):
                say(f"cache: damaged, deleted and made again: {', '.join(damaged)}")
            _take_attached(cache, claims, say)
            if not cache.complete:
                wake()
                _build(cache, claims, trainer, live, requests)
            if cache.complete:
                with claims.folder():
                    if cache.said_again()["fidelity"] is None:
                        wake()
                        cache.manifest["fidelity"] = _fidelity(cache, trainer, live)
                        cache.write_manifest()
                cache.clear_leftovers(claims)  # of processes that died since
        # all processes of a run train from it, or none does
        complete = all(trainer.processes.gather(cache.complete))
        if complete and getattr(teacher, "cache", None) is not cache:
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
        _refuse_other(cache, made_of | {"precision": precision}, trainer.terms)
        return cache
    windows = trainer.data.train
    manifest = {
        "format": FORMAT,
        "made_of": made_of,
        "precision": precision,
        "ids": ids_type(trainer.data.pair.student_vocab.size),
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


def _refuse_other(cache: Cache, wanted: dict[str, Any], terms) -> None:
    held = cache.manifest["made_of"] | {"precision": cache.manifest["precision"]}
    other = [name for name in wanted if held.get(name) != wanted[name]]
    if other:
        shows = "; ".join(f"{name}: {_short(held.get(name))} there, {_short(wanted[name])} here" for name in other)
        if wants := unserved(held, terms):
            shows += f"; not there for {wants}"
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


def _take_attached(cache: Cache, claims: Claims, say: Callable[[str], None]) -> None:
    """Shards of the same content that an input holds, as the output of an earlier session."""
    for folder in attached(MANIFEST):
        if cache.complete or folder.resolve() == cache.folder.resolve():
            continue
        with contextlib.suppress(ValueError):  # of another format: none of ours
            other = Cache.open(folder)
            wanted = cache.manifest["made_of"] | {key: cache.manifest[key] for key in ("precision", "per_shard")}
            held = other.manifest["made_of"] | {key: other.manifest[key] for key in ("precision", "per_shard")}
            if differs := [name for name in wanted if held.get(name) != wanted[name]]:
                say(f"cache: the one in {folder} has another content ({', '.join(differs)}) and is not used")
            elif taken := cache.take_from(other, claims):
                print(f"cache: {taken:,} shards copied from {folder}")
                with claims.folder():
                    if cache.said_again()["fidelity"] is None:
                        cache.manifest["fidelity"] = other.manifest["fidelity"]
                        cache.write_manifest()


# --- the work ---------------------------------------------------------------------------------------------------------


def _build(cache: Cache, claims: Claims, trainer, live, requests: StopRequests) -> None:
    """Make missing shards until all are there, whoever makes them, or the session is over."""
    session, longest = trainer.session, 0.0
    begun = told = session.now()
    before = cache.windows_there

    def over() -> str | None:
        if requests.reason is not None:
            return f"{requests.reason}; {len(cache.shards):,} of {cache.count:,} shards are there, call it again"
        if session.remaining() < 1.5 * longest + trainer._margin():
            return (
                f"the session's time is nearly over; {len(cache.shards):,} of {cache.count:,} shards are there. "
                "Run the notebook again, with this output as its input"
            )
        return None

    for number in _claimed(cache, claims, over):
        if number is not None:
            started = session.now()
            cache.write(number, *_shard(cache, trainer, live, list(cache.windows_of(number))))
            longest = max(longest, session.now() - started)
        if session.now() - told > _LINES and not cache.complete:
            told = session.now()
            done = cache.windows_there - before  # by all processes
            pace = f"{short(done / (told - begun))} windows/s"
            to_go = (told - begun) * (cache.manifest["windows"] - cache.windows_there) / max(done, 1)
            waits = ", waiting for those that other processes make" if number is None else ""
            trainer.processes.say(
                f"cache: {len(cache.shards):,} of {cache.count:,} shards, {pace}, "
                + (f"about {span(to_go)} to go{waits}" if done else f"none of them new{waits}")
            )
    if not cache.complete:
        trainer.processes.say(f"cache: {over()}")
    elif done := cache.windows_there - before:
        trainer.processes.say(
            f"cache: {done:,} windows read in {span(session.now() - begun)}, by all processes that build it"
        )


def _claimed(cache: Cache, claims: Claims, over: Callable[[], str | None]) -> Iterator[int | None]:
    """One missing shard after the other, this process's alone for its turn; None where others have all that are left.

    Those of a process that dies are free again. Ends when none is missing, or it is ``over``.
    """
    while True:
        cache.look()
        waits = True
        for number in cache.missing:
            if over():
                return
            with claims.shard(number) as mine:
                if not mine:
                    continue
                cache.look()  # it may have been made between the look and the claim
                waits = False
                if number not in cache.shards:
                    yield number
        if cache.complete:
            return
        if waits:
            if over():
                return
            time.sleep(_PAUSE)
            cache.look()
            yield None


def _shard(cache: Cache, trainer, live, windows: list[int]) -> tuple[dict[str, list], dict[str, list[int]]]:
    """What :meth:`Cache.write` wants of these windows."""
    pieces: dict[str, list] = {}
    counts: dict[str, list[int]] = {}
    found: dict[int, tuple[dict, dict]] = {}
    for batch, signal in _signals(trainer, live, windows, packed=cache.manifest["precision"] != "full"):
        parts, each = cut(signal, batch, live.needs), counts_of(batch)
        for row, window in enumerate(batch.sample.tolist()):
            of_window = {name: cache.stored(name, rows[row]) for name, rows in parts.items()}
            found[window] = of_window, {kind: int(n[row]) for kind, n in each.items()}
    for window in windows:
        for name, rows in found[window][0].items():
            pieces.setdefault(name, []).append(rows)
        for kind, n in found[window][1].items():
            counts.setdefault(kind, []).append(n)
    return pieces, counts


def _signals(trainer, live, windows: list[int], *, packed: bool = True) -> Iterator[tuple[DistillBatch, TeacherSignal]]:
    """Batches of these windows, those of like length together so that little is padded, with the teacher's signal.

    Args:
        packed: as many windows in a batch as its places hold, and not only as many as its rows.
    """
    data = trainer.data.train
    size = data.table[windows, 3] - data.table[windows, 1]
    order = [window for _, window in sorted(zip(size.tolist(), windows, strict=True))]
    at = 0
    while at < len(order):

        def work(at=at):
            # in full precision as many windows as a live run reads at once: the teacher's sums depend on that
            count = data.fitting(order[at:], trainer.micro_batch) if packed else trainer.micro_batch
            batch = data.collate(order[at : at + count])
            return batch, live.signal(batch.to(live.device)).to("cpu")

        batch, signal = trainer.within_memory(work, "teacher cache")
        at += len(batch.sample)
        yield batch, signal


def _spread(count: int) -> list[int]:
    """A few windows, evenly over all of them."""
    return sorted({round(n) for n in torch.linspace(0, count - 1, min(_SAMPLE, count)).tolist()})


# --- after ------------------------------------------------------------------------------------------------------------


def _fidelity(cache: Cache, trainer, live) -> dict[str, Any]:
    """How far the stored targets are from what the live teacher says, on a few windows."""
    fidelity = Fidelity(live)
    cached = CachedTeacher(live, cache, trainer.data.train, home=live.device)
    for batch, truth in _signals(trainer, fidelity.teacher, _spread(len(trainer.data.train))):
        fidelity.add(batch, truth, cached.signal(batch))
    return fidelity.found


def _use(cache: Cache, trainer, live, home: torch.device) -> None:
    """Let a trainer read the cache from here on."""
    trainer.teacher = CachedTeacher(live, cache, trainer.data.train, home=home)
    trainer.teacher.rest()
    trainer.floor_seconds = None  # was measured with the teacher's part of a step
    trainer.processes.say(
        f"cache: complete, {cache.manifest['windows']:,} windows in {shown(cache.folder)}; steps read it, and the "
        "teacher is asked for evaluation only"
    )
    trainer.history.append(
        {
            "kind": "event",
            "step": trainer.step,
            "what": "cache",
            "text": f"the teacher's knowledge is read from {shown(cache.folder)}",
        }
    )
