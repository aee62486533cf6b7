"""Save training state so that a kill, a full disk or a flipped bit cannot lose it.

A checkpoint is named groups of tensors plus one JSON-able dict; what they mean is the trainer's business.
Saving: everything is written, fsynced and hashed in a staging folder, the manifest last; one rename publishes
it; only then are older checkpoints deleted. No pointer to the latest one exists that could be wrong. Finding,
checking and loading are in ``checkpoint_folder.py``; its public names can be had here too.

Example:
    >>> groups = {"model": model.state_dict()}
    >>> save_checkpoint(run, step=100, save_number=1, run_id="a1", groups=groups, state={"epoch": 0})
    >>> info, refusals = find_checkpoint(run, run_id="a1")
    >>> groups, state = load_checkpoint(info)
"""

from __future__ import annotations

import errno
import hashlib
import json
import operator
import os
import platform
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kd_kit.checkpoint_folder import (
    FORMAT,
    GROUP_FILE,
    JSON_LIMIT,
    MANIFEST,
    STATE,
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    Refusal,
    StoredFile,
    checkpoint_root,
    find_checkpoint,
    free_path,
    inspect_checkpoint,
    load_checkpoint,
    refusal_table,
    seal,
    step_folders,
)
from kd_kit.kaggle_place import room

try:
    import fcntl
except ImportError:  # Windows: folders cannot be held there; everything else works
    fcntl = None

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "DamagedCheckpoint",
    "Refusal",
    "find_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "refusal_table",
    "remove_leftovers",
    "save_checkpoint",
]

Groups = Mapping[str, Mapping[str, Tensor]]

_SPARE_BYTES = 2**20  # for the manifest, and for what folders cost


def save_checkpoint(
    run_folder: str | os.PathLike[str],
    *,
    step: int,
    save_number: int,
    groups: Groups,
    state: Mapping[str, Any],
    run_id: str,
    keep: int = 2,
    best: bool = False,
    check_finite: Collection[str] = ("model", "optim", "aux"),
) -> CheckpointInfo:
    """Write one checkpoint, then delete those of the run that it makes superfluous.

    To be called between two optimizer steps. Whatever goes wrong, the earlier checkpoints stay as they were
    and no half-written folder is left; after a kill, the next save clears it away. Several names for one
    tensor (tied weights) are written once and come back as one tensor; tensors that merely overlap are
    written separately.

    Args:
        step: optimizer steps done. Saved again, a step lies beside its older save until the new one is whole.
        save_number: counts the saves of the run, across resumes.
        groups: file name without suffix, to named tensors on any device.
        state: equal to what JSON makes of it: text keys, lists and no tuples, plain numbers.
        keep: how many of the newest steps stay; the newest best one stays besides.
        best: this one is the best so far.
        check_finite: groups in which NaN and infinity are refused.

    Raises:
        ValueError: nothing could be resumed from this: not finite, not JSON. Nothing was written.
        CheckpointError: it could not be written (``errno`` is ENOSPC where the disk is full).
    """
    step, save_number = operator.index(step), operator.index(save_number)  # numpy's integers are no JSON
    if step < 0 or save_number < 0 or keep < 1:
        raise ValueError(
            f"save_checkpoint: expected step >= 0, save_number >= 0 and keep >= 1, got {step}, {save_number} and {keep}"
        )
    aliases = {group: _find_aliases(group, tensors) for group, tensors in groups.items()}
    encoded_state = _encode_state(state)
    for group in check_finite:
        _refuse_non_finite(group, groups.get(group, {}))

    root = checkpoint_root(run_folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_folder)
        _forecast_space(root, len(encoded_state) + _tensor_bytes(groups, aliases))
        with _staging_folder(root, step) as staging:
            files = {}
            for group, tensors in groups.items():
                name = f"{group}.safetensors"
                files[name] = _write_group(staging / name, tensors, aliases[group])
                crash_point(f"after-{group}")
            files[STATE] = write_file(staging / STATE, encoded_state)
            crash_point("before-manifest")
            manifest = {
                "format": FORMAT,
                "step": step,
                "save_number": save_number,
                "run_id": run_id,
                "best": bool(best),
                "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": {name: file._asdict() for name, file in files.items()},
                "versions": _versions(),
            }
            sealed = manifest | {"seal": seal(manifest)}
            write_file(staging / MANIFEST, json.dumps(sealed, indent=1).encode())
            sync_folder(staging)
            crash_point("before-rename")
            # A folder cannot be renamed onto another, and moving the old one away first would leave a moment
            # without either. So a step that was saved before gets a second name; nothing is read from names.
            path = free_path(root, f"step-{step:08d}")
            os.rename(staging, path)
        crash_point("after-rename")
        sync_folder(root)
        sync_folder(root.parent)
        info = replace(inspect_checkpoint(path, verify=False), verified=True)  # hashed a moment ago
    except CheckpointError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # three ways to say that the disk is full
        raise CheckpointError(
            _error_number(error),
            f"save_checkpoint: expected to write step {step} below {root}, got {error!r}; earlier "
            "checkpoints are untouched; make room or make the folder writable, then save again",
        ) from error
    try:
        _delete_superfluous(root, info, keep)
    except OSError as error:  # the new one is whole, so the save did not fail
        warnings.warn(f"save_checkpoint: cannot delete an old one: {error}", RuntimeWarning, stacklevel=2)
    return info


def remove_leftovers(run_folder: str | os.PathLike[str]) -> list[Path]:
    """Delete what dead processes left, half-written and half-deleted folders; returns those it removed."""
    root = checkpoint_root(run_folder)
    removed = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if not path.name.startswith((".tmp-", ".del-")):
            continue
        try:
            with held(path):
                shutil.rmtree(path)
            removed.append(path)
        except OSError:  # a living process writes it, or it cannot be removed: the forecast sees its space
            continue
    return removed


def _find_aliases(group: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Further names of tensors that have one already, each with that first name."""
    if not GROUP_FILE.fullmatch(f"{group}.safetensors"):
        raise ValueError(f"save_checkpoint: expected group names of a-z, 0-9 and _, got {group!r}; rename it")
    first_names: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"save_checkpoint: expected dense tensors that hold data, got {type(tensor).__name__} "
                f"{str(tensor)[:60]!r} as {group}/{name}; put plain numbers and text into the state"
            )
        if tensor.numel() == 0:  # all of them have the address 0
            continue
        bits = (tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), bits)
        first = first_names.setdefault(place, name)
        if first != name:
            aliases[name] = first
    return aliases


def _encode_state(state: Mapping[str, Any]) -> bytes:
    for key, value in state.items():
        try:
            # repr tells a tuple from a list, 1 from "1", numpy's numbers from Python's; NaN equals NaN
            survives = isinstance(key, str) and repr(json.loads(json.dumps(value))) == repr(value)
        except (TypeError, ValueError, RecursionError):
            survives = False
        if not survives:
            raise ValueError(
                f"save_checkpoint: expected a state that JSON gives back equal, got {repr(value)[:80]} at "
                f"{key!r}; use text keys, lists and plain numbers, and put tensors into a group"
            )
    encoded = json.dumps(dict(state), indent=1).encode()
    if len(encoded) > JSON_LIMIT:
        raise ValueError(
            f"save_checkpoint: expected a state of at most {JSON_LIMIT} bytes, got {len(encoded)}; "
            "put long lists of numbers into a group, as a tensor"
        )
    return encoded


def _refuse_non_finite(group: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach()
        finite = torch.isfinite(values.float() if values.element_size() == 1 else values)  # float8 has none
        if not finite.all():
            raise ValueError(
                f"save_checkpoint: expected finite numbers, got {int((~finite).sum())} of {finite.numel()} "
                f"NaN or infinite in {group}/{name}; go back to the last checkpoint, or leave {group!r} out "
                "of check_finite if they belong there"
            )


def _tensor_bytes(groups: Groups, aliases: Mapping[str, Mapping[str, str]]) -> int:
    """Bytes of all groups' files: the data, and some 200 bytes of header per tensor."""
    return sum(
        tensor.numel() * tensor.element_size() + 200 + len(name)
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
        if name not in aliases[group]
    )


def _forecast_space(root: Path, needed: int) -> None:
    needed += _SPARE_BYTES
    free = room(root, shutil.disk_usage(root).free)
    if needed > free:
        raise CheckpointError(
            errno.ENOSPC,
            f"save_checkpoint: expected {needed:,} bytes free for {root}, got {free:,}; nothing was written; "
            "delete what is not needed (its .bad- folders, exports) or keep fewer checkpoints",
        )


@contextmanager
def _staging_folder(root: Path, step: int) -> Iterator[Path]:
    """A new folder, gone again if the block fails in any way (an interrupt too)."""
    staging = root / f".tmp-{step:08d}-{os.getpid()}"
    staging.mkdir()
    with held(staging):
        try:
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on a folder. Unlike a process id it ends with its process and is not reused.

    Raises BlockingIOError when another one holds it; does nothing where there are no such locks.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _write_group(path: Path, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> StoredFile:
    copies = {name: _cpu_copy(tensor) for name, tensor in tensors.items() if name not in aliases}
    save_file(copies, path, metadata={"format": "pt", "aliases": json.dumps(aliases)})
    # safetensors makes files that only their owner can read; others shall see what the folder lets them see
    path.chmod(path.parent.stat().st_mode & 0o666)
    return settle(path)


def _cpu_copy(tensor: Tensor) -> Tensor:
    """A copy that shares memory with nothing, which safetensors would refuse, and has no lazy conjugation."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", copy=True, memory_format=torch.contiguous_format)


def write_file(path: Path, content: bytes) -> StoredFile:
    """A small file, forced onto the disk; returns its size and hash."""
    path.write_bytes(content)
    return settle(path)


def settle(path: Path) -> StoredFile:
    """Force a file that was just written onto the disk; returns its size and hash."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredFile(os.fstat(file.fileno()).st_size, sha256)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some mounted drives lack it
            raise
    finally:
        os.close(descriptor)


def _delete_superfluous(root: Path, written: CheckpointInfo, keep: int) -> None:
    """Keep the one just written, the last save of each of the ``keep`` newest steps, and the newest best."""
    found = []
    for path in step_folders(root):
        try:
            info = inspect_checkpoint(path, verify=False)
        except OSError:
            continue  # neither counted nor deleted: the search judges it
        if info.run_id == written.run_id:
            found.append(info)
    found.sort(key=lambda info: (info.step, info.save_number, info.path == written.path), reverse=True)
    newest: dict[int, Path] = {}
    for info in found:
        newest.setdefault(info.step, info.path)
    kept = {written.path, *list(newest.values())[:keep], *[info.path for info in found if info.best][:1]}
    for info in found:
        if info.path not in kept:
            doomed = free_path(root, f".del-{info.path.name}")  # from now on nobody takes it for a checkpoint
            os.rename(info.path, doomed)
            crash_point("during-cleanup")
            shutil.rmtree(doomed)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "safetensors", "kd_kit"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # imported from a plain folder
            continue
    return versions


def _error_number(error: Exception) -> int:
    """The system's number of an error; safetensors only has it in its text."""
    in_text = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(in_text[1]) if in_text else errno.EIO)


def crash_point(name: str) -> None:
    """The reliability tests' hook: dies here, as by SIGKILL, if the variable KD_KIT_CRASH_AT says so.

    Names here: after-<group>, before-manifest, before-rename, after-rename, during-cleanup.
    """
    if os.environ.get("KD_KIT_CRASH_AT") == name:
        os._exit(137)
