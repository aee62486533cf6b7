"""Replace a torch that has no kernels for the card by one that has them: ``python -m kd_kit doctor --fix-torch``.

For a process of its own that runs before torch is imported where the work is done. What is installed is asked in
further processes, before and after, since a process keeps the torch that it began with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kd_kit.cards import Capability
from kd_kit.machine import driver_cards
from kd_kit.torch_builds import COMPANIONS, build_for, kernels_for, missing_kernels, requirements, sm

_MINUTES = 30.0  # for pip: three gigabytes
_ASK = """
import importlib, json, sys, warnings
from importlib.metadata import PackageNotFoundError, version
warnings.simplefilter("ignore")
versions, broken, cards = {}, {}, []
for name in sys.argv[1:]:
    try:
        versions[name] = version(name)
    except PackageNotFoundError:
        continue
    try:
        importlib.import_module(name)
    except Exception as error:
        broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
arch = []
if "torch" in versions and "torch" not in broken:
    import torch
    arch = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        failed = None
        try:
            (torch.ones(64, device=f"cuda:{i}") * 2).sum().item()
        except Exception as error:
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
        cards.append([torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), failed])
print(json.dumps({"versions": versions, "broken": broken, "arch_list": arch, "cards": cards}))
"""


@dataclass(frozen=True)
class Installed:
    """The torch that a new process would import, and what it does on the cards.

    Attributes:
        versions: of torch and its companions, where installed. broken: those that cannot be imported, with the error.
        arch_list: of torch. cards: name, capability, and what a sum on it ends in (None for a right one).
    """

    versions: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    arch_list: tuple[str, ...] = ()
    cards: tuple[tuple[str, Capability, str | None], ...] = ()


def installed() -> Installed:
    """Ask a new process. Cards that its torch does not see are asked of the driver.

    Raises:
        RuntimeError: that process ends without an answer.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-c", _ASK, "torch", *COMPANIONS], capture_output=True, text=True, timeout=300, check=False
        )
        found = json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise RuntimeError(
            f"doctor --fix-torch: expected a Python that says which torch it has, got {type(error).__name__}; start "
            f"`{sys.executable} -c 'import torch'` to see why"
        ) from error
    cards = [(name, (major, minor), failed) for name, (major, minor), failed in found["cards"]]
    if not cards:
        cards = [(name, capability, "torch does not see this card") for name, capability in driver_cards()]
    return Installed(found["versions"], found["broken"], tuple(found["arch_list"]), tuple(cards))


def fix_torch(
    *, ask: Callable[[], Installed] = installed, pip: Sequence[str] = (sys.executable, "-m", "pip"), say=print
) -> int:
    """Install a build of torch with kernels for the card, if the one that is there has none. Says what it does.

    Args:
        ask: what is installed; asked again after the installation. pip: the command. say: takes each line.

    Returns:
        Exit status: 0 where torch has kernels for every card now, or there is no card; 1 with a sentence otherwise.
    """
    try:
        before = ask()
    except RuntimeError as error:
        say(error)
        return 1
    torch = before.versions.get("torch", "(not installed)")
    if not before.cards:
        say(f"no NVIDIA card here: torch {torch} stays as it is")
        return 0
    lacking = [card for card in before.cards if kernels_for(card[1], before.arch_list) is None]
    if not lacking:
        return _verdict(before, f"torch {torch} has kernels for {_names(before)}: nothing to do", say)
    name, capability, _ = lacking[0]
    build = build_for(capability)
    if build is None:
        say(f"no torch from 2.6 on has kernels for {name} ({sm(capability)}); take another card")
        return 1
    if before.arch_list:
        say(missing_kernels(name, capability, before.arch_list, torch))
    else:
        say(f"torch {torch} {before.broken.get('torch', 'has no kernels for any card')}; here is {name}")
    for wanted in requirements(build, before.versions):
        say(f"installing {' '.join(wanted)} from {build.index}: some 3 GB, 2 to 6 minutes")
        failed = _install([*pip, "install", "--progress-bar", "off", "--index-url", build.index, *wanted])
        if failed is None:
            break
        say(f"pip could not: {failed}")
    else:
        say(
            "torch is as it was, and will not run on this card; switch the internet on (on Kaggle: Settings > "
            "Internet) and try again, or take another card"
        )
        return 1
    try:
        after = ask()
    except RuntimeError as error:
        say(error)
        return 1
    done = f"torch {after.versions.get('torch')} is installed and has kernels for {_names(after)}"
    return _verdict(after, f"{done}; a notebook that has imported torch already must be restarted", say)


def _install(command: list[str]) -> str | None:
    """None if the command went well, else its reason in one line."""
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_MINUTES * 60, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {_MINUTES:g} minutes"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    if child.returncode == 0:
        return None
    lines = [line.strip() for line in (child.stderr or child.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"exit status {child.returncode} without a word"])[-1]


def _verdict(now: Installed, good: str, say) -> int:
    """Say how it stands, and the exit status of that."""
    if "torch" in now.broken:
        say(f"torch {now.versions.get('torch')} cannot be imported: {now.broken['torch']}")
        return 1
    for name, capability, failed in now.cards:
        if kernels_for(capability, now.arch_list) is None:
            say(missing_kernels(name, capability, now.arch_list, now.versions.get("torch", "?")))
            return 1
        if failed is not None:
            say(f"torch {now.versions.get('torch')} has kernels for {name}, but a sum on it fails: {failed}")
            return 1
    say(good)
    for name, error in now.broken.items():
        say(f"{name} {now.versions[name]} no longer fits ({error}): pip uninstall -y {name}; this kit does not use it")
    return 0


def _names(now: Installed) -> str:
    return ", ".join(dict.fromkeys(f"{name} ({sm(capability)})" for name, capability, _ in now.cards))
