"""The shell verbs."""

from __future__ import annotations

import json

import pytest

from kd_kit.__main__ import main
from kd_kit.demo import table
from kd_kit.notebook_run import run_notebook


def test_demo_measures_paired_seeds(tmp_path, capsys, monkeypatch):
    from kd_kit import demo, offline

    small = {part: offline.corpus(part)[:3] for part in ("student", "held_out")}
    monkeypatch.setattr(demo.offline, "corpus", small.__getitem__)
    out = tmp_path / "figures" / "demo.json"
    arguments = ["demo", "--seeds", "2", "--steps", "3", "--folder", str(tmp_path / "runs"), "--out", str(out)]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["recipe"]["steps"] == 3
    rows = result["bits_per_byte"]
    assert [r["LM-only control"] - r["distilled"] for r in rows] == pytest.approx(result["gain"])
    assert rows[0]["before"] != rows[1]["before"], "the two seeds started from the same student"
    assert rows[0]["teacher"] == rows[1]["teacher"]
    assert "+-" in capsys.readouterr().out


def test_table_names_every_seed():
    row = {"before": 4.0, "LM-only control": 3.0, "distilled": 2.5, "teacher": 2.0}
    text = table(
        {"bits_per_byte": [row], "gain": [0.5], "mean_gain": 0.5, "standard_error": None, "held_out_bytes": 10}
    )
    assert text.splitlines()[-1].startswith("distilled is 0.5000 bits per byte below")


def test_a_failure_is_a_sentence_and_an_exit_status(capsys, tmp_path):
    assert main(["demo", "--seeds", "0"]) == 1
    assert "at least one seed" in capsys.readouterr().err
    assert main(["notebook", str(tmp_path / "none.ipynb"), "--out", str(tmp_path / "x")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_failing_cell_stops_the_notebook_and_keeps_what_ran(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    path = tmp_path / "fails.ipynb"
    cells = [new_code_cell("print('first')"), new_code_cell("1 / 0"), new_code_cell("print('never')")]
    nbformat.write(new_notebook(cells=cells), path)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_notebook(path, tmp_path / "out")
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert done.cells[0].outputs[0]["text"] == "first\n"
    assert done.cells[2].outputs == []
