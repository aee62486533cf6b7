"""What makes a run the run it is, and what may change when it goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kd_kit.head import head_of
from kd_kit.student_weights import start_fingerprint

# A run that goes on with another value of these would not be the same run.
_FIXED = {
    "tokenizers": "the tokenizers",
    "window": "the window",
    "batch_size": "the batch size",
    "packing": "the way in which windows share a batch, build_data(pack=...),",
    "data": "the text or the held-out text",
    "teacher": "the teacher",
    "student": "the student's shapes",
    "terms": "the loss terms",
    "parts": "the layers, experts or method of a term with trained parts",
    "seed": "the seed",
    "accumulation": "the number of batches per step",
}


def run_config(trainer) -> dict:
    """The configuration of a run as plain JSON."""
    shapes = {name: list(p.shape) for name, p in trainer.student.named_parameters()}
    # what a trained part looks at: its statistics and maps would be those of something else
    looked_at = ("layers", "taps", "experts", "active", "scores", "method")
    parts = {t.name: {k: t.settings[k] for k in looked_at if k in t.settings} for t in trainer.terms if t.part}
    arrangement = trainer.data.batching.arrangement
    teacher = None
    if trainer.teacher is not None:  # the same in any precision, and wherever it is kept
        model = trainer.teacher.model
        few = head_of(model).weight[:8, :64].detach().half().cpu().numpy().tobytes()
        size = sum(p.numel() for p in model.parameters())
        teacher = f"{type(model).__name__} of {size:,} parameters, {hashlib.sha256(few).hexdigest()[:12]}"
        if trainer.teacher.more_experts is not None:
            teacher += f", and with {trainer.teacher.more_experts} experts"
    return {
        "tokenizers": trainer.data.pair.fingerprint,
        "window": trainer.data.window,
        "batch_size": trainer.data.batch_size,
        "packing": None if arrangement == "shuffled" else arrangement,
        "data": trainer.data.fingerprint,
        "teacher": teacher,
        "student": shapes,
        "start": start_fingerprint(trainer.student),
        "terms": [t.name for t in trainer.terms],
        "parts": parts,
        **{f"{t.name}.{k}": v for t in trainer.terms for k, v in ({"weight": t.weight} | dict(t.settings)).items()},
        "schedule": repr(trainer.schedule),
        "rates": repr(trainer.lr_schedule),
        "balance": repr(trainer.balance),
        "steps": trainer.planned_steps,
        **trainer.settings,
    }


def check_run(folder: Path, config: dict) -> str | None:
    """The id of the run that lives in ``folder``; None if it is new.

    A run of another configuration of which nothing was saved yet (a cell was changed and run again) makes place.
    A run keeps the start it has, whatever student is given to it later: the stored one is put into ``config``.

    What does not decide which sample meets which weights (rates, weights, steps, logging) may change between two
    sessions; a line says so.

    Raises:
        ValueError: the folder holds checkpoints of a run of another configuration, or something that is no run.
    """
    path = folder / "RUN.json"
    if not path.exists():
        if (folder / "ckpt").is_dir() and any((folder / "ckpt").iterdir()):
            raise ValueError(
                f"build_trainer: expected a run folder with its RUN.json, got {str(folder)!r} with checkpoints but "
                "without it; restore that file, or give the run another name: build_session(run=...)"
            )
        return None
    try:
        stored = json.loads(path.read_text())
        before, run_id = dict(stored["config"]), stored["run_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"build_trainer: expected a RUN.json that can be read, got {str(path)!r} ({error}); "
            "give the run another name: build_session(run=...)"
        ) from error
    start = before.get("start")
    if start is not None and config["start"] not in (None, start):
        print(
            f"{folder.name}: goes on with the student that it started with; the weights of the one given now (another "
            "seed, or another model) are not used"
        )
    config["start"] = start or config["start"]
    try:
        refuse_other_run(folder, before, config)
    except ValueError:
        if any((folder / "ckpt").glob("*")):
            raise
        print(f"{folder.name}: nothing was saved here yet, so the run starts anew with the configuration given now")
        for name in ("RUN.json", "metrics.jsonl", "initial.safetensors", "best.safetensors"):
            (folder / name).unlink(missing_ok=True)
        return None
    notes = changed_settings(before, config)
    if notes:
        print(f"{folder.name}: goes on with {', '.join(notes)}")
    return run_id


def refuse_other_run(folder: Path, before: dict, config: dict) -> None:
    """Raise where two configurations are those of different runs.

    Raises:
        ValueError: names what differs.
    """
    others = {key for key in _FIXED if before.get(key) != config[key]}
    if "terms" in others:  # with other terms there are other parts: that need not be said
        others.discard("parts")
    if others & {"window", "batch_size"}:  # these decide them, too
        others -= {"data", "packing"}
    changed = [
        f"{what} ({before.get(key)} -> {config[key]})" if isinstance(config[key], int) else what
        for key, what in _FIXED.items()
        if key in others
    ]
    if changed:
        raise ValueError(
            f"build_trainer: expected the configuration of the run in {str(folder)!r}, got another one: "
            f"{', '.join(changed)} changed; go back to it, or give the new run another name: build_session(run=...)"
        )


def changed_settings(before: dict, config: dict) -> list[str]:
    """What may change within a run and did, each as "name old -> new"."""
    keys = [*config, *(key for key in before if key not in config)]
    return [
        f"{key} {_short(before.get(key))} -> {_short(config.get(key))}"
        for key in keys
        if key not in _FIXED and key != "start" and before.get(key) != config.get(key)
    ]


def _short(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
