"""A teacher's knowledge of a training text on disk: what it was made of, and shards that are read in place.

    <folder>/CACHE.json                           what it was made of, and how true it is
    <folder>/shard-00012-3f9a....safetensors      the windows of one stretch; its name holds its hash
    <folder>/LOCK                                 which process makes which shard, see :mod:`kd_kit.shard_claims`
    <folder>/.shard-00012-4711/                   what process 4711 has half written

A shard appears by one rename when it is whole, so building may be killed at any time and goes on with the next one.
Whoever changes something about a shard has claimed it. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_kit.cache_fidelity import fidelity_tables
from kd_kit.shard_claims import Claims
from kd_kit.table import Table, short

FORMAT = 2
MANIFEST = "CACHE.json"
PER_SHARD = 256
"""Windows of a shard, a quarter of an hour of work at most; fewer of a small text."""

_SHARD = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.safetensors")
_HALF_WRITTEN = re.compile(r"\.shard-(\d{5,})-\d+")
_HALF_SAID = re.compile(rf"\.{re.escape(MANIFEST)}-\d+")
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
        self._open: dict[int, dict[str, Tensor]] = {}
        self._ends: dict[tuple[int, str], list[int]] = {}
        self.shards: dict[int, Path] = {}
        self.look()

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Cache:
        """The cache in a folder.

        Raises:
            ValueError: there is none, or it is of another format.
        """
        try:
            manifest = _read_manifest(Path(folder))
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

    def said_again(self) -> dict[str, Any]:
        """What CACHE.json says by now."""
        self.manifest = _read_manifest(self.folder)
        return self.manifest

    def write_manifest(self) -> None:
        """Write down what the manifest says. For whoever has claimed the folder."""
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
    def windows_there(self) -> int:
        return sum(len(self.windows_of(number)) for number in self.shards)

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
        """Put a shard in its place. For whoever has claimed it.

        Args:
            pieces: {name: its rows in every window of the shard, in order}, as :meth:`stored` makes them.
            counts: {kind of rows: how many each window has}.
        """
        tensors = {name: torch.cat(list(rows)) for name, rows in pieces.items()}
        for kind, each in counts.items():
            tensors[_OFFSETS + kind] = torch.cumsum(torch.tensor([0, *each]), dim=0)
        with self._beside(number) as temporary:
            save_file(tensors, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            return self._put(number, temporary, f"shard-{number:05}-{_hash(temporary)}.safetensors")

    @contextlib.contextmanager
    def _beside(self, number: int) -> Iterator[Path]:
        """A file to write a shard into, in a folder of its own: safetensors may write others beside it."""
        place = self.folder / f".shard-{number:05}-{os.getpid()}"
        place.mkdir(exist_ok=True)
        try:
            yield place / "shard"
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _put(self, number: int, temporary: Path, name: str) -> Path:
        temporary.replace(self.folder / name)
        self.shards[number] = self.folder / name
        return self.shards[number]

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A piece as it is written: ids as narrow as the student's vocabulary allows, numbers in the precision."""
        if name.endswith("/ids"):
            ids = tensor.detach().cpu().to(getattr(torch, self.manifest["ids"]))
            # every safetensors knows signed numbers of two bytes, not every one the unsigned ones
            return ids.view(torch.int16) if ids.dtype == torch.uint16 else ids
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

    def clear_leftovers(self, claims: Claims) -> None:
        """Delete what killed builds left half written; what a living process writes is claimed."""
        for path in sorted(self.folder.glob(".*")):
            if (found := _HALF_WRITTEN.fullmatch(path.name)) and path.is_dir():
                with claims.shard(int(found[1])) as mine:
                    if mine:
                        shutil.rmtree(path, ignore_errors=True)
            elif _HALF_SAID.fullmatch(path.name) and path.is_file():
                with claims.folder():
                    path.unlink(missing_ok=True)

    def drop_damaged(self, claims: Claims) -> list[str]:
        """Delete shards whose content is not what their name says; their names."""
        bad = []
        for number, path in list(self.shards.items()):
            if _is_whole(path):
                continue
            with claims.shard(number) as mine:
                if mine and not _is_whole(path):  # nobody has seen to it in the meantime
                    path.unlink(missing_ok=True)
                    bad.append(path.name)
        self.look()
        return bad

    def take_from(self, other: Cache, claims: Claims) -> int:
        """Copy the whole shards that another cache of the same content has and this one lacks; how many."""
        taken = 0
        for number in [n for n in self.missing if n in other.shards]:
            with claims.shard(number) as mine:
                self.look()
                if mine and number not in self.shards and _is_whole(source := other.shards[number]):
                    with self._beside(number) as temporary:
                        shutil.copyfile(source, temporary)
                        self._put(number, temporary, source.name)
                    taken += 1
        return taken

    # --- reading ------------------------------------------------------------------------------------------------

    def fetch(self, name: str, kind: str, windows: Sequence[int], *, pinned: bool = False) -> Tensor | None:
        """The rows of a piece in these windows, one after the other, as they are stored; None where it has no such.

        They are copied once, from the files' pages to where they are used.

        Args:
            pinned: to memory that a card reads by itself.

        Raises:
            ValueError: a shard that is not there, or cannot be read.
        """
        parts = []
        for window in windows:
            number, place = divmod(window, self.manifest["per_shard"])
            shard = self._shard(number)
            if name not in shard:
                return None
            ends = self._ends_of(number, kind)
            parts.append(shard[name][ends[place] : ends[place + 1]])
        if not pinned:
            return torch.cat(parts)
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=True))

    def counts(self, kind: str, windows: Sequence[int]) -> list[int]:
        """Rows of a kind in each of these windows."""
        out = []
        for window in windows:
            number, place = divmod(window, self.manifest["per_shard"])
            ends = self._ends_of(number, kind)
            out.append(ends[place + 1] - ends[place])
        return out

    def _ends_of(self, number: int, kind: str) -> list[int]:
        ends = self._ends.get((number, kind))
        if ends is None:
            ends = self._ends[number, kind] = self._shard(number)[_OFFSETS + kind].tolist()
        return ends

    def _shard(self, number: int) -> dict[str, Tensor]:
        """Every tensor of a shard, in the pages of its file: nothing is read before it is looked at."""
        if number not in self._open:
            if number not in self.shards:
                raise ValueError(
                    f"Cache: expected shard {number} of {self.count} in {str(self.folder)!r}, got none; "
                    "kd.build_cache(trainer) makes what is missing"
                )
            try:
                with safe_open(self.shards[number], "pt") as file:
                    self._open[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"Cache: expected a whole shard, got {self.shards[number].name} ({error}); kd.build_cache(trainer) "
                    "finds damaged ones and makes them again"
                ) from error
        return self._open[number]

    def __deepcopy__(self, memo) -> Cache:
        return self  # it only reads

    def __repr__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)

    @property
    def tables(self) -> list[Table]:
        """What it holds, how large and how true it is; and what fewer cells would leave unsaid, a table per reading."""
        said, size, done = self.manifest, self.size, self.windows_there
        rows = [
            ("teacher", str(said["made_of"]["teacher"])),
            ("windows", f"{done:,} of {said['windows']:,}, {said['precision']} precision"),
            ("size", f"{size / 1e6:,.1f} MB in {len(self.shards):,} of {self.count:,} shards"),
        ]
        if tokens := said["tokens"] * done / max(said["windows"], 1):
            rows.append(("bytes per student token", f"{size / tokens:,.0f}"))
        rows += [(f"of these: {name}", f"{value:,.0f}") for name, value in said.get("bytes_per_token", {}).items()]
        fidelity = said["fidelity"] or {"read_back": {}, "by_k": {}}
        rows += [(f"stored against live: {what}", short(value)) for what, value in fidelity["read_back"].items()]
        return [Table("teacher cache", ("", ""), tuple(rows), words=("",)), *fidelity_tables(fidelity)]


def ids_type(vocabulary: int) -> str:
    """What ids of a student's vocabulary are stored as: two bytes where they fit, else four.

    torch knows unsigned numbers of four bytes but can do little with them, and signed ones hold two thousand million.
    """
    return "uint16" if vocabulary <= 2**16 else "int32"


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _is_whole(path: Path) -> bool:
    """Whether a shard's content is what its name says; False where it is gone."""
    try:
        return _hash(path) == _SHARD.fullmatch(path.name)[2]
    except FileNotFoundError:
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
