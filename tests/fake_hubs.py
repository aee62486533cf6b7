"""The Hugging Face hub and Kaggle as their libraries show them, kept in memory."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

Real = huggingface_hub.HfApi  # before any test puts the fake in its place


def answer(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


def http_error(status, kind=HfHubHTTPError, text=None):
    return kind(text or f"{status} Client Error", response=answer(status))


class FakeHub:
    """One hub for all clients that are made of it: ``hub(token=...)``. Every call must fit the real signature.

    Attributes:
        repositories: (kind, name) to private, files by path, titles of commits.
        calls: names, in order.
        fail: name of a call to what is raised there, or done before it.
    """

    def __init__(self):
        self.repositories, self.calls, self.fail, self.token = {}, [], {}, None

    def __call__(self, *args, **kwargs):
        bound = inspect.signature(Real).bind(*args, **kwargs)
        self.token = bound.arguments.get("token")
        return self

    def __getattr__(self, name):
        real = getattr(Real, name)  # AttributeError if the library has no such method

        def call(*args, **kwargs):
            bound = inspect.signature(real).bind(self, *args, **kwargs)
            self.calls.append(name)
            if (failure := self.fail.get(name)) is not None:
                if isinstance(failure, Exception):
                    raise failure
                failure()
            arguments = dict(list(bound.arguments.items())[1:])
            return getattr(type(self), f"do_{name}")(self, **arguments)

        return call

    def repository(self, repo_id, repo_type):
        if (repo_type, repo_id) not in self.repositories:
            raise http_error(404, RepositoryNotFoundError)
        return self.repositories[repo_type, repo_id]

    def do_create_repo(self, repo_id, repo_type, private, exist_ok):
        assert exist_ok
        new = SimpleNamespace(private=private, files={}, titles=["initial commit"])
        self.repositories.setdefault((repo_type, repo_id), new)

    def do_list_repo_tree(self, repo_id, path_in_repo, recursive, repo_type):
        below = f"{path_in_repo}/"
        files = self.repository(repo_id, repo_type).files
        found = [name for name in files if name.startswith(below)]
        if not found:
            raise EntryNotFoundError(f"404: {path_in_repo}")
        shown = [name for name in found if recursive or "/" not in name.removeprefix(below)]
        return (RepoFile(path=name, size=len(files[name]), oid="0") for name in shown)

    def do_preupload_lfs_files(self, repo_id, additions, repo_type):
        self.repository(repo_id, repo_type)
        assert all(isinstance(addition, CommitOperationAdd) for addition in additions)

    def do_create_commit(self, repo_id, operations, commit_message, repo_type):
        repository = self.repository(repo_id, repo_type)
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                assert operation.is_folder
                gone = [name for name in repository.files if name.startswith(operation.path_in_repo)]
                assert gone, f"nothing to delete at {operation.path_in_repo}"
                for name in gone:
                    del repository.files[name]
            else:
                with operation.as_file() as file:
                    repository.files[operation.path_in_repo] = file.read()
        repository.titles.append(commit_message)

    def do_list_repo_commits(self, repo_id, repo_type):
        return [SimpleNamespace(title=title) for title in self.repository(repo_id, repo_type).titles]

    def do_super_squash_history(self, repo_id, commit_message, repo_type):
        self.repository(repo_id, repo_type).titles = [commit_message]

    def do_hf_hub_download(self, repo_id, filename, local_dir, repo_type):
        files = self.repository(repo_id, repo_type).files
        if filename not in files:
            raise EntryNotFoundError(f"404: {filename}")
        path = Path(local_dir, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[filename])
        Path(local_dir, ".cache").mkdir(exist_ok=True)  # the library notes there what it fetched
        return str(path)


class KaggleError(OSError):
    """As requests.HTTPError: it holds the answer."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error.\n\nSee https://x.y/z?signature=secret")
        self.response = answer(status)


class FakeKaggle:
    """A module kagglehub and the datasets behind it, each a list of versions: files by path.

    Attributes:
        fail: raised by the next calls.
        mounted: as in a Kaggle notebook: what was shown once is shown on.
        quiet: for each call, whether logger and bars were silent.
    """

    def __init__(self, cache):
        self.cache, self.datasets, self.credentials, self.fail, self.mounted = cache, {}, object(), None, False
        self.quiet = []

    def install(self, monkeypatch):
        modules = {}
        for name in ("kagglehub", "kagglehub.config", "kagglehub.gcs_upload"):
            modules[name] = ModuleType(name)
            modules[name].__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, modules[name])
        top = modules["kagglehub"]
        top.dataset_download, top.dataset_upload = self.dataset_download, self.dataset_upload
        modules["kagglehub.config"].get_kaggle_credentials = lambda: self.credentials
        modules["kagglehub.gcs_upload"].tqdm = self.bar = lambda **settings: settings

    def note(self):
        import logging

        bar = sys.modules["kagglehub.gcs_upload"].tqdm
        self.quiet.append(logging.getLogger("kagglehub").level == logging.ERROR and bar() == {"disable": True})
        if isinstance(self.fail, Exception):
            raise self.fail
        if self.fail is not None:
            self.fail()

    def dataset_download(self, handle, path=None, *, force_download=False, output_dir=None):
        self.note()
        owner, name, *rest = handle.split("/")
        versions = self.datasets.get(f"{owner}/{name}")
        if versions is None:
            raise KaggleError(403)
        number = int(rest[1]) if rest else len(versions)
        folder = self.cache / (name if self.mounted else f"{owner}/{name}/versions/{number}")
        if folder.exists() and (self.mounted or not force_download):
            return str(folder)
        shutil.rmtree(folder, ignore_errors=True)
        for file, content in versions[number - 1].items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        return str(folder)

    def dataset_upload(self, handle, local_dataset_dir, version_notes="", ignore_patterns=None):
        self.note()
        assert re.fullmatch(r"[\w-]+/[\w-]+", handle), "a version in the handle is refused"
        top = Path(local_dataset_dir)
        files = {p.relative_to(top).as_posix(): p.read_bytes() for p in top.rglob("*") if p.is_file()}
        self.datasets.setdefault(handle, []).append(files)
