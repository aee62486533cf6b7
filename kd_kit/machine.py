"""What a session has: cards, kernels, memory, disk, network, sources, versions. Measured here, judged elsewhere.

Nothing here raises or waits long: what cannot be had is a word in the record.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import torch

from kd_kit.cards import Capability, Profile, profile_for
from kd_kit.kaggle_place import kaggle_input, kaggle_working, on_kaggle, run_type
from kd_kit.real_pass import first_line, real_pass, sdpa_backends
from kd_kit.torch_builds import kernels_for, numbers

GIB = 2**30
SHOWN = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "matplotlib",
    "ipywidgets",
    "IPython",
    "safetensors",
    "huggingface_hub",
    "kd_kit",
)
"""Packages whose versions are shown, whether this kit asks for one or not."""
_WAIT = 3.0  # seconds for the hub's answer
_MOST = 20_000  # files that are counted in one source


@dataclass(frozen=True)
class Card:
    """One card as torch sees it: its name, compute capability, and memory in GiB."""

    name: str
    capability: Capability
    memory: float


@dataclass(frozen=True)
class Source:
    """One thing that is attached: its path below the inputs, its size in bytes, its files; ``whole``: all counted."""

    path: str
    bytes: int
    files: int
    whole: bool = True


@dataclass(frozen=True)
class Machine:
    """What was measured about a session. Made by :func:`measure`.

    Attributes:
        cards: that torch sees. card_error: why it cannot use them, where it says so.
        unseen: names of cards that the driver has and torch does not see.
        arch_list: of the torch that is installed. cuda: that it was built with; None for a build without.
        passes: device to what failed in a real step on it, None for nothing; without the devices not tried.
        backends: kernels of SDPA on the first device; None where they were not tried. triton: its version.
        versions: of the packages in SHOWN and of those in needed, and of python; None for one that is missing.
        needed: package to the lowest version that this kit works with.
        cores: CPU cores. memory: GiB of RAM, all and free; None where unknown.
        disks: folder to free GiB, the working folder first, then the one for temporary files.
        internet: None if the hub answered, else why not. offline: a variable says that it is not to be asked.
        run_type: "Batch" or "Interactive" on Kaggle. sources: attached there.
    """

    cards: tuple[Card, ...] = ()
    card_error: str | None = None
    unseen: tuple[str, ...] = ()
    arch_list: tuple[str, ...] = ()
    cuda: str | None = None
    passes: dict[str, str | None] = field(default_factory=dict)
    backends: tuple[str, ...] | None = None
    triton: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    needed: dict[str, str] = field(default_factory=dict)
    cores: int = 1
    memory: tuple[float, float] | None = None
    disks: dict[str, float] = field(default_factory=dict)
    internet: str | None = None
    offline: bool = False
    run_type: str | None = None
    sources: tuple[Source, ...] = ()

    @property
    def profile(self) -> Profile:
        """Of the first card, which trains; of the CPU without any."""
        return self.profile_of(0) if self.cards else profile_for(None)

    def profile_of(self, number: int) -> Profile:
        card = self.cards[number]
        return profile_for(card.capability, count=len(self.cards), memory=card.memory, name=card.name)

    @property
    def unmet(self) -> dict[str, str | None]:
        """Packages that are missing or too old, to the version that is there."""
        return {
            name: self.versions.get(name)
            for name, lowest in self.needed.items()
            if (found := self.versions.get(name)) is None or numbers(found) < numbers(lowest)
        }

    @property
    def without_kernels(self) -> tuple[Card, ...]:
        return tuple(card for card in self.cards if kernels_for(card.capability, self.arch_list) is None)


def measure() -> Machine:
    """Look at this session. A real step runs on every card that torch has kernels for, or on the CPU."""
    cards, error = see_cards()
    needed = needed_versions()
    machine = Machine(
        cards=cards,
        card_error=error,
        unseen=() if cards or error else unseen_cards(),
        arch_list=tuple(torch.cuda.get_arch_list()),
        cuda=torch.version.cuda,
        triton=_version("triton"),
        versions={name: _version(name) for name in (*SHOWN, *needed)} | {"python": platform.python_version()},
        needed=needed,
        cores=_cores(),
        memory=memory(),
        disks=free_disk(),
        internet=ask_hub(),
        offline=offline_asked() is not None,
        run_type=run_type(),
        sources=attached_sources(),
    )
    return with_passes(machine)


def with_passes(machine: Machine) -> Machine:
    """The record with what real steps showed. A device whose step could only fail is not tried."""
    if machine.unmet or machine.card_error:
        return machine
    devices = {f"cuda:{i}": machine.profile_of(i) for i in range(len(machine.cards))} or {"cpu": machine.profile}
    broken = {f"cuda:{i}" for i, card in enumerate(machine.cards) if card in machine.without_kernels}
    passes = {device: real_pass(device, profile) for device, profile in devices.items() if device not in broken}
    first = next(iter(devices))
    backends = sdpa_backends(first, machine.profile.teacher_dtype) if passes.get(first, "not tried") is None else None
    return replace(machine, passes=passes, backends=backends)


# --- cards -----------------------------------------------------------------------------------------------------------


def see_cards() -> tuple[tuple[Card, ...], str | None]:
    """The cards that torch sees, and the error where asking for them ends in one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cards without kernels, which the report explains
            if not torch.cuda.is_available():
                return (), None
            cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return tuple(Card(c.name, (c.major, c.minor), c.total_memory / GIB) for c in cards), None
    except (RuntimeError, AssertionError) as error:
        return (), f"{type(error).__name__}: {first_line(error)}"


def unseen_cards() -> tuple[str, ...]:
    """Names of the cards that the driver knows."""
    return tuple(name for name, _ in driver_cards())


def driver_cards() -> list[tuple[str, Capability]]:
    """Name and capability of the cards that NVIDIA's driver knows, without torch; empty without a driver, or where
    they are hidden on purpose.
    """
    command = shutil.which("nvidia-smi")
    if command is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        out = subprocess.run(
            [command, "--query-gpu=name,compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^(.+),\s*(\d+)\.(\d+)\s*$", out, flags=re.MULTILINE)
    return [(name.strip(), (int(major), int(minor))) for name, major, minor in found]


# --- packages --------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def needed_versions() -> dict[str, str]:
    """The lowest versions that this kit's own metadata name; empty where it runs from a bare folder of files."""
    try:
        ours = metadata("kd_kit")
    except PackageNotFoundError:
        return {}
    found = {}
    for line in ours.get_all("Requires-Dist") or ():
        plain = re.fullmatch(r"([\w.-]+)\s*\(?>=\s*([\d.]+)\)?", line.strip())
        if plain:  # the others are extras, which only some verbs need
            found[plain[1]] = plain[2]
    python = re.fullmatch(r">=\s*([\d.]+)", ours.get("Requires-Python") or "")
    return ({"python": python[1]} if python else {}) | found


# --- the computer ----------------------------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(proc: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> tuple[float, float] | None:
    """GiB of RAM, all and free, within the limit of the container; None where the system does not say."""
    try:
        found = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", proc.read_text(), re.MULTILINE)}
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError):
        return None
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory" / "memory.limit_in_bytes", groups / "memory" / "memory.usage_in_bytes"),
    ):
        try:
            most, taken = int(limit.read_text()), int(used.read_text())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if most < total:
            total, free = most, min(free, max(most - taken, 0))
    return total / GIB, free / GIB


def free_disk() -> dict[str, float]:
    """Free GiB of the folder that is kept, and of the one for temporary files."""
    folders = (kaggle_working() if on_kaggle() else Path.cwd(), Path(tempfile.gettempdir()))
    return {str(folder): shutil.disk_usage(folder).free / GIB for folder in folders}


# --- the network -----------------------------------------------------------------------------------------------------


def offline_asked() -> str | None:
    """The variable that says that the hub is not to be asked, as huggingface_hub reads them; None without one."""
    name = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)), None)
    return name if name and os.environ[name].upper() in ("1", "ON", "YES", "TRUE") else None


def hub_address() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def ask_hub(wait: float = _WAIT) -> str | None:
    """None if the hub answers within ``wait`` seconds, else why not. A name that is looked up in vain may take longer
    than any time-out of the request itself, so the asking is left behind then.
    """
    if variable := offline_asked():
        return f"not asked: {variable} is set"
    said: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(hub_address(), method="HEAD")
            with urllib.request.urlopen(request, timeout=wait):
                said.append(None)
        except urllib.error.HTTPError as error:  # it is there, whatever it thinks of the question
            said.append(None if error.code < 500 else f"it answers with error {error.code}")
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            said.append(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(wait)
    return said[0] if said else f"no answer in {wait:g} s"


# --- what is attached ------------------------------------------------------------------------------------------------

_LAYERS = {"datasets": 2, "notebooks": 2, "models": 5, "competitions": 1}


def attached_sources() -> tuple[Source, ...]:
    """What lies below the inputs, in today's layout (``datasets/OWNER/SLUG``) or the older one (``SLUG``)."""
    top = kaggle_input()
    if not top.is_dir():
        return ()
    roots: list[Path] = []
    for folder in sorted(top.iterdir()):
        deeper = sorted(folder.glob("/".join("*" * _LAYERS.get(folder.name, 0)))) if folder.name in _LAYERS else []
        roots += [path for path in deeper if path.is_dir()] or [folder]
    return tuple(_source(root, top) for root in roots)


def _source(root: Path, top: Path) -> Source:
    size = files = 0
    for path in [root] if root.is_file() else (Path(at) / name for at, _, names in os.walk(root) for name in names):
        if files == _MOST:  # a folder of a million pictures is not what is waited for
            return Source(root.relative_to(top).as_posix(), size, files, whole=False)
        files += 1
        size += path.stat().st_size if path.exists() else 0
    return Source(root.relative_to(top).as_posix(), size, files)
