"""What the text of Kaggle's real client means. It talks to a server of the tests; nothing leaves the machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from kaggle_server import USER, kaggle_server

from kd_kit import kaggle_client
from kd_kit.kaggle_client import KaggleError, KernelStatus, Pushed, ask_client, read_push, read_status, retired

METADATA = """{"id": "ada/quickstart-cpu", "title": "Quickstart CPU", "code_file": "a.ipynb", "language": "python",
"kernel_type": "notebook", "enable_internet": false}"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    with kaggle_server() as found:
        for name, value in found.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield found
        assert found.strays == [], "a request was on its way out"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A kernel that the client takes."""
    made = tmp_path / "kernel"
    made.mkdir()
    (made / "kernel-metadata.json").write_text(METADATA)
    (made / "a.ipynb").write_text('{"cells": []}')
    return made


def push(folder, limit=60):
    return read_push("ada/quickstart-cpu", *ask_client("kernels", "push", "-p", str(folder), limit=limit))


def test_a_push_that_went_well(server, folder):
    assert push(folder) == Pushed("ada/quickstart-cpu", 1, "https://www.kaggle.com/code/ada/quickstart-cpu")
    second = push(folder)
    assert str(second) == "ada/quickstart-cpu: pushed as version 2, https://www.kaggle.com/code/ada/quickstart-cpu"
    (method, body), *_ = server.asked
    assert method == "SaveKernel" and body["text"] == '{"cells": []}' and body["slug"] == "ada/quickstart-cpu"


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        ((401, "Unauthorized"), 401, r"Kaggle does not take your credentials \(401\): .*; make a token at"),
        (
            (403, "Permission 'kernels.update' was denied"),
            403,
            r"Kaggle refused \(403\): Permission 'kernels.update' was denied; is the owner in its id your account",
        ),
        ((404, "Not found"), 404, r"Kaggle refused \(404\): Not found; it knows no such thing: check the owner"),
        ((500, None), 500, r"Kaggle refused \(500\): 500 Server Error: .*; the fault is on its side: try again"),
    ],
)
def test_http_errors_are_sentences_with_a_cure(server, folder, answer, status, message):
    server.answers["SaveKernel"] = answer
    with pytest.raises(KaggleError, match=message) as refused:
        push(folder)
    assert refused.value.status == status and "\n" not in str(refused.value)


def test_a_refusal_that_the_client_calls_a_success(server, folder):
    server.answers["SaveKernel"] = {"error": "Maximum weekly GPU quota of 30.00 hours was reached."}
    output, _ = ask_client("kernels", "push", "-p", str(folder), limit=60)
    assert output.startswith("Kernel push error:"), "its exit status was 0"
    with pytest.raises(
        KaggleError, match=r"^Kaggle refused to push ada/quickstart-cpu: Maximum weekly GPU quota of 30\.00 hours was"
    ):
        push(folder)


def test_sources_that_kaggle_left_out_are_a_failure(server, folder):
    sources = '"dataset_sources": ["ada/none", "bob/none"], "kernel_sources": ["ada/never-run"], '
    (folder / "kernel-metadata.json").write_text(METADATA.replace("{", "{" + sources, 1))
    with pytest.raises(KaggleError) as refused:
        push(folder)
    text = str(refused.value)
    assert "as version 1, but without dataset sources ada/none, bob/none; kernel sources ada/never-run" in text
    assert "cancel that session at https://www.kaggle.com/code/ada/quickstart-cpu" in text


def test_a_server_that_does_not_answer(server, folder):
    server.answers["SaveKernel"] = "stall"
    with pytest.raises(
        KaggleError, match=r"Kaggle did not answer within 2 seconds; whether it took the request is not"
    ):
        push(folder, limit=2)


def test_kaggle_cannot_be_reached(server, folder, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(KaggleError, match=r"^Kaggle cannot be reached: .*; check the network") as refused:
        push(folder)
    assert "\n" not in str(refused.value)


def test_no_credentials(server, folder, monkeypatch):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(KaggleError, match="no credentials for Kaggle were found; make a token at https://") as refused:
        push(folder)
    assert refused.value.status == 401 and server.asked == []


def test_a_file_of_credentials_counts(server, monkeypatch, tmp_path):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name)
    assert not kaggle_client._has_credentials()
    (tmp_path / "home" / ".kaggle").mkdir(parents=True, exist_ok=True)
    (tmp_path / "home" / ".kaggle" / "access_token").write_text("x")
    assert kaggle_client._has_credentials()


def test_no_client(monkeypatch, tmp_path):
    """Neither in this environment, where a clone's folder of that name does not count, nor on the PATH."""
    (tmp_path / "kaggle" / "distill-p100").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != "kaggle"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KaggleError, match=r"Kaggle's client is not installed; install it: python -m pip install"):
        ask_client("--version", limit=60)
    program = tmp_path / "kaggle-bin" / "kaggle"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho found $2\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    assert ask_client("--version", limit=60) == ("found --version", "")


def test_a_client_that_does_not_start(monkeypatch, tmp_path):
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "kaggle" / "__init__.py").write_text("import no_such_module_six")
    (tmp_path / "kaggle" / "__main__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KaggleError, match=r"its module no_such_module_six is missing; install it: .* kaggle no_such"):
        ask_client("--version", limit=60)


def test_a_failure_of_another_kind_is_quoted(server):
    with pytest.raises(KaggleError, match=r"^Kaggle's client failed: .*invalid choice: 'dance'") as refused:
        ask_client("kernels", "dance", limit=60)
    assert refused.value.status is None


@pytest.mark.parametrize("state", ["RUNNING", "ERROR"])
def test_the_status_of_a_session(server, state):
    name = f"{USER}/distill-p100"
    server.status[name] = state
    if state == "ERROR":
        server.failures[name] = "Your notebook tried to allocate\nmore memory"
    found = read_status(name, ask_client("kernels", "status", name, limit=60)[0])
    assert (found.state, found.running) == (state, state == "RUNNING")
    assert str(found) == f"{name}: {state}" + (", Your notebook tried to allocate more memory" * (state == "ERROR"))


def test_the_status_of_what_is_not_there(server):
    with pytest.raises(KaggleError, match=r"Kaggle shows you no kernel ada/none-there \(403\): it was") as refused:
        ask_client("kernels", "status", "ada/none-there", limit=60)
    assert refused.value.status == 403


# ---- texts alone


def test_the_warning_of_a_retired_card_becomes_one_line():
    """As kaggle 2.2.5 prints it to a pipe, and to a terminal."""
    text = "⚠ Warning: 'NvidiaTeslaP100' is retired.\n  Sessions run on the default GPU (NvidiaTeslaT4) instead.\n"
    expected = ["Kaggle: 'NvidiaTeslaP100' is retired. Sessions run on the default GPU (NvidiaTeslaT4) instead."]
    assert retired(text) == expected
    assert retired("  0%|          | 0.00/5.50M\n") == []
    done = "Kernel version 3 successfully pushed.  Please check progress at https://www.kaggle.com/code/ada/x-y-z"
    assert read_push("ada/x-y-z", done, text) == Pushed("ada/x-y-z", 3, done.split()[-1], tuple(expected))


def test_other_texts_of_success():
    found = read_push("ada/x", "Kernel version successfully saved without running.  See https://k.com/code/ada/x", "")
    assert found == Pushed("ada/x", None, "https://k.com/code/ada/x")
    assert str(found) == "ada/x: pushed, https://k.com/code/ada/x"
    remark = "Your kernel title does not resolve to the specified id. See https://en.wikipedia.org/wiki/X for more\n"
    found = read_push(
        "ada/x", remark + "Kernel version 2 successfully pushed.  Please check progress at https://k/x", ""
    )
    assert (found.version, found.url) == (2, "https://k/x")


@pytest.mark.parametrize("text", ["", "Something new", "Kernel version 3 failed"])
def test_an_unknown_text_is_no_success(text):
    with pytest.raises(KaggleError, match=r"the answer to pushing ada/x is none that is known.*look at https://www"):
        read_push("ada/x", text, "")
    with pytest.raises(KaggleError, match=r"the answer to the status of ada/x is none that is known"):
        read_status("ada/x", text)


def test_lists_that_are_none_are_quoted_as_they_are():
    text = "The following are not valid dataset sources and could not be added to the kernel: ada/a and ada/b\n"
    text += "Kernel version 1 successfully pushed.  Please check progress at https://k/x"
    with pytest.raises(KaggleError, match="without dataset sources ada/a and ada/b, which"):
        read_push("ada/x", text, "")


def test_its_own_output_that_is_not_there_yet_is_a_remark():
    text = "The following are not valid kernel sources and could not be added to the kernel: {}\n"
    text += "Kernel version 2 successfully pushed.  Please check progress at https://k/x"
    [remark] = read_push("ada/x", text.format(["ada/x"]), "").remarks
    assert remark == "ada/x has no output yet to go on from: this session begins anew"
    with pytest.raises(KaggleError, match="without kernel sources bob/y, which"):
        read_push("ada/x", text.format(["ada/x", "bob/y"]), "")


@pytest.mark.parametrize("state", ["QUEUED", "RUNNING", "COMPLETE", "ERROR", "CANCEL_REQUESTED", "CANCEL_ACKNOWLEDGED"])
def test_both_forms_of_a_state_are_read(state):
    for form in (f"KernelWorkerStatus.{state}", state.lower()):
        found = read_status("a/b", f'a/b has status "{form}"')
        assert found == KernelStatus("a/b", state)
        assert found.running == (state in ("QUEUED", "RUNNING", "CANCEL_REQUESTED"))


# What kaggle 2.2.5 prints; 2.2.4 prints the first paragraph only.
NO_ACCESS = """Permission 'datasets.get' was denied

You don't have access to this resource.
If this is a competition, you may need to accept its rules first at
  https://www.kaggle.com/competitions/<competition>/rules"""
OURS = "This is a problem on Kaggle's side, not with your command. Please try again later."


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        (NO_ACCESS, 403, "Kaggle refused (403): Permission 'datasets.get' was denied; is the owner"),
        (NO_ACCESS.split("\n")[0], 403, "Kaggle refused (403): Permission 'datasets.get' was denied; is the owner"),
        ("403 Client Error: Forbidden for url: x", 403, "Kaggle refused (403): 403 Client Error: Forbidden for"),
        (f"oops\n\n{OURS}", 500, "Kaggle refused (500): oops; the fault is on its side: try again later"),
        ("503 Server Error: Service Unavailable", 503, "Kaggle refused (503): 503 Server Error: Service Unavailable;"),
        ("oops\n\nYou have been rate limited. Wait", 429, "Kaggle refused (429): oops; too many requests"),
        ("400 Client Error: Bad Request for url: x", 400, "Kaggle refused (400): 400 Client Error: Bad Request"),
        ("409 Client Error: Conflict for url: x", 409, "Kaggle refused (409): 409 Client Error: Conflict"),
        ("Source file not found: a.ipynb", None, "Kaggle's client failed: Source file not found: a.ipynb; "),
        ("", None, "Kaggle's client failed: it did not say why; "),
    ],
)
def test_the_status_is_read_from_words(text, status, message):
    found = kaggle_client._failure("", text)
    assert str(found).startswith(message) and found.status == status


def test_keywords_that_kaggle_does_not_know_are_a_remark():
    text = "The following are not valid tags and could not be added to the kernel: ['distil']\n"
    found = read_push("ada/x", text + "Kernel version 1 successfully pushed.  Please check progress at https://k/x", "")
    assert found.remarks == ("Kaggle does not know the keywords ['distil']",)


def test_the_client_is_the_real_one(server):
    output, _ = ask_client("--version", limit=60)
    assert re.fullmatch(r"Kaggle CLI 2\.\d+\.\d+", output)
