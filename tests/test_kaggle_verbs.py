"""``python -m kd_kit kaggle``: each verb's arguments, what it says, and its exit status."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_kernel_plan import a_run

from kd_kit import kaggle_verbs, kernel_build
from kd_kit.__main__ import main
from kd_kit.kaggle_client import KaggleError, KernelStatus, Pushed
from kd_kit.kernel_metadata import METADATA


@pytest.fixture
def build_quickly(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_build, "packed_cell", lambda wheel: "install()")
    monkeypatch.chdir(tmp_path)


def test_the_examples_run():
    assert doctest.testmod(kaggle_verbs).attempted and not doctest.testmod(kaggle_verbs).failed


OWN = ["ada/other-run", "ada/distill-p100"]


def test_build_validate_resume(build_quickly, capsys):
    arguments = ["--owner", "ada", "--set", "HOURS=2.5", "--set", "TEACHER=Qwen/Qwen3-0.6B", "--set", "CONTROL=False"]
    arguments += ["--dataset", "bob/texts", "--kernel", "ada/other-run", "--model", "a/b/transformers/c/1"]
    assert main(["kaggle", "build", "distill-p100", *arguments]) == 0
    folder = Path("build/kaggle/distill-p100")
    assert f"kaggle kernels push -p {folder}" in capsys.readouterr().out
    metadata = json.loads((folder / METADATA).read_text())
    assert metadata["dataset_sources"] == ["bob/texts"] and metadata["kernel_sources"] == OWN
    assert metadata["model_sources"] == ["a/b/transformers/c/1"]
    text = (folder / "distill-p100.ipynb").read_text()
    assert "HOURS = 2.5" in text and "TEACHER = 'Qwen/Qwen3-0.6B'" in text and "CONTROL = False" in text

    assert main(["kaggle", "validate", "distill-p100"]) == 0
    said = capsys.readouterr().out
    assert "retired the P100" in said and f"{folder}: Kaggle would take it" in said
    assert main(["kaggle", "resume", "distill-p100"]) == 0
    assert json.loads((folder / METADATA).read_text())["kernel_sources"] == OWN, "it has it already"
    assert "the next version finds the last one's output" in capsys.readouterr().out

    (folder / "distill-p100.ipynb").unlink()
    assert main(["kaggle", "validate", "distill-p100"]) == 1
    assert "code_file: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "distil", "--owner", "ada"], "build: expected one of debug-loss-magnitudes, "),
        (["build", "distill-p100", "--owner", "OWNER"], "got the placeholder 'OWNER'"),
        (["build", "distill-p100", "--owner", "ada", "--set", "HOURS"], "expected --set NAME=VALUE, got 'HOURS'"),
        (
            ["build", "distill-p100", "--owner", "ada", "--set", "HOURS=soon"],
            "expected a number for HOURS of notebooks/03",
        ),
        (["validate", "distill-p100"], "build the kernel first"),
        (["push", "distill-p100"], "build the kernel first"),
        (["status", "distill-p100"], "build the kernel first"),
        (["fetch", "distill-p100"], "build the kernel first"),
        (["resume", "distill-p100"], "build the kernel first"),
        (["plan", "nowhere"], "plan: expected a run with checkpoints below 'nowhere', got none"),
    ],
)
def test_a_failure_is_a_sentence_and_an_exit_status(build_quickly, capsys, arguments, message):
    assert main(["kaggle", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and "Traceback" not in said.err


def test_push_status_and_fetch_pass_on_what_was_asked(monkeypatch, capsys, tmp_path):
    asked = []

    def answering(value):
        def answer(*arguments, **named):
            asked.append((*arguments, named))
            if isinstance(value, Exception):
                raise value
            return value

        return answer

    out = Path("build/kaggle")
    monkeypatch.setattr(kaggle_verbs, "push", answering(Pushed("ada/x", 3, "https://k/x", ("a remark",))))
    assert main(["kaggle", "push", "distill-p100", "--owner", "ada", "--again", "--limit", "9"]) == 0
    assert asked.pop() == ("distill-p100", "ada", out, {"again": True, "limit": 9.0})
    assert capsys.readouterr().out == (
        "a remark\nada/x: pushed as version 3, https://k/x\n"
        "how it stands: python -m kd_kit kaggle status distill-p100\n"
    )

    for state, code in (("RUNNING", 0), ("COMPLETE", 0), ("ERROR", 1)):
        monkeypatch.setattr(kaggle_verbs, "status", answering(KernelStatus("ada/x", state)))
        assert main(["kaggle", "status", "distill-p100"]) == code
        assert asked.pop() == ("distill-p100", None, out, {})
        assert capsys.readouterr().out == f"ada/x: {state}\n"

    (tmp_path / "a.txt").touch()
    monkeypatch.setattr(kaggle_verbs, "fetch", answering(tmp_path))
    assert main(["kaggle", "fetch", "ada/distill-p100", "--into", str(tmp_path)]) == 0
    assert asked.pop() == ("ada/distill-p100", None, tmp_path, out, {})
    assert capsys.readouterr().out == f"{tmp_path}: 1 files\n"

    monkeypatch.setattr(kaggle_verbs, "push", answering(KaggleError("Kaggle refused (403): no; do this", 403)))
    assert main(["kaggle", "push", "distill-p100"]) == 1
    assert capsys.readouterr().err == "Kaggle refused (403): no; do this\n"


def test_plan(tmp_path, capsys):
    a_run(tmp_path / "distil", 100, 400.0)
    arguments = ["--run", "distil", "--hours", "11", "--quota", "20", "--lead", "3600"]
    assert main(["kaggle", "plan", str(tmp_path), *arguments]) == 0
    assert "10 more sessions, 110.0 GPU hours, 6 weeks of the quota" in capsys.readouterr().out


def test_the_doctor_has_a_verb(monkeypatch):
    from kd_kit import doctor_verb

    seen = []
    monkeypatch.setattr(doctor_verb, "run", lambda given: seen.append(SimpleNamespace(**vars(given))) or 7)
    assert main(["doctor", "--asked", "P100"]) == 7
    assert seen[0].asked == "P100" and seen[0].fix_torch is False
