"""A teacher's knowledge of a training text on disk: what it was made of, and shards that are read in place.

    <folder>/CACHE.json                           what it was made of, and how true it is
    <folder>/shard-00012-3f9a....safetensors      the windows of one stretch; its name holds its hash

A shard appears by one rename when it is whole, so building may be killed at any time and goes on with the next one.
Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_kit.table import Table

FORMAT = 1
MANIFEST = "CACHE.json"
PER_SHARD = 256
"""Windows of a shard, a quarter of an hour of work at most; fewer of a small text."""

_SHARD = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.safetensors")
_LEFTOVER = re.compile(rf"\.shard-\d{{5,}}-\d+(\.tmp\w*)?|\.{re.escape(MANIFEST)}-\d+|\.tmp\w{{6}}")  # safetensors' too
_OFFSETS = "offsets/"


class Cache:
    """A folder of shards. Made by :func:`kd_kit.build_cache`, opened by :meth:`open`.

    Attributes:
        folder: where it is. manifest: what CACHE.json says.
        shards: {number: its file}, those that are there.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self._open: dict[int, Any] = {}
        self._offsets: dict[tuple[int, str], Tensor] = {}
        self.shards: dict[int, Path] = {}
        self.look()

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Cache:
        """The cache in a folder.

        Raises:
            ValueError: there is none, or it is of another format.
        """
        path = Path(folder) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            known = manifest["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Cache: expected a cache with {MANIFEST} in {str(folder)!r}, got {type(error).__name__}; build it "
                "with kd.build_cache(trainer)"
            ) from error
        if not known:
            raise ValueError(
                f"Cache: expected format {FORMAT} in {str(folder)!r}, got {manifest['format']!r}; build it again in "
                "another folder"
            )
        return cls(Path(folder), manifest)

    def look(self) -> None:
        """See which shards are there."""
        found = ((int(m[1]), p) for p in sorted(self.folder.iterdir()) if (m := _SHARD.fullmatch(p.name)))
        self.shards = dict(found)

    def write_manifest(self) -> None:
        temporary = self.folder / f".{MANIFEST}-{os.getpid()}"
        temporary.write_text(json.dumps(self.manifest, indent=1), encoding="utf-8")
        temporary.replace(self.folder / MANIFEST)

    @property
    def count(self) -> int:
        """Shards that it has when it is whole."""
        return -(-self.manifest["windows"] // self.manifest["per_shard"])

    @property
    def missing(self) -> list[int]:
        return [number for number in range(self.count) if number not in self.shards]

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def size(self) -> int:
        """Bytes of all shards that are there."""
        return sum(path.stat().st_size for path in self.shards.values())

    def windows_of(self, number: int) -> range:
        """The windows of a shard, by their numbers in the training set."""
        each = self.manifest["per_shard"]
        return range(number * each, min((number + 1) * each, self.manifest["windows"]))

    # --- writing ------------------------------------------------------------------------------------------------

    def write(self, number: int, pieces: Mapping[str, Sequence[Tensor]], counts: Mapping[str, Sequence[int]]) -> Path:
        """Put a shard in its place.

        Args:
            pieces: {name: its rows in every window of the shard, in order}, as :meth:`stored` makes them.
            counts: {kind of rows: how many each window has}.
        """
        tensors = {name: torch.cat(list(rows)) for name, rows in pieces.items()}
        for kind, each in counts.items():
            tensors[_OFFSETS + kind] = torch.cumsum(torch.tensor([0, *each]), dim=0)
        temporary = self.folder / f".shard-{number:05}-{os.getpid()}"
        try:
            save_file(tensors, temporary)
            path = self.folder / f"shard-{number:05}-{_hash(temporary)}.safetensors"
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self.shards[number] = path
        return path

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A piece as it is written: ids as narrow as the student's vocabulary allows, numbers in the precision."""
        if name.endswith("/ids"):
            return tensor.detach().cpu().to(getattr(torch, self.manifest["ids"]))
        tensor = tensor.detach().cpu().float()
        if self.manifest["precision"] == "full":
            return tensor
        half = tensor.half()
        if not torch.equal(half.isinf(), tensor.isinf()):
            raise ValueError(
                f"build_cache: expected {name} within the range of float16 (65,504), got "
                f"{float(tensor[tensor.isfinite()].abs().max()):.3g}; call build_cache(trainer, precision='full'), "
                f"after deleting what is in {str(self.folder)!r}"
            )
        return half

    def clear_leftovers(self) -> None:
        """Delete what killed builds left half written."""
        for path in self.folder.glob(".*"):
            if _LEFTOVER.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)

    def drop_damaged(self) -> list[str]:
        """Delete shards whose content is not what their name says; their names."""
        bad = []
        for number, path in list(self.shards.items()):
            if _hash(path) != _SHARD.fullmatch(path.name)[2]:
                path.unlink()
                del self.shards[number]
                bad.append(path.name)
        return bad

    def take_from(self, other: Cache) -> int:
        """Copy the whole shards that another cache of the same content has and this one lacks; how many."""
        taken = 0
        for number in self.missing:
            source = other.shards.get(number)
            if source is None or _hash(source) != _SHARD.fullmatch(source.name)[2]:
                continue
            temporary = self.folder / f".shard-{number:05}-{os.getpid()}"
            try:
                shutil.copyfile(source, temporary)
                temporary.replace(self.folder / source.name)
            finally:
                temporary.unlink(missing_ok=True)
            self.shards[number] = self.folder / source.name
            taken += 1
        return taken

    # --- reading ------------------------------------------------------------------------------------------------

    def fetch(self, name: str, kind: str, windows: Sequence[int]) -> list[Tensor]:
        """The rows of a piece in these windows, as they are stored; empty where the cache has no such piece.

        Raises:
            ValueError: a shard that is not there, or cannot be read.
        """
        out = []
        for window in windows:
            number, place = divmod(window, self.manifest["per_shard"])
            file = self._shard(number)
            if name not in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return []
            begin, end = self._between(number, kind, place)
            out.append(file.get_slice(name)[begin:end])
        return out

    def counts(self, kind: str, windows: Sequence[int]) -> list[int]:
        """Rows of a kind in each of these windows."""
        each = self.manifest["per_shard"]
        return [end - begin for begin, end in (self._between(w // each, kind, w % each) for w in windows)]

    def _between(self, number: int, kind: str, place: int) -> tuple[int, int]:
        offsets = self._offsets.get((number, kind))
        if offsets is None:
            offsets = self._offsets[number, kind] = self._shard(number).get_tensor(_OFFSETS + kind)
        return int(offsets[place]), int(offsets[place + 1])

    def _shard(self, number: int):
        if number not in self._open:
            if number not in self.shards:
                raise ValueError(
                    f"Cache: expected shard {number} of {self.count} in {str(self.folder)!r}, got none; "
                    "kd.build_cache(trainer) makes what is missing"
                )
            try:
                self._open[number] = safe_open(self.shards[number], "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"Cache: expected a whole shard, got {self.shards[number].name} ({error}); kd.build_cache(trainer) "
                    "finds damaged ones and makes them again"
                ) from error
        return self._open[number]

    def __deepcopy__(self, memo) -> Cache:
        return self  # it only reads

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    @property
    def table(self) -> Table:
        """What it holds, how large and how true it is."""
        said, size = self.manifest, self.size
        done = sum(len(self.windows_of(number)) for number in self.shards)
        rows = [
            ("teacher", str(said["made_of"]["teacher"])),
            ("windows", f"{done:,} of {said['windows']:,}, {said['precision']} precision"),
            ("size", f"{size / 1e6:,.1f} MB in {len(self.shards):,} of {self.count:,} shards"),
        ]
        if tokens := said["tokens"] * done / max(said["windows"], 1):
            rows.append(("bytes per student token", f"{size / tokens:,.0f}"))
        rows += [(f"of these: {name}", f"{value:,.0f}") for name, value in said.get("bytes_per_token", {}).items()]
        rows += [(f"stored against live: {name}", text) for name, text in (said.get("fidelity") or {}).items()]
        return Table("teacher cache", ("", ""), tuple(rows), words=("",))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
