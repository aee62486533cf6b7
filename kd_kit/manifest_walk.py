"""Every folder with a MANIFEST.json below a folder, in any layout, without getting lost in a tree of any size."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from kd_kit.checkpoint_folder import MANIFEST, Refusal

DEPTH = 8  # levels of folders below the one that is searched
ENTRIES = 20_000  # in all
ENTRIES_OF_ONE = 2_000  # of one folder: beside a hundred thousand pictures there may be a run

_UNFINISHED = (".tmp-", ".del-", ".bad-")


class ManifestWalk:
    """Walks below one folder or several, which share one bound on the entries that are read.

    Attributes:
        stopped: where a bound ended the walk, in words.
        unreadable: folders that could not be listed, and why.
    """

    def __init__(self):
        self.stopped: list[str] = []
        self.unreadable: list[Refusal] = []
        self._entries_left = ENTRIES

    def below(self, top: Path) -> Iterator[Path]:
        """The folders, level by level, so that a deep tree does not hide what lies high.

        ``top`` may be a link; links below it are not followed, and what was never finished is left out.
        """
        ahead = deque([(top, 0)])
        deep = False
        while ahead:
            folder, depth = ahead.popleft()
            if os.path.isfile(folder / MANIFEST):
                yield folder
            inside, saw_all = self._folders_in(folder)
            if depth == DEPTH:
                deep = deep or bool(inside)
                continue
            ahead += [(path, depth + 1) for path in inside]
            if not saw_all and self._entries_left == 0:
                self.stopped.append(f"after {ENTRIES:,} entries, in {folder}")
                break
            if not saw_all:
                self.stopped.append(f"after {ENTRIES_OF_ONE:,} entries of {folder}")
        for folder, _ in ahead:  # those whose names are known cost no more entries
            if os.path.isfile(folder / MANIFEST):
                yield folder
        if deep:
            self.stopped.append(f"{DEPTH} folders below {top}")

    def _folders_in(self, folder: Path) -> tuple[list[Path], bool]:
        """Its folders, and whether all of its entries were seen."""
        limit = min(ENTRIES_OF_ONE, self._entries_left)
        try:
            with os.scandir(folder) as entries:
                listed = list(itertools.islice(entries, limit + 1))
        except OSError as error:
            self.unreadable.append(Refusal(folder, f"cannot be looked into: {error}"))
            return [], True
        self._entries_left -= min(len(listed), limit)
        folders = [
            Path(entry.path)
            for entry in listed[:limit]
            if not entry.name.startswith(_UNFINISHED) and entry.is_dir(follow_symlinks=False)
        ]
        return sorted(folders), len(listed) <= limit
