"""Rules of the house: imports go one way, importing is quiet, and the public names are few and documented."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kd_kit

ROOT = Path(kd_kit.__file__).parent

# Lowest first. A file imports only from levels below its own, or from a file that stands before it in its own level.
LEVELS = {
    "words": ["types", "kaggle_place", "cards", "torch_builds"],
    "sums": ["reduce"],
    "mathematics": [
        "losses.divergence",
        "losses.lm",
        "losses.support",
        "losses.span",
        "losses.sorted",
        "losses.hidden",
        "losses.attention",
        "losses.contrastive",
        "losses.moe",
        "losses",
        "align",
        "vocab",
        "spelling",
        "inside",
        "modes",
        "packing",
        "pair",
        "readings",
        "one_softmax",
        "head",
        "packed_body",
        "taps",
        "projectors",
    ],
    "things": [
        "real_pass",
        "processes",
        "machine",
        "checkup",
        "torch_fix",
        "doctor_verb",
        "named",
        "text_files",
        "chats",
        "rows",
        "loading",
        "batching",
        "collate",
        "tokenised",
        "data",
        "history",
        "checkpoint_folder",
        "checkpoint",
        "copied_run",
        "remote_copy",
        "hub_places",
        "mirror_places",
        "mirror",
        "metrics_copy",
        "manifest_walk",
        "adoption",
        "resume_search",
        "session",
        "tensor_tree",
        "run_lock",
        "cursor",
    ],
    "models": [
        "offline",
        "sources",
        "likelihood",
        "calibration",
        "words",
        "speed",
        "experts",
        "upcycling",
        "retokenise",
        "routing",
        "pruning",
        "densify",
        "students",
        "models",
        "teacher_rows",
        "teacher",
        "signal_pieces",
    ],
    "decisions": [
        "ranges",
        "terms",
        "kd_terms",
        "parts",
        "state_terms",
        "expert_terms",
        "stages",
        "learning_rate",
        "balance",
        "table",
        "drawing",
    ],
    "parts of a run": [
        "callbacks",
        "controls",
        "shard_claims",
        "cache_fidelity",
        "cache",
        "cached_teacher",
        "caching",
        "forecast",
        "student_weights",
        "run_config",
        "report_plot",
        "report",
        "evaluation",
        "lm_eval_tasks",
        "model_card",
        "exporting",
        "summary",
        "sample",
        "vocabulary_audit",
    ],
    "the run": [
        "gradients",
        "module",
        "optimizer",
        "train_step",
        "floor",
        "alarms",
        "run_table",
        "step_log",
        "finite",
        "fault_trace",
        "fault_replay",
        "fault_advice",
        "fault",
        "recovery",
        "steering",
        "keeping",
        "together",
        "trainer",
        "trainer_builder",
        "schedule_plot",
        "run_panels",
        "plots",
        "term_evaluation",
    ],
    "judgement": [
        "verification",
        "memory",
        "trial",
        "facts",
        "trial_checks",
        "plan_checks",
        "preflight",
        "token_text",
        "passes",
        "term_changes",
        "probe_settings",
        "scales",
        "probe_plot",
        "probe",
        "token_looks",
        "layer_looks",
        "looks",
        "demo",
    ],
    "faces": ["panel", "dashboard", "probe_panel", "notebook_run", "launched", "launching"],
    "kernels on Kaggle": [
        "kernel_metadata",
        "payload",
        "kernel_build",
        "kaggle_client",
        "kernel_push",
        "kernel_plan",
        "kaggle_io",
        "kaggle_verbs",
    ],
    "makers of the embedded default": [
        "offline.fetch",
        "offline.provenance",
        "offline.austen",
        "offline.cut",
        "offline.shapes",
        "offline.pretrain",
        "offline.__main__",
    ],
    "everything": ["", "__main__"],
}
PLACE = {name: (level, i) for level, names in enumerate(LEVELS.values()) for i, name in enumerate(names)}


def name_of(path: Path) -> str:
    """``losses.lm`` for kd_kit/losses/lm.py, ``losses`` for its package, ``""`` for kd_kit itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if "assets" not in path.parts}


def imports_of(source: str) -> set[str]:
    """The files of kd_kit that ``source`` imports anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected `from kd_kit...`, got a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "kd_kit":
                # the longest part of the dotted name that is a file; the rest is a name in it
                found.add(next(n for k in range(len(parts), 0, -1) if (n := ".".join(parts[1:k])) in FILES))
    return found


def test_every_file_has_a_level():
    for name, path in FILES.items():
        assert name in PLACE, (
            f"kd_kit/{path.relative_to(ROOT)} has no level; put {name!r} into LEVELS of this file, in the lowest level "
            "that lies above everything it imports"
        )
    gone = PLACE.keys() - FILES.keys()
    assert not gone, f"LEVELS names files that do not exist: {sorted(gone)}; take them out"


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    if name not in PLACE:
        pytest.skip("has no level yet; another test says so")
    level, i = PLACE[name]
    rooms = list(LEVELS)
    for other in imports_of(FILES[name].read_text()) - {name}:
        assert PLACE.get(other, (0, 0)) < (level, i), (
            f"kd_kit.{name} ({rooms[level]}) imports kd_kit.{other} ({rooms[PLACE[other][0]]}), which does not stand "
            "below it; move what is shared down, or the importing code up"
        )


def test_the_reader_of_imports_sees_them_all():
    source = (
        "import kd_kit.types\ndef f():\n    from kd_kit import losses, build_data\n    import os, kd_kit.head as h\n"
    )
    source += "    from kd_kit.losses.lm import cross_entropy\n    from kd_kit.data import DistillData\n"
    assert imports_of(source) == {"types", "losses", "", "head", "losses.lm", "data"}


SLOW = {
    "transformers",
    "datasets",
    "matplotlib",
    "ipywidgets",
    "nbformat",
    "nbclient",
    "nbconvert",
    "IPython",
    "pandas",
}


@pytest.mark.parametrize("name", FILES)
def test_slow_libraries_are_imported_where_they_are_needed(name):
    """Not at the top of a file, unless only a type checker reads it."""
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {node.module.split(".")[0]}
        else:
            continue
        assert not names & SLOW, (
            f"kd_kit.{name} line {node.lineno}: import {names & SLOW} in the function that needs it"
        )


def test_importing_is_quiet(tmp_path):
    """No output, no slow library, no environment variable, no logging handler, no random number drawn."""
    code = """
import json, logging, os, random, sys
import torch, accelerate, safetensors, safetensors.torch  # theirs, not ours
def handlers():
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return sum(len(getattr(l, "handlers", [])) for l in loggers), logging.root.level
before = dict(os.environ), handlers(), random.getstate(), torch.get_rng_state().tolist(), torch.get_default_dtype()
there = set(sys.modules)
import kd_kit
after = dict(os.environ), handlers(), random.getstate(), torch.get_rng_state().tolist(), torch.get_default_dtype()
new = sorted({m.split(".")[0] for m in set(sys.modules) - there})
with open(sys.argv[1], "w") as out:
    json.dump({"same": [a == b for a, b in zip(before, after)], "new": new}, out)
"""
    report = tmp_path / "report.json"
    child = subprocess.run([sys.executable, "-c", code, str(report)], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
    seen = json.loads(report.read_text())
    assert seen["same"] == [True] * 5, "environment, logging, random, torch's random, default dtype"
    assert not set(seen["new"]) & SLOW


# ---- the public names


def test_public_names_are_sorted_and_there():
    assert sorted(kd_kit.__all__) == kd_kit.__all__
    assert len(set(kd_kit.__all__)) == len(kd_kit.__all__) <= 55
    assert all(hasattr(kd_kit, name) for name in kd_kit.__all__)


@pytest.mark.parametrize("name", kd_kit.__all__)
def test_public_names_are_documented(name):
    doc = getattr(kd_kit, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}("), "a dataclass's own signature is no docstring"
    assert len(doc.split()) >= 5


def test_no_public_name_hides_a_file():
    """``import kd_kit.x`` gives the file, whatever ``kd_kit.__init__`` imports from it."""
    hidden = {n for n in kd_kit.__all__ if n in FILES and getattr(kd_kit, n) is not sys.modules.get(f"kd_kit.{n}")}
    assert not hidden, f"kd_kit.{hidden} is not the file of that name; rename the file or the function"
