"""A copy of a run at another place: what lies there, whether it is true, and bringing it back.

What lies at a place may be torn, damaged or made by somebody else. So a checkpoint is taken only if its manifest is
sealed and every byte is what the manifest says; only names of our own making are asked for, and only folders of our
own choosing are written. What a copy consists of is in ``copied_run.py``, the places are in ``mirror_places.py`` and
``hub_places.py``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kd_kit.checkpoint_folder import (
    JSON_LIMIT,
    MANIFEST,
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    StoredFile,
    checkpoint_root,
    free_path,
    inspect_checkpoint,
    seal,
)
from kd_kit.copied_run import (
    ABOUT,
    LIMITS,
    SLOWEST,
    TEXTS,
    WEIGHTS,
    LocalCopy,
    MirrorError,
    RemoteCheckpoint,
    brief,
    described,
    manifests,
    parse_manifest,
    read_local,
)
from kd_kit.kaggle_place import room

_REASONS = 5  # more refusals than that are only counted


class Place:
    """Where copies of one run go, and come back from. Made by :func:`kd_kit.mirror_places.open_place`.

    Attributes:
        address: as people read it, without a password.
        refused: what the last :meth:`newest` or :meth:`download` passed over, and why: a few lines of text.
        patience: seconds that a question to the place, or a file less than a megabyte, may take.
    """

    patience = 600.0

    def __init__(self, address: str):
        self.address = address
        self.refused: list[str] = []

    def newest(self) -> list[RemoteCheckpoint]:
        """The checkpoints there, newest first by (step, save number); empty where there is nothing yet.

        Only those whose manifest is sealed and whose files have the sizes that it says. Their content is compared
        when they are downloaded.

        Raises:
            MirrorError: the place cannot be reached, or does not let this account in.
        """
        self.refused = []
        with self._reported("looking for checkpoints"):
            found = self._within(lambda: self._found(self._list()))
        if (more := len(self.refused) - _REASONS) > 0:
            self.refused[_REASONS:] = [f"and {more} more that cannot be used"]
        return found

    def upload(self, run_copy: Path, alive: Callable[[], bool]) -> int:
        """Send a run folder that holds one checkpoint, then remove older checkpoints of the run down to two.

        Args:
            run_copy: RUN.json, metrics.jsonl, initial.safetensors, best.safetensors, where they are there, and
                ``ckpt`` with one checkpoint.
            alive: asked again and again; once it says False, nothing more is sent and nothing is removed.

        Returns:
            bytes that were sent.

        Raises:
            MirrorError: not everything arrived; what the place held before can still be used.
            OldCopiesRemain: everything arrived, but what it makes superfluous is still there.
            CheckpointError: the checkpoint in ``run_copy`` is not whole.
        """
        with self._reported("sending"):
            return self._upload(read_local(Path(run_copy)), alive)

    def download(self, remote: RemoteCheckpoint, into: Path) -> CheckpointInfo:
        """Make ``into`` a run folder that holds this checkpoint, with what lies beside it at the place.

        Every byte of the checkpoint is compared with its manifest before it gets a checkpoint's name. Files beside it
        replace those in ``into``; one that is damaged is left out and named in :attr:`refused`.

        Raises:
            DamagedCheckpoint: the files at the place are not what the manifest says; ``into`` is as it was.
            CheckpointError: there is no room for it.
            MirrorError: the place cannot be reached; ``into`` is as it was.
        """
        self.refused = []
        root = checkpoint_root(into)
        with self._reported("fetching"):
            there = self._within(self._list)
            beside = {name: there[name] for name in (*WEIGHTS, *TEXTS) if name in there}
            root.mkdir(parents=True, exist_ok=True)
            _forecast_space(root, remote.size + sum(beside.values()))
            # a leftover of this name is swept like any checkpoint that was not finished
            staging = Path(tempfile.mkdtemp(prefix=f".tmp-{remote.step:08d}-", dir=root))
            try:
                checkpoint = staging / remote.name
                checkpoint.mkdir()
                for name, expected in remote.info.files.items():
                    got = self._fetch_patiently(f"ckpt/{remote.name}/{name}", checkpoint / name, expected.size)
                    if got != expected:
                        raise DamagedCheckpoint(
                            f"{self.address}: {remote.name}/{name}: expected {described(expected)}, got "
                            f"{described(got)}; take an older checkpoint"
                        )
                (checkpoint / MANIFEST).write_bytes(remote.manifest)
                inspect_checkpoint(checkpoint, verify=False)
                for name in self._fetch_beside(staging, beside, there):
                    os.replace(staging / name, Path(into) / name)
                path = free_path(root, f"step-{remote.step:08d}")
                os.rename(checkpoint, path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        return replace(inspect_checkpoint(path, verify=False), verified=True)  # hashed while it came

    def check_apart(self, folder: Path) -> None:
        """ValueError if this place is where the run itself lies: a copy beside the original saves nothing."""

    # ---- what each kind of place does in its own way

    def _list(self) -> dict[str, int]:
        """Sizes in bytes of the run's files there, by their names below the run; no other run's."""
        raise NotImplementedError

    def _read(self, name: str) -> bytes:
        """A small file."""
        raise NotImplementedError

    def _fetch(self, name: str, target: Path, size: int) -> StoredFile:
        """Write a file of ``size`` bytes to ``target``; returns what was written, at most a little more than that."""
        raise NotImplementedError

    def _upload(self, local: LocalCopy, alive: Callable[[], bool]) -> int:
        raise NotImplementedError

    def _advice(self, error: Exception) -> str:
        """What to do about an error of the library that reaches the place."""
        return "look whether the network is on (on Kaggle: Internet, in the notebook's settings) and try again later"

    # ---- what they share

    @contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        """Whatever a library raises in the block becomes a MirrorError: where, at what, and what to do."""
        try:
            yield
        except (MirrorError, CheckpointError):
            raise
        except Exception as error:
            text = f"{self.address}: {doing} failed: {brief(error)}; {self._advice(error)}"
            raise MirrorError(getattr(error, "errno", None), text) from error

    def _within(self, work: Callable[[], Any], size: int = 0) -> Any:
        """What ``work`` returns or raises; MirrorError when it takes too long. A hung call is left alone."""
        outcome: dict[str, Any] = {}

        def run() -> None:
            try:
                outcome["result"] = work()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=run, name="kd_kit mirror download", daemon=True)
        thread.start()
        thread.join(seconds := self.patience + size / SLOWEST)
        if "error" in outcome:
            raise outcome["error"]
        if "result" not in outcome:
            raise MirrorError(f"{self.address}: expected an answer within {seconds:.0f} s, got none; try again later")
        return outcome["result"]

    def _fetch_patiently(self, name: str, target: Path, size: int) -> StoredFile:
        return self._within(lambda: self._fetch(name, target, size), size)

    def _found(self, there: Mapping[str, int]) -> list[RemoteCheckpoint]:
        found = []
        for name, folder in manifests(there):
            try:
                if there[name] > JSON_LIMIT:
                    raise DamagedCheckpoint(f"{MANIFEST}: expected at most {JSON_LIMIT} bytes, got {there[name]}")
                remote = parse_manifest(folder, self._read(name))
                for file, expected in remote.info.files.items():
                    if (got := there.get(f"ckpt/{folder}/{file}", "no such file")) != expected.size:
                        raise DamagedCheckpoint(f"{file}: expected {expected.size} bytes, got {got}")
            except CheckpointError as error:
                self.refused.append(f"{folder}: {brief(error)}")
                continue
            found.append(remote)
        return sorted(found, key=lambda remote: (remote.step, remote.save_number), reverse=True)

    def _about(self, there: Mapping[str, int]) -> dict[str, StoredFile]:
        """What COPY.json says of the weights there; nothing where it is not to be believed."""
        if not 0 < there.get(ABOUT, 0) <= JSON_LIMIT:
            return {}
        try:
            content = json.loads(self._read(ABOUT))
            if content.pop("seal") != seal(content):
                return {}
            return {name: StoredFile(**file) for name, file in content["files"].items() if name in WEIGHTS}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    def _unsent(self, local: LocalCopy, there: Mapping[str, int]) -> dict[str, Path]:
        """The weights that the place does not have yet, or has of another content."""
        about = self._about(there)
        return {
            name: path
            for name, path in local.weights.items()
            if about.get(name) != local.about[name] or there.get(name) != local.about[name].size
        }

    def _fetch_beside(self, staging: Path, beside: Mapping[str, int], there: Mapping[str, int]) -> list[str]:
        about, good = self._within(lambda: self._about(there)), []
        for name, size in beside.items():
            try:
                if size > LIMITS.get(name, size):
                    raise ValueError(f"expected at most {LIMITS[name]} bytes, got {size}")
                if name in WEIGHTS and name not in about:
                    raise ValueError(f"expected its sha256 in {ABOUT}, got none")
                got = self._fetch_patiently(name, staging / name, size)
                expected = about.get(name, StoredFile(size, got.sha256))
                if got != expected:
                    raise ValueError(f"expected {described(expected)}, got {described(got)}")
                _check_content(staging / name)
            except (ValueError, RecursionError, SafetensorError) as error:
                self.refused.append(f"{name}: {brief(error)}; left out")
                continue
            good.append(name)
        return good


def _check_content(path: Path) -> None:
    """Raise if a file beside the checkpoints is not of its kind; its name tells which."""
    if path.name == "RUN.json":
        content: Any = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            file.keys()


def _forecast_space(root: Path, needed: int) -> None:
    free = room(root, shutil.disk_usage(root).free)
    if needed > free:
        raise CheckpointError(
            errno.ENOSPC,
            f"download: expected {needed:,} bytes free for {root}, got {free:,}; nothing was fetched; make room there",
        )
