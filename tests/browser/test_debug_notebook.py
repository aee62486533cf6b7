"""The notebook on loss magnitudes as a person uses it: sliders, menus and buttons, in JupyterLab and a browser."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from lab import open_lab

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_debug_loss_magnitudes.ipynb"
PROBE, DASHBOARD, TRAINS = "kd.build_probe(healthy)", "kd.build_dashboard(sick)", "sick.fit(background=True)"


@pytest.fixture(scope="module")
def lab():
    with open_lab(width=1300, height=1000) as opened:
        yield opened


@pytest.fixture(scope="module")
def notebook_file(tmp_path_factory):
    """The notebook up to the run in the background, which here goes on until somebody stops it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    first = sources.index(next(s for s in sources if s.startswith("## 2. Faults in a loss")))
    last = sources.index(next(s for s in sources if s.startswith("## 4. In a run")))
    end = sources.index(next(s for s in sources if TRAINS in s))
    summed = [cell for cell in notebook.cells[first:last] if "summed_attention" in cell.source]
    names = [cell for cell in notebook.cells[first:last] if "student_layer, teacher_layer = " in cell.source]
    kept = [*notebook.cells[:first], *names, *summed, *notebook.cells[last : end + 1]]
    for cell in kept:
        cell.source = cell.source.replace("steps=60, eval_every=20", "steps=100_000, eval_every=100_000")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert sum("100_000" in cell.source for cell in kept) == 1
    notebook.cells = kept
    path = tmp_path_factory.mktemp("debug") / "debug.ipynb"
    nbformat.write(notebook, path)
    return path
