"""What is measured about a session, with torch's, the driver's and the system's answers made up where need be."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from kd_kit import machine as module
from kd_kit.machine import (
    Card,
    Machine,
    Source,
    ask_hub,
    attached_sources,
    driver_cards,
    free_disk,
    measure,
    memory,
    needed_versions,
    see_cards,
    unseen_cards,
    with_passes,
)

T4 = Card("Tesla T4", (7, 5), 14.7)
P100 = Card("Tesla P100-PCIE-16GB", (6, 0), 15.9)


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    found = measure()
    assert found.offline, "conftest says so"
    assert found.internet == "not asked: HF_HUB_OFFLINE is set"
    assert found.versions["python"].startswith("3.")
    assert found.versions["torch"] == torch.__version__
    assert found.unmet == {}, "the tests' own environment"
    assert found.passes and set(found.passes.values()) == {None}
    assert "math" in found.backends
    assert (found.run_type, found.sources) == (None, ())
    assert all(free > 0 for free in found.disks.values())


# --- cards -----------------------------------------------------------------------------------------------------------


def pretend_cards(monkeypatch, *cards):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))

    def properties(i):
        name, (major, minor), gib = cards[i]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=int(gib * 2**30))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def test_cards_as_torch_says_them(monkeypatch):
    pretend_cards(monkeypatch, ("Tesla T4", (7, 5), 14.5), ("Tesla T4", (7, 5), 14.5))
    cards, error = see_cards()
    assert error is None
    assert cards == (Card("Tesla T4", (7, 5), 14.5),) * 2


def test_cards_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def broken():
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    cards, error = see_cards()
    assert cards == ()
    assert error == "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment"


def test_a_step_is_made_on_every_card_that_has_kernels(monkeypatch):
    tried = []
    monkeypatch.setattr(module, "real_pass", lambda device, profile: tried.append((device, profile.name)))
    monkeypatch.setattr(module, "sdpa_backends", lambda device, dtype: (device, dtype))
    needs = {"versions": {"torch": "2.10.0"}, "needed": {"torch": "2.6"}}
    found = with_passes(Machine(cards=(T4, T4), arch_list=("sm_75",), **needs))
    assert tried == [("cuda:0", "T4 x2"), ("cuda:1", "T4 x2")]
    assert found.passes == {"cuda:0": None, "cuda:1": None}
    assert found.backends == ("cuda:0", "float16")

    tried.clear()
    found = with_passes(Machine(cards=(P100, T4), arch_list=("sm_75",), **needs))
    assert tried == [("cuda:1", "T4 x2")], "the other could only fail"
    assert (found.passes, found.backends) == ({"cuda:1": None}, None)
    assert found.without_kernels == (P100,)

    tried.clear()
    assert with_passes(Machine(**needs)).passes == {"cpu": None}
    assert tried == [("cpu", "CPU")]

    tried.clear()
    too_old = Machine(versions={"torch": "2.5.1"}, needed={"torch": "2.6"})
    assert with_passes(too_old) == too_old
    assert with_passes(replace(too_old, needed={}, card_error="broken")).passes == {}
    assert tried == []


def test_a_failing_step_leaves_the_kernels_of_attention_alone(monkeypatch):
    monkeypatch.setattr(module, "real_pass", lambda device, profile: "forward and backward: it broke")
    monkeypatch.setattr(module, "sdpa_backends", lambda device, dtype: pytest.fail("tried on a broken device"))
    found = with_passes(Machine())
    assert (found.passes, found.backends) == ({"cpu": "forward and backward: it broke"}, None)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """An nvidia-smi that says what it is told to."""

    def make(said: str, status: int = 0):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!{sys.executable}\nprint('''{said}''')\nraise SystemExit({status})\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


@pytest.mark.skipif(os.name == "nt", reason="a script as a program")
def test_cards_as_the_driver_says_them(driver, monkeypatch):
    driver("Tesla T4, 7.5\nNVIDIA RTX PRO 6000, Server, 12.0\n")
    assert driver_cards() == [("Tesla T4", (7, 5)), ("NVIDIA RTX PRO 6000, Server", (12, 0))]
    assert unseen_cards() == ("Tesla T4", "NVIDIA RTX PRO 6000, Server")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unseen_cards() == (), "hidden on purpose"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver("NVIDIA-SMI has failed", 9)
    assert driver_cards() == []


def test_no_driver_no_cards(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_cards() == []


# --- packages --------------------------------------------------------------------------------------------------------


def test_the_needed_versions_are_those_of_setup_cfg():
    import configparser

    from kd_kit import __file__ as package

    setup = configparser.ConfigParser()
    path = os.path.join(os.path.dirname(os.path.dirname(package)), "setup.cfg")
    if not setup.read(path):
        pytest.skip("installed without its source tree")
    wanted = dict(line.split(">=") for line in setup["options"]["install_requires"].splitlines() if ">=" in line)
    found = needed_versions()
    assert found.pop("python") == "3.11"
    assert {"torch", "transformers", "datasets", "accelerate"} <= found.keys()
    assert found.items() <= wanted.items()


def test_extras_are_not_needed(monkeypatch):
    lines = ["torch>=2.6", "numpy (>=1.26)", 'pytest>=8; extra == "test"', "kaggle>=1.6 ; extra == 'kaggle'"]
    made = SimpleNamespace(get_all=lambda _: lines, get=lambda _: ">=3.11")
    monkeypatch.setattr(module, "metadata", lambda _: made)
    assert needed_versions() == {"python": "3.11", "torch": "2.6", "numpy": "1.26"}


def test_a_bare_folder_names_no_versions(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "metadata", missing)
    assert needed_versions() == {}


def test_unmet_packages():
    found = Machine(
        versions={"torch": "2.10.0+cu128", "transformers": "4.55.4", "numpy": "1.26", "datasets": None},
        needed={"torch": "2.6", "transformers": "4.56", "numpy": "1.26", "datasets": "3"},
    )
    assert found.unmet == {"transformers": "4.55.4", "datasets": None}


# --- memory and disk -------------------------------------------------------------------------------------------------


def test_memory_is_the_containers_where_that_is_less(tmp_path):
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal:       33554432 kB\nMemFree:         1 kB\nMemAvailable:   25165824 kB\n")
    assert memory(proc, tmp_path) == (32.0, 24.0)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1\n")
    assert memory(proc, tmp_path) == (32.0, 24.0)
    (tmp_path / "memory.max").write_text(str(16 * 2**30))
    (tmp_path / "memory.current").write_text(str(6 * 2**30))
    assert memory(proc, tmp_path) == (16.0, 10.0)
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(8 * 2**30))
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(str(9 * 2**30))
    assert memory(proc, tmp_path) == (8.0, 0.0)
    assert memory(tmp_path / "none") is None


def test_the_disk_that_counts_is_the_one_that_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert next(iter(free_disk())) == os.getcwd()
    (tmp_path / "working").mkdir()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert next(iter(free_disk())) == str(tmp_path / "working")


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The address of a hub of this test, that answers with one status."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    status = [200]

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield status
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_that_answers(hub):
    assert ask_hub() is None
    hub[0] = 429
    assert ask_hub() is None, "it is there, whatever it thinks of the question"
    hub[0] = 503
    assert ask_hub() == "it answers with error 503"


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_hub_that_is_not_to_be_asked(hub, monkeypatch, variable):
    monkeypatch.setenv(variable, "yes")
    hub[0] = 503
    assert ask_hub() == f"not asked: {variable} is set"
    monkeypatch.setenv(variable, "0")
    assert ask_hub() == "it answers with error 503"


def test_a_hub_that_says_nothing_is_not_waited_for(hub, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert ask_hub(wait=0.2) in ("no answer in 0.2 s", "timed out")


def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(hub, monkeypatch):
    told = threading.Event()

    def wait(*_, **__):
        told.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(module.urllib.request, "urlopen", wait)
    try:
        assert ask_hub(wait=0.05) == "no answer in 0.05 s"
    finally:
        told.set()


def test_a_network_that_is_off(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert ask_hub() == "Connection refused"
    monkeypatch.setenv("HF_ENDPOINT", "no address")
    assert "unknown url type" in ask_hub()


# --- what is attached ------------------------------------------------------------------------------------------------


def test_sources_in_both_layouts(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    assert attached_sources() == ()
    files = {
        "datasets/me/my-text/a.txt": 10,
        "datasets/me/my-text/deep/b.txt": 5,
        "datasets/you/other/c": 1,
        "models/qwen-lm/qwen-3/transformers/0.6b/1/model.safetensors": 100,
        "notebooks/me/distill-p100/run/history.jsonl": 7,
        "old-layout/x/y": 3,
    }
    for name, size in files.items():
        path = tmp_path / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert attached_sources() == (
        Source("datasets/me/my-text", 15, 2),
        Source("datasets/you/other", 1, 1),
        Source("models/qwen-lm/qwen-3/transformers/0.6b/1", 100, 1),
        Source("notebooks/me/distill-p100", 7, 1),
        Source("old-layout", 3, 1),
    )


def test_a_source_called_as_a_layer_and_one_that_is_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    (tmp_path / "input" / "datasets").mkdir(parents=True)
    (tmp_path / "input" / "datasets" / "a.txt").write_text("abc")
    (tmp_path / "input" / "one.txt").write_text("ab")
    assert attached_sources() == (Source("datasets", 3, 1), Source("one.txt", 2, 1))


def test_a_folder_of_a_million_files_is_not_counted_to_the_end(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    monkeypatch.setattr(module, "_MOST", 3)
    (tmp_path / "input" / "pictures").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "input" / "pictures" / str(i)).write_text("ab")
    assert attached_sources() == (Source("pictures", 6, 3, whole=False),)
