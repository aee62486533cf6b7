"""Checkpoints as they lie on disk: what a folder says it is, whether that is true, and the newest that is.

    <run>/ckpt/step-00001200/     appears by rename only, so whatever bears this name was whole once
        <group>.safetensors       one file per group of tensors: model, optim, aux, rng
        state.json                step, epoch, cursor, ...
        MANIFEST.json             size and sha256 of each file above, sealed by a sha256 of its own
    <run>/ckpt/.tmp-*  .del-*  .bad-*    being written, being deleted, quarantined

A checkpoint may come from anywhere, so a folder is believed only after it was checked: JSON of limited size,
file names of our own making, plain files, no links, hashes. No pickle is ever opened. Writing is in
``checkpoint.py``.
"""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
JSON_LIMIT = 64 * 2**20  # bytes; a larger JSON file is refused unread
GROUP_FILE = re.compile(r"([a-z][a-z0-9_]*)\.safetensors")
_STEP_FOLDER = re.compile(r"step-\d{8,}(-\d+)?")
_FINGERPRINTS = {"tokenizers", "data", "start"}  # settings that tell people nothing
_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


class CheckpointError(OSError):
    """A checkpoint cannot be written, or this one must not be read. ``errno`` says the kind, where known."""


class DamagedCheckpoint(CheckpointError):
    """The folder is not what its manifest says; :func:`find_checkpoint` puts it in quarantine."""


class StoredFile(NamedTuple):
    size: int
    sha256: str


@dataclass(frozen=True, repr=False)
class CheckpointInfo:
    """What a checkpoint's manifest says; prints well.

    Attributes:
        path: the folder.
        step: optimizer steps done when it was taken.
        save_number: saves that the run had made, this one included; tells two saves of one step apart.
        run_id: the run that wrote it.
        best: it was the best so far when it was written.
        written_at: UTC, for people; nothing is ordered by it.
        files: name to size and sha256, without the manifest itself.
        versions: of python, torch, safetensors and kd_kit at that time.
        verified: every file's sha256 was compared when this object was made.
    """

    path: Path
    step: int
    save_number: int
    run_id: str
    best: bool
    written_at: str
    files: Mapping[str, StoredFile]
    versions: Mapping[str, str]
    verified: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def _facts(self) -> dict[str, str]:
        name, settings = self._run()
        return {
            "step": f"{self.step}, save {self.save_number}{', best so far' if self.best else ''}",
            "run": f"{name} ({self.run_id})" if name else self.run_id,
            "written": self.written_at,
            "verified": "every file's sha256" if self.verified else "sizes only",
            **{name: f"{f.size:,} bytes, sha256 {f.sha256[:12]}" for name, f in self.files.items()},
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            **settings,
        }

    def _run(self) -> tuple[str, dict[str, str]]:
        """Name and main settings of its run, as the state has them now; nothing where it has none to show."""
        try:
            run = read_state(self).get("run")
        except (OSError, KeyError):
            return "", {}
        if not isinstance(run, dict):
            return "", {}
        config = run.get("config") if isinstance(run.get("config"), dict) else {}
        plain = {key: config[key] for key in sorted(config) if isinstance(config[key], str | int | float | list)}
        shown = itertools.islice((key for key in plain if key not in _FINGERPRINTS), 40)
        return _line(run.get("name") or ""), {_line(f"set {key}"): _line(plain[key]) for key in shown}

    def __repr__(self) -> str:
        facts = self._facts()
        width = max(map(len, facts))
        return "\n".join([str(self.path), *(f"  {name:<{width}}  {fact}" for name, fact in facts.items())])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>"
            for name, fact in self._facts().items()
        )
        return f"<table><caption>{html.escape(str(self.path))}</caption>{rows}</table>"


class Refusal(NamedTuple):
    """What the search for a checkpoint passed over, and why, in words.

    ``path`` is its folder; text where it lies at an address and in no folder of this machine.
    """

    path: Path | str
    reason: str


def refusal_table(refusals: Sequence[Refusal], *, whole_paths: bool = False) -> str:
    """One line of plain text per refused checkpoint, name and reason; empty when there are none.

    Args:
        whole_paths: tell where it lies instead of its name alone.
    """
    places = [path.name if isinstance(path, Path) and not whole_paths else str(path) for path, _ in refusals]
    width = max(map(len, places), default=0)
    lines = (f"{place:<{width}}  {reason}" for place, (_, reason) in zip(places, refusals, strict=True))
    return "\n".join(lines)


def find_checkpoint(
    run_folder: str | os.PathLike[str], *, run_id: str | None = None
) -> tuple[CheckpointInfo | None, list[Refusal]]:
    """The newest checkpoint whose every byte is as it was written, and why others were refused on the way.

    Newest by (step, save number) of the manifests. Damaged ones are renamed to ``.bad-`` where the folder can
    be written, so that they are not tried again; those of another run or another format are only passed over.

    Args:
        run_id: take none but this run's.
    """
    candidates, refusals = [], []
    for path in step_folders(checkpoint_root(run_folder)):
        try:
            candidates.append(read_manifest(path))
        except OSError as error:
            refusals.append(refuse(path, error))
    for info in sorted(candidates, key=lambda info: (info.step, info.save_number), reverse=True):
        if run_id is not None and info.run_id != run_id:
            refusals.append(Refusal(info.path, f"expected run {run_id!r}, got {info.run_id!r}"))
            continue
        try:
            _check_files(info)
            _check_hashes(info)
        except OSError as error:
            refusals.append(refuse(info.path, error))
            continue
        return replace(info, verified=True), refusals
    return None, refusals


def inspect_checkpoint(path: str | os.PathLike[str], *, verify: bool = True) -> CheckpointInfo:
    """What the checkpoint in this folder is.

    Args:
        verify: compare every file's sha256, which reads it all, and not the sizes alone.

    Raises:
        DamagedCheckpoint: it is not what its manifest says.
        CheckpointError: it must not be read: another format, a pickle beside it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise CheckpointError(f"inspect_checkpoint: expected a checkpoint's folder, got {str(path)!r}: there is none")
    within = [str(p) for root in (path / "ckpt", path) if not (path / MANIFEST).exists() for p in step_folders(root)]
    if within:
        raise CheckpointError(
            f"inspect_checkpoint: expected a checkpoint's folder, got {str(path)!r}; pass one of those within it: "
            + ", ".join(within[-3:])
        )
    info = read_manifest(path)
    _check_files(info)
    if verify:
        _check_hashes(info)
    return replace(info, verified=verify)


def load_checkpoint(info: CheckpointInfo) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """``(groups, state)`` as they were saved, tensors on the CPU.

    Compares the hashes once more, since a checkpoint may have been found hours before it is needed. The
    tensors own their memory, so that no file stays mapped (and on the disk) that a later save deletes.

    Raises:
        CheckpointError: as :func:`inspect_checkpoint`.
    """
    _check_files(info)
    _check_hashes(info)
    groups = {}
    for name in info.files:
        if match := GROUP_FILE.fullmatch(name):
            groups[match[1]] = _read_group(info.path / name)
    return groups, read_json(info.path / STATE)


def read_state(info: CheckpointInfo) -> dict[str, Any]:
    """A checkpoint's state alone, believed only if it has the hash that its manifest seals.

    Raises:
        DamagedCheckpoint: it has another, or is no JSON.
        OSError: it cannot be read.
    """
    path = info.path / STATE
    content = _read_limited(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != info.files[STATE].sha256:
        raise DamagedCheckpoint(f"{STATE}: expected sha256 {info.files[STATE].sha256[:12]}, got {sha256[:12]}")
    return _parsed(path, content)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a plain file of limited size.

    Raises:
        DamagedCheckpoint: it is missing, no plain file, too large, no JSON, or no object.
        OSError: it cannot be read.
    """
    return _parsed(path, _read_limited(path))


def seal(manifest: Mapping[str, Any]) -> str:
    """sha256 over a manifest's content, so that a flipped bit in the manifest is noticed as well."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def checkpoint_root(run_folder: str | os.PathLike[str]) -> Path:
    return Path(run_folder) / "ckpt"


def step_folders(root: Path) -> list[Path]:
    """Everything that bears a checkpoint's name, in no meaningful order."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _STEP_FOLDER.fullmatch(path.name))


def free_path(folder: Path, name: str) -> Path:
    """``folder/name``, or with -2, -3, ... behind it where that exists."""
    paths = itertools.chain([folder / name], (folder / f"{name}-{number}" for number in itertools.count(2)))
    return next(path for path in paths if not os.path.lexists(path))


def _line(value: Any) -> str:
    """A value from a file as at most 80 characters of one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_manifest(path: Path) -> CheckpointInfo:
    """What the manifest in a folder says; the files that it names are not looked at.

    Raises:
        DamagedCheckpoint: it is not what was sealed, or names files that are not of our making.
        CheckpointError: no folder, or another format.
    """
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError("expected a folder, got a link or a file")
    manifest = read_json(path / MANIFEST)
    if manifest.pop("seal", None) != seal(manifest):
        raise DamagedCheckpoint(f"{MANIFEST}: expected the content that was sealed, got another")
    if manifest.pop("format", None) != FORMAT:
        raise CheckpointError(f"{MANIFEST}: expected format {FORMAT}, got another; use its own kd_kit")
    try:
        files = {name: StoredFile(**file) for name, file in manifest.pop("files").items()}
        info = CheckpointInfo(path=path, files=files, **manifest)
        numbers = [info.step, info.save_number, *(file.size for file in files.values())]
        texts = [info.run_id, info.written_at, *(f.sha256 for f in files.values()), *info.versions.values()]
        types = [{type(value) for value in values} for values in (numbers, texts, [info.best])]
        if types != [{int}, {str}, {bool}]:
            raise TypeError("a value of another type")
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST}: expected all fields and no more, got {error!r}") from error
    # Only names of our own making: none of them leads out of the folder or to a pickle.
    foreign = [name for name in files if name != STATE and not GROUP_FILE.fullmatch(name)]
    if foreign or STATE not in files:
        got = foreign or [*files]
        raise DamagedCheckpoint(f"{MANIFEST}: expected <group>.safetensors and {STATE}, got {got}")
    return info


def _check_files(info: CheckpointInfo) -> None:
    pickles = sorted(path.name for path in info.path.iterdir() if path.suffix.lower() in _PICKLES)
    if pickles:
        raise CheckpointError(f"{pickles[0]}: expected no file that could run code; delete it if you know it")
    for name, expected in info.files.items():
        size = _file_size(info.path / name)
        if size != expected.size:
            raise DamagedCheckpoint(f"{name}: expected {expected.size} bytes, got {size}")


def _check_hashes(info: CheckpointInfo) -> None:
    for name, expected in info.files.items():
        with open(info.path / name, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != expected.sha256:
            raise DamagedCheckpoint(f"{name}: expected sha256 {expected.sha256[:12]}, got {sha256[:12]}")


def _file_size(path: Path) -> int:
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path.name}: expected a file, got none") from error
    if not stat.S_ISREG(status.st_mode):
        raise DamagedCheckpoint(f"{path.name}: expected a plain file, got a link, a folder or a device")
    return status.st_size


def _read_limited(path: Path) -> bytes:
    size = _file_size(path)
    if size > JSON_LIMIT:
        raise DamagedCheckpoint(f"{path.name}: expected at most {JSON_LIMIT} bytes, got {size}")
    return path.read_bytes()


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}: expected JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(parsed, dict):
        raise DamagedCheckpoint(f"{path.name}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _read_group(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
            aliases = json.loads(file.metadata()["aliases"])
        return tensors | {name: tensors[first] for name, first in aliases.items()}
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}: expected named tensors, got {error!r}") from error


def refuse(path: Path, error: OSError) -> Refusal:
    """The refusal that an error means; what is damaged is put in quarantine, where its folder can be written."""
    if not isinstance(error, DamagedCheckpoint):
        return Refusal(path, str(error))
    try:
        quarantine = free_path(path.parent, f".bad-{path.name}")
        os.rename(path, quarantine)
    except OSError as rename_error:  # mounted read-only: the refusal alone must do
        return Refusal(path, f"{error} (left where it is: {rename_error.strerror})")
    return Refusal(path, f"{error} (now {quarantine.name})")
