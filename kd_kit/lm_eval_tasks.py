"""Scores on tasks of EleutherAI's lm_eval, for a model that is in memory: ``pip install 'kd_kit[eval]'``.

lm_eval reads the model through its own front for transformers, as it would a folder on disk, so that figures can be
compared with published ones. It fetches the data sets of its own tasks; a task file of yours needs no internet.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kd_kit.likelihood import evaluating
from kd_kit.table import Table


@dataclass(frozen=True)
class TaskScores:
    """What a model reached on some tasks.

    Attributes:
        scores: {task: {metric: value}}; a group of tasks has an entry of its own.
        errors: {task: {metric: standard error}}, of those metrics that have one.
        examples, shots: {task: how many were asked, and how many solved ones stood before each}.
        version: of lm_eval.
    """

    scores: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]
    examples: dict[str, int]
    shots: dict[str, int]
    version: str

    @property
    def table(self) -> Table:
        """A row per task and metric."""
        rows = []
        for task, figures in self.scores.items():
            for metric, value in figures.items():
                error = self.errors.get(task, {}).get(metric)
                some = (str(given[task]) if task in given else "-" for given in (self.examples, self.shots))
                rows.append((task, metric, f"{value:.4f}", "-" if error is None else f"{error:.4f}", *some))
        columns = ("task", "metric", "value", "± standard error", "examples", "shots")
        return Table("", columns, tuple(rows), note=f"lm_eval {self.version}", words=("task", "metric"))

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def evaluate_tasks(
    model,
    tokenizer,
    tasks: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> TaskScores:
    """Run lm_eval's tasks on a model in memory; its mode and the caller's random state stay as they were.

    Args:
        model, tokenizer: of transformers: ``trainer.student, tokenizers.student``.
        tasks: names that lm_eval knows ("hellaswag"), task files of your own (a path that ends in .yaml), or several.
            lm_eval looks at every YAML file in such a file's folder; paths in its ``data_files`` start from the working
            directory.
        limit: only the first so many examples of each task, to see whether it works; not a result.
        shots: solved examples before each one; what the task says if left out.
        seed: of the choice of those, and of whatever a task draws.

    Raises:
        ValueError: lm_eval is not installed, a task that it does not know, or a file that is no task.

    Example:
        >>> from kd_kit.lm_eval_tasks import evaluate_tasks
        >>> evaluate_tasks(trainer.student, tokenizers.student, "my_tasks/words.yaml")
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "evaluate_tasks: expected the package lm_eval, got an environment without it; pip install 'kd_kit[eval]'"
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if limit is not None and limit < 1:
        raise ValueError(f"evaluate_tasks: expected a limit of at least 1 example, got {limit}")
    given = [tasks] if isinstance(tasks, (str, os.PathLike)) else list(tasks)
    if not given:
        raise ValueError("evaluate_tasks: expected one task or more, got none; 'hellaswag', or a task file of your own")
    files = {task: Path(task) for task in given if Path(task).suffix in (".yaml", ".yml")}
    names = [_named(files[task]) if task in files else str(task) for task in given]
    folders = sorted({str(path.resolve().parent) for path in files.values()})
    with _quiet():
        known = TaskManager(include_path=folders or None, include_defaults=len(files) < len(given))
        _check_known(names, known.all_tasks)
        with evaluating(model), _own_random_numbers():
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=names,
                task_manager=known,
                num_fewshot=shots,
                limit=limit,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    return _scores(found, lm_eval.__version__)


def _named(path: Path) -> str:
    """The name that a task file gives its task."""
    if not path.is_file():
        raise ValueError(f"evaluate_tasks: expected a task file, got {str(path)!r}, which does not exist")
    name = re.search(r"^(?:task|group):\s*['\"]?([^\s'\"#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if name is None:
        raise ValueError(
            f"evaluate_tasks: expected a task file with a line 'task: its_name', got {str(path)!r} without one; "
            "see lm_eval's guide to new tasks"
        )
    return name[1]


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known)) or "none"
            raise ValueError(
                f"evaluate_tasks: expected a task that lm_eval knows, got {name!r}; the nearest names are: {near} "
                "(a file of your own ends in .yaml)"
            )


def _scores(found: dict, version: str) -> TaskScores:
    """lm_eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    scores, errors = {}, {}
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or not isinstance(value, (int, float)):
                continue
            bare = metric.removesuffix("_stderr")
            into = scores if bare == metric else errors
            into.setdefault(task, {})[bare if kind == "none" else f"{bare} ({kind})"] = float(value)
    examples = {task: count["effective"] for task, count in found["n-samples"].items()}
    return TaskScores(scores, errors, examples, dict(found["n-shot"]), version)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval warns that a model in memory is no name, which is what is meant here; its errors stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """lm_eval seeds the generators of Python, numpy and torch; the caller's states come back."""
    mine, theirs = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(mine)
            np.random.set_state(theirs)
