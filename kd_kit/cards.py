"""What each kind of card can do, and what a run on it is therefore given: a table and a function, without torch.

Sources: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities"; PyTorch's notes on SDPA (flash attention from
capability 8.0, memory-efficient attention from 5.0), on Triton (7.0) and on grouped matrix products (8.0).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

Capability = tuple[int, int]

GROUPED = (8, 0)
"""Capability from which grouped matrix products, flash attention and real bfloat16 are there."""


class _Family(NamedTuple):
    """Cards from one capability on: what they are called, and how they compute."""

    since: Capability
    name: str
    precision: str
    teacher_dtype: str
    tensor_cores: bool
    triton: bool
    backends: tuple[str, ...]


_FAMILIES = (
    _Family((8, 0), "Ampere or newer", "bf16", "bfloat16", True, True, ("flash", "memory-efficient", "math")),
    _Family((7, 5), "Turing", "fp16", "float16", True, True, ("memory-efficient", "math")),
    _Family((7, 0), "Volta", "fp16", "float16", True, True, ("memory-efficient", "math")),
    _Family((6, 0), "Pascal", "fp16", "float16", False, False, ("memory-efficient", "math")),
    _Family((5, 0), "Maxwell", "no", "float32", False, False, ("memory-efficient", "math")),
    _Family((0, 0), "older than Maxwell", "no", "float32", False, False, ("math",)),
)


@dataclass(frozen=True)
class Profile:
    """How this kit runs on one kind of card, or on the CPU. Made by :func:`profile_for`.

    Attributes:
        name: "P100", "T4 x2", "Ampere or newer", "CPU".
        capability: compute capability of a card; None on the CPU. count: cards. memory: GiB of each, where known.
        precision: "no", "fp16" or "bf16", for the student; never an emulated bfloat16.
        teacher_dtype: "float16", "bfloat16" or "float32".
        teacher_device: "cuda:1" where a second card is there.
        attention: implementation that transformers is asked for. backends: kernels that it may run on, fastest first.
        experts: implementation that transformers 5 is asked for; None leaves it its own choice ("grouped_mm").
        triton: whether Triton, and so torch.compile, works. tensor_cores: whether half precision is also faster.
    """

    name: str
    capability: Capability | None
    count: int
    memory: float | None
    precision: str
    teacher_dtype: str
    teacher_device: str
    attention: str
    backends: tuple[str, ...]
    experts: str | None
    triton: bool
    tensor_cores: bool

    @property
    def student_device(self) -> str:
        return "cpu" if self.capability is None else "cuda:0"

    def experts_argument(self, transformers: str) -> dict[str, str]:
        """For ``from_pretrained`` of this version of transformers; before 5 it knows no such argument."""
        if self.experts is None or int(transformers.split(".")[0]) < 5:
            return {}
        return {"experts_implementation": self.experts}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What this means for a run, in plain words."""
        if self.capability is None:
            return ("no card: float32 on the CPU, which is enough for the embedded pair; a real teacher takes days",)
        found = []
        if self.precision == "fp16":
            found.append(
                "no bfloat16 in this card: float16 with loss scaling, which may skip the first few steps of a run"
            )
        if self.precision == "no":
            found.append("half precision is not native here: float32 throughout, which takes twice the memory")
        if self.precision != "no" and not self.tensor_cores:
            found.append("no tensor cores: float16 saves memory, but no time")
        if self.experts == "eager":
            found.append("experts of a mixture run one after the other: the grouped kernel needs capability 8.0")
        if not self.triton:
            found.append("no Triton, so no torch.compile")
        if self.count > 1:
            found.append(
                f"{self.count} cards: build_teacher(device={self.teacher_device!r}) leaves cuda:0 to the student"
            )
        if self.memory is not None and self.memory < 10:
            found.append(f"{self.memory:.0f} GiB are little: begin with a small batch and accumulate")
        return tuple(found)


_CPU = Profile(
    name="CPU",
    capability=None,
    count=0,
    memory=None,
    precision="no",
    teacher_dtype="float32",
    teacher_device="cpu",
    attention="sdpa",
    backends=("flash", "math"),
    experts=None,
    triton=False,
    tensor_cores=False,
)


def profile_for(
    capability: Capability | None, *, count: int = 1, memory: float | None = None, name: str = ""
) -> Profile:
    """How to run on ``count`` cards of this capability, or on the CPU.

    Args:
        capability: compute capability, (6, 0) for a P100; None for the CPU.
        count: cards of this kind. memory: of each, in GiB. name: what the driver calls the card.

    Raises:
        ValueError: a card, and a count below 1.
    """
    if capability is None:
        return Profile(
            "CPU",
            None,
            0,
            None,
            "no",
            "float32",
            "cpu",
            "sdpa",
            ("flash", "math"),
            None,
            triton=False,
            tensor_cores=False,
        )
    if count < 1:
        raise ValueError(f"profile_for: expected at least one card of capability {capability}, got {count}")
    family = next(family for family in _FAMILIES if tuple(capability) >= family.since)
    # the GTX 16 series is Turing without tensor cores
    tensor_cores = family.tensor_cores and not re.search(r"GTX\s*16\d\d", name)
    return Profile(
        name=_profile_name(tuple(capability), family, name) + (f" x{count}" if count > 1 else ""),
        capability=tuple(capability),
        count=count,
        memory=memory,
        precision=family.precision,
        teacher_dtype=family.teacher_dtype,
        teacher_device="cuda:1" if count > 1 else "cuda:0",
        attention="sdpa",
        backends=family.backends,
        experts=None if tuple(capability) >= GROUPED else "eager",
        triton=family.triton,
        tensor_cores=tensor_cores,
    )


def _profile_name(capability: Capability, family: _Family, name: str) -> str:
    if capability == (6, 0):  # of this capability there is no other card
        return "P100"
    return "T4" if capability == (7, 5) and short_name(name) == "T4" else family.name


def short_name(name: str) -> str:
    """The name of a card without its maker: "P100" for "Tesla P100-PCIE-16GB", "A100" for "NVIDIA A100-SXM4-40GB"."""
    kept = [word for word in name.split() if word.lower() not in ("nvidia", "tesla")]
    return re.sub(r"-(SXM|PCIE|PCI|HBM|\d+GB).*", "", " ".join(kept), flags=re.IGNORECASE)


# --- the card that was asked for -------------------------------------------------------------------------------------

_ASKED = {
    "p100": ("P100", (6, 0), 16.0),
    "t4": ("T4", (7, 5), 15.0),
    "v100": ("V100", (7, 0), 16.0),
    "l4": ("L4", (8, 9), 22.0),
    "a100": ("A100", (8, 0), 40.0),
    "h100": ("H100", (9, 0), 80.0),
    "rtxpro6000": ("RTX Pro 6000", (12, 0), 95.0),
}


class Asked(NamedTuple):
    """The card that somebody asked for: its name, and what a run on it would be given."""

    name: str
    profile: Profile


def asked_for(text: str) -> Asked:
    """Read "P100", "T4 x2", "NvidiaTeslaP100" or "CPU".

    Raises:
        ValueError: another name.
    """
    key = re.sub(r"[\s_-]", "", text.lower()).removeprefix("nvidia").removeprefix("tesla")
    if key in ("cpu", "none"):
        return Asked("the CPU", profile_for(None))
    bare, _, count = key.rpartition("x") if re.fullmatch(r".+x\d+", key) else (key, "", "1")
    if bare not in _ASKED or int(count) < 1:
        raise ValueError(
            f"doctor: expected asked= as CPU or one of {', '.join(name for name, *_ in _ASKED.values())}, with x2 "
            f"behind it for two of them, got {text!r}; leave it out where any card will do"
        )
    name, capability, memory = _ASKED[bare]
    profile = profile_for(capability, count=int(count), memory=memory, name=name)
    return Asked(counted(name, int(count)), profile)


def counted(name: str, count: int) -> str:
    return f"{count} x {name}" if count > 1 else name


def changes(asked: Profile, got: Profile) -> list[str]:
    """What is different for a run on ``got`` instead of ``asked``, in plain words; empty if nothing is."""
    if asked.capability is None or got.capability is None:
        if asked.capability == got.capability:
            return []
        slow = "everything runs on the CPU in float32, and far slower"
        return [slow] if got.capability is None else [f"everything runs on the card, in {_words(got.precision)}"]
    found = []
    if got.count > asked.count:
        found.append(f"{_number(got.count)} separate cards, so that teacher and student need not share one")
    if got.count < asked.count:
        found.append(f"{_number(got.count)} card{'s' * (got.count > 1)}, which teacher and student share")
    if got.memory and asked.memory and not 0.8 < got.memory / asked.memory < 1.25:
        found.append(f"{got.memory:.0f} GiB on each card instead of {asked.memory:.0f}")
    if got.tensor_cores != asked.tensor_cores:
        found.append(
            "tensor cores, so that half precision is faster and not only smaller"
            if got.tensor_cores
            else "no tensor cores, so that half precision saves memory but no time"
        )
    if got.triton != asked.triton:
        found.append("torch.compile is possible" if got.triton else "no torch.compile")
    if ("flash" in got.backends) != ("flash" in asked.backends):
        found.append("flash attention" if "flash" in got.backends else "no flash attention")
    same = got.precision == asked.precision
    now = f"precision {'stays' if same else 'is'} {_words(got.precision)}"
    before = "" if same else f" instead of {_words(asked.precision)}"
    return [*found, now + before] if found or not same else []


def _words(precision: str) -> str:
    return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]


def _number(count: int) -> str:
    return {1: "one", 2: "two", 3: "three", 4: "four"}.get(count, str(count))
