"""History: what is appended is read back, whatever a kill, a full disk or a resume does in between."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest

from kd_kit.history import History, verdict

KD = {"unit": "nats/token", "healthy": [0.1, 3.0], "impossible_below": 0.0, "impossible_above": 10.0}


def train(step: int, value: float | None = 1.5, **more: object) -> dict:
    term = {"value": value, "weight": 0.5, "contribution": None if value is None else value / 2, "count": 64}
    fields = {"kind": "train", "step": step, "total": 1.0, "terms": {"kd": term}, "lr": {"student": 1e-4}}
    return {**fields, **more}


def run(total_steps: int = 100) -> dict:
    return {"kind": "run", "run_id": "demo", "total_steps": total_steps, "terms": {"kd": KD}}


def filled(path: Path | None = None) -> History:
    history = History(path)
    history.append(run())
    history.append({"kind": "reference", "name": "teacher", "bits_per_byte": 1.85})
    for step in (10, 20, 30):
        history.append(train(step, value=3.0 / step))
        history.append({"kind": "eval", "step": step, "bits_per_byte": 4.0 - step / 30, "seconds": 1.0})
        history.append({"kind": "event", "step": step, "what": "saved", "text": f"step {step}"})
    return history


def test_reads_back_what_it_wrote(tmp_path):
    written = filled(tmp_path / "run" / "metrics.jsonl")
    read = History.load(tmp_path / "run" / "metrics.jsonl")
    assert read.records == written.records
    assert read.series("kd") == ([10, 20, 30], [0.3, 0.15, 0.1])
    assert read.series("kd", "weight") == ([10, 20, 30], [0.5, 0.5, 0.5])
    assert read.column("total") == ([10, 20, 30], [1.0, 1.0, 1.0])
    assert read.column("lr", "student") == ([10, 20, 30], [1e-4, 1e-4, 1e-4])
    assert read.evaluations()[0] == [10, 20, 30]
    assert read.references() == {"teacher": 1.85}
    assert read.terms == {"kd": KD}
    assert (read.run_id, read.total_steps, read.groups, len(read)) == ("demo", 100, ["student"], 11)
    assert [e["text"] for e in read.events] == ["step 10", "step 20", "step 30"]
    assert read.last("train")["step"] == 30


def test_every_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    for count, step in enumerate((1, 2, 3), 1):
        history.append(train(step))
        assert len(path.read_text().splitlines()) == count


def test_values_that_json_has_no_word_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.append(train(1, math.nan, grad_norm=math.inf, total=-math.inf))
    history.append({"kind": "event", "step": 1, "what": "alarm", "text": "nan"})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    read = History.load(path)
    assert math.isnan(read.series("kd")[1][0])
    assert read.column("grad_norm") == ([1], [math.inf])
    assert read.column("total") == ([1], [-math.inf])
    assert read.events[0]["text"] == "nan"


def test_numbers_of_other_libraries_become_plain():
    np = pytest.importorskip("numpy")
    history = History()
    history.append({"kind": "eval", "step": np.int64(3), "bits_per_byte": np.float32(2.5)})
    assert history.evaluations() == ([3], [2.5])
    assert type(history.evaluations()[1][0]) is float


def test_later_changes_of_the_callers_dict_do_not_reach_the_history():
    history, record = History(), train(1)
    history.append(record)
    record["terms"]["kd"]["value"] = 99.0
    assert history.series("kd") == ([1], [1.5])


@pytest.mark.parametrize("torn", [b'{"kind":"tra', b"\x00\x00\x00", b'{"kind":"eval","step":"\xe2\x82', b"\n\x00\n"])
def test_a_torn_last_line_is_ignored_and_removed_by_the_next_write(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    before = filled(path).records
    with path.open("ab") as file:
        file.write(torn)
    content = path.read_bytes()
    read = History.load(path)
    assert read.records == before
    assert path.read_bytes() == content  # reading changes nothing: the folder may be read-only
    read.append(train(40))
    assert [r["step"] for r in History.load(path).rows()] == [10, 20, 30, 40]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path)
    path.write_bytes(path.read_bytes()[:-1])
    read = History.load(path)
    assert len(read) == 11
    read.append(train(40))
    assert len(History.load(path)) == 12


def test_every_cut_of_the_file_reads(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert content[:end].count(b"\n") <= len(History.load(path)) <= content[:end].count(b"\n") + 1


def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], b"{broken\n", *lines[4:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 5"):
        History.load(path)
    path.write_bytes(b"".join([*lines[:2], b'{"kind":"gossip"}\n', *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3: expected a kind"):
        History.load(path)


def test_an_existing_file_is_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    filled(path)
    again = History(path)
    again.append(train(40))
    assert [r["step"] for r in History.load(path).rows()] == [10, 20, 30, 40]
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        History.load(tmp_path / "nowhere")


def test_rewind_forgets_what_came_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = filled(path)
    assert history.rewind(20) == 3
    for h in (history, History.load(path)):
        assert h.series("kd")[0] == [10, 20]
        assert h.evaluations()[0] == [10, 20]
        assert [e["step"] for e in h.events] == [10, 20]
        assert h.references() == {"teacher": 1.85}
        assert h.run_id == "demo"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    history.append(train(21))
    assert History.load(path).series("kd")[0] == [10, 20, 21]
    assert history.rewind(1000) == 0
    assert filled().rewind(0) == 9


def test_a_kill_during_rewind_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    history = filled(path)
    content = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        history.rewind(10)
    assert path.read_bytes() == content


def test_a_full_disk_warns_once_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    history = filled(path)
    with monkeypatch.context() as full:

        def no_space(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(Path, "open", no_space)
        with pytest.warns(UserWarning, match="No space left"):
            history.append(train(40))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history.append(train(50))
        assert "NOT ON DISK" in repr(history)
    assert len(History.load(path)) == 11
    history.append(train(60))
    assert History.load(path).records == history.records
    assert history.write_error is None


def test_steps_that_were_done_twice_count_once():
    history = History()
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0)):
        history.append(train(step, value))
    assert history.series("kd") == ([1, 2, 3], [1.0, 20.0, 3.0])


def test_absent_values_are_left_out_and_undeclared_terms_are_listed():
    history = History()
    for step, value in ((1, 1.0), (2, None), (3, math.nan)):
        history.append(train(step, value))
    steps, values = history.series("kd")
    assert steps == [1, 3]
    assert math.isnan(values[1])
    assert history.series("kd", "count") == ([1, 2, 3], [64, 64, 64])
    assert history.series("never") == ([], [])
    assert history.terms == {"kd": {}}


def test_rows_are_flat():
    row = filled().rows()[0]
    assert row["kd.value"] == 0.3
    assert row["lr.student"] == 1e-4
    assert row["step"] == 10
    assert not any(isinstance(value, dict) for value in row.values())
    assert filled().rows("eval")[0] == {"step": 10, "bits_per_byte": 4.0 - 10 / 30, "seconds": 1.0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "gossip"}, "expected a kind out of run, train, eval, reference, event, got 'gossip'"),
        ({"step": 1}, "got None"),
        ([1], "expected a dict"),
        ({"kind": "eval", "step": 1}, "got none of bits_per_byte"),
        ({"kind": "eval", "step": 1.5, "bits_per_byte": 2.0}, "whole number"),
        ({"kind": "eval", "step": 1, "bits_per_byte": object()}, "got object"),
        ({"kind": "train", "step": 1, "total": 1.0, "terms": {"kd": 1.0}}, "expected terms"),
        ({"kind": "train", "step": 1, "total": 1.0, "terms": [1]}, "expected terms"),
    ],
)
def test_what_is_refused_leaves_no_trace(tmp_path, record, message):
    history = History(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=message):
        history.append(record)
    assert len(history) == 0
    assert not history.path.exists()
    with pytest.raises(ValueError, match="expected a kind"):
        history.last("gossip")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (1.0, "healthy"),
        (0.1, "healthy"),
        (3.0, "healthy"),
        (0.05, "low"),
        (0.0, "low"),
        (-1e-8, "low"),  # rounding of a divergence that is zero
        (-0.01, "impossible"),
        (9.0, "high"),
        (34.0, "impossible"),
        (math.nan, "impossible"),
        (math.inf, "impossible"),
        (None, "absent"),
    ],
)
def test_verdicts(value, word):
    assert verdict(KD, value) == word


def test_verdict_of_a_term_without_ranges():
    assert verdict({}, 1e9) == verdict(None, -5.0) == "healthy"
    assert verdict({}, math.nan) == "impossible"
    limited = {"healthy": [0.0, 0.5], "impossible_below": 0.0, "impossible_above": None}
    assert verdict(limited, -1e-8) == "healthy"
    assert verdict(limited, 1e9) == "high"


def test_repr_says_where_the_run_is(tmp_path):
    assert repr(History()) == "History(no steps yet)"
    text = repr(filled(tmp_path / "metrics.jsonl"))
    assert "step 30 of 100" in text
    assert "3.000 bits per byte at step 30" in text
    assert "metrics.jsonl" in text
