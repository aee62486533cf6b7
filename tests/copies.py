"""Run folders to copy, and what is done to the copies of them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from kd_kit.checkpoint import save_checkpoint


def save(run, step, number=None, run_id="a", groups=("model",)):
    groups = {name: {"w": torch.full((50,), float(step))} for name in groups}
    return save_checkpoint(
        run, step=step, save_number=number or step, run_id=run_id, groups=groups, state={"step": step}
    )


def run_copy(folder, step, number=None, run_id="a"):
    """A run folder with one checkpoint of this step, and all that lies beside it."""
    folder.mkdir(parents=True)
    (folder / "RUN.json").write_text(json.dumps({"run_id": run_id}))
    (folder / "metrics.jsonl").write_text("{}\n" * step)
    save_file({"w": torch.zeros(9)}, folder / "initial.safetensors")
    save_file({"w": torch.full((9,), float(step))}, folder / "best.safetensors")
    save(folder, step, number, run_id)
    return folder


def fill(place, tmp_path, *steps):
    """Send copies of these steps, one after the other; returns the bytes of each."""
    return [place.upload(run_copy(tmp_path / f"copy-{step}", step), lambda: True) for step in steps]


def contents(folder):
    """Every file below it, by its path there; checkpoints without what differs between their folders' names."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
