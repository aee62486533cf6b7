"""What a copy of a run at another place consists of: its names, its manifests, what to send, what to remove.

    <place>/<run>/
      RUN.json  metrics.jsonl  initial.safetensors  best.safetensors
      COPY.json                           size and sha256 of the two weight files above, sealed like a manifest
      ckpt/step-00001200-7/               of step and save number, so that a name never gets another content
        <group>.safetensors  state.json   as the run wrote them
        MANIFEST.json                     sent last: a folder without it is no checkpoint

How it is sent and fetched is in ``remote_copy.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kd_kit.checkpoint_folder import (
    JSON_LIMIT,
    MANIFEST,
    CheckpointError,
    CheckpointInfo,
    StoredFile,
    checkpoint_root,
    inspect_checkpoint,
    read_manifest,
    seal,
    step_folders,
)

WEIGHTS = ("initial.safetensors", "best.safetensors")
TEXTS = ("metrics.jsonl", "RUN.json")
ABOUT = "COPY.json"
LIMITS = {"RUN.json": JSON_LIMIT, "metrics.jsonl": 2**30}  # bytes; the latter has some two million log lines then
KEPT = 2  # checkpoints of a run that stay at a place
SLOWEST = 1e6  # bytes per second; a line that is slower than that is taken for a hung one

_COPY_FOLDER = re.compile(r"step-\d{8,}(-\d+)?")
_CHUNK = 2**22


class MirrorError(OSError):
    """A place cannot be reached, refuses what is asked of it, or did not take what was sent.

    ``errno`` is the system's number, where there is one.
    """

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class GivenUp(MirrorError):
    """An upload found that nobody waits for it any more."""


class OldCopiesRemain(MirrorError):
    """The new copy is whole at the place, but older ones could not be removed."""


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint at a place, as its manifest describes it; its files have not been read yet.

    Attributes:
        name: of its folder there.
        manifest: MANIFEST.json, byte for byte.
        info: what the manifest says; ``info.path`` is no local folder.
    """

    name: str
    manifest: bytes
    info: CheckpointInfo

    @property
    def step(self) -> int:
        return self.info.step

    @property
    def save_number(self) -> int:
        return self.info.save_number

    @property
    def run_id(self) -> str:
        return self.info.run_id

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return self.info.size


class LocalCopy(NamedTuple):
    """What an upload has to send.

    Attributes:
        checkpoint: with the name that it gets at the place.
        files: its files, by the name at the place (``ckpt/...``); all but the manifest.
        weights: the run's weights beside its checkpoints, by name.
        texts: metrics.jsonl and RUN.json, by name.
        about: size and sha256 of ``weights``.
    """

    checkpoint: RemoteCheckpoint
    files: Mapping[str, Path]
    weights: Mapping[str, Path]
    texts: Mapping[str, Path]
    about: Mapping[str, StoredFile]

    @property
    def manifest(self) -> str:
        """Name of the manifest at the place."""
        return f"ckpt/{self.checkpoint.name}/{MANIFEST}"

    def sealed_about(self) -> bytes:
        """Content of COPY.json."""
        content = {"files": {name: file._asdict() for name, file in self.about.items()}}
        return json.dumps(content | {"seal": seal(content)}, indent=1).encode()


def manifests(there: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Name of every manifest there, and of its folder."""
    for name in sorted(there):
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "ckpt" and parts[2] == MANIFEST and _COPY_FOLDER.fullmatch(parts[1]):
            yield name, parts[1]


def superfluous(
    there: Mapping[str, int], found: list[RemoteCheckpoint], written: RemoteCheckpoint, kept: int = KEPT
) -> list[str]:
    """Folders of checkpoints that ``written`` makes superfluous at its place.

    Those of the same run beyond the ``kept`` newest; those of steps that the run has gone back from, which a resume
    must not take; and uploads that were never finished. Other runs' checkpoints and newer ones stay.

    Args:
        there: sizes of all files there. found: the whole checkpoints among them, newest first.
    """
    mine = [remote for remote in found if remote.run_id == written.run_id and remote.name != written.name]
    older = [r for r in mine if (r.step, r.save_number) < (written.step, written.save_number)]
    left_behind = [r for r in mine if r.save_number < written.save_number and r.step > written.step]
    whole = {folder for _, folder in manifests(there)}
    folders = {name.split("/")[1] for name in there if name.startswith("ckpt/") and name.count("/") >= 2}
    torn = {folder for folder in folders - whole if _COPY_FOLDER.fullmatch(folder)} - {written.name}
    return sorted({remote.name for remote in [*older[kept - 1 :], *left_behind]} | torn)


def read_local(run_copy: Path) -> LocalCopy:
    """What to send of a run folder that holds one checkpoint.

    Raises:
        CheckpointError: it does not hold one, or that is not whole.
    """
    folders = step_folders(checkpoint_root(run_copy))
    if len(folders) != 1:
        raise CheckpointError(f"upload: expected one checkpoint in {run_copy}, got {len(folders)}; copy the newest")
    info = inspect_checkpoint(folders[0])
    name = f"step-{info.step:08d}-{info.save_number}"
    files = {f"ckpt/{name}/{file}": info.path / file for file in info.files}
    weights = {file: run_copy / file for file in WEIGHTS if (run_copy / file).is_file()}
    texts = {file: run_copy / file for file in TEXTS if (run_copy / file).is_file()}
    about = {}
    for file, path in weights.items():
        with open(path, "rb") as opened:
            about[file] = StoredFile(path.stat().st_size, hashlib.file_digest(opened, "sha256").hexdigest())
    checkpoint = RemoteCheckpoint(name, (info.path / MANIFEST).read_bytes(), info)
    return LocalCopy(checkpoint, files, weights, texts, about)


def parse_manifest(name: str, content: bytes) -> RemoteCheckpoint:
    """The checkpoint that a manifest describes.

    Raises:
        CheckpointError: it is damaged, not sealed, of another format, or names files that are none of ours.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(content)
        info = read_manifest(Path(folder))
    return RemoteCheckpoint(name, content, replace(info, path=Path(name)))


def still_wanted(alive: Callable[[], bool]) -> None:
    """Raise GivenUp if nobody waits for this upload."""
    if not alive():
        raise GivenUp("the upload was given up")


def take_in(source: BinaryIO, target: Path, size: int) -> StoredFile:
    """Write a stream to a new file, forced onto the disk; stops soon after ``size`` bytes."""
    sha256, written = hashlib.sha256(), 0
    with open(target, "xb") as file:
        while written <= size and (chunk := source.read(_CHUNK)):
            file.write(chunk)
            sha256.update(chunk)
            written += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(written, sha256.hexdigest())


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file where the disk can do that, a copy where it cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def status_of(error: BaseException) -> int | None:
    """Of an answer that a library for HTTP made an error of."""
    return getattr(getattr(error, "response", None), "status_code", None)


def brief(error: BaseException) -> str:
    """An error on one line, without what must stay secret; a library's is cut at 200 characters."""
    ours = isinstance(error, (MirrorError, CheckpointError))
    text = without_secrets(" ".join(((ours and error.strerror) or str(error)).split()))
    if ours:
        return text
    if not text.startswith(kind := type(error).__name__):
        text = f"{kind}: {text}" if text else kind
    return text if len(text) <= 200 else f"{text[:197]}..."


def without_secrets(text: str) -> str:
    """Without passwords in addresses, the signatures behind them, and tokens of the hub."""
    text = re.sub(r"//([^/:@\s]+):[^@/\s]+@", r"//\1:***@", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text)


def described(file: StoredFile) -> str:
    return f"{file.size} bytes, sha256 {file.sha256[:12]}"
