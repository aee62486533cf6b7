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
        cell.source = cell.source.replace("steps=STEPS, eval_every=20", "steps=100_000, eval_every=100_000")
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert sum("100_000" in cell.source for cell in kept) == 1
    notebook.cells = kept
    path = tmp_path_factory.mktemp("debug") / "debug.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def notebook(lab, notebook_file):
    """The notebook, run from its first cell to its last; the run of its last cell trains in the background."""
    with lab.open(notebook_file) as opened:
        opened.run_all(timeout=300)
        yield opened


def test_a_slider_changes_the_table_and_only_what_it_is_about(notebook):
    answer = notebook.output(PROBE)
    before = {name: row_of(answer, name) for name in ("lm", "kd")}
    table = notebook.watch(answer)
    readout = notebook.drag(notebook.slider("temperature"), to=0.9)
    assert float(readout) > 2
    table.changed()
    notebook.sees(answer, f"temperature 1 -> {float(readout):g}"[:16])
    after = {name: row_of(answer, name) for name in ("lm", "kd")}
    assert after["kd"] != before["kd"]
    assert after["lm"][:3] == before["lm"][:3], "the text's own loss has no temperature"
    notebook.screenshot("probe_temperature", answer)


def row_of(answer, name: str) -> list[str]:
    """The cells of a term's row in the probe's table."""
    rows = answer.locator("tr").all_inner_texts()
    return next(row.split("\t") for row in rows if row.split("\t")[0].rstrip("*").strip() == name)


def test_a_menu_changes_the_table(notebook):
    answer = notebook.output(PROBE)
    table = notebook.watch(answer)
    notebook.choose(notebook.dropdown("divergence"), "reverse_kl")
    table.changed()
    notebook.sees(answer, "reverse_kl")


def test_scales_and_back(notebook):
    answer = notebook.output(PROBE)
    notebook.click("As the run has it")
    notebook.sees(answer, "all settings as the run has them")
    notebook.click("Scales")
    notebook.sees(answer, "none of 4 terms scales", timeout=60)


def test_a_look_is_drawn(notebook):
    answer = notebook.output(PROBE)
    notebook.choose(notebook.dropdown("look"), "similarity")
    pictures = answer.locator("img")
    notebook.sees(answer, "looks")
    pictures.nth(1).wait_for(timeout=60_000)
    notebook.screenshot("look_similarity", answer)


def test_the_values_chosen_reach_the_run(notebook):
    answer = notebook.output(PROBE)
    notebook.drag(notebook.slider("kd"), to=0.25)
    notebook.sees(answer, "weight of kd 0.7 ->")
    notebook.click("Use these")
    notebook.sees(answer, "kd.weight 0.7 ->", timeout=60)


def test_the_run_in_the_background_is_paused_saved_and_stopped_by_buttons(notebook):
    dashboard = notebook.output(DASHBOARD)
    picture = dashboard.locator("img").first
    seen = notebook.watch(picture, "src")
    seen.changed(timeout=120)
    notebook.click("pause or go on")
    notebook.sees(dashboard, "rests: by request", timeout=60)
    notebook.screenshot("dashboard_paused", dashboard)
    notebook.click("evaluate now")
    notebook.sees(dashboard, "held-out bits per byte", timeout=120)
    notebook.click("save now")
    notebook.click("pause or go on")
    notebook.sees(dashboard, "rests: no longer", timeout=60)
    notebook.click("stop after this step")
    notebook.sees(dashboard, "stopped by request", timeout=60)
    seen = notebook.watch(picture, "src")
    seen.still(seconds=3, timeout=60)
    notebook.screenshot("dashboard_stopped", dashboard)


def test_nothing_went_wrong_in_the_page_and_nothing_was_asked_of_the_net(notebook):
    assert notebook.page_errors == []
    assert notebook.outside == []


def test_the_saved_file_shows_table_and_picture_without_widgets(notebook):
    saved = notebook.save()
    assert "widgets" not in saved.metadata or not saved.metadata.widgets
    probe = next(c for c in saved.cells if PROBE in c.source)
    kinds = {kind for output in probe.outputs for kind in output.get("data", {})}
    assert {"text/html", "application/vnd.jupyter.widget-view+json"} <= kinds
    dashboard = next(c for c in saved.cells if DASHBOARD in c.source)
    pictures = [o.data["image/png"] for o in dashboard.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert len(pictures[0]) < 300_000
