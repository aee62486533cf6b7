"""Every kernel of the project goes through Kaggle's real client to a server of the tests, and comes back as it left."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from kaggle_server import USER, kaggle_server

from kd_kit import kernel_build, kernel_push
from kd_kit.kaggle_client import KaggleError
from kd_kit.kernel_build import PAIR_SLUG, build
from kd_kit.kernel_metadata import METADATA, read_metadata
from kd_kit.kernel_push import fetch, push, resume, status
from kd_kit.offline import PAIR_FILE

KERNELS = sorted(path.parent.name for path in (Path(__file__).parent.parent / "kaggle").glob("*/build.json"))
PAIR = f"{USER}/{PAIR_SLUG}"


@pytest.fixture(scope="module", autouse=True)
def packed_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_build, "packed_cell", functools.cache(kernel_build.packed_cell))
        yield


@pytest.fixture
def server(tmp_path, monkeypatch):
    with kaggle_server() as found:
        for name, value in found.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield found
        assert found.strays == [], "a request was on its way out"


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_arrives_as_it_was_built(server, kernel):
    folder = build(kernel, USER)
    server.datasets[PAIR] = {PAIR_FILE: b"there already"}
    pushed = push(kernel)
    assert (pushed.version, pushed.url) == (1, f"https://www.kaggle.com/code/{USER}/{kernel}")
    retired = [remark for remark in pushed.remarks if "retired" in remark]
    assert len(retired) == (kernel == "distill-p100") and "\n" not in "".join(retired)
    assert str(pushed).splitlines()[-1].startswith(f"{USER}/{kernel}: pushed as version 1, https://")

    (body,) = server.kernels[f"{USER}/{kernel}"]
    sent, built = json.loads(body["text"]), json.loads((folder / f"{kernel}.ipynb").read_text())
    for cell in built["cells"]:
        cell["source"] = "".join(cell["source"])
    assert sent == built
    metadata = read_metadata(folder)
    assert (body["slug"], body["newTitle"]) == (metadata["id"], metadata["title"])
    assert body.get("machineShape") == metadata.get("machine_shape")
    assert body["enableInternet"] is metadata["enable_internet"] and body["enableGpu"] is metadata["enable_gpu"]
    assert body["isPrivate"] is True and body.get("datasetDataSources", []) == metadata["dataset_sources"]


def test_the_pair_is_uploaded_once_and_waited_for(server, monkeypatch):
    waited = []

    def wait(seconds):
        waited.append(seconds)
        server.answers.pop("GetDatasetStatus", None)

    create = server._CreateDataset

    def not_ready_at_first(body):
        server.answers["GetDatasetStatus"] = {"status": "BLOBS_RECEIVED"}
        return create(body)

    monkeypatch.setattr(server, "_CreateDataset", not_ready_at_first)
    monkeypatch.setattr(kernel_push, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))
    build("quickstart-cpu", USER)
    push("quickstart-cpu")
    pair = Path("build/kaggle") / PAIR_SLUG / PAIR_FILE
    assert server.datasets == {PAIR: {PAIR_FILE: pair.read_bytes()}}
    assert waited == [5]
    body = dict(server.asked)["CreateDataset"]
    assert body.get("isPrivate") is True and body["licenseName"] == "other"
    methods = server.methods()
    assert methods.index("CreateDataset") < methods.index("SaveKernel")
    server.status[f"{USER}/quickstart-cpu"] = "COMPLETE"
    push("quickstart-cpu")
    assert server.methods().count("CreateDataset") == 1
    sources = [body.get("kernelDataSources", []) for body in server.kernels[f"{USER}/quickstart-cpu"]]
    assert sources == [[], []], "the quickstart starts anew, unlike a distillation"


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("CreateDataset", {"status": "error", "error": "too many data sets"}, "to make the data set .*: too many data"),
        ("GetDatasetStatus", (401, "no"), "does not take your credentials"),
        ("GetDatasetStatus", {"status": "FAILED"}, f"the data set {PAIR} is failed; look at https://www"),
    ],
)
def test_a_pair_that_cannot_be_had_stops_the_push(server, method, answer, message):
    build("quickstart-cpu", USER)
    server.answers[method] = answer
    if "FAILED" in str(answer):
        server.datasets[PAIR] = {}
    with pytest.raises(KaggleError, match=message):
        push("quickstart-cpu")
    assert server.kernels == {}


def test_a_pair_that_is_not_built_stops_the_push(server):
    build("quickstart-cpu", USER)
    (Path("build/kaggle") / PAIR_SLUG / "dataset-metadata.json").unlink()
    with pytest.raises(
        ValueError, match=r"expected the data set ada/kd-kit-embedded-pair in .* build the kernel again"
    ):
        push("quickstart-cpu")


def test_pushing_again_goes_on_and_never_beside_a_running_session(server):
    build("distill-t4x2", USER)
    push("distill-t4x2")
    name = f"{USER}/distill-t4x2"
    with pytest.raises(KaggleError, match=r"push: ada/distill-t4x2 is RUNNING, .* --again"):
        push("distill-t4x2")
    assert len(server.kernels[name]) == 1
    server.status[name] = "COMPLETE"
    build("distill-t4x2", USER)
    assert push("distill-t4x2").version == 2
    first, second = server.kernels[name]
    assert (first.get("kernelDataSources", []), second["kernelDataSources"]) == ([], [name])
    assert push("distill-t4x2", again=True).version == 3
    assert server.kernels[name][2]["kernelDataSources"] == [name]


def test_what_is_not_right_is_not_sent(server):
    with pytest.raises(ValueError, match=r"expected 'build/kaggle/distill-p100/kernel-metadata\.json', which does not"):
        push("distill-p100")
    folder = build("distill-p100", USER)
    with pytest.raises(ValueError, match="push: expected a kernel that was built for 'bob', got 'ada/distill-p100'"):
        push("distill-p100", "bob")
    (folder / METADATA).write_text(json.dumps(read_metadata(folder) | {"is_private": "false"}))
    with pytest.raises(ValueError, match="is_private: expected true or false, got 'false'"):
        push("distill-p100")
    assert server.asked == []


def test_a_refusal_passes_through(server):
    build("distill-p100", USER)
    server.answers["SaveKernel"] = {"error": "Maximum batch GPU session count of 2 reached."}
    with pytest.raises(KaggleError, match=r"refused to push ada/distill-p100: Maximum batch GPU session count of 2"):
        push("distill-p100")


def test_resume_adds_its_own_output_once(server, tmp_path):
    build("quickstart-cpu", USER, tmp_path)
    path = resume("quickstart-cpu", tmp_path)
    once = path.read_bytes()
    assert json.loads(once)["kernel_sources"] == [f"{USER}/quickstart-cpu"]
    assert resume("quickstart-cpu", tmp_path).read_bytes() == once
    build("quickstart-cpu", USER, tmp_path)
    assert path.read_bytes() == once, "it stays when the kernel is built again"
    path.write_text(json.dumps(json.loads(once) | {"kernel_sources": [f"{USER}/quickstart-cpu/4"]}))
    resume("quickstart-cpu", tmp_path)
    assert json.loads(path.read_text())["kernel_sources"] == [f"{USER}/quickstart-cpu/4"], "a version was chosen"
    with pytest.raises(ValueError, match="build the kernel first"):
        resume("none", tmp_path)


def test_a_fetched_output_takes_the_place_of_an_older_one(server):
    name = f"{USER}/distill-p100"
    server.status[name] = "COMPLETE"
    server.outputs[name] = {"old.txt": b"of the first session", "summary.txt": b"half way"}
    folder = fetch(name)
    server.outputs[name] = {"summary.txt": b"finished"}  # newer, and not larger
    assert fetch(name) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"summary.txt": b"finished"}
    server.outputs[name] = {}
    with pytest.raises(KaggleError, match=r"has no output yet; what lies in .* is of an earlier session"):
        fetch(name)
    assert [path.name for path in folder.parent.iterdir()] == ["distill-p100"], "nothing half fetched is left"
    assert (folder / "summary.txt").read_bytes() == b"finished"


def test_a_distillation_has_its_own_output_as_a_source_but_not_in_its_first_push(server):
    name = f"{USER}/distill-p100"
    folder = build("distill-p100", USER)
    assert read_metadata(folder)["kernel_sources"] == [name], "for whoever pushes it with the client itself"
    push("distill-p100")
    server.status[name] = "COMPLETE"
    push("distill-p100")
    server.status[name] = "COMPLETE"
    build("distill-p100", USER)
    push("distill-p100")
    assert [body.get("kernelDataSources", []) for body in server.kernels[name]] == [[], [name], [name]]


def test_status_and_output(server, tmp_path):
    name = f"{USER}/distill-p100"
    server.status[name] = "COMPLETE"
    assert status("distill-p100", USER).state == status(name).state == "COMPLETE"
    with pytest.raises(KaggleError, match=r"fetch: ada/distill-p100 has no output yet"):
        fetch(name, into=tmp_path / "empty")
    server.outputs[name] = {"kd_runs/distil/RUN.json": b"{}", "student/model.safetensors": b"w" * 70_000, "a.txt": b"a"}
    server.logs[name] = "[]"
    folder = fetch("distill-p100", USER)
    assert folder == Path("build/kaggle-output/distill-p100")
    with pytest.raises(ValueError, match="expected an empty folder"):
        fetch(name, into=folder)
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == server.outputs[name] | {"distill-p100.log": b"[]"}
    with pytest.raises(KaggleError, match=r"Kaggle shows you no kernel ada/none-there \(403\)"):
        fetch("none-there", USER, into=tmp_path / "none")
