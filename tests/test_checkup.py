"""What is made of a measured machine: every card, every broken torch, every cure, without having any of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kd_kit import checkup
from kd_kit.checkup import doctor, judge
from kd_kit.machine import Card, Machine, Source

P100 = Card("Tesla P100-PCIE-16GB", (6, 0), 15.9)
T4 = Card("Tesla T4", (7, 5), 14.7)
A100 = Card("NVIDIA A100-SXM4-40GB", (8, 0), 39.4)
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
VERSIONS = {
    "python": "3.12.12",
    "torch": "2.10.0+cu128",
    "transformers": "5.0.0",
    "accelerate": "1.13.0",
    "datasets": "4.0.0",
    "numpy": "2.0.2",
    "matplotlib": "3.10.0",
    "ipywidgets": "8.1.5",
    "IPython": "7.34.0",
    "safetensors": "0.7.0",
    "huggingface_hub": "1.2.0",
    "kd_kit": "0.1.0",
}
NEEDED = {"python": "3.11", "torch": "2.6", "transformers": "4.56", "datasets": "3", "accelerate": "1.0"}


def kaggle(*cards: Card, **changes) -> Machine:
    """A session on Kaggle's image where all is well, with these cards; ``changes`` are what is not."""
    passes = {f"cuda:{i}": None for i in range(len(cards))} or {"cpu": None}
    machine = Machine(
        cards=cards,
        arch_list=CU128,
        cuda="12.8",
        passes=passes,
        backends=("memory-efficient", "math"),
        triton="3.6.0",
        versions=VERSIONS,
        needed=NEEDED,
        cores=4,
        memory=(31.4, 29.9),
        disks={"/kaggle/working": 19.5, "/tmp": 60.0},
        run_type="Batch",
    )
    return replace(machine, **changes)


def only(machine: Machine, **arguments):
    """The one problem of a machine."""
    (problem,) = judge(machine, **arguments).problems
    return problem


# --- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "chosen"),
    [
        (kaggle(P100, arch_list=CU126), ("P100", "fp16", "sdpa", "eager", "cuda:0")),
        (kaggle(T4), ("T4", "fp16", "sdpa", "eager", "cuda:0")),
        (kaggle(T4, T4), ("T4 x2", "fp16", "sdpa", "eager", "cuda:1")),
        (kaggle(A100), ("Ampere or newer", "bf16", "sdpa", None, "cuda:0")),
        (kaggle(), ("CPU", "no", "sdpa", None, "cpu")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_chosen_and_the_whole_report(machine, chosen):
    found = judge(machine)
    assert (found.profile.name, found.precision, found.attention, found.experts, found.teacher_device) == chosen
    assert (found.ok, found.problems) == (True, ())
    lines = str(found).splitlines()
    words = {"no": "float32", "fp16": "float16 autocast with loss scaling", "bf16": "bfloat16 autocast"}
    assert lines[-1] == repr(found) == f"-> ready: {chosen[0]}, {words[chosen[1]]}"
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    for name, version in VERSIONS.items():
        assert f"{name} {version}" in " ".join(str(found).split())


def test_the_report_of_two_t4s_line_by_line():
    sources = (Source("datasets/me/my-text", 1_250_000_000, 3), Source("notebooks/me/distill", 42_000, 1, whole=False))
    text = str(judge(kaggle(T4, T4, sources=sources), asked="P100"))
    assert text == (
        "card        2 x Tesla T4, 14.7 GiB each, capability 7.5\n"
        "kernels     sm_75 is built in\n"
        "real step   cuda:0 ok, cuda:1 ok (a tiny student learns a step, tiny experts read a batch)\n"
        "precision   student float16 autocast with loss scaling on cuda:0, teacher float16 on cuda:1\n"
        "attention   sdpa: memory-efficient, math\n"
        "experts     eager\n"
        "Triton      3.6.0\n"
        "that means  no bfloat16 in this card: float16 with loss scaling, which may skip the first few steps\n"
        "            of a run\n"
        "            experts of a mixture run one after the other: the grouped kernel needs capability 8.0\n"
        "            2 cards: build_teacher(device='cuda:1') leaves cuda:0 to the student\n"
        "computer    4 cores, 31.4 GiB of RAM, 29.9 free\n"
        "disk        20 GiB free in /kaggle/working, 60 GiB free in /tmp\n"
        "internet    the hub answers\n"
        "run         Kaggle, Batch\n"
        "attached    datasets/me/my-text (1.2 GB, 3 files), notebooks/me/distill (over 42.0 kB, 1 file)\n"
        "versions    python 3.12.12, torch 2.10.0+cu128, cuda 12.8, transformers 5.0.0, accelerate 1.13.0,\n"
        "            datasets 4.0.0, numpy 2.0.2, matplotlib 3.10.0, ipywidgets 8.1.5, IPython 7.34.0,\n"
        "            safetensors 0.7.0, huggingface_hub 1.2.0, kd_kit 0.1.0\n"
        "asked       for P100, got 2 x T4 (Kaggle retired the P100 on 2026-09-15 and gives T4 x2 in its\n"
        "            place). What that changes: two separate cards, so that teacher and student need not\n"
        "            share one; tensor cores, so that half precision is faster and not only smaller;\n"
        "            torch.compile is possible; precision stays float16\n"
        "-> ready: T4 x2, float16 autocast with loss scaling"
    )


def test_kernels_that_the_driver_compiles_and_kernels_of_another_number():
    ada = Card("NVIDIA L4", (8, 9), 22.0)
    assert "sm_89 runs sm_86" in str(judge(kaggle(ada)))
    assert "sm_89 runs compute_80, compiled by the driver" in str(judge(kaggle(ada, arch_list=("compute_80",))))


def test_transformers_4_has_no_choice_of_experts():
    text = str(judge(kaggle(T4, versions=VERSIONS | {"transformers": "4.57.1"})))
    assert "experts     one after the other, as transformers 4 does it" in text


def test_many_sources_are_a_few_lines():
    sources = tuple(Source(f"datasets/me/number-{i}", 10, 1) for i in range(40))
    text = str(judge(kaggle(sources=sources)))
    assert "datasets/me/number-0 (10 bytes, 1 file)" in " ".join(text.split())
    assert "and 34 more" in " ".join(text.split())
    assert "attached    nothing" in str(judge(kaggle()))


def test_a_record_of_nothing_prints_too():
    text = str(judge(Machine(disks={"/here": 50.0})))
    assert "real step   not tried" in text
    assert "not tried" in next(line for line in text.splitlines() if line.startswith("attention"))
    assert "1 core\n" in text
    assert "kd_kit is a bare folder here" in " ".join(text.split())
    assert "bare folder" not in " ".join(str(judge(kaggle(T4))).split())


# --- what is fatal ---------------------------------------------------------------------------------------------------


def test_a_p100_on_the_stock_image():
    found = judge(kaggle(P100, passes={}, backends=None))
    (problem,) = found.problems
    assert problem.fatal
    assert "torch 2.10.0+cu128 has no kernels for Tesla P100-PCIE-16GB (sm_60" in problem.what
    assert "--fix-torch" in problem.cure
    assert "FIX_TORCH = True" in problem.cure
    assert '"torch==2.10.0+cu126" --index-url https://download.pytorch.org/whl/cu126' in problem.cure
    assert not found.ok
    text = str(found)
    assert "kernels     NONE for sm_60" in text
    for command in re.findall("`.*?`", problem.cure):
        assert command in text, "a command is copied from one line"
    assert "real step   not tried: it could only fail" in text
    assert text.endswith("-> not ready: 1 problem to solve first")
    assert len(text.splitlines()) <= 30


def test_one_card_of_two_without_kernels():
    found = judge(kaggle(T4, P100, passes={"cuda:0": None}))
    assert [problem.fatal for problem in found.problems] == [True]
    assert "cuda:0 ok, cuda:1 not tried" in str(found)
    assert "sm_75 is built in; NONE for sm_60" in str(found)


def test_two_cards_without_kernels_are_one_problem():
    assert len(judge(kaggle(P100, P100, passes={})).problems) == 1


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        ("forward and backward: RuntimeError: CUDA error: no kernel image is available", "doctor --fix-torch"),
        ("forward and backward: OutOfMemoryError: CUDA out of memory. Tried to", "something else holds the card"),
        (
            "loading transformers: RuntimeError: operator torchvision::nms does not exist",
            "pip uninstall -y torchvision",
        ),
        ("forward and backward: RuntimeError: The NVIDIA driver on your system is too old", "driver is too old"),
        ("loading transformers: ModuleNotFoundError: No module named 'regex'", "pip install --force-reinstall"),
        ("forward and backward: ImportError: cannot import name 'x'", "reinstall the package"),
        ("forward and backward: RuntimeError: CUBLAS_STATUS_NOT_INITIALIZED", "do not go together: take another card"),
    ],
)
def test_a_step_that_fails_is_explained(error, cure):
    problem = only(kaggle(T4, passes={"cuda:0": error}))
    assert problem.fatal
    assert problem.what == f"a real step on cuda:0 failed: {error}"
    assert cure in problem.cure


def test_a_step_that_fails_on_the_second_card_only():
    found = judge(kaggle(T4, T4, passes={"cuda:0": None, "cuda:1": "forward and backward: RuntimeError: x"}))
    assert not found.ok
    assert "cuda:0 ok, cuda:1 FAILED" in str(found)


def test_a_step_that_fails_on_the_cpu_is_not_the_cards_fault():
    problem = only(kaggle(passes={"cpu": "forward and backward: RuntimeError: x"}))
    assert problem.cure == "restart the session and run from the top"


def test_packages():
    versions = VERSIONS | {"transformers": "4.55.0", "datasets": None}
    problem = only(kaggle(T4, versions=versions, passes={}))
    assert problem.fatal
    assert problem.what.endswith("transformers 4.55.0 (needs 4.56), datasets is missing")
    assert problem.cure.startswith('`pip install "transformers>=4.56" "datasets>=3"')
    old = only(kaggle(T4, versions=VERSIONS | {"python": "3.10.14"}))
    assert (old.what, old.fatal) == ("Python 3.10.14 is too old", True)


def test_a_card_that_torch_cannot_use():
    problem = only(kaggle(card_error="RuntimeError: CUDA unknown error", passes={}), asked="T4 x2")
    assert problem.fatal
    assert "CUDA unknown error" in problem.what


# --- what is to be looked at -----------------------------------------------------------------------------------------


def test_a_card_that_torch_does_not_see():
    built = only(kaggle(unseen=("Tesla T4",), cuda=None))
    assert not built.fatal
    assert "this torch is built for the CPU" in built.cure
    assert "driver is too old" in only(kaggle(unseen=("Tesla T4",))).cure


def test_the_surroundings():
    machine = kaggle(T4, disks={"/kaggle/working": 1.2, "/tmp": 60.0}, memory=(31.0, 2.5), internet="no answer in 3 s")
    found = judge(machine)
    assert found.ok
    assert [problem.what for problem in found.problems] == [
        "/kaggle/working has 1.2 GiB left",
        "2.5 GiB of RAM are free",
        "no internet (no answer in 3 s): nothing can be fetched by name",
    ]
    assert "phone-verified" in found.problems[2].cure
    assert "phone" not in judge(replace(machine, run_type=None)).problems[2].cure
    assert str(found).endswith("-> ready: T4, float16 autocast with loss scaling, 3 to look at")
    assert "internet    off" in str(found)


def test_being_offline_on_purpose_is_no_problem():
    found = judge(kaggle(T4, internet="not asked: HF_HUB_OFFLINE is set", offline=True))
    assert found.problems == ()
    assert "internet    not asked: HF_HUB_OFFLINE is set" in str(found)


def test_the_fatal_comes_first():
    found = judge(kaggle(P100, passes={}, internet="off"), asked="P100")
    assert [problem.fatal for problem in found.problems] == [True, False]
    text = str(found)
    assert text.index("PROBLEM") < text.index("look ")
    both = judge(kaggle(unseen=("Tesla T4",), passes={"cpu": "forward and backward: RuntimeError: x"}))
    assert [problem.fatal for problem in both.problems] == [True, False]


# --- the card that was asked for -------------------------------------------------------------------------------------


def test_what_was_asked_for():
    assert judge(kaggle(T4)).asked is None
    assert judge(kaggle(P100, arch_list=CU126), asked="NvidiaTeslaP100").asked == "for P100, and got it"
    assert judge(kaggle(T4, T4), asked="T4 x2").asked == "for 2 x T4, and got it"
    assert "retired" not in judge(kaggle(P100, P100, arch_list=CU126), asked="P100").asked
    ada = Card("NVIDIA L4", (8, 9), 40.0)
    assert judge(kaggle(ada), asked="A100").asked == "for A100, got L4: nothing changes"
    elsewhere = judge(kaggle(T4, T4, run_type=None), asked="P100").asked
    assert elsewhere.startswith("for P100, got 2 x T4. What that changes: two separate cards")
    assert judge(kaggle(), asked="CPU").asked == "for the CPU, and got it"


def test_no_card_at_all_is_said_once():
    found = judge(kaggle(), asked="P100")
    (problem,) = found.problems
    assert not problem.fatal, "the embedded pair trains there"
    assert problem.what.startswith("asked for P100, got the CPU. What that changes: everything runs on the CPU")
    assert "Settings > Accelerator" in problem.cure
    assert str(found).count("got the CPU") == 1
    assert "nvidia-smi" in only(kaggle(run_type=None), asked="P100").cure


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_prints_and_hands_back(monkeypatch, capsys):
    monkeypatch.setattr(checkup, "measure", lambda: kaggle(T4, T4))
    found = doctor(asked="P100")
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "asked       for P100" in printed
    assert repr(found).count("\n") == 0, "a notebook shows it below what was printed"


def test_doctor_stops_after_it_has_said_everything(monkeypatch, capsys):
    monkeypatch.setattr(checkup, "measure", lambda: kaggle(P100, passes={}, internet="off"))
    with pytest.raises(RuntimeError, match=r"^doctor: expected a session that can train, got: torch .*; restart"):
        doctor()
    printed = capsys.readouterr().out
    assert "look        no internet" in printed
    assert "-> not ready" in printed
    found = doctor(stop=False)
    assert not found.ok


def test_doctor_reads_the_asked_card_before_it_measures(monkeypatch):
    monkeypatch.setattr(checkup, "measure", lambda: pytest.fail("measured"))
    with pytest.raises(ValueError, match="expected asked= as CPU or one of P100"):
        doctor(asked="P1000")


def test_doctor_on_this_machine(capsys):
    found = doctor()
    assert found.ok
    assert f"-> ready: {found.profile.name}" in capsys.readouterr().out
