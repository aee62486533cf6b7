"""Kernels as Kaggle's client takes them: the notebook with the package inside, and its metadata."""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import json
import shutil
from pathlib import Path

import nbformat
import pytest

from kd_kit import kernel_build
from kd_kit.kernel_build import PAIR_SLUG, build, kernel_notebook, read_recipe
from kd_kit.kernel_metadata import METADATA, sent_text, validate
from kd_kit.offline import PAIR_FILE
from kd_kit.payload import build_pair

ROOT = Path(__file__).parent.parent
KERNELS = sorted(path.parent.name for path in (ROOT / "kaggle").glob("*/build.json"))


@pytest.fixture(scope="module", autouse=True)
def packed_once():
    """Packing takes a second; that it gives the same text for the same wheel is tested with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_build, "packed_cell", functools.cache(kernel_build.packed_cell))
        yield


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as it is now: an edit while the tests run would be another package."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("kd_kit", "kaggle", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, copy_function=shutil.copyfile)
    for name in ("setup.cfg", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    for kernel in KERNELS:
        build(kernel, "ada", out, root=clone)
    return out


def notebook_of(folder: Path):
    return nbformat.read(next(folder.glob("*.ipynb")), as_version=4)


def tagged(notebook, tag: str) -> list[int]:
    return [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]


def test_there_are_the_kernels_that_the_readme_names():
    assert KERNELS == ["debug-loss-magnitudes", "distill-p100", "distill-t4x2", "quickstart-cpu"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_what_the_client_takes(built, clone, kernel):
    folder = built / kernel
    assert sorted(path.name for path in folder.iterdir()) == sorted([METADATA, f"{kernel}.ipynb"])
    remarks = validate(folder)
    assert len(remarks) == (kernel == "distill-p100")
    notebook = notebook_of(folder)
    nbformat.validate(notebook)
    source = nbformat.read(clone / read_recipe(kernel, clone)["notebook"], as_version=4)
    assert notebook.cells[0] == source.cells[0], "the title stays the title"
    (package,) = tagged(notebook, "kd-kit-package")
    assert package == 1 and notebook.cells[1].metadata["jupyter"] == {"source_hidden": True}
    assert notebook.cells[1].metadata["_kg_hide-input"] is True
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    doctors = [i for i, cell in enumerate(notebook.cells) if "kd.doctor(" in cell.source]
    first = next(i for i, cell in enumerate(notebook.cells) if "import kd_kit" in cell.source)
    assert len(doctors) == 1 and package < first <= doctors[0]
    ours = {"kd-kit-package", "kd-kit-doctor", "injected-parameters"}
    kept = [(cell.cell_type, cell.source) for cell in notebook.cells if cell.id not in ours]
    assert kept == [(cell.cell_type, cell.source) for cell in source.cells]


def test_what_each_kernel_asks_kaggle_for(built):
    asked = {kernel: json.loads((built / kernel / METADATA).read_text()) for kernel in KERNELS}
    machines = {kernel: metadata.get("machine_shape") for kernel, metadata in asked.items()}
    assert machines == {
        "debug-loss-magnitudes": "NvidiaTeslaT4",
        "distill-p100": "NvidiaTeslaP100",
        "distill-t4x2": "NvidiaTeslaT4",
        "quickstart-cpu": None,
    }
    assert {kernel for kernel, metadata in asked.items() if metadata["enable_internet"]} == {
        "distill-p100",
        "distill-t4x2",
    }
    with_pair = {kernel for kernel, metadata in asked.items() if metadata["dataset_sources"] == [f"ada/{PAIR_SLUG}"]}
    assert with_pair == {"debug-loss-magnitudes", "quickstart-cpu"}
    assert all(metadata["is_private"] and metadata["id"] == f"ada/{kernel}" for kernel, metadata in asked.items())


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("distill-p100", {"ASKED_FOR": "P100"}),
        ("distill-t4x2", {"ASKED_FOR": "T4 x2"}),
    ],
)
def test_parameters_come_after_their_defaults(built, kernel, expected):
    notebook = notebook_of(built / kernel)
    (defaults,), (injected,) = tagged(notebook, "parameters"), tagged(notebook, "injected-parameters")
    assert injected == defaults + 1
    values = {}
    for node in ast.parse(notebook.cells[injected].source).body:
        values[node.targets[0].id] = ast.literal_eval(node.value)
    assert values == expected


def test_a_notebook_without_a_doctor_gets_one_that_knows_the_card(built):
    source = notebook_of(built / "debug-loss-magnitudes").cells[2].source
    assert source == "import kd_kit as kd\n\nkd.doctor(asked='T4 x2')"
    assert notebook_of(built / "quickstart-cpu").cells[2].source == "import kd_kit as kd\n\nkd.doctor()"


def test_the_pair_is_a_data_set_beside_the_kernels(built, clone):
    folder = built / PAIR_SLUG
    assert sorted(path.name for path in folder.iterdir()) == ["dataset-metadata.json", PAIR_FILE]
    assert (folder / PAIR_FILE).read_bytes() == build_pair(clone)
    about = json.loads((folder / "dataset-metadata.json").read_text())
    assert about["id"] == f"ada/{PAIR_SLUG}" and 6 <= len(about["title"]) <= 50 and len(about["licenses"]) == 1


def test_building_again_gives_the_same_bytes(built, clone, tmp_path):
    """Elsewhere, and over what was built before."""
    for out in (tmp_path, built):
        for kernel in ("distill-p100", "quickstart-cpu"):
            before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (built / kernel).iterdir()}
            folder = build(kernel, "ada", out, root=clone)
            assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()} == before


def test_parameters_and_sources_of_the_call(clone, tmp_path):
    folder = build(
        "distill-t4x2",
        "ada",
        tmp_path,
        {"HOURS": 2, "RUN": "mine", "ASKED_FOR": None, "OFFLINE_FALLBACK": True},
        [f"ada/{PAIR_SLUG}", "bob/texts/3"],
        ["ada/distill-p100"],
        ["qwen-lm/qwen-3/transformers/0.6b/1"],
        root=clone,
    )
    metadata = json.loads((folder / METADATA).read_text())
    assert metadata["dataset_sources"] == [f"ada/{PAIR_SLUG}", "bob/texts/3"]
    assert metadata["kernel_sources"] == ["ada/distill-p100", "ada/distill-t4x2"], "its own output, to go on from"
    assert metadata["model_sources"] == ["qwen-lm/qwen-3/transformers/0.6b/1"]
    assert (tmp_path / PAIR_SLUG / PAIR_FILE).is_file(), "a source names it"
    notebook = notebook_of(folder)
    source = notebook.cells[tagged(notebook, "injected-parameters")[0]].source
    assert source.splitlines()[1:] == [
        "ASKED_FOR = None",
        "HOURS = 2",
        "RUN = 'mine'",
        "OFFLINE_FALLBACK = True",
    ]


@pytest.mark.parametrize(("name", "value"), [("HOURS", 30), ("HOURS", 0), ("STEPS", -5), ("WINDOW", 0)])
def test_numbers_that_can_only_fail_later_are_refused(clone, tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"build: expected {name} above 0.* got {value}"):
        build("distill-p100", "ada", tmp_path, parameters={name: value}, root=clone)


def test_a_source_that_the_metadata_names_for_the_owner_may_be_given_again(clone, tmp_path):
    folder = build("quickstart-cpu", "ada", tmp_path, datasets=[f"ada/{PAIR_SLUG}"], root=clone)
    assert json.loads((folder / METADATA).read_text())["dataset_sources"] == [f"ada/{PAIR_SLUG}"]


def test_its_own_output_stays_a_source(clone, tmp_path):
    folder = build("quickstart-cpu", "ada", tmp_path, root=clone)
    metadata = json.loads((folder / METADATA).read_text())
    assert metadata["kernel_sources"] == []
    metadata["kernel_sources"] = ["ada/quickstart-cpu", "ada/passing-by"]
    (folder / METADATA).write_text(json.dumps(metadata))
    build("quickstart-cpu", "ada", tmp_path, root=clone)
    assert json.loads((folder / METADATA).read_text())["kernel_sources"] == ["ada/quickstart-cpu"]
    build("quickstart-cpu", "bob", tmp_path, root=clone)
    assert json.loads((folder / METADATA).read_text())["kernel_sources"] == [], "that was another account's"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("distil", "ada"), r"build: expected one of debug-loss-magnitudes, .*, got 'distil'"),
        (("quickstart-cpu", "OWNER"), r"id: expected a Kaggle account, got the placeholder 'OWNER'"),
        (("quickstart-cpu", "a/b"), r"id: expected 'owner/slug', got 'a/b/quickstart-cpu'"),
        (("distill-p100", "ada", None, {"HOUR": 3}), r"build: expected a parameter of .*\(TEACHER, .*\), got 'HOUR'"),
        (
            ("distill-p100", "ada", None, {"CONTROL": "no"}),
            r"expected True or False for CONTROL of .* default is True, got 'no'",
        ),
        (
            ("distill-p100", "ada", None, {"STEPS": "many"}),
            r"expected a number for STEPS of .* default is \d+, got 'many'",
        ),
        (("quickstart-cpu", "ada", None, {}, ["texts"]), r"dataset_sources: expected 'owner/slug' .* got 'texts'"),
    ],
)
def test_what_cannot_be_built_is_a_sentence_and_leaves_nothing(clone, tmp_path, arguments, message):
    kernel, owner, _, *more = *arguments, *[None] * (3 - len(arguments))
    with pytest.raises(ValueError, match=message):
        build(kernel, owner, tmp_path / "out", *more, root=clone)
    assert not (tmp_path / "out").exists()


def test_a_kernel_with_a_notebook_that_is_too_large_is_refused(clone, tmp_path):
    path = clone / "notebooks" / "large.ipynb"
    notebook = json.loads((clone / "notebooks" / "01_quickstart.ipynb").read_text())
    notebook["cells"].append({"cell_type": "markdown", "id": "large", "metadata": {}, "source": ["é" * 150_000]})
    path.write_text(json.dumps(notebook))
    own = clone / "kaggle" / "large-notebook"
    own.mkdir()
    metadata = json.loads((clone / "kaggle" / "quickstart-cpu" / METADATA).read_text())
    metadata |= {"id": "OWNER/large-notebook", "title": "Large notebook", "code_file": "large-notebook.ipynb"}
    (own / METADATA).write_text(json.dumps(metadata))
    (own / "build.json").write_text('{"notebook": "notebooks/large.ipynb"}')
    with pytest.raises(ValueError, match="code_file: expected at most 1,000,000 bytes of source, got 1,"):
        build("large-notebook", "ada", tmp_path / "out", root=clone)
    assert not (tmp_path / "out").exists()
    (own / METADATA).write_text(json.dumps(metadata | {"machine": "T4"}))
    with pytest.raises(ValueError, match="machine: expected a key that Kaggle knows"):
        build("large-notebook", "ada", tmp_path / "out", root=clone)
    (own / METADATA).write_text(json.dumps(metadata))
    (own / "build.json").write_text('{"notebook": "notebooks/none.ipynb"}')
    with pytest.raises(ValueError, match=r"expected the notebook 'notebooks/none\.ipynb' of 'large-notebook'"):
        build("large-notebook", "ada", tmp_path / "out", root=clone)


def test_parameters_need_a_cell_with_their_defaults():
    with pytest.raises(ValueError, match=r"expected a cell tagged 'parameters' in x\.ipynb for \['HOURS'\], got none"):
        kernel_notebook({"metadata": {}, "cells": []}, "install()", {"HOURS": 3}, asked=None, name="x.ipynb")


def cell(kind: str, source: str, **metadata) -> dict:
    return {"cell_type": kind, "metadata": metadata, "source": source} | ({"outputs": [1]} if kind == "code" else {})


def test_a_notebook_is_not_changed_and_needs_no_title():
    given = {"metadata": {"widgets": {}, "kernelspec": {}}, "cells": [cell("code", "kd.doctor()"), cell("raw", "x")]}
    before = copy.deepcopy(given)
    made = kernel_notebook(given, "install()", {}, asked="P100", name="x.ipynb")
    assert given == before
    assert [c["source"] for c in made["cells"]] == [["install()"], "kd.doctor()", "x"]
    assert made["metadata"] == {"kernelspec": {}} and made["cells"][1]["outputs"] == []


@pytest.mark.parametrize(
    ("defaults", "value", "passes"),
    [
        ("X = 1.0", 2, True),
        ("X = 1", 2.5, True),
        ("X = 1", True, False),
        ("X = True", 1, False),
        ("X = True", None, True),
        ("X = None", "a", True),
        ("X = 'a'", ["a", "b"], True),
        ("X: float = 3.0", 1.5, True),
        ("X = 2 * 3", "a", True),
        ("Y = 1", 1, False),
    ],
)
def test_a_parameter_is_like_its_default(defaults, value, passes):
    given = {"metadata": {}, "cells": [cell("code", f"{defaults}  # why", tags=["parameters"])]}
    if passes:
        made = kernel_notebook(given, "p", {"X": value}, asked=None, name="n")
        assert made["cells"][-1]["source"][-1] == f"X = {value!r}"
    else:
        with pytest.raises(ValueError, match="build: expected"):
            kernel_notebook(given, "p", {"X": value}, asked=None, name="n")


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_sent_is_far_below_the_limit(built, kernel):
    assert len(sent_text((built / kernel / f"{kernel}.ipynb").read_text())) < 600_000
