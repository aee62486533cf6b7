"""A kernel that Kaggle can run, from its folder in ``kaggle/`` and a notebook: the notebook with the package inside."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_kit.kernel_metadata import (
    METADATA,
    PLACEHOLDER,
    kernel_metadata,
    problems,
    read_metadata,
    refuse,
    text_problems,
)
from kd_kit.offline import PAIR_FILE
from kd_kit.payload import build_pair, build_wheel, packed_cell

OUT = Path("build/kaggle")
PAIR_SLUG = "kd-kit-embedded-pair"
DATASET_METADATA = "dataset-metadata.json"
RECIPE = "build.json"
ROOT = Path(__file__).resolve().parent.parent

# What `doctor` calls the machines that Kaggle has.
ASKED = {"NvidiaTeslaP100": "P100", "NvidiaTeslaT4": "T4 x2"}


def build(
    kernel: str,
    owner: str,
    out: str | Path = OUT,
    parameters: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    kernels: Sequence[str] = (),
    models: Sequence[str] = (),
    *,
    root: str | Path = ROOT,
) -> Path:
    """The folder that ``kaggle kernels push -p`` takes: ``OUT/KERNEL`` with metadata and notebook.

    The notebook is the one that ``kaggle/KERNEL/build.json`` names, without outputs, and with a collapsed cell after
    its title that installs this very package. The same files and arguments give the same bytes (on machines with the
    same release of liblzma). A kernel whose ``build.json`` says ``resume`` has its own output as a source, so that
    building and pushing again goes on with a run; so has one that :func:`~kd_kit.kernel_push.resume` was called for.

    Args:
        kernel: a folder of ``kaggle/``.
        owner: the Kaggle account that it is for.
        out: where built kernels lie, and beside them the data set of the embedded pair if a source names it.
        parameters: values for names of the notebook's cell tagged ``parameters``, over those of ``build.json``.
        datasets, kernels, models: further sources, ``"owner/slug"``, and for models with five parts.
        root: a clone of the project.

    Returns:
        the built folder.

    Raises:
        ValueError: there is no such kernel, notebook or parameter, or Kaggle would not take the result.
    """
    root, out = Path(root), Path(out)
    recipe = read_recipe(kernel, root)
    asked = read_metadata(root / "kaggle" / kernel)
    refuse(asked, [problem for problem in problems(asked) if PLACEHOLDER not in problem])
    folder, slug = out / kernel, asked.pop("id").split("/")[1]
    attached = {
        "dataset_sources": datasets,
        "kernel_sources": [*kernels, *_own(folder, f"{owner}/{slug}", recipe)],
        "model_sources": models,
    }
    for key, more in attached.items():
        every = (source.replace(f"{PLACEHOLDER}/", f"{owner}/", 1) for source in (*asked.get(key, []), *more))
        asked[key] = list(dict.fromkeys(every))
    metadata = kernel_metadata(owner, slug, **asked)

    path = root / recipe["notebook"]
    if not path.is_file():
        raise ValueError(f"build: expected the notebook {recipe['notebook']!r} of {kernel!r}, which does not exist")
    values = {**recipe.get("parameters", {}), **(parameters or {})}
    notebook = kernel_notebook(
        json.loads(path.read_text(encoding="utf-8")),
        packed_cell(build_wheel(root)),
        values,
        asked=ASKED.get(asked.get("machine_shape", "")),
        name=recipe["notebook"],
    )
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    refuse(metadata, problems(metadata) + text_problems(metadata, text))
    if f"{owner}/{PAIR_SLUG}" in metadata["dataset_sources"]:
        _write_pair(out / PAIR_SLUG, owner, build_pair(root))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / metadata["code_file"]).write_text(text, encoding="utf-8")
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def read_recipe(kernel: str, root: Path = ROOT) -> dict[str, Any]:
    """``kaggle/KERNEL/build.json``: ``notebook``, ``parameters``, and ``resume``, whether pushing again goes on.

    Raises:
        ValueError: there is no such kernel.
    """
    path = root / "kaggle" / kernel / RECIPE
    if not path.is_file():
        known = sorted(path.parent.name for path in (root / "kaggle").glob(f"*/{RECIPE}"))
        there = f"one of {', '.join(known)}" if known else f"a clone of the project, with kaggle/*/{RECIPE}"
        raise ValueError(f"build: expected {there}, got {kernel!r} in {str(root)!r}; name a kernel of a clone")
    return json.loads(path.read_text(encoding="utf-8"))


def kernel_notebook(
    notebook: Mapping[str, Any], package: str, parameters: Mapping[str, Any], *, asked: str | None, name: str
) -> dict[str, Any]:
    """A notebook for Kaggle: without outputs, with the package after its title and parameters after their defaults.

    Args:
        notebook: its JSON; it is not changed.
        package: the source of the cell that installs the package.
        asked: the card to tell ``kd.doctor`` about, in a notebook that does not call it itself.
        name: for messages.

    Raises:
        ValueError: a parameter has no default in the cell tagged ``parameters``, or one of another kind.
    """
    notebook = copy.deepcopy(dict(notebook))
    notebook["metadata"] = {k: v for k, v in notebook["metadata"].items() if k in ("kernelspec", "language_info")}
    for cell in notebook["cells"]:
        cell["metadata"].pop("execution", None)
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    cells = notebook["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

    if parameters:
        tagged = [i for i, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", [])]
        if not tagged:
            raise ValueError(
                f"build: expected a cell tagged 'parameters' in {name} for {sorted(parameters)}, got none; tag the one "
                "with the defaults"
            )
        _check_parameters("".join(cells[tagged[0]]["source"]), parameters, name)
        lines = [f"{key} = {value!r}" for key, value in parameters.items()]
        source = "\n".join(["# In place of the defaults above: parameters of this kernel", *lines])
        cells.insert(tagged[0] + 1, _cell("injected-parameters", source, tags=["injected-parameters"]))

    top = [_cell("kd-kit-package", package, tags=["kd-kit-package"], hidden=True)]
    if not any(re.search(r"\bdoctor\(", source) for source in code):
        call = "kd.doctor()" if asked is None else f"kd.doctor(asked={asked!r})"
        top.append(_cell("kd-kit-doctor", f"import kd_kit as kd\n\n{call}"))
    first = 1 if cells and cells[0]["cell_type"] == "markdown" else 0
    cells[first:first] = top
    return notebook


def _cell(name: str, source: str, *, tags: Sequence[str] = (), hidden: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}} if hidden else {}
    if tags:
        metadata["tags"] = list(tags)
    cell = {"cell_type": "code", "execution_count": None, "id": name, "metadata": metadata, "outputs": []}
    return cell | {"source": source.splitlines(keepends=True)}


def _check_parameters(defaults: str, parameters: Mapping[str, Any], name: str) -> None:
    """That every parameter has a default, and of the same kind where that is a number or a truth value."""
    known = {}
    for node in ast.parse(defaults).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for target in targets:
            if isinstance(target, ast.Name):
                known[target.id] = node.value
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"build: expected a parameter of {name} ({', '.join(known)}), got {key!r}; choose one")
        try:
            default = ast.literal_eval(known[key])
        except (ValueError, TypeError):
            continue  # an expression: its kind is known when it runs
        if key == "HOURS" and isinstance(value, int | float) and not 0 < value < 12:
            raise ValueError(
                f"build: expected HOURS above 0 and below 12, when Kaggle kills a session and its output is lost, got "
                f"{value!r}; 11 leaves time to save"
            )
        if _positive(default) and not _positive(value) and not isinstance(value, bool | str | None):
            raise ValueError(f"build: expected {key} above 0, got {value!r}; its default is {default!r}")
        kind = (
            "True or False" if isinstance(default, bool) else "a number" if isinstance(default, int | float) else None
        )
        if kind is None or value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(
                f"build: expected {kind} for {key} of {name}, whose default is {default!r}, got {value!r}; correct it"
            )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _own(folder: Path, name: str, recipe: Mapping[str, Any]) -> list[str]:
    """The kernel's own address, where a next version is to find the output of the last one.

    From the first build on: whether there is an output yet, this machine cannot know. Without one Kaggle's client says
    that the source is not valid, and pushes all the same.
    """
    if recipe.get("resume"):
        return [name]
    if not (folder / METADATA).is_file():
        return []
    before = read_metadata(folder)
    return [name] if before.get("id") == name and name in before.get("kernel_sources", []) else []


def _write_pair(folder: Path, owner: str, data: bytes) -> None:
    """The data set of the embedded pair, as ``kaggle datasets create -p`` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAIR_FILE).write_bytes(data)
    about = {
        "title": "kd_kit embedded pair",
        "id": f"{owner}/{PAIR_SLUG}",
        "licenses": [{"name": "other"}],
        "description": "A tiny teacher, a tiny student and six novels for kd_kit's notebooks; a zip under another "
        "name, since it is read as one file. Models and tokenizers: Apache-2.0. Texts: public domain. PROVENANCE.md "
        "in it says where each file comes from.",
    }
    (folder / DATASET_METADATA).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
