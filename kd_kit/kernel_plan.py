"""How many sessions and weeks a run still needs, from the speed that its last checkpoint measured."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_kit.checkpoint_folder import CheckpointInfo, inspect_checkpoint, read_json, read_state, step_folders
from kd_kit.forecast import sessions_needed
from kd_kit.table import short, span

HOURS = 11.0  # of a GPU session, which Kaggle ends after 12
QUOTA = 30.0  # GPU hours of a week
LEAD = 15 * 60.0  # seconds before a session's first step, and after its last


@dataclass(frozen=True)
class RunPlan:
    """What is left of a run; prints well.

    Attributes:
        run: its name.
        step, steps: optimizer steps done and planned.
        step_seconds: measured, of one step; None where no step was measured.
        to_go: seconds of training, None as well.
        sessions: further ones, math.inf if a session has no time for training; None where nothing was measured.
        gpu_hours: of these sessions together.
        weeks: of the quota that these hours take.
        note: what is not counted.
    """

    run: str
    step: int
    steps: int
    step_seconds: float | None
    to_go: float | None
    sessions: float | None
    gpu_hours: float | None
    weeks: int | None
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.run}: step {self.step:,} of {self.steps:,}"
        if self.sessions == 0:
            return f"{text}, finished" + (f" ({self.note})" if self.note else "")
        if self.to_go is None:
            return f"{text}; no step was measured yet, so how long the rest takes is not known: let it run a session"
        text += f", {short(self.step_seconds)} s per step, about {span(self.to_go)} of training to go"
        if math.isinf(self.sessions):
            return f"{text}; a session has no time for training: give it more hours"
        text += f": {self.sessions:.0f} more session{'s' * (self.sessions > 1)}, {self.gpu_hours:.1f} GPU hours"
        text += f", {self.weeks} week{'s' * (self.weeks > 1)} of the quota"
        return f"{text} ({self.note})" if self.note else text


def plan(
    folder: str | os.PathLike,
    run: str | None = None,
    *,
    hours: float = HOURS,
    quota: float = QUOTA,
    lead: float = LEAD,
) -> RunPlan:
    """What a run still needs: its newest whole checkpoint says how far it is, and how long a step takes.

    Args:
        folder: a run folder, or one above it, as a fetched output.
        run: the run's name, where there are several.
        hours: of a session. quota: GPU hours of a week.
        lead: seconds of each session that do not train: loading, the cache, saving, exporting.

    Raises:
        ValueError: there is no run, or several and none of them named, or no checkpoint can be used.
    """
    if hours <= 0 or quota <= 0 or lead < 0:
        raise ValueError(
            f"plan: expected positive hours and quota, got hours={hours}, quota={quota}, lead={lead}; leave them out "
            f"for {HOURS:g} h, {QUOTA:g} h and {LEAD:g} s"
        )
    runs = _runs(Path(folder))
    chosen = {name: place for name, place in runs.items() if run in (None, name)}
    if not runs and any(Path(folder).rglob("CACHE.json")):
        raise ValueError(
            f"plan: expected a run with checkpoints below {str(folder)!r}, got one that is still in its first phase, a "
            "teacher cache and no step yet; push it again: the cache goes on where it stopped"
        )
    if not chosen:
        what = (
            f"a run of {sorted(runs)}, got {run!r}"
            if runs
            else f"a run with checkpoints below {str(folder)!r}, got none"
        )
        raise ValueError(f"plan: expected {what}; fetch its output: python -m kd_kit kaggle fetch KERNEL")
    if len(chosen) > 1:
        raise ValueError(f"plan: expected one run, got {', '.join(sorted(chosen))}; name one: --run NAME")
    (name, place), *_ = chosen.items()
    info, state = _newest(place)
    step, steps = info.step, _steps(place, state)
    each = state.get("step_seconds") or None
    if step >= steps or state.get("stopped_early"):
        note = "stopped early" if state.get("stopped_early") and step < steps else ""
        return RunPlan(name, step, steps, each, 0.0, 0, 0.0, 0, note)
    if each is None:
        return RunPlan(name, step, steps, None, None, None, None, None)
    to_go, session = (steps - step) * each, hours * 3600 - lead
    count = sessions_needed(to_go, session, session) if session > 0 else math.inf
    note = "evaluations and an LM-only control come on top"
    if math.isinf(count):
        return RunPlan(name, step, steps, each, to_go, count, math.inf, None, note)
    total = (to_go + count * lead) / 3600
    return RunPlan(name, step, steps, each, to_go, count, total, math.ceil(total / quota), note)


def _runs(folder: Path) -> dict[str, Path]:
    """Run folders at and below a folder, by name; a run's control is no run of its own."""
    found = {}
    for inside, folders, _ in os.walk(folder):
        here = Path(inside)
        folders[:] = sorted(f for f in folders if f != "control")
        if "ckpt" in folders and step_folders(here / "ckpt"):
            folders.remove("ckpt")
            found[here.name if here.name else str(here)] = here
    return found


def _newest(run: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """The newest checkpoint whose state is whole. Its tensors are not read: the run itself checks them."""
    refused, found = [], []
    for path in step_folders(run / "ckpt"):
        try:
            info = inspect_checkpoint(path, verify=False)
            found.append((info.step, info.save_number, info, read_state(info)))
        except (OSError, ValueError) as error:
            refused.append(f"{path.name}: {error}")
    if not found:
        raise ValueError(
            f"plan: expected a checkpoint that can be read in {str(run)!r}, got {'; '.join(refused)}; fetch the output "
            "again into an empty folder"
        )
    *_, info, state = max(found, key=lambda entry: entry[:2])
    return info, state


def _steps(run: Path, state: dict[str, Any]) -> int:
    """Optimizer steps planned: as RUN.json says, which a later session may have changed, else the checkpoint."""
    try:
        return int(read_json(run / "RUN.json")["config"]["steps"])
    except (OSError, KeyError, TypeError, ValueError):
        return int(state["run"]["config"]["steps"])
