"""Copies of a run in a repository of the Hugging Face hub, or in a private Kaggle dataset.

Both libraries are asked for only here, and neither is needed where a run is copied to a folder or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from kd_kit.checkpoint_folder import JSON_LIMIT, StoredFile
from kd_kit.copied_run import (
    ABOUT,
    LocalCopy,
    MirrorError,
    OldCopiesRemain,
    RemoteCheckpoint,
    brief,
    link_or_copy,
    status_of,
    still_wanted,
    superfluous,
    take_in,
)
from kd_kit.remote_copy import Place

_HUB_KINDS = {"datasets": "dataset", "models": "model"}
_SQUASH_ABOVE = 8  # commits; each keeps what it deleted on the account's storage until the history is squashed
_COMMIT = "kd_kit: "  # how the titles of our commits begin


class HubPlace(Place):
    """A repository of the Hugging Face hub. Every upload is one commit, so that no state between can be seen.

    A repository that does not exist is made, as a private one; one that exists stays as public as it is. The token is
    that of ``HF_TOKEN``, of a stored login, or of a Kaggle Secret named ``HF_TOKEN``. Old commits keep what they
    deleted on the account's storage, so the history is squashed now and then, unless it holds a commit of somebody
    else.
    """

    def __init__(self, address: str, run: str):
        if importlib.util.find_spec("huggingface_hub") is None:
            raise ValueError("open_place: expected the package of hf://, got none; pip install huggingface_hub")
        parts = address.removeprefix("hf://").strip("/").split("/")
        kind = _HUB_KINDS.get(parts[0])
        if kind is not None:
            parts = parts[1:]
        if len(parts) < 2 or parts[0] in ("spaces", "buckets") or not all(map(_is_hub_name, parts)):
            raise ValueError(
                f"open_place: expected hf://datasets/owner/name or hf://models/owner/name, and maybe a folder behind "
                f"it, got {address!r}; write it so"
            )
        from huggingface_hub import HfApi

        super().__init__(address)
        self._repo = {"repo_id": "/".join(parts[:2]), "repo_type": kind or "model"}
        self._prefix = "/".join([*parts[2:], run])
        self._api = HfApi(token=_hub_token())

    @contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        with _quiet_hub(), super()._reported(doing):
            yield

    def _advice(self, error: Exception) -> str:
        name = self._repo["repo_id"]
        return {
            401: "the token is not accepted: make a new one that may write, and set HF_TOKEN to it",
            403: f"the token may not do that: it needs the right to write to {name} (and to make it)",
            404: f"look whether {name} is right, and whether the token may see it",
            429: "the hub asks for fewer requests: save less often",
        }.get(status_of(error)) or super()._advice(error)

    def _list(self) -> dict[str, int]:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        found: dict[str, int] = {}
        for folder, recursive in ((self._prefix, False), (f"{self._prefix}/ckpt", True)):
            try:
                entries = list(self._api.list_repo_tree(path_in_repo=folder, recursive=recursive, **self._repo))
            except EntryNotFoundError:
                continue
            except RepositoryNotFoundError as error:  # of a wrong token, too, and of one that has to wait for leave
                if status_of(error) != 404:
                    raise
                self.refused.append(
                    f"no repository {self._repo['repo_id']} that this token can see; the first copy makes it"
                )
                return {}
            for entry in entries:
                if isinstance(entry, RepoFile) and entry.path.startswith(f"{self._prefix}/"):
                    found[entry.path.removeprefix(f"{self._prefix}/")] = entry.size
        return found

    def _read(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder, open(self._fetched(name, folder), "rb") as file:
            return file.read(JSON_LIMIT)

    def _fetch(self, name: str, target: Path, size: int) -> StoredFile:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
            os.rename(self._fetched(name, folder), target)
        with open(target, "rb") as file:
            return StoredFile(target.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def _fetched(self, name: str, folder: str) -> Path:
        path = Path(self._api.hf_hub_download(filename=f"{self._prefix}/{name}", local_dir=folder, **self._repo))
        if path.is_symlink() or not path.is_file():
            raise MirrorError(f"{self.address}: {name}: expected a plain file, got a link or a folder")
        return path

    def _upload(self, local: LocalCopy, alive: Callable[[], bool]) -> int:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        still_wanted(alive)
        self._api.create_repo(private=True, exist_ok=True, **self._repo)
        there = self._list()
        found = self._found(there)
        new = local.checkpoint
        sources: dict[str, Path | bytes] = {**self._unsent(local, there), **local.texts, ABOUT: local.sealed_about()}
        if not any(r.name == new.name and r.manifest == new.manifest for r in found):
            sources |= {**local.files, local.manifest: new.manifest}
        sizes = {n: len(s) if isinstance(s, bytes) else s.stat().st_size for n, s in sources.items()}
        adds = [
            CommitOperationAdd(f"{self._prefix}/{n}", s if isinstance(s, bytes) else str(s)) for n, s in sources.items()
        ]
        old = superfluous(there, found, new)
        deletes = [CommitOperationDelete(f"{self._prefix}/ckpt/{name}/", is_folder=True) for name in old]
        for add in adds:  # one by one, so that an upload that was given up stops between them
            still_wanted(alive)
            self._api.preupload_lfs_files(additions=[add], **self._repo)
        still_wanted(alive)
        title = f"{_COMMIT}step {new.step:,}"
        self._api.create_commit(operations=[*adds, *deletes], commit_message=title, **self._repo)
        there = self._list()
        for name, size in sizes.items():
            if there.get(name) != size:
                got = there.get(name, "no such file")
                raise MirrorError(f"{self.address}: {name}: expected {size} bytes to arrive, got {got}; send it again")
        still_wanted(alive)
        try:
            self._squash()
        except Exception as error:
            raise OldCopiesRemain(f"{self.address}: expected to squash the history, got {brief(error)}") from error
        return sum(sizes.values())

    def _squash(self) -> None:
        titles = [commit.title for commit in self._api.list_repo_commits(**self._repo)]
        if len(titles) > _SQUASH_ABOVE and all(t.startswith((_COMMIT, "initial commit")) for t in titles):
            self._api.super_squash_history(commit_message=f"{_COMMIT}earlier copies dropped", **self._repo)


class KaggleDatasetPlace(Place):
    """A private Kaggle dataset for the run alone, ``<dataset>-<run>``: each version replaces all of the former one.

    kagglehub tells nobody what arrived, and takes an upload that broke off again and again for a whole one, so that
    sizes cannot be compared after an upload. They are when copies are looked for, and every byte when one is fetched:
    where the newest version proves torn, the one before it is taken. A Kaggle notebook cannot do that, since there
    kagglehub mounts what is newest when the notebook first asks, and goes on showing that one for as long as the
    session lasts.

    Kaggle takes minutes to process a version, and refuses another while the very first is being processed; the next
    try brings it.
    """

    patience = 1800.0  # a dataset comes as a whole, and kagglehub waits without end for it to be mounted

    def __init__(self, address: str, run: str):
        if importlib.util.find_spec("kagglehub") is None:
            raise ValueError("open_place: expected the package of kaggle://, got none; pip install kagglehub")
        parts = address.removeprefix("kaggle://").strip("/").split("/")
        slug = "-".join([parts[-1], re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")])
        if len(parts) != 2 or not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", part) for part in (parts[0], slug)):
            raise ValueError(f"open_place: expected kaggle://owner/dataset, got {address!r}; write it so")
        if not 6 <= len(slug) <= 50:
            raise ValueError(
                f"open_place: expected a Kaggle dataset's name of 6 to 50 characters, got {slug!r}; choose another "
                "name for the dataset or the run"
            )
        if not os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):  # a notebook there has its owner's rights
            from kagglehub.config import get_kaggle_credentials

            if not get_kaggle_credentials():
                raise ValueError(
                    "open_place: expected a Kaggle API token for kaggle://, got none; set KAGGLE_API_TOKEN, or put the "
                    "kaggle.json of your account's settings into ~/.kaggle"
                )
        self._handle = f"{parts[0]}/{slug}"
        super().__init__(f"kaggle://{self._handle}")
        self._run = run
        self._version: Path | None = None  # where kagglehub put the one that was fetched

    def newest(self) -> list[RemoteCheckpoint]:
        self._version = None
        found = super().newest()
        older = re.search(r"versions/(\d+)$", "" if self._version is None else self._version.as_posix())
        if found or older is None or int(older[1]) < 2:
            return found
        refused, number = self.refused, int(older[1]) - 1
        with self._reported("looking for checkpoints"):
            self._version = self._within(partial(self._download_all, f"{self._handle}/versions/{number}"))
        found = super().newest() if self._version is not None else []
        self.refused = [*refused, *self.refused]
        return found

    @contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        with _quiet_kagglehub(), super()._reported(doing):
            yield

    def _advice(self, error: Exception) -> str:
        return {
            401: "the token is not accepted: set KAGGLE_API_TOKEN to a new one of your account's settings",
            403: f"this account may not do that: {self._handle} has to begin with its own name",
            404: f"look whether {self._handle} is right, and wait a few minutes if it is new",
            429: "Kaggle asks for fewer requests: save less often",
        }.get(status_of(error)) or super()._advice(error)

    def _list(self) -> dict[str, int]:
        if self._version is None:
            self._version = self._download_all(self._handle)
        if self._version is None:
            return {}
        root, found = self._version / self._run, {}
        for folder in (root, *(root / "ckpt").glob("step-*")):
            for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
                if path.is_file() and not path.is_symlink():
                    found[path.relative_to(root).as_posix()] = path.stat().st_size
        return found

    def _download_all(self, handle: str) -> Path | None:
        """A version of the dataset; it comes as a whole."""
        import kagglehub

        try:
            return Path(kagglehub.dataset_download(handle, force_download=True))
        except Exception as error:
            # Kaggle answers 403 for a dataset that does not exist; its notebooks get numbers that mean the same
            if status_of(error) not in (403, 404) and not re.search(r'"code":\s*[57]\b', str(error)):
                raise
            self.refused.append(f"no dataset {handle} that this account can see; the first copy makes it")
            return None

    def _read(self, name: str) -> bytes:
        with open(self._version / self._run / name, "rb") as file:
            return file.read(JSON_LIMIT)

    def _fetch(self, name: str, target: Path, size: int) -> StoredFile:
        with open(self._version / self._run / name, "rb") as file:
            return take_in(file, target, size)

    def _upload(self, local: LocalCopy, alive: Callable[[], bool]) -> int:
        import kagglehub

        still_wanted(alive)
        beside = next(iter(local.files.values())).parent.parent  # links need the same disk
        with tempfile.TemporaryDirectory(dir=beside, prefix=".sending-", ignore_cleanup_errors=True) as folder:
            root = Path(folder) / self._run
            for name, path in {**local.files, **local.weights, **local.texts}.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, root / name)
            (root / ABOUT).write_bytes(local.sealed_about())
            (root / local.manifest).write_bytes(local.checkpoint.manifest)
            size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
            still_wanted(alive)
            kagglehub.dataset_upload(self._handle, folder, version_notes=f"step {local.checkpoint.step:,}")
        return size


def _is_hub_name(part: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", part)) and ".." not in part


def _hub_token() -> str:
    from huggingface_hub import get_token

    token, why = get_token(), ""
    if not token and importlib.util.find_spec("kaggle_secrets") is not None:
        from kaggle_secrets import UserSecretsClient

        try:
            token = UserSecretsClient().get_secret("HF_TOKEN")
        except Exception as error:
            why = f" (Kaggle's secrets: {brief(error)})"
    if not token:
        raise ValueError(
            f"open_place: expected a token for the Hugging Face hub, got none{why}; set HF_TOKEN to one that may "
            "write, log in with `hf auth login`, or attach a Kaggle Secret named HF_TOKEN to the notebook"
        )
    return token


# What the libraries print and draw would land in whatever cell runs, since copies are sent from a thread.


@contextmanager
def _quiet_hub() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    with _quiet_logger("huggingface_hub"):
        if shown:
            disable_progress_bars()
        try:
            yield
        finally:
            if shown:
                enable_progress_bars()


@contextmanager
def _quiet_kagglehub() -> Iterator[None]:
    import kagglehub  # noqa: F401 (loads the two below)

    with ExitStack() as bars, _quiet_logger("kagglehub"):
        for name in ("kagglehub.gcs_upload", "kagglehub.clients"):  # neither has a switch for its bar
            if hasattr(module := sys.modules.get(name), "tqdm"):
                bars.callback(setattr, module, "tqdm", module.tqdm)
                module.tqdm = partial(module.tqdm, disable=True)
        yield


@contextmanager
def _quiet_logger(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
