"""Every kernel as Kaggle runs it: pushed by the real client, taken out of the request, executed, and looked at."""

from __future__ import annotations

import json
import re

import pytest
from kernels import CASES, PICTURES, output_listing
from machine import Ran, text_of
from page import open_page

from kd_kit.kaggle_place import MOST_FILES
from kd_kit.kernel_metadata import METADATA

KERNELS = tuple(CASES)
FIELDS = {
    "id": "slug",
    "title": "newTitle",
    "enable_gpu": "enableGpu",
    "enable_internet": "enableInternet",
    "is_private": "isPrivate",
    "kernel_type": "kernelType",
    "dataset_sources": "datasetDataSources",
    "kernel_sources": "kernelDataSources",
}
"""Kaggle's names in the file and in the request."""


def errors(ran: Ran) -> list[str]:
    cells = [cell for cell in ran.notebook.cells if cell.cell_type == "code"]
    return [text_of(output) for cell in cells for output in cell.outputs if output.output_type == "error"]


def pictures(ran: Ran, piece: str) -> list[str]:
    return [o.data["image/png"] for o in ran.cell(piece).outputs if "image/png" in o.get("data", {})]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_server_gets_what_was_built(sent, kernel):
    pushed = sent(kernel)
    metadata = json.loads((pushed.folder / METADATA).read_text())
    built = json.loads((pushed.folder / metadata["code_file"]).read_text())
    received = json.loads(pushed.notebook)
    assert len(received["cells"]) == len(built["cells"])
    for ours, theirs in zip(built["cells"], received["cells"], strict=True):
        assert "".join(theirs["source"]) == "".join(ours["source"])
        assert theirs["metadata"] == ours["metadata"]
    for name, theirs in FIELDS.items():
        assert pushed.request.get(theirs) in (metadata[name], None if metadata[name] == [] else metadata[name]), name
    assert pushed.request.get("machineShape") == metadata.get("machine_shape")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_cell_runs_with_kaggles_versions_and_the_package_of_the_notebook(session, sent, kernel):
    ran = session(kernel)
    assert errors(ran) == []
    assert ran.code == 0
    code = [cell for cell in ran.notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    version = re.search(r"# kd_kit (\S+):", sent(kernel).notebook)[1]
    installed = {path.name for path in ran.executed.parent.glob("env/lib/*/site-packages/kd_kit*")}
    assert installed == {"kd_kit", f"kd_kit-{version}.dist-info"}
    assert ran.changed == frozenset(), "the inputs are read only"
    for piece, words in CASES[kernel].says.items():
        assert words in ran.said(piece), piece


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_dashboard_leaves_one_picture_and_no_widgets(session, kernel):
    ran, case = session(kernel), CASES[kernel]
    for piece in case.dashboards:
        assert len(pictures(ran, piece)) == 1, piece
        assert "finished" in ran.said(piece), piece
    for piece in case.trains:
        assert pictures(ran, piece) == [], piece
    assert "widgets" not in ran.notebook.metadata
    kinds = {kind for c in ran.notebook.cells for o in c.get("outputs", ()) for kind in o.get("data", {})}
    assert not any("widget" in kind for kind in kinds)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_page_shows_figure_and_table_without_javascript(session, kernel):
    ran, case = session(kernel), CASES[kernel]
    table, words = case.table
    with open_page(ran.html) as page:
        for piece in case.dashboards:
            page.screenshot(PICTURES / kernel / f"{re.sub(r'[^a-z]+', '_', piece)}.png", piece)
            assert len(page.pictures(piece)) == 1, piece
        page.screenshot(PICTURES / kernel / "table.png", table)
        shown = page.text(table)
        for piece in case.says:
            page.screenshot(PICTURES / kernel / f"{re.sub(r'[^a-z]+', '_', piece)}.png", piece)
    for word in words:
        assert word in shown


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_output_holds_the_run_and_what_it_made_and_nothing_else(session, kernel):
    ran = session(kernel)
    assert {path.name for path in ran.working.iterdir()} == CASES[kernel].output
    files = output_listing(ran.working)
    assert len(files) < MOST_FILES / 2
    assert sum(files.values()) < 200e6
    strange = [name for name in files if re.search(r"(^|/)(\.|__)|\.pyc$|\.tmp|site-packages|\.lock$|\.ipynb$", name)]
    assert strange == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_log_stays_short(session, kernel):
    log = session(kernel).log
    assert len(log.splitlines()) < 500
    assert "\r" not in log
    assert not re.search(r"\d+%\|", log), "a progress bar that is printed again with every refresh"
