"""Every card has its profile, without one being here: what a run on it is given, and what it changes."""

from __future__ import annotations

import pytest
import torch

from kd_kit.cards import asked_for, changes, profile_for, short_name
from kd_kit.session import build_session, check_kernels

CARDS = {
    # name as the driver says it, capability: profile, precision, teacher, experts, Triton, tensor cores, flash
    ("Tesla P100-PCIE-16GB", (6, 0)): ("P100", "fp16", "float16", "eager", False, False, False),
    ("NVIDIA GeForce GTX 1080", (6, 1)): ("Pascal", "fp16", "float16", "eager", False, False, False),
    ("Tesla V100-SXM2-16GB", (7, 0)): ("Volta", "fp16", "float16", "eager", True, True, False),
    ("Tesla T4", (7, 5)): ("T4", "fp16", "float16", "eager", True, True, False),
    ("NVIDIA GeForce RTX 2080 Ti", (7, 5)): ("Turing", "fp16", "float16", "eager", True, True, False),
    ("NVIDIA GeForce GTX 1660 Ti", (7, 5)): ("Turing", "fp16", "float16", "eager", True, False, False),
    ("NVIDIA A100-SXM4-40GB", (8, 0)): ("Ampere or newer", "bf16", "bfloat16", None, True, True, True),
    ("NVIDIA GeForce RTX 3090", (8, 6)): ("Ampere or newer", "bf16", "bfloat16", None, True, True, True),
    ("NVIDIA L4", (8, 9)): ("Ampere or newer", "bf16", "bfloat16", None, True, True, True),
    ("NVIDIA H100 80GB HBM3", (9, 0)): ("Ampere or newer", "bf16", "bfloat16", None, True, True, True),
    ("NVIDIA RTX PRO 6000 Blackwell", (12, 0)): ("Ampere or newer", "bf16", "bfloat16", None, True, True, True),
    ("A card of 2031", (15, 3)): ("Ampere or newer", "bf16", "bfloat16", None, True, True, True),
    ("NVIDIA GeForce GTX 980", (5, 2)): ("Maxwell", "no", "float32", "eager", False, False, False),
    ("Tesla K80", (3, 7)): ("older than Maxwell", "no", "float32", "eager", False, False, False),
}


@pytest.mark.parametrize(("card", "expected"), CARDS.items(), ids=[name for name, _ in CARDS])
def test_every_card_has_its_profile(card, expected):
    name, capability = card
    found = profile_for(capability, memory=16.0, name=name)
    flash = "flash" in found.backends
    parts = (found.precision, found.teacher_dtype, found.experts, found.triton, found.tensor_cores, flash)
    assert (found.name, *parts) == expected
    assert found.attention == "sdpa"
    assert found.backends[-1] == "math", "which every card has"
    assert ("memory-efficient" in found.backends) == (capability >= (5, 0))
    assert (found.teacher_device, found.student_device) == ("cuda:0", "cuda:0")


def test_the_cpu_has_one_too():
    found = profile_for(None)
    assert (found.name, found.precision, found.teacher_dtype, found.experts) == ("CPU", "no", "float32", None)
    assert (found.teacher_device, found.student_device, found.count) == ("cpu", "cpu", 0)
    assert "float32 on the CPU" in found.remarks[0]


def test_the_second_card_takes_the_teacher():
    one, two = (profile_for((7, 5), count=n, memory=14.7, name="Tesla T4") for n in (1, 2))
    assert (two.name, two.teacher_device, two.student_device) == ("T4 x2", "cuda:1", "cuda:0")
    assert (two.precision, two.experts, two.backends) == (one.precision, one.experts, one.backends)
    assert [remark for remark in two.remarks if remark not in one.remarks] == [
        "2 cards: build_teacher(device='cuda:1') leaves cuda:0 to the student"
    ]


def test_remarks_say_what_a_card_lacks():
    p100, a100 = profile_for((6, 0), memory=16.0), profile_for((8, 0), memory=40.0)
    text = "\n".join(p100.remarks)
    for words in ("no bfloat16", "loss scaling", "no tensor cores", "one after the other", "no torch.compile"):
        assert words in text
    assert a100.remarks == ()
    assert any("6 GiB are little" in remark for remark in profile_for((8, 6), memory=6.0).remarks)
    maxwell = profile_for((5, 2), memory=12.0).remarks
    assert any("float32 throughout" in remark for remark in maxwell)
    assert not any("float16" in remark for remark in maxwell), "which it does not compute in"


def test_experts_are_named_only_to_a_transformers_that_knows_them():
    old, new = profile_for((7, 5)), profile_for((8, 0))
    assert old.experts_argument("5.0.0") == {"experts_implementation": "eager"}
    assert old.experts_argument("4.57.1") == {}
    assert new.experts_argument("5.0.0") == {}
    assert profile_for(None).experts_argument("5.0.0") == {}


def test_no_card_is_no_count():
    with pytest.raises(ValueError, match=r"^profile_for: expected at least one card of capability \(7, 5\), got 0"):
        profile_for((7, 5), count=0)


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("P100", "P100", 1),
        ("NvidiaTeslaP100", "P100", 1),
        ("Tesla P100", "P100", 1),
        ("T4 x2", "2 x T4", 2),
        ("nvidia-tesla-t4", "T4", 1),
        ("NvidiaL4X1", "L4", 1),
        ("NvidiaRtxPro6000", "RTX Pro 6000", 1),
        ("RTX Pro 6000 x2", "2 x RTX Pro 6000", 2),
        ("cpu", "the CPU", 0),
    ],
)
def test_a_card_is_asked_for_by_its_name_or_kaggles(text, name, count):
    found = asked_for(text)
    assert (found.name, found.profile.count) == (name, count)


@pytest.mark.parametrize("text", ["P1000", "T4 x0", "", "x2", "TPU v5"])
def test_an_unknown_card_is_named_with_the_known(text):
    with pytest.raises(ValueError, match=r"^doctor: expected asked= as CPU or one of P100, T4, .*; leave it out"):
        asked_for(text)


def test_t4s_in_place_of_a_p100():
    got = profile_for((7, 5), count=2, memory=14.7, name="Tesla T4")
    assert changes(asked_for("P100").profile, got) == [
        "two separate cards, so that teacher and student need not share one",
        "tensor cores, so that half precision is faster and not only smaller",
        "torch.compile is possible",
        "precision stays float16",
    ]
    back = changes(asked_for("T4 x2").profile, profile_for((6, 0), memory=15.9))
    assert back == [
        "one card, which teacher and student share",
        "no tensor cores, so that half precision saves memory but no time",
        "no torch.compile",
        "precision stays float16",
    ]


def test_other_changes():
    t4 = profile_for((7, 5), memory=14.7, name="Tesla T4")
    assert changes(asked_for("T4").profile, t4) == []
    assert changes(asked_for("A100").profile, t4) == [
        "15 GiB on each card instead of 40",
        "no flash attention",
        "precision is float16 instead of bfloat16",
    ]
    assert changes(asked_for("P100").profile, profile_for(None)) == [
        "everything runs on the CPU in float32, and far slower"
    ]
    assert changes(asked_for("CPU").profile, t4) == ["everything runs on the card, in float16"]
    assert changes(asked_for("CPU").profile, profile_for(None)) == []


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Tesla P100-PCIE-16GB", "P100"),
        ("Tesla T4", "T4"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


# --- where the profile is used ---------------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch):
    """torch says that it has cards of a capability, and kernels of these architectures."""

    def pretend(capability, arch_list=("sm_70", "sm_75", "sm_80", "sm_90")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100-PCIE-16GB")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(arch_list))

    return pretend


def test_a_session_on_a_card_without_kernels_does_not_begin(pretended, tmp_path):
    pretended((6, 0))
    with pytest.raises(ValueError, match=r"^build_session: expected a torch with kernels .*sm_60.*--fix-torch"):
        build_session("mine", folder=tmp_path)
    pretended((6, 0), ["sm_60"])
    check_kernels(torch.device("cuda"))
    pretended((6, 0), [])
    check_kernels(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "device", "expected"),
    [
        ((6, 0), None, {"dtype": torch.float16, "experts_implementation": "eager"}),
        ((7, 5), "cuda:1", {"dtype": torch.float16, "experts_implementation": "eager"}),
        ((8, 0), None, {"dtype": torch.bfloat16}),
        ((6, 0), "cpu", {"dtype": torch.float32}),
    ],
)
def test_a_teacher_is_loaded_as_its_card_wants_it(pretended, monkeypatch, capability, device, expected):
    from kd_kit import models

    asked = []
    placed = []

    class Model(torch.nn.Module):
        def to(self, where):
            placed.append(where)
            return self

    monkeypatch.setattr(models, "_from_pretrained", lambda *_, **arguments: asked.append(arguments) or Model())
    monkeypatch.setattr("transformers.__version__", "5.0.0")
    pretended(capability)
    models.build_teacher("some/teacher", device=device)
    assert asked == [expected]
    assert placed == [torch.device(device or "cuda")]
