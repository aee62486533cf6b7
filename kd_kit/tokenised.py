"""Texts to tokens on both sides: kept in memory, or, of much text, in a file of ``datasets`` that is read back.

Tokenising is the slow part of preparing text. A file of it is named by everything that decides what it holds (texts,
tokenizers, versions), so that the same cell run again, or another run on the same text, maps it into memory instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd_kit.align import byte_ends, starts_of
from kd_kit.pair import TokenizerPair
from kd_kit.rows import NOT_GIVEN_BACK, unencodable

LARGE = 4_000_000  # characters, 6 to 13 seconds of tokenising in one thread; below it a file is not worth its room
FORMAT = 1  # of the file, one higher with every change of what is in it
ENCODE_AT_ONCE = 32  # documents per call of a tokenizer: bounds memory, costs nothing
_ROOM = 10  # bytes of a file for a byte of text, at most: twelve a token, two sides, some 2.4 bytes of text a token
_FORSAKEN = 3 * 24 * 3600  # seconds after which an unfinished file is one of a process that was killed
_ARRAYS = ("student_ids", "student_ends", "teacher_ids", "teacher_ends")


class Document(NamedTuple):
    """A text in both tokenizations: ids [n] int32, and the byte at which each token ends, [n] int64."""

    student_ids: np.ndarray
    student_ends: np.ndarray
    teacher_ids: np.ndarray
    teacher_ends: np.ndarray


Take = Callable[[int, Sequence["Document | str"]], list[bool]]


def tokenise(texts: list[str], pair: TokenizerPair, take: Take) -> Sequence[Document]:
    """The documents of texts, in memory; of ``LARGE`` characters or more in a file, mapped into memory.

    The file lies in the folder ``kd_kit`` of ``datasets``' cache (``HF_DATASETS_CACHE``, ``HF_HOME``) and may be
    deleted at any time when nothing reads it. There is none where ``datasets.disable_caching()`` was called, or for a
    tokenizer written in Python, which cannot be told from another one of the same vocabulary. Where it cannot be
    written, that is printed and the documents stay in memory.

    Args:
        take: given the number of the first of a few texts and what became of each, a document or the reason why there
            is none; in order, every text once. Says which of them to keep; may raise to stop.

    Returns:
        the documents that ``take`` kept.
    """
    kept: list[bool] = []
    if sum(map(len, texts)) < LARGE:
        return _in_memory(texts, pair, take, kept)
    import datasets

    stopped: list[BaseException] = []

    def encode_some(start: int) -> list[Document | str]:
        try:
            found = encode(pair, texts[start : start + ENCODE_AT_ONCE])
            kept.extend(take(start, found))
            return found
        except BaseException as error:  # not the disk's
            stopped.append(error)
            raise

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "kd_kit"
    trouble = ""
    try:
        key = _key(texts, pair)
        if key is None:
            return _in_memory(texts, pair, take, kept)
        path = folder / f"{key[:32]}.arrow"
        there = _is_whole(path, key)
        if not there:
            _write(path, key, texts, encode_some)
        stored = StoredDocuments(path)
    except MemoryError:
        raise
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}"  # the error itself would hold on to a deleted file's room
    if stopped:
        raise stopped[0]
    if trouble:
        print(f"build_data: tokens stay in memory, not in {folder}: {trouble}")
        return _in_memory(texts, pair, take, kept)
    for start in range(0, len(texts), ENCODE_AT_ONCE) if there else ():
        kept += take(start, stored.found(slice(start, start + ENCODE_AT_ONCE)))
    stored.keep(np.flatnonzero(kept))
    return stored


def encode(pair: TokenizerPair, texts: list[str]) -> list[Document | str]:
    """The documents of these texts; the reason where ``pair.encode`` gives nothing or raises."""
    try:
        return [
            NOT_GIVEN_BACK
            if both is None
            else Document(both[0].astype(np.int32), byte_ends(both[1]), both[2].astype(np.int32), byte_ends(both[3]))
            for both in pair.encode([pair.normalise(t) for t in texts])
        ]
    except MemoryError:
        raise
    except Exception as error:
        return [unencodable(error)] if len(texts) == 1 else [one for t in texts for one in encode(pair, [t])]


def _in_memory(texts: list[str], pair: TokenizerPair, take: Take, kept: list[bool]) -> list[Document]:
    """The documents to keep; of the first texts it is known from ``kept``, and they are not taken again."""
    out = []
    for start in range(0, len(texts), ENCODE_AT_ONCE):
        found = encode(pair, texts[start : start + ENCODE_AT_ONCE])
        chosen = kept[start : start + len(found)] or take(start, found)
        out += [document for document, wanted in zip(found, chosen, strict=True) if wanted]
    return out


# --- the file --------------------------------------------------------------------------------------------------------


def _key(texts: list[str], pair: TokenizerPair) -> str | None:
    """Hash of all that the file's content depends on; None where that cannot be told, or nothing is to be cached."""
    import datasets

    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (pair.teacher, pair.student)]
    if not datasets.is_caching_enabled() or None in backends:
        return None
    digest = hashlib.sha256()

    def add(part: str) -> None:
        content = part.encode(errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)

    # the package's own word: it may lie on the path without being installed
    versions = [sys.modules[__package__].__version__, metadata.version("tokenizers")]
    add(repr((FORMAT, *versions, pair.fingerprint)))
    # two tokenizers of one vocabulary may still cut a text differently: by their merges, or by how they split it first
    for thing in (pair, pair.teacher, pair.student):
        add(f"{type(thing).__module__}.{type(thing).__qualname__}")
    for backend in backends:
        rules = json.loads(backend.to_str())
        # the settings of a single call, which whoever used the tokenizer last has left behind
        add(json.dumps({name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}))
    for text in texts:
        add(text)
    return digest.hexdigest()


def _seal(path: Path) -> Path:
    """Where it is written down what a file was made of, and the hash that it must have."""
    return path.with_suffix(".json")


def _is_whole(path: Path, key: str) -> bool:
    """Whether a file is there and is the one that was written for ``key``, to the last bit."""
    if not path.exists():
        return False
    try:
        if json.loads(_seal(path).read_text()) == _content_of(path, key):
            return True
    except (OSError, ValueError):
        pass
    print(f"build_data: {path} is damaged, or another program's; it is made again")
    return False


def _content_of(path: Path, key: str) -> dict[str, str]:
    with path.open("rb") as file:
        return {"key": key, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, key: str, texts: list[str], encode_some: Callable[[int], list[Document | str]]) -> None:
    """Tokenise into a file, which appears under its name when it is finished, and its seal after it.

    Raises:
        OSError: no room, or a folder that cannot be written to.
    """
    import datasets
    import pyarrow

    types = {name: pyarrow.list_(pyarrow.int32() if name.endswith("ids") else pyarrow.int64()) for name in _ARRAYS}
    schema = pyarrow.schema({**types, "refused": pyarrow.string()})
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob("making-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _FORSAKEN:
                shutil.rmtree(old, ignore_errors=True)
    wanted = _ROOM * sum(len(text.encode(errors="surrogatepass")) for text in texts)
    free = shutil.disk_usage(path.parent).free
    if free < wanted:
        raise OSError(f"expected {wanted / 1e9:.2f} GB free for the tokens, got {free / 1e9:.2f}")

    def table(starts: list[int]):
        return _table([one for start in starts for one in encode_some(start)], schema)

    # a folder of our own: `map` leaves its unfinished file behind where closing it fails, too
    staging = Path(tempfile.mkdtemp(prefix="making-", dir=path.parent))
    try:
        # rows are the numbers of texts and not the texts, which would all be copied
        numbers = datasets.Dataset.from_dict({"start": list(range(0, len(texts), ENCODE_AT_ONCE))})
        with _no_progress_bars():
            numbers.map(
                table,
                batched=True,
                batch_size=1,
                input_columns=["start"],
                remove_columns=["start"],
                features=datasets.Features.from_arrow_schema(schema),
                cache_file_name=str(staging / path.name),
                load_from_cache_file=False,
                new_fingerprint=key[:32],
            )
        _seal(staging / path.name).write_text(json.dumps(_content_of(staging / path.name, key)))
        (staging / path.name).replace(path)
        _seal(staging / path.name).replace(_seal(path))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _table(found: list[Document | str], schema):
    """A few texts as rows of the file; a refused one has empty lists."""
    import pyarrow

    nothing = Document(*(np.zeros(0, np.int32), np.zeros(0, np.int64)) * 2)
    documents = [nothing if isinstance(one, str) else one for one in found]
    columns = []
    for name in _ARRAYS:
        rows = [getattr(document, name) for document in documents]
        starts = starts_of([len(row) for row in rows]).astype(np.int32)
        columns.append(pyarrow.ListArray.from_arrays(pyarrow.array(starts), pyarrow.array(np.concatenate(rows))))
    reasons = [one if isinstance(one, str) else None for one in found]
    return pyarrow.Table.from_arrays([*columns, pyarrow.array(reasons, pyarrow.string())], schema=schema)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the bar of ``datasets``; the user's own setting comes back, and one in the environment stands."""
    from datasets import config, utils

    quiet = config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            utils.enable_progress_bars()


class StoredDocuments(Sequence):
    """Documents in a file, mapped into memory: a document is four views of it, made when it is asked for.

    Another process gets the path and maps the file itself, a forked one shares it.
    """

    def __init__(self, path: Path, rows: np.ndarray | None = None):
        """``rows``: [D] int64, the documents, by their row in the file; all if left out, refused ones as no tokens."""
        import datasets

        self._path = path
        table = datasets.Dataset.from_file(str(path)).data
        self._refused = table.column("refused")
        arrays = [table.column(name).chunks for name in _ARRAYS]
        # [chunk][array]: tokens of some rows, one row behind the other
        views = [[part.values.to_numpy(zero_copy_only=True) for part in chunks] for chunks in arrays]
        self._values = list(zip(*views, strict=True))
        counts = [len(part) for part in arrays[0]]
        # of every row its chunk, and there its begin and end in the student's arrays, then in the teacher's
        where = [np.repeat(np.arange(len(counts)), counts)]
        for side in (0, 2):
            starts = [part.offsets.to_numpy(zero_copy_only=True) for part in arrays[side]]
            where += [np.concatenate([s[:-1] for s in starts]), np.concatenate([s[1:] for s in starts])]
        self._where = np.stack(where, axis=1)
        self._rows = np.arange(len(self._where))
        if rows is not None:
            self.keep(rows)

    def keep(self, rows: np.ndarray) -> None:
        """Forget all but these rows of the file; once, as they are counted in the whole file."""
        self._rows, self._where = rows, self._where[rows]

    def found(self, rows: slice) -> list[Document | str]:
        """What became of these texts: a document, or the reason why there is none. Before any of them is forgotten."""
        documents = self[rows]
        reasons = self._refused.slice(rows.start, len(documents)).to_pylist()
        return [document if why is None else why for document, why in zip(documents, reasons, strict=True)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        chunk, begin, end, theirs, their_end = self._where[index].tolist()
        ids, ends, their_ids, their_ends = self._values[chunk]
        return Document(ids[begin:end], ends[begin:end], their_ids[theirs:their_end], their_ends[theirs:their_end])

    def __reduce__(self):
        return StoredDocuments, (self._path, self._rows)
