"""Which build of torch runs on which card. Pure: capabilities and lists of architectures go in, words come out.

A build of torch holds machine code ("sm_75") for some cards and, at times, code that the driver can compile for newer
ones ("compute_90"). On any other card ``torch.cuda.is_available()`` is True and the first operation fails.

Source: NVIDIA, CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Capability = tuple[int, int]

_INDEX = "https://download.pytorch.org/whl/"
COMPANIONS = ("torchvision", "torchaudio")
"""Packages that are built against one torch and have to change with it."""


class Build(NamedTuple):
    """A family of torch builds: the tag in its versions, its first version and the first one that is no more."""

    tag: str
    first: str
    end: str | None

    @property
    def index(self) -> str:
        return _INDEX + self.tag

    @property
    def range(self) -> str:
        return f">={self.first}" + (f",<{self.end}" if self.end else "")

    def holds(self, version: str) -> bool:
        """Whether there is a build of this family of a version."""
        found = numbers(version)
        return numbers(self.first) <= found and (self.end is None or found < numbers(self.end))


# CUDA 12.6 is the last with kernels for capabilities below 7.0, and torch 2.14 the last that is built with it
_CU126 = Build("cu126", "2.6", "2.15")
_CU128 = Build("cu128", "2.7", None)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare by: (2, 10, 0) for "2.10.0+cu128"; () for one without."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def sm(capability: Capability) -> str:
    """What a card's own machine code is called: "sm_60"."""
    return f"sm_{capability[0]}{capability[1]}"


def kernels_for(capability: Capability, arch_list: Sequence[str]) -> str | None:
    """The entry of ``torch.cuda.get_arch_list()`` that a card of this capability runs; None if there is none.

    Machine code runs on its own capability and on higher ones of the same major number (sm_80 on an 8.6 card, sm_60 on
    6.1); ``compute_XY`` runs on every newer card, compiled by the driver at first use. With the suffix ``a`` a kernel
    runs on that very capability only.
    """
    if any(entry.startswith("gfx") for entry in arch_list):  # AMD counts otherwise: a real operation has to show it
        return next(entry for entry in arch_list if entry.startswith("gfx"))
    binary: list[tuple[Capability, str]] = []
    portable: list[tuple[Capability, str]] = []
    for entry in arch_list:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry)
        if found is None:
            continue
        built = int(found[2]), int(found[3])
        if found[4] == "a" and built != tuple(capability):
            continue
        same_major = built[0] == capability[0]
        if built > tuple(capability) or (not same_major and (found[1] == "sm" or found[4] == "f")):
            continue
        (binary if found[1] == "sm" else portable).append((built, entry))
    return max(binary or portable, default=(None, None))[1]


def build_for(capability: Capability) -> Build | None:
    """The builds of torch that have kernels for a card; None if no torch that this kit works with has any."""
    if tuple(capability) < (5, 0):
        return None
    return _CU128 if tuple(capability) >= (10, 0) else _CU126


def requirements(build: Build, installed: Mapping[str, str | None]) -> list[list[str]]:
    """What pip is to install, in the order in which to try: the same versions built otherwise, then any of the build.

    A plain range would be met by what is there already, since pip does not look at the part behind the "+".

    Args:
        installed: versions of torch and of those of :data:`COMPANIONS` that are there.
    """
    torch = installed.get("torch")
    beside = {name: version for name in COMPANIONS if (version := installed.get(name))}
    if torch is None or not build.holds(torch):
        return [[f"torch{build.range}", *beside]]
    public = {name: version.partition("+")[0] for name, version in {"torch": torch, **beside}.items()}
    same = [f"{name}=={version}+{build.tag}" for name, version in public.items()]
    return [same, [f"torch{build.range},!={public['torch']}", *beside]]


def missing_kernels(card: str, capability: Capability, arch_list: Sequence[str], torch: str) -> str:
    """What is wrong where a torch has no kernels for a card."""
    held = " ".join(arch_list) or "none, being built for the CPU"
    return (
        f"torch {torch} has no kernels for {card} ({sm(capability)}; it has {held}): the card is seen, and the first "
        "operation on it would fail"
    )


def cure_for_kernels(capability: Capability, torch: str) -> str:
    """What to do where the torch that is installed has no kernels for a card."""
    build = build_for(capability)
    if build is None:
        return (
            f"no torch from 2.6 on has kernels for {sm(capability)}; take another card, or hide this one with "
            'CUDA_VISIBLE_DEVICES="" to run on the CPU'
        )
    names = " ".join(f'"{name}"' for name in requirements(build, {"torch": torch})[0])
    return (
        "restart the session and, before torch is imported, run `python -m kd_kit doctor --fix-torch` (or set "
        f"FIX_TORCH = True in the parameter cell); by hand: `pip install {names} --index-url {build.index}`"
    )
