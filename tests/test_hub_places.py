"""Copies at the Hugging Face hub and at Kaggle: there and back, refused, torn, and what is said of it."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from copies import contents, fill, run_copy
from fake_hubs import FakeHub, FakeKaggle, KaggleError, http_error
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from kd_kit.checkpoint import DamagedCheckpoint, inspect_checkpoint, load_checkpoint
from kd_kit.copied_run import GivenUp, OldCopiesRemain
from kd_kit.hub_places import KaggleDatasetPlace
from kd_kit.mirror import Mirror
from kd_kit.mirror_places import MirrorError, open_place

ADDRESS = "hf://datasets/me/my-run"
NAME = "step-00000001-1"


@pytest.fixture
def hub(monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", "hf_ofthevariable")
    return hub


@pytest.fixture
def repository(hub):
    """As it is after the first upload."""
    return lambda: hub.repositories["dataset", "me/my-run"]


def there(files):
    return sorted({name.split("/")[3] for name in files if name.startswith("run/main/ckpt/")})


# ------------------------------------------------------------------------------------------------ the hub


def test_opening_asks_nothing(hub):
    open_place(ADDRESS, "run/main")
    assert hub.calls == [] and hub.token == "hf_ofthevariable"


def test_the_first_upload_makes_a_private_repository_and_comes_back_whole(hub, repository, tmp_path):
    place = open_place(ADDRESS, "run/main")
    assert place.newest() == [] and place.refused == [
        "no repository me/my-run that this token can see; the first copy makes it"
    ]
    (sent,) = fill(place, tmp_path, 1)
    assert repository().private is True and sent == sum(map(len, repository().files.values()))
    (remote,) = place.newest()
    assert place.refused == [] and (remote.step, remote.run_id) == (1, "a")
    info = place.download(remote, tmp_path / "back")
    assert load_checkpoint(info)[1] == {"step": 1} and info.verified and place.refused == []
    assert contents(tmp_path / "back") == contents(tmp_path / "copy-1")


@pytest.mark.parametrize(
    ("address", "key", "path"),
    [
        ("hf://me/x", ("model", "me/x"), "run/main/RUN.json"),
        ("hf://models/me/x/", ("model", "me/x"), "run/main/RUN.json"),
        ("hf://datasets/me/x/deep/er", ("dataset", "me/x"), "deep/er/run/main/RUN.json"),
    ],
)
def test_the_address_says_kind_and_folder(hub, tmp_path, address, key, path):
    fill(open_place(address, "run/main"), tmp_path, 1)
    assert list(hub.repositories) == [key] and path in hub.repositories[key].files


def test_an_upload_is_one_commit_that_deletes_what_it_makes_superfluous(hub, repository, tmp_path):
    place = open_place(ADDRESS, "run/main")
    fill(place, tmp_path, 1, 2, 3)
    assert repository().titles == ["initial commit", "kd_kit: step 1", "kd_kit: step 2", "kd_kit: step 3"]
    assert there(repository().files) == ["step-00000002-2", "step-00000003-3"]
    assert [remote.step for remote in place.newest()] == [3, 2]


def test_weights_that_are_there_already_are_not_sent_again(hub, repository, tmp_path):
    place = open_place(ADDRESS, "run/main")
    run = run_copy(tmp_path / "copy", 1)
    first = place.upload(run, lambda: True)
    again = place.upload(run, lambda: True)
    small = ("RUN.json", "metrics.jsonl", "COPY.json")
    assert first == sum(map(len, repository().files.values()))
    assert again == sum(len(repository().files[f"run/main/{name}"]) for name in small)
    repository().files["run/main/initial.safetensors"] = b"of another size"
    place.upload(run, lambda: True)
    assert repository().files["run/main/initial.safetensors"] == (run / "initial.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_what_is_fetched_is_compared_with_its_hash(hub, repository, tmp_path, name):
    place = open_place(ADDRESS, "run/main")
    fill(place, tmp_path, 1)
    path = f"run/main/ckpt/{NAME}/{name}"
    repository().files[path] = repository().files[path][:-1] + b"x"
    (remote,) = place.newest()
    with pytest.raises(DamagedCheckpoint, match=rf"{NAME}/{name}: expected \d+ bytes, sha256 .*take an older"):
        place.download(remote, tmp_path / "back")
    assert contents(tmp_path / "back") == {}


def test_other_runs_and_other_files_of_the_repository_stay(hub, repository, tmp_path):
    fill(open_place(ADDRESS, "run/main"), tmp_path / "a", 1)
    repository().files["README.md"] = b"mine"
    fill(open_place(ADDRESS, "run"), tmp_path / "b", 1, 2, 3)
    assert there(repository().files) == [NAME] and repository().files["README.md"] == b"mine"
    assert [remote.step for remote in open_place(ADDRESS, "run").newest()] == [3, 2]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (http_error(401), "set HF_TOKEN"),
        (http_error(401, RepositoryNotFoundError), "set HF_TOKEN"),
        (http_error(403), "right to write to me/my-run"),
        (http_error(429), "save less often"),
        (http_error(503), "network is on"),
        (ConnectionError("no route"), "network is on"),
    ],
)
def test_what_goes_wrong_is_said_with_what_to_do(hub, tmp_path, error, advice):
    place = open_place(ADDRESS, "run/main")
    hub.fail = {"list_repo_tree": error}
    with pytest.raises(MirrorError, match=f"^{ADDRESS}: looking for checkpoints failed: .*{advice}"):
        place.newest()
    hub.fail = {"create_commit": error}
    with pytest.raises(MirrorError, match=f"^{ADDRESS}: sending failed: .*{advice}"):
        fill(place, tmp_path, 1)
    hub.fail = {}
    fill(place, tmp_path, 2)
    (remote,) = place.newest()
    hub.fail = {"hf_hub_download": error}
    with pytest.raises(MirrorError, match=f"^{ADDRESS}: fetching failed: .*{advice}"):
        place.download(remote, tmp_path / "back")


def test_a_copy_in_the_background_says_what_to_do_and_arrives_when_that_is_done(hub, repository, tmp_path):
    run = run_copy(tmp_path / "run", 1)
    (checkpoint,) = (run / "ckpt").iterdir()
    mirror = Mirror(open_place(ADDRESS, "run/main"), run, retry_seconds=(1e6,))
    hub.fail = {"create_commit": http_error(403, text="403 Forbidden: " + "long " * 99)}
    mirror.take(inspect_checkpoint(checkpoint))
    for _ in range(3000):
        if news := mirror.news():
            break
        time.sleep(0.01)
    assert news[0][1].startswith(f"the copy to {ADDRESS} failed: sending failed: HfHubHTTPError: 403 Forbidden: long")
    assert news[0][1].endswith(
        "...; the token may not do that: it needs the right to write to me/my-run (and to make it); training goes on, "
        "the next try is in 1000000 s"
    )
    hub.fail = {}
    assert mirror.flush(30) and mirror.sent == 1 and there(repository().files) == [NAME]
    mirror.close()


def test_a_repository_that_is_gone_before_the_commit_is_an_error(hub, tmp_path):
    hub.fail = {"create_commit": http_error(404, RepositoryNotFoundError)}
    with pytest.raises(MirrorError, match="look whether me/my-run is right"):
        fill(open_place(ADDRESS, "run/main"), tmp_path, 1)


def test_an_error_shows_no_token(hub):
    hub.fail = {"list_repo_tree": RuntimeError("Bearer hf_abcdefghijklmnop https://x.y/z?X-Amz-Signature=1234")}
    with pytest.raises(MirrorError, match=r"Bearer hf_\*\*\* https://x.y/z;"):
        open_place(ADDRESS, "run/main").newest()


def test_what_did_not_arrive_whole_is_noticed(hub, repository, tmp_path):
    def truncate():
        for name in repository().files:
            if name.endswith("model.safetensors"):
                repository().files[name] = b"short"

    hub.fail = {"list_repo_tree": lambda: hub.repositories and truncate()}
    with pytest.raises(MirrorError, match=r"model\.safetensors: expected \d+ bytes to arrive, got 5"):
        fill(open_place(ADDRESS, "run/main"), tmp_path, 1)


def test_an_upload_that_was_given_up_makes_no_commit(hub, repository, tmp_path):
    answers = iter([True] * 3)
    with pytest.raises(GivenUp):
        open_place(ADDRESS, "run/main").upload(run_copy(tmp_path / "copy", 1), lambda: next(answers, False))
    assert repository().titles == ["initial commit"] and hub.calls.count("preupload_lfs_files") == 2


def test_a_long_history_is_squashed(hub, repository, tmp_path):
    fill(open_place(ADDRESS, "run/main"), tmp_path, *range(1, 9))
    assert repository().titles == ["kd_kit: earlier copies dropped"]
    assert there(repository().files) == ["step-00000007-7", "step-00000008-8"]


def test_a_history_that_holds_a_commit_of_somebody_else_is_not_squashed(hub, repository, tmp_path):
    place = open_place(ADDRESS, "run/main")
    fill(place, tmp_path, 1)
    repository().titles.append("My own notes")
    fill(place, tmp_path, *range(2, 12))
    assert len(repository().titles) == 13 and "super_squash_history" not in hub.calls


def test_a_history_that_cannot_be_squashed_costs_no_copy(hub, tmp_path):
    hub.fail = {"list_repo_commits": http_error(403)}
    place = open_place(ADDRESS, "run/main")
    with pytest.raises(OldCopiesRemain, match="squash the history"):
        fill(place, tmp_path, 1)
    assert [remote.step for remote in place.newest()] == [1]


def test_a_download_that_never_ends_is_given_up(hub, tmp_path):
    place = open_place(ADDRESS, "run/main")
    fill(place, tmp_path, 1)
    (remote,) = place.newest()
    go = threading.Event()
    hub.fail = {"hf_hub_download": lambda: go.wait(30)}
    place.patience = 0.01
    with pytest.raises(MirrorError, match=r"expected an answer within 0 s, got none; try again later"):
        place.download(remote, tmp_path / "back")
    assert contents(tmp_path / "back") == {}
    go.set()


def test_nothing_is_drawn_or_logged_and_the_users_own_comes_back(hub, tmp_path):
    seen, logger = [], logging.getLogger("huggingface_hub")
    level = logger.level
    enable_progress_bars()

    def look():
        seen.append((are_progress_bars_disabled(), logger.isEnabledFor(logging.WARNING)))

    hub.fail = dict.fromkeys(("create_commit", "list_repo_tree", "hf_hub_download"), look)
    place = open_place(ADDRESS, "run/main")
    fill(place, tmp_path, 1)
    place.newest()
    assert set(seen) == {(True, False)}
    assert not are_progress_bars_disabled() and logger.level == level


def test_the_token_of_a_stored_login(hub, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("hf_stored\n")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    open_place(ADDRESS, "run")
    assert hub.token == "hf_stored"


def kaggle_secrets(monkeypatch, get_secret):
    module = ModuleType("kaggle_secrets")
    module.__spec__ = ModuleSpec("kaggle_secrets", None)
    module.UserSecretsClient = type("UserSecretsClient", (), {"get_secret": staticmethod(get_secret)})
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.delenv("HF_TOKEN")


def test_the_token_of_a_kaggle_secret(hub, monkeypatch):
    kaggle_secrets(monkeypatch, {"HF_TOKEN": "hf_secret"}.__getitem__)
    open_place(ADDRESS, "run")
    assert hub.token == "hf_secret"


def test_no_token_is_said_at_once(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"expected a token .* got none; set HF_TOKEN"):
        open_place(ADDRESS, "run")


def test_a_kaggle_secret_that_is_not_attached_is_said(hub, monkeypatch):
    def refuse(name):
        raise RuntimeError(f"No user secrets exist for kernel id 1 and label {name}.")

    kaggle_secrets(monkeypatch, refuse)
    with pytest.raises(
        ValueError, match=r"got none \(Kaggle's secrets: RuntimeError: No user secrets .*attach a Kaggle"
    ):
        open_place(ADDRESS, "run")


# -------------------------------------------------------------------------------------------------- Kaggle


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    kaggle = FakeKaggle(tmp_path / "cache")
    kaggle.install(monkeypatch)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    return kaggle


def test_a_dataset_of_the_run_alone_there_and_back(kaggle, tmp_path):
    place = open_place("kaggle://me/my-data", "run/Main")
    assert place.address == "kaggle://me/my-data-run-main" and kaggle.quiet == []
    assert place.newest() == []
    assert place.refused == ["no dataset me/my-data-run-main that this account can see; the first copy makes it"]
    (sent,) = fill(place, tmp_path, 1)
    (files,) = kaggle.datasets["me/my-data-run-main"]
    assert sent == sum(map(len, files.values()))
    (remote,) = place.newest()
    info = place.download(remote, tmp_path / "back")
    assert load_checkpoint(info)[1] == {"step": 1} and place.refused == []
    assert contents(tmp_path / "back") == contents(tmp_path / "copy-1")
    assert all(kaggle.quiet) and logging.getLogger("kagglehub").level == logging.NOTSET
    assert sys.modules["kagglehub.gcs_upload"].tqdm is kaggle.bar


def test_a_version_replaces_all_of_the_former_one(kaggle, tmp_path):
    place = open_place("kaggle://me/my-data", "run")
    fill(place, tmp_path, 1, 2)
    assert [remote.step for remote in place.newest()] == [2]
    assert len(kaggle.datasets["me/my-data-run"]) == 2
    assert list(tmp_path.glob("copy-*/ckpt/*")) == [
        tmp_path / "copy-1/ckpt/step-00000001",
        tmp_path / "copy-2/ckpt/step-00000002",
    ]


def test_a_version_that_changed_behind_its_number_is_fetched_anew(kaggle, tmp_path):
    place = open_place("kaggle://me/my-data", "run")
    fill(place, tmp_path, 1)
    place.newest()
    kaggle.datasets["me/my-data-run"][0].clear()
    assert place.newest() == []


def test_after_a_torn_version_the_one_before_is_taken(kaggle, tmp_path):
    place = open_place("kaggle://me/my-data", "run")
    fill(place, tmp_path, 1, 2)
    files = kaggle.datasets["me/my-data-run"][1]
    files["run/ckpt/step-00000002-2/model.safetensors"] = b"short"
    (remote,) = place.newest()
    assert remote.step == 1 and place.refused[0].startswith("step-00000002-2: model.safetensors: expected")
    assert load_checkpoint(place.download(remote, tmp_path / "back"))[1] == {"step": 1}


def test_a_flipped_byte_is_noticed_when_it_is_fetched(kaggle, tmp_path):
    place = open_place("kaggle://me/my-data", "run")
    fill(place, tmp_path, 1)
    path = f"run/ckpt/{NAME}/model.safetensors"
    files = kaggle.datasets["me/my-data-run"][0]
    files[path] = files[path][:-1] + b"x"
    (remote,) = place.newest()
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
        place.download(remote, tmp_path / "back")


def test_a_notebook_at_kaggle_has_its_owners_rights_and_sees_what_is_mounted(kaggle, monkeypatch, tmp_path):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    kaggle.credentials, kaggle.mounted = None, True
    place = open_place("kaggle://me/my-data", "run")
    fill(place, tmp_path, 1)
    assert [remote.step for remote in place.newest()] == [1]
    fill(place, tmp_path, 2)
    assert [remote.step for remote in place.newest()] == [1]
    files = kaggle.cache / f"my-data-run/run/ckpt/{NAME}"
    (files / "model.safetensors").write_bytes(b"short")
    assert place.newest() == [] and len(place.refused) == 1


@pytest.mark.parametrize(
    "error", [KaggleError(404), RuntimeError('POST failed with: {"errors":["x"],"error":{"code":5,"details":[]}}')]
)
def test_a_dataset_that_is_not_there_yet_is_no_error(kaggle, error):
    place = open_place("kaggle://me/my-data", "run")
    kaggle.fail = error
    assert place.newest() == [] and "the first copy makes it" in place.refused[0]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (KaggleError(401), "set KAGGLE_API_TOKEN"),
        (KaggleError(429), "save less often"),
        (KaggleError(500), "network is on"),
        (ConnectionError("no route"), "network is on"),
        (RuntimeError('POST failed with: {"errors":["x"],"error":{"code":13,"details":[]}}'), "network is on"),
    ],
)
def test_what_goes_wrong_at_kaggle_is_said_with_what_to_do(kaggle, tmp_path, error, advice):
    place = open_place("kaggle://me/my-data", "run")
    kaggle.fail = error
    with pytest.raises(MirrorError, match=f"^kaggle://me/my-data-run: looking for checkpoints failed: .*{advice}") as e:
        place.newest()
    assert "secret" not in str(e.value)
    with pytest.raises(MirrorError, match=f"sending failed: .*{advice}"):
        fill(place, tmp_path, 1)


@pytest.mark.parametrize(("status", "advice"), [(403, "begin with its own name"), (404, "wait a few minutes")])
def test_an_upload_that_kaggle_refuses_says_why(kaggle, tmp_path, status, advice):
    kaggle.fail = KaggleError(status)
    with pytest.raises(MirrorError, match=advice):
        fill(open_place("kaggle://me/my-data", "run"), tmp_path, 1)


def test_a_dataset_that_is_never_mounted_is_given_up(kaggle, monkeypatch):
    assert KaggleDatasetPlace.patience == 1800
    go = threading.Event()
    kaggle.fail = lambda: go.wait(30)
    place = open_place("kaggle://me/my-data", "run")
    place.patience = 0.01
    with pytest.raises(MirrorError, match="expected an answer within"):
        place.newest()
    go.set()


def test_an_upload_to_kaggle_that_was_given_up_is_not_started(kaggle, tmp_path):
    answers = iter([True])
    with pytest.raises(GivenUp):
        open_place("kaggle://me/my-data", "run").upload(run_copy(tmp_path / "c", 1), lambda: next(answers, False))
    assert kaggle.datasets == {}


@pytest.mark.parametrize("whole", [True, False])
def test_links_in_a_dataset_are_not_followed(kaggle, tmp_path, whole):
    place = open_place("kaggle://me/my-data", "run")
    fill(place, tmp_path, 1)
    kaggle.mounted = True  # so that what lies there now is what is seen
    source, target = tmp_path / "copy-1/ckpt/step-00000001", kaggle.cache / "my-data-run/run/ckpt" / NAME
    target.parent.mkdir(parents=True)
    if whole:
        target.symlink_to(source)
    else:
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).symlink_to(path)
    assert place.newest() == [] and place.refused == []


def test_no_credentials_are_said_at_once(kaggle):
    kaggle.credentials = None
    with pytest.raises(ValueError, match=r"expected a Kaggle API token .*KAGGLE_API_TOKEN"):
        open_place("kaggle://me/my-data", "run")


@pytest.mark.parametrize(
    ("address", "package"), [("hf://datasets/me/x", "huggingface_hub"), ("kaggle://me/x", "kagglehub")]
)
def test_a_missing_package_is_said_with_what_to_install(monkeypatch, address, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ValueError, match=f"got none; pip install {package}"):
        open_place(address, "run")


@pytest.mark.parametrize("address", ["kaggle://me", "kaggle://me/a/b", "kaggle://me/a b", "kaggle://m e/data"])
def test_an_address_that_kaggle_does_not_have_says_what_to_write(kaggle, address):
    with pytest.raises(ValueError, match="expected kaggle://owner/dataset"):
        open_place(address, "run")


@pytest.mark.parametrize("name", ["x", "x" * 47])
def test_a_name_of_a_length_that_kaggle_refuses(kaggle, name):
    with pytest.raises(ValueError, match="6 to 50 characters"):
        open_place(f"kaggle://me/{name}", "run")


@pytest.mark.parametrize("address", ["hf://datasets/me", "hf://spaces/me/x", "hf://datasets/../x", "hf://me/x y"])
def test_an_address_that_the_hub_does_not_have_says_what_to_write(hub, address):
    with pytest.raises(ValueError, match="hf://datasets/owner/name"):
        open_place(address, "run")


def test_the_fake_kagglehub_is_like_the_real_one(tmp_path):
    real = pytest.importorskip("kagglehub")
    for name in ("dataset_download", "dataset_upload"):
        ours, theirs = (inspect.signature(getattr(o, name)).parameters for o in (FakeKaggle, real))
        shape = [(p.name, p.kind, p.default) for p in theirs.values()]
        assert [(p.name, p.kind, p.default) for p in list(ours.values())[1:]] == shape
    from kagglehub import clients, gcs_upload
    from kagglehub.config import get_kaggle_credentials

    assert inspect.signature(get_kaggle_credentials).parameters == {}
    assert hasattr(gcs_upload, "tqdm") and hasattr(clients, "tqdm")
