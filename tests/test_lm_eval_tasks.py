"""kd_kit/lm_eval_tasks.py: a local task through lm_eval itself, against log-likelihoods by hand."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pair, teacher, tiny_student

from kd_kit.lm_eval_tasks import TaskScores, _scores, evaluate_tasks

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is an extra")
# of the libraries that lm_eval brings
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")

EXAMPLES = [
    {"text": "Anne had been", "choices": [" very happy", " zxq vkj"], "label": 0},
    {"text": "It was a truth", "choices": [" qqq zz", " that he was"], "label": 1},
    {"text": "She was not", "choices": [" at all", " in the least"], "label": 1},
    {"text": "They came to", "choices": [" the house", " xx#kk"], "label": 1},
]


def task_file(folder: Path, name: str = "austen_words") -> Path:
    """A multiple-choice task and its examples."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(map(json.dumps, EXAMPLES)))
    path = folder / f"{name}.yaml"
    path.write_text(
        f"""task: {name}  # a comment
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
    )
    return path


def by_hand(model, tokenizer, examples) -> float:
    """Share of the examples whose right choice is the more likely one."""
    right = 0
    for example in examples:
        found = []
        for choice in example["choices"]:
            before = tokenizer(example["text"])["input_ids"]
            ids = torch.tensor([tokenizer(example["text"] + choice)["input_ids"]])
            with torch.no_grad():
                rows = model(input_ids=ids).logits[0].log_softmax(-1)
            found.append(sum(float(rows[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1])))
        right += int(np.argmax(found)) == example["label"]
    return right / len(examples)


@needs_lm_eval
@quiet
def test_a_local_task_is_scored_as_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = task_file(tmp_path)
    student = tiny_student()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for model, tokenizer in ((teacher(), pair().teacher), (student, pair().student)):
        mode = model.training
        found = evaluate_tasks(model, tokenizer, path, batch_size=2)
        assert found.scores == {"austen_words": {"acc": by_hand(model.eval(), tokenizer, EXAMPLES)}}
        assert found.examples == {"austen_words": 4}
        assert found.shots == {"austen_words": 0}
        assert found.errors["austen_words"]["acc"] >= 0
        model.train(mode)
        assert "austen_words" in repr(found)
    assert evaluate_tasks(student, pair().student, [path], limit=2).examples == {"austen_words": 2}
    assert student.training
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert "pretrained" not in capsys.readouterr().err


@needs_lm_eval
@quiet
def test_tasks_that_are_not_there_are_refused(tmp_path):
    known = task_file(tmp_path)
    with pytest.raises(ValueError, match=r"^evaluate_tasks: .* got 'hellaswagg'; the nearest names are: hellaswag"):
        evaluate_tasks(teacher(), pair().teacher, ["hellaswagg"])
    with pytest.raises(ValueError, match=r"^evaluate_tasks: .*'none.yaml', which does not exist"):
        evaluate_tasks(teacher(), pair().teacher, [known, "none.yaml"])
    (tmp_path / "other.yaml").write_text("dataset_path: json\n")
    with pytest.raises(ValueError, match=r"^evaluate_tasks: expected a task file with a line 'task: its_name'"):
        evaluate_tasks(teacher(), pair().teacher, tmp_path / "other.yaml")
    with pytest.raises(ValueError, match=r"^evaluate_tasks: expected one task or more, got none"):
        evaluate_tasks(teacher(), pair().teacher, [])
    with pytest.raises(ValueError, match=r"^evaluate_tasks: expected a limit of at least 1 example, got 0"):
        evaluate_tasks(teacher(), pair().teacher, known, limit=0)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("kd_kit.lm_eval_tasks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^evaluate_tasks: .* pip install 'kd_kit\[eval\]'"):
        evaluate_tasks(None, None, "hellaswag")


def test_scores_are_read_from_what_lm_eval_returns():
    found = {
        "results": {
            "one": {"alias": "one", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.1},
            "two": {"em,strict": 0.25, "em_stderr,strict": "N/A", "em,loose": 1},
        },
        "n-samples": {"one": {"original": 100, "effective": 9}, "two": {"original": 5, "effective": 5}},
        "n-shot": {"one": 3, "two": 0},
    }
    scores = _scores(found, "1.2.3")
    assert scores == TaskScores(
        {"one": {"acc": 0.5}, "two": {"em (strict)": 0.25, "em (loose)": 1.0}},
        {"one": {"acc": 0.1}},
        {"one": 9, "two": 5},
        {"one": 3, "two": 0},
        "1.2.3",
    )
    assert scores.table.rows[0] == ("one", "acc", "0.5000", "0.1000", "9", "3")
    assert scores.table.rows[1] == ("two", "em (strict)", "0.2500", "-", "5", "0")
    assert "lm_eval 1.2.3" in repr(scores)
    assert "<table" in scores._repr_html_()
