"""Where a run can be gone on from: the newest good checkpoint of it, wherever it lies, brought into the run folder.

On Kaggle a new session starts with an empty folder and finds the output of the last one below /kaggle/input, in a
layout of Kaggle's or of the user's. So nothing is read from names of folders and from their dates: every MANIFEST.json
is a candidate, it belongs to the run that RUN.json two levels up or its own state names, and the highest (step, save
number) of which every sha256 is right wins. What lies outside the run folder is only read.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from kd_kit.adoption import CONTROL, Source, StoredRun, adopt, complete, finish_adoption, run_of, stored_run
from kd_kit.checkpoint import held, remove_leftovers
from kd_kit.checkpoint_folder import (
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    Refusal,
    checkpoint_root,
    free_path,
    inspect_checkpoint,
    read_state,
    refusal_table,
    refuse,
    step_folders,
)
from kd_kit.manifest_walk import ManifestWalk

NEW, OWN, GIVEN, INPUT, MIRROR = "new", "run folder", "given", "input", "mirror"

_LINES = 50  # of the printed table


@dataclass(frozen=True, repr=False)
class Found:
    """What a run goes on from; prints as the table of all that was looked at.

    Attributes:
        origin: "new" (nothing can be gone on from), "run folder", "given", "input" or "mirror".
        path: the checkpoint, as it lies in the run folder now; None for a new run.
        step: optimizer steps done; 0 for a new run.
        run_id: None for a new run.
        refusals: what was passed over, and why.
        adopted_from: where it lay before it was brought into the run folder; None if it was there.
        stopped_looking: where the search ended before everything was seen; None if it saw everything.
    """

    origin: str
    path: Path | None
    step: int
    run_id: str | None
    refusals: list[Refusal]
    adopted_from: str | None
    stopped_looking: str | None

    def __repr__(self) -> str:
        if self.path is None:
            first = "nothing to go on from was found"
        else:
            first = f"goes on from step {self.step} of run {self.run_id}: {self.path}"
        if self.adopted_from is not None:
            first += f", brought from {self.adopted_from} ({self.origin})"
        return _table(first, self.refusals, self.stopped_looking)


@dataclass(frozen=True)
class _Candidate:
    """A checkpoint that may be the one; ``remote`` instead of ``source`` while it is at the mirror's."""

    origin: str
    step: int
    save_number: int
    run_id: str
    where: Path | str
    source: Source | None = None
    remote: Any = None
    run: StoredRun | None = None
    given: bool = False

    def refusal(self, reason: object) -> Refusal:
        return Refusal(self.where, f"step {self.step}, save {self.save_number}: {reason}")


def find_run(
    folder: Path,
    name: str,
    check: Callable[[dict], None],
    *,
    given: Path | None = None,
    inputs: Sequence[Path] = (Path("/kaggle/input"),),
    place: Any = None,
) -> Found:
    """The newest good checkpoint of a run, in its folder; brought there if it lay elsewhere.

    To be called by whoever holds the run's lock, before anything is read from the folder. A checkpoint that lies in
    the folder already is hashed only if another one could take its place: whoever loads it compares the hashes.

    Args:
        folder: the run folder; may be missing.
        name: of the run, as given to ``build_session(run=...)``. Another name is taken from ``given`` only.
        check: raises ValueError, with a sentence, for the configuration of another run.
        given: a run folder, its ckpt, one checkpoint, or any folder above them. Its run is the one to go on with.
        inputs: folders below which every checkpoint is looked at; those that do not exist are passed over.
        place: a mirror: ``address``, ``newest()``, ``download(remote, into)``; asked once.

    Raises:
        ValueError: there is no folder ``given``.
        CheckpointError: nothing in ``given`` can be used, or the disk does not take what was found.
    """
    folder = Path(folder)
    if given is not None and not Path(given).is_dir():
        raise ValueError(
            f"find_run: expected a folder with a checkpoint, got {str(given)!r}, which is none; give a run folder, its "
            "ckpt, one checkpoint, or a folder above them"
        )
    with _told(folder):
        finish_adoption(folder)
        remove_leftovers(folder)  # what died before may have filled the disk
    search = _Search(folder, name, check)
    search.look_into_run_folder()
    if given is not None:
        search.look_below(Path(given), GIVEN)
    for top in inputs:
        search.look_below(Path(top), INPUT)
    if place is not None:
        search.ask(place)
    return search.choose(place, given)


class _Search:
    """One search: what it found so far, and what it refused."""

    def __init__(self, folder: Path, name: str, check: Callable[[dict], None]):
        self.folder, self.name, self.check = folder, name, check
        self.candidates: list[_Candidate] = []
        self.refusals: list[Refusal] = []
        self.run_ids: set[str] = set()  # of the runs whose checkpoints are here: no other run may come to them
        self.seen: set[Path] = set()
        self.refused_ids: dict[str, str] = {}  # runs at the mirror that are others, and why
        self.walk = ManifestWalk()

    # ---- gathering

    def look_into_run_folder(self) -> None:
        run = stored_run(self.folder)
        root = checkpoint_root(self.folder)
        wrong = self._other_config(run)
        for path in step_folders(root):
            self.seen.add(path.resolve())
            try:
                info = inspect_checkpoint(path, verify=False)
                lineage = run or _run_in_state(info)
            except OSError as error:
                self.refusals.append(refuse(path, error))
                continue
            if run is None:
                self.run_ids.add(info.run_id)
            found = _Candidate(OWN, info.step, info.save_number, info.run_id, path, run=lineage)
            if lineage is None:
                reason = "expected its run in RUN.json or in its state, got it in neither"
            elif lineage.run_id != info.run_id:
                reason = f"expected run {lineage.run_id!r}, got {info.run_id!r}"
            else:
                reason = wrong if run is not None else self._other_config(lineage)
            if reason is not None:
                self.refusals.append(found.refusal(reason))
                continue
            self.candidates.append(replace(found, source=Source(info, self.folder, lineage.config)))
        names = [path.name for path in root.iterdir()] if root.is_dir() else []
        if run is not None and any(name.startswith(("step-", ".bad-step-")) for name in names):
            self.run_ids.add(run.run_id)

    def look_below(self, top: Path, origin: str) -> None:
        if not os.path.isdir(top):
            return
        top = top.resolve()  # the folder itself may be a link; those below it are not followed
        within = None if origin == GIVEN else top
        own = self.folder.resolve()
        for path in self.walk.below(top):
            if path in self.seen or (origin != GIVEN and path.is_relative_to(own)):
                if origin == GIVEN:  # the run folder itself was given, or one around it
                    self.candidates = [replace(c, given=c.given or c.where.resolve() == path) for c in self.candidates]
                continue
            self.seen.add(path)
            try:
                info = inspect_checkpoint(path, verify=False)
                run, run_folder = _lineage(info, within)
            except OSError as error:
                self.refusals.append(Refusal(path, str(error)))
                continue
            if origin != GIVEN and run is not None and _is_control(run.name) and not _is_control(self.name):
                continue  # trained beside a run, in its folder: comes with that or not at all
            found = _Candidate(origin, info.step, info.save_number, info.run_id, path, run=run, given=origin == GIVEN)
            reason = self._refusal(run, by_path=origin == GIVEN) or self._other_id(info.run_id)
            if reason is not None:
                self.refusals.append(found.refusal(reason))
                continue
            self.candidates.append(replace(found, source=Source(info, run_folder, run.config)))
        self.refusals += self.walk.unreadable
        self.walk.unreadable.clear()

    def ask(self, place: Any) -> None:
        address = str(place.address)
        try:
            for remote in place.newest():
                where = f"{address}: {remote.name}"
                found = _Candidate(MIRROR, remote.step, remote.save_number, remote.run_id, where, remote=remote)
                reason = self._other_id(remote.run_id)
                if reason is None:
                    self.candidates.append(found)
                else:
                    self.refusals.append(found.refusal(reason))
        except OSError as error:
            said = str(error).removeprefix(f"{address}: ")
            self.refusals.append(Refusal(address, f"the mirror cannot be asked: {said}"))
        self.refusals += [Refusal(address, reason) for reason in getattr(place, "refused", ())]

    # ---- refusing

    def _refusal(self, run: StoredRun | None, *, by_path: bool) -> str | None:
        """Why a checkpoint elsewhere is not this run's, in words; None if it may be."""
        if run is None:
            return "expected its run in RUN.json or in its state, got it in neither"
        if by_path and _is_control(run.name) != _is_control(self.name):
            return f"expected a run like {self.name!r}, got {run.name!r}, which is trained beside another"
        if not by_path and run.name != self.name:
            got = "one without a name" if run.name is None else repr(run.name)
            return f"expected run {self.name!r}, got {got}; give its path to go on with it all the same"
        return self._other_config(run)

    def _other_config(self, run: StoredRun | None) -> str | None:
        try:
            if run is not None:
                self.check(dict(run.config))
        except ValueError as error:
            return str(error)
        return None

    def _other_id(self, run_id: str) -> str | None:
        if self.run_ids and run_id not in self.run_ids:
            here = " or ".join(map(repr, sorted(self.run_ids)))
            return f"expected run {here}, whose checkpoints are in {self.folder}, got {run_id!r}"
        return None

    # ---- choosing

    def choose(self, place: Any, given: Path | None) -> Found:
        if given is not None:
            self._keep_to_given(given)
        # of two that are equally new the one that was looked at first stays first: the nearer one
        ranked = sorted(self.candidates, key=lambda c: (c.step, c.save_number), reverse=True)
        for i, candidate in enumerate(ranked):
            try:
                if candidate.origin == OWN:
                    return self._stay(candidate, alone=all(other.origin == OWN for other in ranked[i:]))
                return self._bring(candidate, place)
            except _Refused as error:
                self.refusals.append(error.refusal)
            if candidate.given and not any(other.given for other in ranked[i + 1 :]):
                self._nothing_given(given)
        return Found(NEW, None, 0, None, self.refusals, None, self._stopped())

    def _keep_to_given(self, given: Path) -> None:
        """Who gives a path has chosen a run: another one is not taken for being further on."""
        there = [candidate for candidate in self.candidates if candidate.given]
        if not there:
            self._nothing_given(given)
        there = [c for c in there if c.run is not None and c.run.name == self.name] or there
        run_ids = {candidate.run_id for candidate in there}
        if len(run_ids) > 1:
            names = sorted({f"{c.run.name!r}" if c.run is not None and c.run.name else c.run_id for c in there})
            raise CheckpointError(
                f"find_run: expected one run in {str(given)!r}, got {len(run_ids)}: {', '.join(names)}; give the "
                "folder of one of them"
            )
        for candidate in self.candidates:
            if candidate.run_id not in run_ids:
                self.refusals.append(candidate.refusal(f"expected a run that is in {given}, got {candidate.run_id!r}"))
        self.candidates = [candidate for candidate in self.candidates if candidate.run_id in run_ids]

    def _nothing_given(self, given: Path | None) -> NoReturn:
        first = (
            f"find_run: expected a checkpoint in {str(given)!r} that the run {self.name!r} can go on from, got none; "
            "give another path, or none for a new run"
        )
        raise CheckpointError(_table(first, self.refusals, self._stopped()))

    def _stay(self, candidate: _Candidate, *, alone: bool) -> Found:
        path = candidate.source.info.path
        try:
            if not alone:  # it stands in the way of others only if it is good
                inspect_checkpoint(path)
        except OSError as error:
            raise _Refused(refuse(path, error)) from error
        with _told(self.folder):
            if stored_run(self.folder) is None:
                complete(self.folder, self.name, candidate.source.info, candidate.run)
        return self._found(candidate, path)

    def _bring(self, candidate: _Candidate, place: Any) -> Found:
        with _told(self.folder):
            try:
                with self._fetched(candidate, place) as source:
                    path, left = adopt(self.folder, self.name, source)
            except CheckpointError as error:
                raise _Refused(candidate.refusal(error)) from error
        self.refusals += left
        if place is not None and candidate.remote is not None:
            self.refusals += [Refusal(str(place.address), reason) for reason in getattr(place, "refused", ())]
        return self._found(candidate, path)

    @contextmanager
    def _fetched(self, candidate: _Candidate, place: Any) -> Iterator[Source]:
        """The candidate in a folder of this machine.

        Raises:
            CheckpointError: it is not to be had, or not what was looked for.
            OSError: the disk is full.
        """
        if candidate.remote is None:
            yield candidate.source
            return
        if candidate.run_id in self.refused_ids:
            raise CheckpointError(self.refused_ids[candidate.run_id])
        root = checkpoint_root(self.folder)
        root.mkdir(parents=True, exist_ok=True)
        into = free_path(root, f".tmp-mirror-{os.getpid()}")  # what dies here is removed by the next search or save
        into.mkdir()
        try:
            with held(into):
                yield self._download(candidate, place, into)
        finally:
            shutil.rmtree(into, ignore_errors=True)

    def _download(self, candidate: _Candidate, place: Any, into: Path) -> Source:
        try:
            place.download(candidate.remote, into)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(error.errno, f"expected room for the mirror's checkpoint, got {error}") from error
            raise CheckpointError(error.errno, f"cannot be fetched from the mirror: {error}") from error
        found = step_folders(checkpoint_root(into))
        if len(found) != 1:
            raise DamagedCheckpoint(f"expected one checkpoint from the mirror, got {len(found)}")
        info = inspect_checkpoint(found[0], verify=False)  # hashed when it is moved to its place
        got = (info.step, info.save_number, info.run_id)
        if got != (candidate.step, candidate.save_number, candidate.run_id):
            raise DamagedCheckpoint(f"expected from the mirror what it lists, got step, save and run {got}")
        run, run_folder = _lineage(info, into)
        reason = self._refusal(run, by_path=False)
        if reason is not None:
            self.refused_ids[candidate.run_id] = reason  # true of all of that run: it is not fetched again
            raise CheckpointError(reason)
        return Source(info, run_folder, run.config, owned=True)

    def _found(self, candidate: _Candidate, path: Path) -> Found:
        origin, where = candidate.origin, str(candidate.where)
        adopted_from = None if origin == OWN else where
        return Found(origin, path, candidate.step, candidate.run_id, self.refusals, adopted_from, self._stopped())

    def _stopped(self) -> str | None:
        return "; ".join(self.walk.stopped) or None


class _Refused(Exception):
    """The candidate at hand cannot be used; the next one is tried."""

    def __init__(self, refusal: Refusal):
        super().__init__(refusal.reason)
        self.refusal = refusal


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """The disk's own errors as one that says what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            error.errno,
            f"find_run: expected to bring a checkpoint into {folder}, got {error}; make room or make the folder "
            "writable, then run this again",
        ) from error


def _lineage(info: CheckpointInfo, within: Path | None) -> tuple[StoredRun | None, Path | None]:
    """The run that a checkpoint is of, and its run folder; None for the folder of a bare checkpoint.

    Args:
        within: nothing above this folder is opened.
    """
    folder = info.path.parent.parent
    if info.path.parent.name == "ckpt" and (within is None or folder.is_relative_to(within)):
        run = stored_run(folder)
        if run is not None and run.run_id == info.run_id:
            inner = _run_in_state(info) if run.name is None else None
            return (run if inner is None else run._replace(name=inner.name)), folder
    return _run_in_state(info), None


def _run_in_state(info: CheckpointInfo) -> StoredRun | None:
    content = read_state(info).get("run")
    return run_of(content | {"run_id": info.run_id}) if isinstance(content, dict) else None


def _is_control(name: str | None) -> bool:
    return name is not None and name.split("/")[-1] == CONTROL


def _table(first: str, refusals: Sequence[Refusal], stopped: str | None) -> str:
    lines = refusal_table(refusals[:_LINES], whole_paths=True).splitlines()
    if len(refusals) > _LINES:
        lines.append(f"and {len(refusals) - _LINES:,} more")
    if stopped is not None:
        lines.append(f"not everything was looked at: the search stopped {stopped}")
    return "\n".join([first, *(f"  {line}" for line in lines)])
