"""kd_kit/fault.py: the record of a step that went wrong, in print and on disk."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_trainer, small_data

import kd_kit.fault
from kd_kit import fault as faults
from kd_kit.fault import Fault, build_fault, faults_of, last_fault, read_fault, remember, write_fault
from kd_kit.fault_trace import ORDER, Trace, trace


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What one test's process remembers is nothing that the next one knows."""
    faults._LAST.clear()
    yield
    faults._LAST.clear()


def a_fault(step: int = 123, **changes) -> Fault:
    return Fault(
        **{
            "step": step,
            "kind": "not finite",
            "where": "student",
            "layer": "student.model.layers.3.mlp.down_proj",
            "dtype": "float16",
            "numbers": "12 +inf of 4,096",
            "windows": [17, 4],
            "rows": [3, 0],
            "texts": ["It is a truth <b>universally</b> acknowledged & known", "second\n\tone"],
            "positions": [246, 247],
            "learning_rate": 1e-3,
            "loss_scale": 65536.0,
            "precision": "fp16",
        }
        | changes
    )


def batches(count: int = 2) -> list:
    return list(small_data().batches(0, range(count)))


def assert_same_batches(one, other) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for f in dataclasses.fields(a):
            left, right = getattr(a, f.name), getattr(b, f.name)
            assert left.dtype == right.dtype
            assert torch.equal(left, right), f.name


# --- the record


def test_it_prints_what_where_the_text_and_what_to_try():
    said = repr(a_fault(folder=Path("run/faults/step-00000123")))
    first = "Step 123 was not taken: it was not finite, first in student.model.layers.3.mlp.down_proj (float16)"
    assert said.splitlines()[0] == first
    for part in (
        "12 +inf of 4,096, float16",
        "the student's forward pass",
        "2: 17, 4 (row 3, 0)",
        'window 17: "It is a truth <b>universally</b> acknowledged & known"',
        '"second\\n\\tone"',
        "learning rate 1e-3, loss scale 65,536, float16 autocast",
        "an overflow of float16, which ends at 65,504",
        'build_session(precision="bf16")',
        "fault.replay(trainer)",
    ):
        assert part in said, part
    assert max(map(len, said.splitlines())) <= 120


def test_its_html_escapes_texts_and_names():
    shown = a_fault(layer="student.<script>", note="<i>")._repr_html_()
    assert "It is a truth &lt;b&gt;universally&lt;/b&gt; acknowledged &amp; known" in shown
    assert "student.&lt;script&gt;" in shown
    assert "<script>" not in shown
    assert "<i>" not in shown


@pytest.mark.parametrize("kind", ["not finite", "spike", "out of memory", "loader"])
@pytest.mark.parametrize("where", ORDER)
def test_every_kind_and_place_prints_with_advice(kind, where):
    fault = Fault(step=5, kind=kind, where=where)
    assert fault.advice.causes
    assert fault.advice.cures
    assert fault.advice.cures[0].split("(")[0][:40] in " ".join(repr(fault).split())
    assert "5" in fault._repr_html_()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer": "student.model.layers.0.self_attn"}, "softmax"),
        ({"where": "term", "term": "own", "layer": None}, "division by zero"),
        ({"where": "term", "term": "part", "layer": "parts.part.guess"}, "trained part"),
        ({"where": "gradient", "layer": None, "term": "root"}, "torch.where"),
        ({"where": "gradient", "note": "only with the loss scale of 65,536: an overflow"}, "nothing, if it is rare"),
        ({"where": "gradient", "note": "every number is finite, and their norm is not"}, "explode"),
        ({"where": "weights", "layer": "teacher.model.norm.weight"}, "build_teacher"),
        ({"where": "weights", "layer": "student.model.norm.weight"}, "older checkpoint"),
        ({"where": "unknown", "layer": None}, "memory errors"),
        ({"where": "teacher", "layer": "teacher.model.layers.0.mlp"}, "bfloat16"),
    ],
)
def test_advice_follows_the_place(changes, word):
    advice = a_fault(**changes).advice
    assert word in " ".join([*advice.causes, *advice.cures])


@pytest.mark.parametrize("wrong", [{"kind": "bad luck"}, {"where": "somewhere"}])
def test_unknown_words_are_refused(wrong):
    with pytest.raises(ValueError, match="Fault: expected"):
        a_fault(**wrong)


@pytest.mark.parametrize("changes", [{}, {"loss_scale": math.inf, "learning_rate": None, "term": "kd", "layer": None}])
def test_json_and_back(changes):
    fault = a_fault(**changes)
    assert Fault.from_json(json.loads(json.dumps(fault.to_json(), allow_nan=False))) == fault


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "12"},
        {"windows": [1.5]},
        {"windows": 3},
        {"texts": [None]},
        {"note": None},
        {"kind": None},
        {"term": 5},
        {"learning_rate": "fast"},
        {"more": 1},
    ],
)
def test_damaged_json_is_refused(damage):
    with pytest.raises(ValueError, match="it is damaged"):
        Fault.from_json(a_fault().to_json() | damage)


# --- out of a run


def test_a_fault_of_a_run_knows_rows_and_texts(tmp_path):
    trainer = make_trainer(tmp_path)
    made = batches()
    found = trace(trainer, made, shares=trainer.shares_at(0))
    fault = build_fault(trainer, found, step=7, positions=[14, 15], learning_rate=0.01)
    windows = trainer.data.train
    assert fault.windows == found.windows
    assert fault.texts == [windows.text(i)[:300] for i in fault.windows]
    assert (fault.step, fault.kind, fault.where) == (7, "not finite", "unknown")
    assert fault.positions == [14, 15]
    assert fault.rows == [windows.report.kept[windows.table[i, 0]] for i in fault.windows]


def test_rows_are_those_of_the_texts_that_were_given(tmp_path):
    """Empty rows, rows held out, and rows that a tokenizer cannot read do not shift the numbers."""
    from helpers import pages, pair

    from kd_kit import build_data

    texts = pages(8)
    texts[1:1] = ["", "  "]
    data = build_data(texts, pair(), held_out=0.25, window=32, batch_size=2)
    trainer = make_trainer(tmp_path, data=data)
    every = list(range(len(data.train)))
    fault = build_fault(trainer, Trace("unknown", windows=every), step=0)
    assert len(fault.texts) == 32 < len(every)
    for row, text in zip(fault.rows, fault.texts, strict=False):
        assert " ".join(text.split())[:20] in " ".join(texts[row].split())


def test_long_texts_are_cut(tmp_path):
    trainer = make_trainer(tmp_path, data=small_data(window=400, size=3000))
    fault = build_fault(trainer, Trace("unknown", windows=[0]), step=0)
    assert len(fault.texts[0]) == 300
    assert fault.texts[0].endswith("…")


# --- on disk


def test_what_is_written_is_read_back(tmp_path):
    fault, made = a_fault(), batches()
    kept = write_fault(fault, made, tmp_path)
    assert kept == dataclasses.replace(fault, folder=tmp_path / "faults" / "step-00000123")
    again, read = read_fault(kept.folder)
    assert again == kept
    assert_same_batches(read, made)
    assert sorted(p.name for p in (tmp_path / "faults").iterdir()) == ["step-00000123"]
    names = sorted(p.name for p in kept.folder.iterdir())
    assert names == ["batch-0.safetensors", "batch-1.safetensors", "fault.json"]


def test_a_second_fault_of_a_step_has_a_folder_of_its_own(tmp_path):
    paths = [write_fault(a_fault(), batches(1), tmp_path).folder.name for _ in range(3)]
    assert paths == ["step-00000123", "step-00000123-2", "step-00000123-3"]
    assert [f.folder.name for f in faults_of(tmp_path)] == paths


def test_the_first_and_the_newest_are_kept_also_after_a_return_to_earlier_steps(tmp_path):
    steps = [*range(100, 120), *range(50, 60)]
    for step in steps:
        write_fault(a_fault(step), batches(1), tmp_path)
    expected = sorted([*steps[:5], *steps[-15:]])
    assert [f.step for f in faults_of(tmp_path)] == expected
    assert last_fault(tmp_path).step == 59


def test_faults_are_sorted_by_step_and_the_newest_is_the_last_written(tmp_path):
    for step in (30, 10, 20):
        write_fault(a_fault(step), batches(1), tmp_path)
    assert [f.step for f in faults_of(tmp_path)] == [10, 20, 30]
    assert last_fault(tmp_path).step == 20
    assert last_fault().step == 20


def test_large_faults_keep_the_batches_that_caused_them(tmp_path, monkeypatch):
    made = batches(4)
    size = sum(getattr(made[0], f.name).nbytes for f in dataclasses.fields(made[0]))
    monkeypatch.setattr(kd_kit.fault, "MOST_BYTES", int(2.2 * size))
    guilty = [int(made[3].sample[1])]
    kept = write_fault(a_fault(windows=guilty, rows=[0], texts=["t"]), made, tmp_path)
    assert "2 of 4 micro-batches are kept for replay" in kept.note
    assert_same_batches(read_fault(kept.folder)[1], [made[0], made[3]])


def test_a_disk_that_refuses_is_said_and_the_batch_stays_in_memory(tmp_path):
    (tmp_path / "faults").write_text("in the way")
    kept = write_fault(a_fault(), batches(), tmp_path)
    assert kept.folder is None
    assert kept.note.startswith("not kept on disk: ")
    assert last_fault() == kept
    assert faults_of(tmp_path) == []
    trainer = make_trainer(tmp_path / "run")
    assert len(kept.replay(trainer).rows) == 2 + 4


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kd_kit.fault, "save_file", full)
    kept = write_fault(a_fault(), batches(), tmp_path)
    assert kept.folder is None
    assert "No space left on device" in kept.note
    assert list((tmp_path / "faults").iterdir()) == []


DAMAGES = {
    "no json": lambda path: (path / "fault.json").unlink(),
    "half a json": lambda path: (path / "fault.json").write_text('{"format": 1, '),
    "a list": lambda path: (path / "fault.json").write_text("[]"),
    "another format": lambda path: (path / "fault.json").write_text('{"format": 99}'),
    "a large json": lambda path: (path / "fault.json").write_text(" " * (2**22 + 1)),
    "deep json": lambda path: (path / "fault.json").write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_fault_is_left_out_with_a_warning(tmp_path, damage):
    write_fault(a_fault(1), batches(1), tmp_path)
    broken = write_fault(a_fault(2), batches(1), tmp_path).folder
    DAMAGES[damage](broken)
    with pytest.raises(ValueError, match="read_fault: expected a fault in"):
        read_fault(broken)
    with pytest.warns(UserWarning, match="a fault cannot be read"):
        assert [f.step for f in faults_of(tmp_path)] == [1]
    with pytest.warns(UserWarning, match="a fault cannot be read"):
        assert write_fault(a_fault(3), batches(1), tmp_path).folder is not None


def test_a_damaged_batch_is_refused(tmp_path):
    path = write_fault(a_fault(), batches(), tmp_path).folder
    whole = (path / "batch-1.safetensors").read_bytes()
    (path / "batch-1.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"read_fault: expected a batch in .*batch-1"):
        read_fault(path)
    (path / "batch-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"read_fault: expected a batch in .*batch-1"):
        read_fault(path)


# --- the last one, and once more


def test_the_last_fault_of_the_process_and_of_a_run(tmp_path):
    assert last_fault() is None
    assert last_fault(tmp_path) is None
    trainer = make_trainer(tmp_path / "run")
    kept = write_fault(a_fault(), batches(), trainer.session.folder)
    remember(a_fault(9))
    assert last_fault().step == 9
    assert last_fault(trainer) == last_fault(str(tmp_path / "run")) == kept


def test_a_kept_fault_runs_again_with_its_windows_marked(tmp_path):
    trainer = make_trainer(tmp_path)
    made = batches()
    guilty = int(made[1].sample[0])
    fault = build_fault(trainer, Trace("student", windows=[guilty]), step=0)
    kept = write_fault(fault, made, tmp_path)
    faults._LAST.clear()  # another session
    seen = last_fault(tmp_path).replay(trainer)
    assert seen == kept.replay(trainer)
    assert [row.what for row in seen.rows if row.guilty] == [f"window {guilty}"]


def test_a_replay_without_batches_or_beside_a_running_loop_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="a fault whose batches were kept"):
        a_fault().replay(trainer)
    kept = write_fault(a_fault(), batches(), tmp_path)
    shutil.rmtree(kept.folder)
    with pytest.raises(ValueError, match="read_fault: expected a fault"):
        kept.replay(trainer)
    monkeypatch.setattr(type(trainer), "running", True)
    with pytest.raises(ValueError, match="trains in the background"):
        kept.replay(trainer)
