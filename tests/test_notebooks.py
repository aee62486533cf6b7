"""Every notebook runs top to bottom, shrunk by replacements that must each be found."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import nbformat
import pytest

import kd_kit as kd
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
            "CHAPTERS = None": "CHAPTERS = 6",
            "HELD_OUT = None": "HELD_OUT = 2",
            "WINDOW = 256": "WINDOW = 64",
            "STEPS = 300": "STEPS = 20",
            'kd.build_session("quickstart")': f'kd.build_session("quickstart", folder={str(folder)!r})',
        },
    )
    first = nbformat.read(run_notebook(path, folder / "first", timeout=300), as_version=4)
    second = nbformat.read(run_notebook(path, folder / "second", timeout=300), as_version=4)
    return folder, first, second


def test_quickstart_shows_the_plan_the_run_and_a_report(quickstart):
    _, notebook, _ = quickstart
    assert len(outputs(notebook, "image/png")) == 2
    tables = [o["data"]["text/html"] for o in outputs(notebook, "text/html")]
    assert any("LM-only control" in t and "bits per byte" in t for t in tables)
    assert "widgets" not in notebook.metadata


def test_quickstart_run_again_trains_nothing_twice(quickstart):
    folder, first, second = quickstart
    lines = (folder / "quickstart" / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "train"' in line or '"kind":"train"' in line for line in lines) == 20

    def report(notebook) -> list[str]:
        """The report without its last column, tokens/s, which no two measurements share."""
        text = next(o["data"]["text/plain"] for o in outputs(notebook, "text/html") if "distilled" in str(o["data"]))
        return [line.rsplit(None, 1)[0] for line in text.splitlines()]

    assert "bits per byte" in report(first)[0]
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
    for name, value in {"WINDOW": recipe.window, "STEPS": recipe.steps, "CHAPTERS": None, "HELD_OUT": None}.items():
        assert f"{name} = {value}" in source
    assert f"window=WINDOW, batch_size={recipe.batch_size}" in source
    assert f"steps=STEPS, learning_rate={rate}" in source
    assert f"LearningRate(warmup={recipe.warmup:g})" in source
    assert f"kd.kd_term({recipe.kd_weight:g}" in source
    assert f"kd.lm_term({1 - recipe.kd_weight:.2g})" in source


def test_stored_notebooks_are_small_and_without_widget_state():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        assert path.stat().st_size < 1_000_000, path.name
        assert "widgets" not in notebook.metadata, path.name
        nbformat.validate(notebook)


def test_the_drawing_of_how_it_works_names_every_term():
    script = runpy.run_path(str(NOTEBOOKS / "how_it_works.py"))
    drawn = [name for names in script["TERMS"] for name in names.split(", ")]
    assert sorted(drawn) == sorted(name.removesuffix("_term") for name in kd.__all__ if name.endswith("_term"))
    (ax,) = script["drawing"]().axes
    written = {text.get_text() for text in ax.texts}
    assert {"Teacher", "Bridge", "Student", "Terms", "Optimizer", "Cache", "Checkpoint", "␣visit", "␣vis"} <= written
    assert (NOTEBOOKS / "how_it_works.png").stat().st_size < 300_000


# --- 02: loss magnitudes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debug(tmp_path_factory):
    """The executed notebook on loss magnitudes, and what its cells printed or showed, by a piece of their source."""
    folder = tmp_path_factory.mktemp("debug")
    path = shrunk(
        "02_debug_loss_magnitudes.ipynb",
        folder,
        {
            "CHAPTERS = 12": "CHAPTERS = 6",
            "HELD_OUT = 3": "HELD_OUT = 1",
            "WINDOW = 128": "WINDOW = 64",
            "STEPS = 60": "STEPS = 24",
            "eval_every=20, eval_windows=16": "eval_every=12, eval_windows=4",
            "early.fit(steps=20)": "early.fit(steps=5)",
            'kd.build_session(f"debug-{name}")': f'kd.build_session(f"debug-{{name}}", folder={str(folder)!r})',
        },
    )
    notebook = nbformat.read(run_notebook(path, folder / "debug", timeout=300), as_version=4)

    def shown(piece: str) -> str:
        (cell,) = [c for c in notebook.cells if c.cell_type == "code" and piece in c.source]
        texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
        return "\n".join(texts)

    return notebook, shown


def rows_of(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.split() and line.split()[0] == name]


def test_a_healthy_run_has_no_faults(debug):
    _, shown = debug
    assert "0 failed" in shown("kd.run_preflight(healthy)")
    assert "-> none of 4 terms scales" in shown("probe.set(temperature=1.0")


@pytest.mark.parametrize(
    ("piece", "name", "said"),
    [
        ("class SquaredError", "squared", None),
        ("def summed_attention", "summed", "scales with length: normalise by tokens"),
        ("def kl_batchmean", "batchmean", "scales with length: normalise by tokens"),
        ("def without_square", "no_square", "its gradient falls with T^2: multiply by T*T"),
        ("def with_padding", "padded", "changes with padding: count batch.rows only"),
        ("def by_number", "by_number", None),
    ],
)
def test_every_fault_shows_its_sign_and_no_other_term_is_blamed(debug, piece, name, said):
    _, shown = debug
    magnitudes, scales = rows_of(shown(piece), name)
    assert scales.endswith(said or "ok")
    blamed = [
        line for line in shown(piece).splitlines() if "normalise" in line or "multiply" in line or "count" in line
    ]
    assert blamed == ([scales] if said else [])
    value, gradient, cosine = float(magnitudes.split()[1].replace(",", "")), *magnitudes.split()[-2:]
    if name in ("squared", "summed", "batchmean"):
        assert value > 50
        assert float(gradient) > 85
        assert " high " in magnitudes
    elif name == "no_square":
        assert " healthy " in magnitudes
        assert float(gradient) < 4
    elif name == "padded":
        assert float(cosine) > 0.9, "it looks right in the table"
    else:
        (right, _) = rows_of(shown(piece), "kd")
        assert float(cosine) < 0.15 < float(right.split()[-1])


def test_what_can_never_teach_is_refused(debug):
    _, shown = debug
    assert "expected at least half of the full factor 1 of 'feature' at 50% progress, got 0.067" in shown('"late"')
    refusals = shown('"lost"')
    assert "expected an lm_term with a weight above 0 beside the teacher's terms" in refusals
    assert "expected a weight above 0 for lm" in refusals
    assert "shares of the gradient that sum to 1" in refusals


def test_the_sick_run_names_the_loss_and_the_healthy_one_has_no_alarm(debug):
    notebook, shown = debug
    alarms = shown("for event in sick.history.events")
    assert "summed is " in alarms
    assert " times the top of its range" in alarms
    assert "summed has " in alarms
    assert "of the gradient: the other terms change next to nothing" in alarms
    assert not any(f"{name} " in alarms.replace("summed", "") for name in ("kd has", "feature has", "lm has"))
    (cell,) = [c for c in notebook.cells if "kd.build_dashboard(well)" in c.source]
    (picture,) = [o for o in cell.outputs if "image/png" in o.get("data", {})]
    assert "alarm" not in picture["data"]["text/plain"]


def test_one_set_of_weights_for_training_and_evaluation(debug):
    _, shown = debug
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", shown("final = early.shares_at"))]
    trained, same, other = numbers[:3]
    assert abs(same - trained) < 0.25 * trained < trained - other


def test_the_wrong_dtype_fails_before_the_run(debug):
    _, shown = debug
    found = shown("class Narrow")
    assert "mat1 and mat2 must have the same dtype" in found
    assert "1 failed" in found


def test_the_saved_file_is_small_and_needs_no_javascript(debug):
    notebook, _ = debug
    assert "widgets" not in notebook.metadata
    assert len(nbformat.writes(notebook)) < 1_000_000
    assert len(outputs(notebook, "image/png")) == 5


# --- 05: resume after a timeout --------------------------------------------------------------------------------------


TIMES = {"seconds", "tokens_per_second", "times_floor", "seconds_left", "seconds_to_finish"}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The executed notebook on sessions that end, and what the cell with a piece of source printed."""
    folder = tmp_path_factory.mktemp("resumed")
    path = shrunk(
        "05_resume_after_a_timeout.ipynb",
        folder,
        {
            "kd_runs/timeout": str(folder / "runs"),
            "SECONDS = 60": "SECONDS = 15",
            'corpus("student")': 'corpus("student")[:6]',
            'corpus("held_out")': 'corpus("held_out")[:1]',
            "window=128": "window=64",
            "save_minutes=0.1": "save_minutes=0.04",
        },
    )
    return nbformat.read(run_notebook(path, folder / "resumed", timeout=300), as_version=4)


@pytest.fixture(scope="module")
def stored_resumed():
    return nbformat.read(NOTEBOOKS / "05_resume_after_a_timeout.ipynb", as_version=4)


def printed(notebook, piece: str) -> str:
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and piece in c.source]
    return "".join(o.get("text", "") for o in cell.outputs)


@pytest.mark.parametrize("which", ["resumed", "stored_resumed"])
def test_a_run_that_is_stopped_killed_and_damaged_ends_as_if_nothing_had_happened(which, request):
    notebook = request.getfixturevalue(which)
    first, second = printed(notebook, "hours=SECONDS / 3600"), printed(notebook, "def late_enough")
    third = printed(notebook, "^= 1")
    assert "the session's time is over" in first
    assert "exit status 0" in first
    (stopped,) = re.findall(r"stopped at step (\d+)", first)
    assert f"resumed: from step-{stopped:0>8}" in second or stopped == "0"
    assert "-> killed" in second

    saved = re.findall(r"\d+", second.split("the checkpoints are of the steps")[1])
    assert f"step-{saved[-1]:0>8}  model.safetensors: expected sha256" in third
    assert f"resumed: from step-{saved[-2]:0>8}" in third
    assert "finished" in third

    groups = re.findall(r"(\w+) +(\d+) of +(\d+) tensors are equal", printed(notebook, "checkpoint.load_checkpoint"))
    assert [name for name, *_ in groups] == ["model", "aux", "optim", "rng"]
    assert all(equal == count != "0" for _, equal, count in groups)
    for line in printed(notebook, 'different("train")').splitlines():
        assert set(line.split("different: ")[1].split(", ")) <= TIMES
    assert len(outputs(notebook, "image/png")) == 1


@pytest.mark.parametrize("which", ["resumed", "stored_resumed"])
def test_a_run_is_found_at_its_mirror_after_its_folder_is_lost(which, request):
    notebook = request.getfixturevalue(which)
    assert "-> killed" in printed(notebook, "first_machine")
    second = printed(notebook, '"second_machine"')
    assert re.search(r"goes on from step [1-9]\d* of run \w+: .*, brought from .* \(mirror\)", second)
    assert "stopped at step 20: finished" in second


def test_the_stored_sessions_name_no_folder_of_the_machine_they_ran_on(stored_resumed):
    texts = [o.get("text", "") for c in stored_resumed.cells if c.cell_type == "code" for o in c.outputs]
    assert len("".join(texts)) > 2000
    assert not re.findall(r"(?<![\w.])/\w+/\w+", "".join(texts))


# --- 04: your own pair -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_pair(tmp_path_factory):
    """The folder and the executed notebook on a pair of one's own, with two short chapters as one's own text."""
    folder = tmp_path_factory.mktemp("own_pair")
    path = shrunk(
        "04_your_own_pair.ipynb",
        folder,
        {
            "own_text": str(folder / "text"),
            'corpus("student")[::5]': 'corpus("student")[:6]',
            'corpus("held_out")[:3]': 'corpus("held_out")[:1]',
            "WINDOW = 128": "WINDOW = 64",
            "STEPS = 200": "STEPS = 20",
            "EVAL_WINDOWS = 100": "EVAL_WINDOWS = 16",
            "kd.build_session(RUN)": f"kd.build_session(RUN, folder={str(folder)!r})",
        },
    )
    return folder, nbformat.read(run_notebook(path, folder / "own", timeout=300), as_version=4)


@pytest.fixture(scope="module")
def stored_own_pair():
    return None, nbformat.read(NOTEBOOKS / "04_your_own_pair.ipynb", as_version=4)


def result(notebook, piece: str) -> str:
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and piece in c.source]
    return "\n".join(o["data"]["text/plain"] for o in cell.outputs if o.output_type == "execute_result")


@pytest.mark.parametrize("which", ["own_pair", "stored_own_pair"])
def test_the_audit_chooses_the_method_and_the_cells_of_the_run(which, request):
    _, notebook = request.getfixturevalue(which)
    kept = {
        int(k): float(mass)
        for k, mass in re.findall(r"in the (\d+) largest cells +([\d.]+)%", result(notebook, "found = "))
    }
    method, top_k = re.fullmatch(r"\('(\w+)', (\d+)\)", result(notebook, "method = found.method")).groups()
    assert method == "bridge"
    assert int(top_k) == min((k for k, mass in kept.items() if mass > 90), default=128)
    assert f"{top_k} of 2,048 cells" in result(notebook, "kd.run_preflight(trainer)")
    assert result(notebook, "kd.audit(alike, data_alike).method") == "'same'"


@pytest.mark.parametrize("which", ["own_pair", "stored_own_pair"])
def test_students_made_of_the_teacher_start_between_it_and_nothing(which, request):
    _, notebook = request.getfixturevalue(which)
    bits = [float(b) for b in re.findall(r"([\d.]+) bits per byte\n", printed(notebook, "starts = {"))]
    teacher, *made, untrained = bits
    assert len(made) == 3
    assert teacher < min(made)
    assert max(made) < untrained


@pytest.mark.parametrize("which", ["own_pair", "stored_own_pair"])
def test_the_checks_of_an_own_pair_hold(which, request):
    _, notebook = request.getfixturevalue(which)
    assert re.search(r"all \d+ checks hold", result(notebook, "kd.verify("))
    assert "0 failed" in result(notebook, "kd.run_preflight(trainer)")
    assert "none of 4 terms scales" in result(notebook, "probe.scales()")
    assert len(outputs(notebook, "image/png")) == 3


def test_an_own_pair_is_trained_on_the_text_in_the_folder_and_loads_without_the_kit(own_pair):
    folder, notebook = own_pair
    assert len(list((folder / "text/train").glob("*.txt"))) == 6
    assert "6 documents" in result(notebook, "data = read(tokenizers)")
    assert "LM-only control" in result(notebook, "report = kd.evaluate")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (folder / "own-pair/export").iterdir()
    }
    assert len(printed(notebook, "AutoModelForCausalLM")) > len("Anne had been") + 20


def test_the_stored_own_pair_learnt_more_than_its_control(stored_own_pair):
    _, notebook = stored_own_pair
    rows = re.findall(
        r"^(before|LM-only control|distilled|teacher) +([\d.]+)", result(notebook, "report ="), re.MULTILINE
    )
    bits = {name: float(value) for name, value in rows}
    assert bits["teacher"] < bits["distilled"] < bits["LM-only control"] < bits["before"]
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
