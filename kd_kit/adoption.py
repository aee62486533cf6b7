"""Bring a checkpoint that lies elsewhere into the run folder, so that the run goes on as if it had always been there.

Everything is copied, hashed and forced onto the disk in ``ckpt/.tmp-adopt-<pid>/`` first. Then one rename gives the
checkpoint its name; what is left to do from there on are renames out of that folder, RUN.json last. A process that
dies before the first rename has changed nothing; one that dies later left all that :func:`finish_adoption` needs.

    <run>/ckpt/.tmp-adopt-123/
        PLAN.json            its step, and which files of an earlier run go
        checkpoint/          gone once it has its name
        metrics.jsonl  initial.safetensors  best.safetensors  RUN.json       where they are brought
        control/             the same once more, for the LM-only control inside the run
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from kd_kit.checkpoint import crash_point, held, settle, sync_folder, write_file
from kd_kit.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    Refusal,
    StoredFile,
    checkpoint_root,
    free_path,
    inspect_checkpoint,
    read_json,
    step_folders,
)
from kd_kit.kaggle_place import room
from kd_kit.metrics_copy import METRICS, append_records, keep_readable_lines, write_evaluations

RUN = "RUN.json"
START, BEST = "initial.safetensors", "best.safetensors"
CONTROL = "control"

_PLAN = "PLAN.json"
_CHECKPOINT = "checkpoint"  # its folder while it is staged
_STAGING = ".tmp-adopt-"
_BESIDE = (METRICS, START, BEST)
_METRICS_LIMIT = 2**30  # bytes; a larger metrics.jsonl is left where it is
_SPARE_BYTES = 2**20  # for manifests and what folders cost
_BLOCK = 2**22


class StoredRun(NamedTuple):
    """What RUN.json says; ``name`` is None where it says none."""

    run_id: str
    name: str | None
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A checkpoint elsewhere that a run can go on from.

    Attributes:
        info: the checkpoint.
        folder: the run folder that it lies in; None for a bare checkpoint.
        config: of its run.
        owned: it lies in the run folder's own file system and may be moved instead of copied.
    """

    info: CheckpointInfo
    folder: Path | None
    config: Mapping[str, Any]
    owned: bool = False


def stored_run(folder: Path) -> StoredRun | None:
    """What a run folder says it is; None where it does not say it, or not so that it can be read."""
    try:
        return run_of(read_json(folder / RUN))
    except OSError:
        return None


def run_of(content: Mapping[str, Any]) -> StoredRun | None:
    """The run that a JSON object describes; None where it describes none."""
    run_id, name, config = content.get("run_id"), content.get("name"), content.get("config")
    if not isinstance(run_id, str) or not isinstance(config, dict) or not isinstance(name, str | None):
        return None
    return StoredRun(run_id, name, config)


def adopt(folder: Path, name: str, source: Source) -> tuple[Path, list[Refusal]]:
    """Bring a checkpoint, and what lies beside it in its run folder, into ``folder``; the source is only read.

    Where ``folder`` holds the same run, its RUN.json and its start stay. Where it holds another, that one's files go.
    To be called by whoever holds the run's lock.

    Returns:
        the checkpoint's folder there, and what was left behind because it cannot be used.

    Raises:
        DamagedCheckpoint: the source is not what its manifest says; ``folder`` is as it was.
        CheckpointError: the source cannot be read; ``folder`` is as it was.
        OSError: the run folder does not take it (``errno`` is ENOSPC where there is no room).
    """
    root = checkpoint_root(folder)
    root.mkdir(parents=True, exist_ok=True)
    controls = _controls(source, folder / CONTROL)
    _forecast_space(root, [(folder, source), *((folder / CONTROL, control) for control in controls[:1])])
    left: list[Refusal] = []
    with _staging_folder(root) as staging:
        _stage(staging, folder, name, source, left)
        for control in controls:
            (staging / CONTROL).mkdir()
            try:
                _stage(staging / CONTROL, folder / CONTROL, f"{name}/{CONTROL}", control, left)
                break
            except CheckpointError as error:  # a control can be trained once more: no reason to refuse the run
                shutil.rmtree(staging / CONTROL)
                left.append(Refusal(control.info.path, f"the control's checkpoint stays behind: {error}"))
        sync_folder(staging)
        crash_point("adopt-staged")
        path = _publish(staging, folder)
    return path, left


def finish_adoption(folder: Path) -> None:
    """Complete what a process began that died while it adopted; what had not begun to show is removed.

    Raises:
        OSError: the run folder cannot be written.
    """
    root = checkpoint_root(folder)
    for staging in sorted(root.glob(f"{_STAGING}*")) if root.is_dir() else []:
        if staging.is_symlink() or not staging.is_dir():
            continue
        try:
            with held(staging):
                if _plan(staging) is not None and not (staging / _CHECKPOINT).exists():
                    _publish(staging, folder)
                else:
                    shutil.rmtree(staging)
        except BlockingIOError:  # a living process is at it
            continue


def complete(folder: Path, name: str, info: CheckpointInfo, run: StoredRun) -> None:
    """Give a run folder that holds checkpoints and no RUN.json what its newest checkpoint knows about the run."""
    with _staging_folder(checkpoint_root(folder)) as staging:
        if not (folder / METRICS).exists():
            write_evaluations(staging / METRICS, info)
            settle(staging / METRICS)
            os.replace(staging / METRICS, folder / METRICS)
        write_file(staging / RUN, _encoded_run(info.run_id, name, run.config))
        os.replace(staging / RUN, folder / RUN)
        sync_folder(folder)
        shutil.rmtree(staging)


# ---- what is brought


def _controls(source: Source, folder: Path) -> list[Source]:
    """Checkpoints of the LM-only control inside a run folder, newest first; none that ``folder`` has no need of."""
    inside = None if source.folder is None else source.folder / CONTROL
    linked = inside is None or inside.is_symlink() or checkpoint_root(inside).is_symlink()  # it may lead out
    run = None if linked else stored_run(inside)
    found = []
    try:
        paths = [] if run is None else step_folders(checkpoint_root(inside))
    except OSError:  # it cannot be listed; the run goes on without its control
        paths = []
    for path in paths:
        try:
            info = inspect_checkpoint(path, verify=False)
        except OSError:
            continue
        if info.run_id == run.run_id and _is_news(info, folder):
            found.append(Source(info, inside, run.config, source.owned))
    return sorted(found, key=lambda control: (control.info.step, control.info.save_number), reverse=True)


def _is_news(info: CheckpointInfo, folder: Path) -> bool:
    """Whether ``folder`` holds no checkpoint, or older ones of the same run."""
    there = step_folders(checkpoint_root(folder))
    run = stored_run(folder)
    if there and (run is None or run.run_id != info.run_id):
        return False
    for path in there:
        try:
            other = inspect_checkpoint(path, verify=False)
        except OSError:
            continue
        if (other.step, other.save_number) >= (info.step, info.save_number):
            return False
    return True


def _wanted(folder: Path, source: Source) -> list[str]:
    """What is brought beside the checkpoint, if it is there: a run keeps its start, and a curve that has no better."""
    if not _is_same_run(folder, source):
        return [METRICS, START, BEST]
    start = [] if (folder / START).exists() else [START]
    bare = source.folder is None or _plain_size(source.folder / METRICS) is None
    metrics = [] if bare and (folder / METRICS).exists() else [METRICS]
    return [*metrics, *start, BEST]


def _is_same_run(folder: Path, source: Source) -> bool:
    here = stored_run(folder)
    return here is not None and here.run_id == source.info.run_id


def _forecast_space(root: Path, sources: Iterable[tuple[Path, Source]]) -> None:
    needed = _SPARE_BYTES
    for folder, source in sources:
        needed += 0 if source.owned else source.info.size
        for name in _wanted(folder, source) if source.folder is not None else ():
            copies = (not source.owned) + (name == METRICS)  # its lines are copied once more, those that can be read
            needed += copies * (_plain_size(source.folder / name) or 0)
    free = room(root, shutil.disk_usage(root).free)
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"expected {needed:,} bytes free for {root}, got {free:,}; nothing was written; delete what is not needed "
            "(exports, its .bad- folders), or keep the run elsewhere: build_session(folder=...)",
        )


def _plain_size(path: Path) -> int | None:
    """Size of a plain file; None for anything else, or nothing."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


# ---- staging


@contextmanager
def _staging_folder(root: Path) -> Iterator[Path]:
    """A new folder of this process; kept when the block fails after the checkpoint got its name."""
    staging = free_path(root, f"{_STAGING}{os.getpid()}")
    staging.mkdir()
    with held(staging):
        try:
            yield staging
        except BaseException:
            if (staging / _CHECKPOINT).exists() or not (staging / _PLAN).exists():
                shutil.rmtree(staging, ignore_errors=True)
            raise


def _stage(staging: Path, folder: Path, name: str, source: Source, left: list[Refusal]) -> None:
    """Put all that ``folder`` gets into ``staging``, and the plan last."""
    _stage_checkpoint(staging / _CHECKPOINT, source)
    same_run = _is_same_run(folder, source)
    for beside in _wanted(folder, source):
        there = None if source.folder is None else source.folder / beside
        plain = there is not None and _plain_size(there) is not None
        if there is not None and not plain and os.path.lexists(there):
            left.append(Refusal(there, "stays behind: expected a plain file, got a link, a folder or a device"))
        if beside == METRICS:
            _stage_metrics(staging / METRICS, source, left)
        elif plain:
            _stage_weights(staging / beside, source, left)
    if not same_run:
        write_file(staging / RUN, _encoded_run(source.info.run_id, name, source.config))
    remove = [] if same_run else [beside for beside in _BESIDE if not (staging / beside).exists()]
    write_file(staging / _PLAN, json.dumps({"step": source.info.step, "remove": remove}).encode())
    sync_folder(staging)


def _stage_checkpoint(target: Path, source: Source) -> None:
    info = source.info
    target.mkdir()
    for name, expected in info.files.items():
        got = _bring(info.path / name, target / name, limit=expected.size, move=source.owned)
        if got != expected:
            raise DamagedCheckpoint(
                f"{name}: expected {expected.size} bytes, sha256 {expected.sha256[:12]}, got {got.size}, "
                f"{got.sha256[:12]}"
            )
        crash_point("adopt-copying")
    _bring(info.path / MANIFEST, target / MANIFEST, limit=_plain_size(info.path / MANIFEST) or 0, move=source.owned)
    sync_folder(target)
    brought = inspect_checkpoint(target, verify=False)
    if dict(brought.files) != dict(info.files) or brought.run_id != info.run_id:  # changed while it was read
        raise DamagedCheckpoint(f"{MANIFEST}: expected the content that was read a moment ago, got another")


def _stage_weights(target: Path, source: Source, left: list[Refusal]) -> None:
    """Weights beside the checkpoints have no hash to compare: what is torn is told by their own header."""
    path = source.folder / target.name
    try:
        _bring(path, target, limit=_plain_size(path) or 0, move=source.owned)
        with safe_open(target, framework="pt") as file:  # compares the length that the header says
            about = file.metadata() or {}
        if target.name == BEST:
            int(about["step"]), float(about["bits_per_byte"])
    except (SafetensorError, KeyError, ValueError, CheckpointError) as error:
        target.unlink(missing_ok=True)
        left.append(Refusal(path, f"stays behind: expected weights that can be read, got {error!r}"))


def _stage_metrics(target: Path, source: Source, left: list[Refusal]) -> None:
    path = None if source.folder is None else source.folder / METRICS
    size = None if path is None else _plain_size(path)
    copy = target.with_name(f"{METRICS}.copy")
    bad = 0
    try:
        if size is None or size > _METRICS_LIMIT:
            raise CheckpointError(f"expected a plain file of at most {_METRICS_LIMIT:,} bytes, got {size}")
        _bring(path, copy, limit=size, move=source.owned)
        bad = keep_readable_lines(copy, target)
    except CheckpointError as error:
        if size is not None:
            left.append(Refusal(path, f"stays behind: {error}"))
        write_evaluations(target, source.info)
    copy.unlink(missing_ok=True)
    if bad:
        text = f"{bad} lines of {METRICS} cannot be read and are left out"
        left.append(Refusal(path, text))
        append_records(target, [{"kind": "event", "step": source.info.step, "what": "resumed", "text": text}])
    settle(target)


def _bring(source: Path, target: Path, *, limit: int, move: bool) -> StoredFile:
    """Copy a plain file of at most ``limit`` bytes onto the disk, hashing what is read; or move it there.

    Raises:
        CheckpointError: the source cannot be read, or is no plain file.
        OSError: the target cannot be written.
    """
    if _plain_size(source) is None:
        raise DamagedCheckpoint(f"{source.name}: expected a plain file, got none")
    if move:
        os.rename(source, target)
        return settle(target)
    try:
        # not through a link, and not waiting for a writer of a pipe, should it have become one since
        descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CheckpointError(error.errno, f"{source.name}: expected a file that can be read, got {error}") from error
    sha256, size = hashlib.sha256(), 0
    with open(descriptor, "rb", buffering=0) as reader, open(target, "xb") as writer:
        while size <= limit:  # one byte more than that shows that it has grown
            try:
                block = reader.read(min(_BLOCK, limit + 1 - size))
            except OSError as error:
                raise CheckpointError(
                    error.errno, f"{source.name}: expected a file that can be read, got {error}"
                ) from error
            if not block:
                break
            sha256.update(block)
            size += len(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    return StoredFile(size, sha256.hexdigest())


def _encoded_run(run_id: str, name: str, config: Mapping[str, Any]) -> bytes:
    return json.dumps({"run_id": run_id, "name": name, "config": dict(config)}, indent=1).encode()


# ---- publishing: renames alone, each of which may be the last one that this process does


def _plan(staging: Path) -> tuple[int, list[str]] | None:
    """The step that is staged, and the files of an earlier run that go; None if it was never staged whole."""
    try:
        plan = read_json(staging / _PLAN)
        return int(plan["step"]), [name for name in plan["remove"] if name in _BESIDE]
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _publish(staging: Path, folder: Path) -> Path | None:
    """Move what is staged to where it belongs; called again, it goes on where it was killed.

    Returns:
        the checkpoint's folder; None if it had its name already.
    """
    step, remove = _plan(staging)
    root = checkpoint_root(folder)
    root.mkdir(parents=True, exist_ok=True)
    path = None
    if (staging / _CHECKPOINT).exists():
        path = free_path(root, f"step-{step:08d}")
        os.rename(staging / _CHECKPOINT, path)
        sync_folder(root)
        sync_folder(staging)
    crash_point("adopt-checkpoint")
    for name in remove:
        (folder / name).unlink(missing_ok=True)
    crash_point("adopt-removed")
    for name in _BESIDE:
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
            crash_point(f"adopt-{name}")
    if _plan(staging / CONTROL) is not None:
        _publish(staging / CONTROL, folder / CONTROL)
        crash_point("adopt-control")
    sync_folder(folder)
    if (staging / RUN).exists():
        crash_point("adopt-before-run")
        os.replace(staging / RUN, folder / RUN)
        sync_folder(folder)
    crash_point("adopt-after-run")
    (staging / _PLAN).unlink()  # done: what the run writes from here on is not to be removed by it
    shutil.rmtree(staging)
    return path
