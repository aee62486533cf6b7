"""Every notebook runs top to bottom, shrunk by replacements that must each be found."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from kd_kit.demo import Recipe
from kd_kit.notebook_run import run_notebook

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def shrunk(name: str, folder: Path, replacements: dict[str, str]) -> Path:
    """A copy of a notebook without outputs, with every replacement made at least once."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    for old, new in replacements.items():
        assert any(old in c.source for c in code), f"{name} has no {old!r} to shrink"
        for cell in code:
            cell.source = cell.source.replace(old, new)
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    path = folder / name
    nbformat.write(notebook, path)
    return path


def outputs(notebook, kind: str) -> list:
    return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if kind in o.get("data", {})]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The executed quickstart, run twice on one run folder: to the end, and then again."""
    folder = tmp_path_factory.mktemp("quickstart")
    path = shrunk(
        "01_quickstart.ipynb",
        folder,
        {
            'corpus("student")': 'corpus("student")[:6]',
            'corpus("held_out")': 'corpus("held_out")[:2]',
            "window=256": "window=64",
            "steps=300": "steps=20",
            'kd.build_session("quickstart")': f'kd.build_session("quickstart", folder={str(folder)!r})',
        },
    )
    first = nbformat.read(run_notebook(path, folder / "first", timeout=300), as_version=4)
    second = nbformat.read(run_notebook(path, folder / "second", timeout=300), as_version=4)
    return folder, first, second


def test_quickstart_shows_one_picture_and_a_report(quickstart):
    _, notebook, _ = quickstart
    assert len(outputs(notebook, "image/png")) == 1
    tables = [o["data"]["text/html"] for o in outputs(notebook, "text/html")]
    assert any("LM-only control" in t and "bits per byte" in t for t in tables)
    assert "widgets" not in notebook.metadata


def test_quickstart_run_again_trains_nothing_twice(quickstart):
    folder, first, second = quickstart
    lines = (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "train"' in line or '"kind":"train"' in line for line in lines) == 20

    def report(notebook):
        return next(o["data"]["text/plain"] for o in outputs(notebook, "text/html") if "distilled" in str(o["data"]))

    assert report(first) == report(second)


def test_quickstart_wrote_html_and_an_export(quickstart):
    folder, _, _ = quickstart
    html = (folder / "first.html").read_text()
    assert "data:image/png;base64" in html
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (folder / "quickstart" / "export").iterdir()
    }


def test_quickstart_trains_the_recipe_that_is_measured():
    recipe = Recipe()
    source = "\n".join(
        c.source for c in nbformat.read(NOTEBOOKS / "01_quickstart.ipynb", as_version=4).cells if c.cell_type == "code"
    )
    rate = f"{recipe.learning_rate:.0e}".replace("e-0", "e-")
    assert f"window={recipe.window}, batch_size={recipe.batch_size}" in source
    assert f"steps={recipe.steps}, learning_rate={rate}" in source
    assert f"LearningRate(warmup={recipe.warmup:g})" in source
    assert f"kd.kd_term({recipe.kd_weight:g}" in source
    assert f"kd.lm_term({1 - recipe.kd_weight:.2g})" in source


def test_stored_notebooks_are_small_and_without_widget_state():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        assert path.stat().st_size < 1_000_000, path.name
        assert "widgets" not in notebook.metadata, path.name
        nbformat.validate(notebook)
