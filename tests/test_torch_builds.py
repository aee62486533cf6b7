"""Which build of torch runs on which card: binary and portable kernels, and what to install where there are none."""

from __future__ import annotations

import pytest

from kd_kit.torch_builds import build_for, cure_for_kernels, kernels_for, missing_kernels, numbers, requirements

CU118 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_37", "sm_90"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "arch_list", "entry"),
    [
        ((6, 0), CU128, None),  # a P100 on the stock image
        ((6, 0), CU126, "sm_60"),
        ((6, 1), CU126, "sm_60"),  # a lower one of the same major number
        ((6, 1), CU128, None),
        ((7, 0), CU128, "sm_70"),
        ((7, 0), CU130, None),
        ((7, 5), CU130, "sm_75"),
        ((7, 5), ["sm_70"], "sm_70"),
        ((8, 6), ["sm_80"], "sm_80"),
        ((8, 0), ["sm_86"], None),  # but not a higher one
        ((8, 9), CU128, "sm_86"),
        ((9, 0), CU118, "sm_90"),
        ((10, 3), CU128, "sm_100"),
        ((12, 0), CU126, None),  # sm_90 is of another major number
        ((12, 1), CU130, "sm_120"),
        ((13, 0), CU130, "compute_120"),  # compiled by the driver
        ((9, 0), ["sm_80", "compute_80"], "compute_80"),
        ((7, 5), ["compute_80"], None),
        ((9, 0), ["sm_90a"], "sm_90a"),
        ((9, 1), ["sm_90a"], None),
        ((12, 0), ["compute_90a"], None),
        ((10, 3), ["compute_100f"], "compute_100f"),
        ((12, 0), ["compute_100f"], None),
        ((7, 5), [], None),  # built for the CPU
        ((7, 5), ["nonsense", "sm_"], None),
        ((9, 4), ["gfx90a", "gfx942"], "gfx90a"),  # AMD: its numbers are others
    ],
)
def test_kernels(capability, arch_list, entry):
    assert kernels_for(capability, arch_list) == entry


def test_machine_code_comes_before_code_that_is_compiled_first():
    assert kernels_for((8, 6), ["compute_80", "sm_80", "compute_86"]) == "sm_80"


def test_builds_by_card():
    assert {build_for(c).tag for c in ((5, 0), (6, 0), (6, 1), (7, 0), (7, 5), (9, 0))} == {"cu126"}
    assert {build_for(c).tag for c in ((10, 0), (12, 0))} == {"cu128"}
    assert build_for((3, 7)) is None
    p100 = build_for((6, 0))
    assert p100.range == ">=2.6,<2.15"
    assert p100.index == "https://download.pytorch.org/whl/cu126"
    held = ("2.6.0", "2.14.1", "2.10.0+cu128", "2.5.1", "2.15.0", "3.0")
    assert [p100.holds(v) for v in held] == [True, True, True, False, False, False]


def test_the_same_versions_built_otherwise_come_first():
    """A plain range would be met by the torch that is there already, and pip would do nothing."""
    image = {"torch": "2.10.0+cu128", "torchvision": "0.25.0+cu128", "torchaudio": "2.10.0+cu128", "numpy": "2.0.2"}
    assert requirements(build_for((6, 0)), image) == [
        ["torch==2.10.0+cu126", "torchvision==0.25.0+cu126", "torchaudio==2.10.0+cu126"],
        ["torch>=2.6,<2.15,!=2.10.0", "torchvision", "torchaudio"],
    ]


def test_a_version_that_is_not_built_for_it_gives_way():
    assert requirements(build_for((6, 0)), {"torch": "2.15.0+cu130"}) == [["torch>=2.6,<2.15"]]
    assert requirements(build_for((6, 0)), {"torch": None, "torchaudio": "2.9"}) == [["torch>=2.6,<2.15", "torchaudio"]]
    assert requirements(build_for((12, 0)), {"torch": "2.6.0+cu124"}) == [["torch>=2.7"]]
    assert requirements(build_for((12, 0)), {"torch": "2.8.0+cu126"})[0] == ["torch==2.8.0+cu128"]


def test_what_is_said():
    said = missing_kernels("Tesla P100-PCIE-16GB", (6, 0), CU128, "2.10.0+cu128")
    assert "torch 2.10.0+cu128 has no kernels for Tesla P100-PCIE-16GB (sm_60; it has sm_70 sm_75" in said
    assert "built for the CPU" in missing_kernels("Tesla T4", (7, 5), (), "2.13.0+cpu")
    cure = cure_for_kernels((6, 0), "2.10.0+cu128")
    assert "python -m kd_kit doctor --fix-torch" in cure
    assert 'pip install "torch==2.10.0+cu126" --index-url https://download.pytorch.org/whl/cu126' in cure
    assert "no torch from 2.6 on has kernels for sm_37" in cure_for_kernels((3, 7), "2.10.0")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.10.0+cu128", (2, 10, 0)), ("2.6.0a0+git1", (2, 6, 0)), ("5", (5,)), ("main", ()), ("", ())],
)
def test_numbers_of_a_version(version, expected):
    assert numbers(version) == expected
    assert numbers("2.10.0") > numbers("2.9.1"), "by number, not by letter"
