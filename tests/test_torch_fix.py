"""The repair of torch, with a pip and cards that are made up."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from kd_kit import checkup, torch_fix
from kd_kit.doctor_verb import add_arguments, run
from kd_kit.machine import Machine
from kd_kit.torch_fix import Installed, fix_torch, installed

STOCK = ("sm_70", "sm_75", "sm_80")
PASCAL = ("sm_50", "sm_60", "sm_70")
P100 = ("Tesla P100-PCIE-16GB", (6, 0))
NO_KERNEL = "AcceleratorError: CUDA error: no kernel image is available for execution on the device"
IMAGE = {"torch": "2.10.0+cu128", "torchvision": "0.25.0+cu128", "torchaudio": "2.10.0+cu128"}
BROKEN = Installed(IMAGE, {}, STOCK, ((*P100, NO_KERNEL),))
FIXED = Installed({**IMAGE, "torch": "2.10.0+cu126"}, {}, PASCAL, ((*P100, None),))


@pytest.fixture
def fix(tmp_path):
    """Repair with these answers of what is installed and these of pip: (status, messages, what pip was asked for)."""
    record = tmp_path / "asked.jsonl"

    def go(*answers, pip=(0,), words="ERROR: no matching distribution"):
        script = tmp_path / "pip.py"
        script.write_text(
            "import json, pathlib, sys\n"
            f"record = pathlib.Path({str(record)!r})\n"
            "before = record.read_text() if record.exists() else ''\n"
            "record.write_text(before + json.dumps(sys.argv[1:]) + '\\n')\n"
            f"status = {list(pip)!r}[before.count('\\n')]\n"
            f"print({words!r} if status else '', file=sys.stderr)\n"
            "sys.exit(status)\n"
        )
        left = list(answers)
        said = []
        status = fix_torch(
            ask=lambda: left.pop(0), pip=(sys.executable, str(script)), say=lambda x: said.append(str(x))
        )
        assert left == [], "asked once before and once after an installation"
        asked = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        return status, said, asked

    return go


def test_a_torch_with_kernels_is_left_alone(fix):
    status, said, asked = fix(FIXED)
    assert (status, asked) == (0, [])
    assert said == ["torch 2.10.0+cu126 has kernels for Tesla P100-PCIE-16GB (sm_60): nothing to do"]


def test_without_a_card_torch_is_left_alone(fix):
    status, said, asked = fix(Installed({"torch": "2.13.0+cpu"}))
    assert (status, asked) == (0, [])
    assert said == ["no NVIDIA card here: torch 2.13.0+cpu stays as it is"]


def test_the_same_torch_is_installed_with_other_kernels(fix):
    status, said, asked = fix(BROKEN, FIXED)
    assert status == 0
    assert asked == [
        [
            *("install", "--progress-bar", "off", "--index-url", "https://download.pytorch.org/whl/cu126"),
            *("torch==2.10.0+cu126", "torchvision==0.25.0+cu126", "torchaudio==2.10.0+cu126"),
        ]
    ]
    assert "has no kernels for Tesla P100-PCIE-16GB (sm_60; it has sm_70 sm_75 sm_80)" in said[0]
    assert said[1].startswith("installing torch==2.10.0+cu126")
    assert said[2].startswith("torch 2.10.0+cu126 is installed and has kernels for Tesla P100-PCIE-16GB (sm_60)")


def test_another_version_is_tried_where_that_one_is_not_to_be_had(fix):
    after = Installed({"torch": "2.14.1+cu126"}, {}, PASCAL, ((*P100, None),))
    status, said, asked = fix(BROKEN, after, pip=(1, 0))
    assert status == 0
    assert asked[1][-3:] == ["torch>=2.6,<2.15,!=2.10.0", "torchvision", "torchaudio"]
    assert "pip could not: ERROR: no matching distribution" in said


def test_a_pip_that_fails_is_a_sentence_and_a_status(fix):
    words = "WARNING: retrying\nERROR: Could not find a version that satisfies torch\nhint: look"
    status, said, asked = fix(BROKEN, pip=(1, 1), words=words)
    assert (status, len(asked)) == (1, 2)
    assert said.count("pip could not: ERROR: Could not find a version that satisfies torch") == 2
    assert "switch the internet on" in said[-1]
    status, said, _ = fix(BROKEN, pip=(1, 1, 3, 3), words="it just broke")
    assert "pip could not: it just broke" in said


def test_a_pip_that_is_not_there():
    said = []
    assert fix_torch(ask=lambda: BROKEN, pip=("no-such-pip-here",), say=lambda x: said.append(str(x))) == 1
    assert any(line.startswith("pip could not: FileNotFoundError") for line in said)


def test_a_pip_that_never_ends(monkeypatch):
    monkeypatch.setattr(torch_fix, "_MINUTES", 0.0005)
    said = []
    sleepy = (sys.executable, "-c", "import time; time.sleep(60)")
    assert fix_torch(ask=lambda: BROKEN, pip=sleepy, say=lambda x: said.append(str(x))) == 1
    assert "pip could not: not done after 0.0005 minutes" in said


def test_what_pip_installed_is_looked_at(fix):
    still = Installed(IMAGE, {}, STOCK, ((*P100, NO_KERNEL),))
    status, said, _ = fix(BROKEN, still)
    assert status == 1
    assert "has no kernels for" in said[-1]
    torn = Installed({"torch": "2.10.0+cu126"}, {"torch": "ImportError: libcudart.so.12"}, (), ((*P100, "unseen"),))
    status, said, _ = fix(BROKEN, torn, pip=(0, 0))
    assert status == 1
    assert said[-1] == "torch 2.10.0+cu126 cannot be imported: ImportError: libcudart.so.12"


def test_kernels_that_do_not_work_are_not_fine(fix):
    status, said, asked = fix(Installed(IMAGE, {}, PASCAL, ((*P100, "RuntimeError: no"),)))
    assert (status, asked) == (1, [])
    assert said[-1].endswith("but a sum on it fails: RuntimeError: no")


def test_companions_that_no_longer_fit_are_named(fix):
    after = Installed(
        {"torch": "2.14.1+cu126", "torchvision": "0.25.0+cu128"},
        {"torchvision": "RuntimeError: operator torchvision::nms does not exist"},
        PASCAL,
        ((*P100, None),),
    )
    status, said, _ = fix(BROKEN, after)
    assert status == 0
    assert said[-1].startswith("torchvision 0.25.0+cu128 no longer fits")
    assert "pip uninstall -y torchvision" in said[-1]


def test_a_torch_for_the_cpu_and_a_broken_one_are_replaced(fix):
    card = ("Tesla T4", (7, 5), "torch does not see this card")
    after = Installed({"torch": "2.13.0+cu126"}, {}, ("sm_75",), (("Tesla T4", (7, 5), None),))
    status, said, asked = fix(Installed({"torch": "2.13.0+cpu"}, {}, (), (card,)), after)
    assert (status, asked[0][-1]) == (0, "torch==2.13.0+cu126")
    assert said[0] == "torch 2.13.0+cpu has no kernels for any card; here is Tesla T4"
    broken = Installed({"torch": "2.13.0"}, {"torch": "OSError: libcublas"}, (), (card,))
    status, said, _ = fix(broken, after, pip=(0, 0))
    assert (status, said[0]) == (0, "torch 2.13.0 OSError: libcublas; here is Tesla T4")


def test_a_card_that_no_torch_serves(fix):
    status, said, asked = fix(Installed(IMAGE, {}, STOCK, (("Tesla K80", (3, 7), NO_KERNEL),)))
    assert (status, asked) == (1, [])
    assert said == ["no torch from 2.6 on has kernels for Tesla K80 (sm_37); take another card"]


def test_a_python_that_says_nothing():
    said = []

    def silent():
        raise RuntimeError("doctor --fix-torch: expected a Python that says which torch it has")

    assert fix_torch(ask=silent, say=lambda x: said.append(str(x))) == 1
    assert said == ["doctor --fix-torch: expected a Python that says which torch it has"]


# --- what is installed -----------------------------------------------------------------------------------------------


def test_this_machines_torch_is_asked_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(torch_fix, "driver_cards", lambda: [("Tesla P4", (6, 1))])
    found = installed()
    assert found.versions["torch"] == torch.__version__
    assert "torch" not in found.broken
    assert found.arch_list == tuple(torch.cuda.get_arch_list())
    if not torch.cuda.is_available():
        assert found.cards == (("Tesla P4", (6, 1), "torch does not see this card"),)


def test_a_torch_that_cannot_be_imported_is_an_answer(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcublas.so.12: cannot open\\nmore')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch_fix, "driver_cards", lambda: [])
    found = installed()
    assert found.broken == {"torch": "OSError: libcublas.so.12: cannot open"}
    assert (found.arch_list, found.cards) == ((), ())


def test_a_python_that_dies_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch_fix, "_ASK", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"^doctor --fix-torch: expected a Python that says which torch it has"):
        installed()


# --- the verb --------------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_verb_reports_and_says_it_by_its_status(monkeypatch, capsys):
    machine = Machine(disks={"/here": 50.0})
    monkeypatch.setattr(checkup, "measure", lambda: machine)
    assert run(parsed("--asked", "P100")) == 0
    assert "asked for P100, got the CPU" in capsys.readouterr().out
    machine = Machine(card_error="RuntimeError: no")
    assert run(parsed()) == 1
    assert "PROBLEM     torch cannot use the card" in capsys.readouterr().out


def test_the_verb_repairs(monkeypatch):
    monkeypatch.setattr(torch_fix, "fix_torch", lambda: 7)
    assert run(parsed("--fix-torch")) == 7


def test_the_question_is_plain_python():
    """It is run by a Python that has only torch: it may not need this package."""
    assert "kd_kit" not in torch_fix._ASK
    compile(torch_fix._ASK, "question", "exec")
    assert subprocess.run([sys.executable, "-c", torch_fix._ASK], capture_output=True, check=True).stdout
