"""The first cell: can this session train, and how? Every problem is printed with its cure, in the first minute."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

from kd_kit.cards import Profile, asked_for, changes, counted, short_name
from kd_kit.machine import SHOWN, Card, Machine, measure
from kd_kit.torch_builds import cure_for_kernels, kernels_for, missing_kernels, sm

_WIDTH = 100
_INDENT = 12
_DISK = 5.0  # GiB: two checkpoints of a student of 135 million parameters, or a teacher of a billion
_MEMORY = 4.0  # GiB: a teacher of a billion parameters on its way to the card
_SOURCES = 6
_TOGETHER = "\N{NO-BREAK SPACE}"

_PRECISION = {"no": "float32", "fp16": "float16 autocast with loss scaling", "bf16": "bfloat16 autocast"}


class Problem(NamedTuple):
    """Something that is not in order, and what to do about it. After a fatal one no run can begin."""

    what: str
    cure: str
    fatal: bool = False


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`doctor` found, and what it chose for this session. ``str()`` of it is the whole report.

    Attributes:
        machine: what was measured.
        problems: what is not in order, the fatal ones first.
        asked: what is different from the card that was asked for, in a sentence; None if none was.
    """

    machine: Machine
    problems: tuple[Problem, ...]
    asked: str | None = None

    @property
    def ok(self) -> bool:
        """Whether a run can begin: no problem is fatal."""
        return not any(problem.fatal for problem in self.problems)

    @property
    def profile(self) -> Profile:
        return self.machine.profile

    @property
    def precision(self) -> str:
        """For ``build_session``: "no", "fp16" or "bf16"."""
        return self.profile.precision

    @property
    def attention(self) -> str:
        return self.profile.attention

    @property
    def experts(self) -> str | None:
        """Experts implementation for transformers 5; None for its own choice."""
        return self.profile.experts

    @property
    def teacher_device(self) -> str:
        """For ``build_teacher``: "cuda:1" where a second card is there."""
        return self.profile.teacher_device

    def __str__(self) -> str:
        lines = [_line(name, text) for name, text in _findings(self.machine)]
        if self.asked and not any(problem.what.endswith(self.asked) for problem in self.problems):
            lines.append(_line("asked", self.asked))
        for problem in self.problems:
            lines += [_line("PROBLEM" if problem.fatal else "look", problem.what), _line("  cure", problem.cure)]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        fatal = sum(problem.fatal for problem in self.problems)
        if fatal:
            return f"-> not ready: {fatal} problem{'s' * (fatal > 1)} to solve first"
        chosen = f"-> ready: {self.profile.name}, {_PRECISION[self.precision]}"
        return f"{chosen}, {len(self.problems)} to look at" if self.problems else chosen

    def __repr__(self) -> str:
        return self._verdict()


def doctor(*, asked: str | None = None, stop: bool = True) -> Diagnosis:
    """Look at this session, print what it is and what is wrong with it, and choose how to run on it.

    A real step is made on every card: kernels that are missing show here and not in the first operation of a run.

    Args:
        asked: the card that was asked for, "P100" or "T4 x2": says what changes where another one came.
        stop: raise after the report where no run could begin, so that the cells below do not go on.

    Raises:
        ValueError: a card of a name that is not known.
        RuntimeError: no run can begin: torch has no kernels for the card, a step on it fails, or a package is missing
            or too old.

    Example:
        >>> found = doctor(asked="P100")  # doctest: +SKIP
        >>> teacher = build_teacher(TEACHER, device=found.teacher_device)  # doctest: +SKIP
    """
    if asked is not None:
        asked_for(asked)  # a misspelt name shows before anything is measured
    found = judge(measure(), asked=asked)
    print(found)
    if stop and not found.ok:
        first = found.problems[0]
        raise RuntimeError(f"doctor: expected a session that can train, got: {first.what}; {first.cure}")
    return found


def judge(machine: Machine, *, asked: str | None = None) -> Diagnosis:
    """What is wrong with a measured machine, and what is different from the card that was asked for. Pure.

    Raises:
        ValueError: a card of a name that is not known.
    """
    problems = [*_packages(machine), *_cards(machine), *_passes(machine), *_surroundings(machine)]
    sentence = None
    if asked is not None:
        wanted = asked_for(asked)
        sentence = _asked_line(wanted.name, wanted.profile, machine)
        if wanted.profile.capability and not machine.cards and not machine.card_error:
            problems.append(Problem(f"asked {sentence}", _no_card(machine)))
    return Diagnosis(machine, tuple(sorted(problems, key=lambda problem: not problem.fatal)), sentence)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def _packages(machine: Machine) -> list[Problem]:
    unmet = machine.unmet
    python = unmet.pop("python", None)
    found = []
    if python is not None:
        cure = f"run this with Python {machine.needed['python']} or newer"
        found.append(Problem(f"Python {python} is too old", cure, fatal=True))
    if unmet:
        have = ", ".join(f"{n} {v} (needs {machine.needed[n]})" if v else f"{n} is missing" for n, v in unmet.items())
        wanted = " ".join(f'"{name}>={machine.needed[name]}"' for name in unmet)
        cure = f"`pip install {wanted}`, then restart the session and run from the top"
        found.append(Problem(f"packages are missing or too old: {have}", cure, fatal=True))
    return found


def _cards(machine: Machine) -> list[Problem]:
    found = []
    if machine.card_error:
        cure = "restart the session; if that does not help, switch the accelerator off and on again"
        found.append(Problem(f"torch cannot use the card: {machine.card_error}", cure, fatal=True))
    torch = machine.versions.get("torch") or "?"
    for card in dict.fromkeys(machine.without_kernels):
        what = missing_kernels(card.name, card.capability, machine.arch_list, torch)
        found.append(Problem(what, cure_for_kernels(card.capability, torch), fatal=True))
    if machine.unseen:
        names = ", ".join(machine.unseen)
        what = f"this machine has a card ({names}) that torch {torch} does not use: everything runs on the CPU"
        built = (
            "its driver is too old for this torch, or is not passed on to this environment: `nvidia-smi` says which "
            "CUDA it has"
            if machine.cuda
            else "this torch is built for the CPU; `python -m kd_kit doctor --fix-torch` installs one for the card"
        )
        found.append(Problem(what, f'{built}; CUDA_VISIBLE_DEVICES="" says that the CPU is meant'))
    return found


_EXPLAINED = (
    (
        "no kernel image",
        "torch lacks kernels for this card: restart the session and run `python -m kd_kit doctor --fix-torch` before "
        "torch is imported",
    ),
    (
        "out of memory",
        "something else holds the card's memory: stop other notebooks and processes on it, then restart the session",
    ),
    (
        "torchvision",
        "torchvision belongs to another torch: `pip uninstall -y torchvision` (this kit does not use it), then restart "
        "the session",
    ),
    (
        "driver",
        "the driver is too old for this build of torch: install a torch for an older CUDA, or update the driver",
    ),
    ("loading transformers", "the installation is broken: `pip install --force-reinstall --no-deps transformers`"),
    ("ImportError", "the installation is broken: reinstall the package that the error names, then restart the session"),
)


def _passes(machine: Machine) -> list[Problem]:
    found = []
    for device, failed in machine.passes.items():
        if failed is None:
            continue
        known = next((cure for sign, cure in _EXPLAINED if sign.lower() in failed.lower()), None)
        usual = "restart the session and run from the top"
        if device != "cpu":
            usual += f"; if it stays, this card and torch {machine.versions.get('torch')} do not go together: take "
            usual += 'another card, or CUDA_VISIBLE_DEVICES="" for the CPU'
        found.append(Problem(f"a real step on {device} failed: {failed}", known or usual, fatal=True))
    return found


def _surroundings(machine: Machine) -> list[Problem]:
    found = []
    for folder, free in machine.disks.items():
        if free < _DISK:
            cure = f"delete what is not needed there; a run wants some {_DISK:g} GiB for checkpoints and models"
            found.append(Problem(f"{folder} has {free:.1f} GiB left", cure))
    if machine.memory and machine.memory[1] < _MEMORY:
        cure = "stop other notebooks and processes, or restart the session; a teacher passes through it on its way"
        found.append(Problem(f"{machine.memory[1]:.1f} GiB of RAM are free", cure))
    if machine.internet and not machine.offline:
        switch = (
            "Settings > Internet on (needs a phone-verified account)"
            if machine.run_type
            else "check the connection and proxy"
        )
        cure = f"{switch}, or use models and text from attached or local folders; the embedded pair needs none"
        found.append(Problem(f"no internet ({machine.internet}): nothing can be fetched by name", cure))
    return found


def _no_card(machine: Machine) -> str:
    if not machine.run_type:
        return "check the driver with `nvidia-smi`, and that this torch is built with CUDA"
    return (
        "Settings > Accelerator, or machine_shape and enable_gpu in kernel-metadata.json; it needs a phone-verified "
        "account and hours left of the weekly quota"
    )


def _asked_line(name: str, wanted: Profile, machine: Machine) -> str:
    got = machine.profile
    short = counted(short_name(machine.cards[0].name), len(machine.cards)) if machine.cards else "the CPU"
    differs = changes(wanted, got)
    if not differs:
        return f"for {name}, and got it" if short == name else f"for {name}, got {short}: nothing changes"
    retired = name.endswith("P100") and not short.endswith("P100") and machine.run_type and machine.cards
    why = " (Kaggle retired the P100 on 2026-09-15 and gives T4 x2 in its place)" if retired else ""
    return f"for {name}, got {short}{why}. What that changes: {'; '.join(differs)}"


# --- the report ------------------------------------------------------------------------------------------------------


def _line(name: str, text: str) -> str:
    filled = textwrap.fill(
        re.sub(r"`[^`]*`", lambda command: command[0].replace(" ", _TOGETHER), text),
        _WIDTH,
        initial_indent=name.ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace(_TOGETHER, " ")


def _findings(machine: Machine) -> list[tuple[str, str]]:
    """The lines of the report above the problems: a word and what was found."""
    profile = machine.profile
    lines = [("card", _cards_line(machine.cards))]
    if machine.cards:
        lines.append(("kernels", _kernels_line(machine)))
    lines += [
        ("real step", _passes_line(machine)),
        ("precision", _precision_line(profile)),
        ("attention", _attention_line(machine)),
        ("experts", _experts_line(machine)),
    ]
    if machine.cards:
        lines.append(("Triton", _triton_line(machine)))
    lines += [("that means", remark) if i == 0 else ("", remark) for i, remark in enumerate(profile.remarks)]
    lines.append(("computer", _computer_line(machine)))
    lines.append(("disk", ", ".join(f"{free:.0f} GiB free in {folder}" for folder, free in machine.disks.items())))
    lines.append(("internet", "off" if machine.internet else "the hub answers"))
    if machine.offline:
        lines[-1] = ("internet", machine.internet or "")
    lines.append(("run", f"Kaggle, {machine.run_type}" if machine.run_type else "not on Kaggle"))
    if machine.run_type or machine.sources:
        lines.append(("attached", _sources_line(machine)))
    lines.append(("versions", _versions_line(machine)))
    return [line for line in lines if line[1]]


def _cards_line(cards: tuple[Card, ...]) -> str:
    if not cards:
        return "none: the CPU"
    kinds: dict[Card, int] = {}
    for card in cards:
        kinds[card] = kinds.get(card, 0) + 1
    return "; ".join(
        f"{counted(card.name, n)}, {card.memory:.1f} GiB{' each' * (n > 1)}, capability "
        f"{card.capability[0]}.{card.capability[1]}"
        for card, n in kinds.items()
    )


def _kernels_line(machine: Machine) -> str:
    found = []
    for capability in dict.fromkeys(card.capability for card in machine.cards):
        entry = kernels_for(capability, machine.arch_list)
        if entry is None:
            found.append(f"NONE for {sm(capability)}")
        elif entry == sm(capability):
            found.append(f"{entry} is built in")
        else:
            how = ", compiled by the driver at first use" if entry.startswith("compute") else ""
            found.append(f"{sm(capability)} runs {entry}{how}")
    return "; ".join(found)


def _passes_line(machine: Machine) -> str:
    if not machine.passes:
        return "not tried: it could only fail"
    said = [f"{device} {'FAILED' if failed else 'ok'}" for device, failed in machine.passes.items()]
    missing = [f"cuda:{i} not tried" for i in range(len(machine.cards)) if f"cuda:{i}" not in machine.passes]
    what = "a tiny student learns a step, tiny experts read a batch"
    return f"{', '.join([*said, *missing])} ({what})"


def _precision_line(profile: Profile) -> str:
    student = f"student {_PRECISION[profile.precision]} on {profile.student_device}"
    return f"{student}, teacher {profile.teacher_dtype} on {profile.teacher_device}"


def _attention_line(machine: Machine) -> str:
    if machine.backends is None:
        return f"{machine.profile.attention}: {', '.join(machine.profile.backends)} by its kind, not tried"
    return f"{machine.profile.attention}: {', '.join(machine.backends) or 'NO kernel works'}"


def _experts_line(machine: Machine) -> str:
    version = machine.versions.get("transformers") or ""
    if version.partition(".")[0] in ("4", ""):
        return "one after the other, as transformers 4 does it"
    return machine.profile.experts or "grouped_mm, transformers' own choice"


def _triton_line(machine: Machine) -> str:
    if not machine.profile.triton:
        return "not on this card (needs capability 7.0)"
    return machine.triton or "not installed: no torch.compile"


def _computer_line(machine: Machine) -> str:
    cores = f"{machine.cores} core{'s' * (machine.cores != 1)}"
    if machine.memory is None:
        return cores
    return f"{cores}, {machine.memory[0]:.1f} GiB of RAM, {machine.memory[1]:.1f} free"


def _sources_line(machine: Machine) -> str:
    if not machine.sources:
        return "nothing"
    found = [
        f"{s.path} ({'' if s.whole else 'over '}{_size(s.bytes)}, {s.files:,} file{'s' * (s.files != 1)})"
        for s in machine.sources[:_SOURCES]
    ]
    more = len(machine.sources) - len(found)
    return ", ".join(found) + (f", and {more} more" if more else "")


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _versions_line(machine: Machine) -> str:
    names = ["python", *SHOWN, *(name for name in machine.needed if name not in (*SHOWN, "python"))]
    found = [f"{name} {machine.versions.get(name) or 'missing'}" for name in names]
    found.insert(2, f"cuda {machine.cuda}" if machine.cuda else "no cuda")
    if not machine.needed:
        found.append("(the lowest that will do are not known: kd_kit is a bare folder here, not installed)")
    return ", ".join(text.replace(" ", _TOGETHER) if text[0] != "(" else text for text in found)
