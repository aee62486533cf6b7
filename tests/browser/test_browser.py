"""JupyterLab in a browser: widgets that act, a run in the background that stops, and a harness that sees failures."""

from __future__ import annotations

import subprocess
import sys

import chromium
import lab_server
import nbformat
import PIL.Image
import pytest
from lab import LabError, open_lab
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

TABLE = """\
import ipywidgets
from IPython.display import HTML, display

def table(gain):
    rows = "".join(f"<tr><td>{name}</td><td>{gain * x:.2f}</td></tr>" for name, x in [("lm", 1.0), ("kd", 10.0)])
    return HTML(f"<table><tr><th>term</th><th>loss</th></tr>{rows}</table>")

gain = ipywidgets.FloatSlider(description="gain", tooltip="gain × loss", min=0, max=2, value=1)
decoy = ipywidgets.Dropdown(description="unit of time", options=["s", "ms"])
unit = ipywidgets.Dropdown(description="unit", options=["nats", "bits"])
seen = ipywidgets.HTML("in nats")
display(ipywidgets.HBox([gain, unit, seen, decoy]))
shown = display(table(gain.value), display_id=True)
gain.observe(lambda change: shown.update(table(change.new)), "value")
unit.observe(lambda change: setattr(seen, "value", f"in {change.new}"), "value")"""

TRAINING = """\
import io, threading
from IPython.display import Image
from matplotlib.figure import Figure

def picture(losses):
    figure = Figure(figsize=(4, 2), layout="constrained")
    figure.subplots().plot(losses)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image(file.getvalue())

stop = threading.Event()
losses = [1.0]
button = ipywidgets.Button(description="Stop", tooltip="stop the training")
button.on_click(lambda _: stop.set())
curve = display(picture(losses), display_id=True)

def train():
    while not stop.wait(0.3):
        losses.append(losses[-1] * 0.9)
        curve.update(picture(losses))
    button.description = "stopped"

thread = threading.Thread(target=train, daemon=True)
display(button)
thread.start()"""

PYTHON = "import sys\nprint(sys.executable)"


@pytest.fixture(scope="module")
def lab():
    with open_lab() as opened:
        yield opened


def written(folder, name, *cells, counted=False):
    """A notebook of these cells' sources, as a user would have it on disk."""
    made = [new_markdown_cell(f"# {name}"), *map(new_code_cell, cells), new_code_cell("")]
    if counted:  # it ran before
        for number, cell in enumerate(made[1:-1], start=1):
            cell.execution_count = number
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": kernel}), path)
    return path


def test_widgets_act_and_a_background_run_stops(lab, tmp_path):
    path = written(tmp_path, "widgets", TABLE, TRAINING, PYTHON, counted=True)
    before = path.read_bytes()
    with lab.open(path) as notebook:
        saved = notebook.run_all()
        assert [cell.execution_count for cell in saved.cells if cell.cell_type == "code"] == [1, 2, 3, None]
        assert saved.cells[3].outputs[0].text.strip() == sys.executable

        curve = notebook.watch(notebook.output("curve =").locator("img"), "src")
        curve.changed()
        curve.changed()  # it goes on while the kernel is idle

        table = notebook.watch(notebook.output("def table").locator("table"))
        assert table.last == "termlosslm1.00kd10.00"
        reads = notebook.drag(notebook.slider("gain"), to=0.75)
        assert float(reads) == pytest.approx(1.5, abs=0.1)
        shown = table.changed()
        if f"lm{reads}" not in shown:  # a value on the way
            shown = notebook.sees(table.locator, f"lm{reads}")
        assert f"kd{float(reads) * 10:.2f}" in shown

        assert notebook.slider("gain × loss").count() == 1

        notebook.choose(notebook.dropdown("unit"), "bits")
        notebook.sees(notebook.output("def table"), "in bits")

        notebook.screenshot("page")
        notebook.screenshot("table", notebook.output("def table"))
        notebook.click("stop the training")
        notebook.sees(notebook.button("stop the training"), "stopped")
        last = curve.still(1.5)
        picture = notebook.screenshot("curve", notebook.output(2, 0))
        assert picture.read_bytes().startswith(b"\x89PNG")

        saved = notebook.save()
        png = saved.cells[2].outputs[0].data["image/png"]
        assert "".join(png.split()) == last.removeprefix("data:image/png;base64,")
        assert notebook.page_errors == [] and notebook.console_errors == [] and notebook.outside == []
    assert path.read_bytes() == before


def test_a_restart_and_an_interrupt(lab, tmp_path):
    count = "import os, time\nn = globals().get('n', 0) + 1\nprint('process', os.getpid(), 'run', n)"
    wait = "if n == 2:\n    print('waiting', flush=True)\n    time.sleep(600)"
    with lab.open(written(tmp_path, "restart", count, wait, "'after'")) as notebook:
        _, one, _, run = notebook.run_all().cells[1].outputs[0].text.split()
        _, two, _, again = notebook.restart_and_run_all().cells[1].outputs[0].text.split()
        assert run == again == "1" and one != two
        notebook.start_all()
        notebook.sees(notebook.output("sleep"), "waiting")
        stopped = notebook.interrupt()
        assert stopped.cells[1].outputs[0].text.split() == ["process", two, "run", "2"]  # the same kernel goes on
        assert stopped.cells[2].outputs[-1].ename == "KeyboardInterrupt"
        assert stopped.cells[3].execution_count is None
        assert notebook.page_errors == []


def test_what_fails_is_told_with_a_screenshot(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_KIT_SCREENSHOTS", str(tmp_path / "pictures"))
    script = "setTimeout(() => { throw new Error('thrown in the page') }); console.error('said')"
    throw = f'<img src="" onerror="{script}">'
    cells = (
        f"from IPython.display import HTML\nHTML({throw!r})",
        "import time\ntime.sleep(1.5)\n1 / 0",
        "'never'",
    )
    with lab.open(written(tmp_path, "failing", *cells)) as notebook:
        with pytest.raises(LabError, match=r"(?s)run_all: .*not within 0\.3 s.*'\[\*\]:'"):
            notebook.run_all(timeout=0.3)
        notebook.interrupt()
        with pytest.raises(LabError, match=r"(?s)cell 2 failed:.*ZeroDivisionError.*3: '\[ \]:'") as told:
            notebook.run_all()
        picture = tmp_path / "pictures" / "failing_failed_run_all.png"
        assert str(picture) in str(told.value) and picture.read_bytes().startswith(b"\x89PNG")
        assert any("thrown in the page" in error for error in notebook.page_errors)
        assert any("said" in error for error in notebook.console_errors)

        notebook.page.set_default_timeout(500)
        with pytest.raises(LabError, match="click 'stop the training': expected one enabled button"):
            notebook.click("stop the training")
        with pytest.raises(LabError, match="expected 'nowhere' to name one of 5 cells"):
            notebook.cell("nowhere")


def test_all_of_a_high_output_is_in_its_screenshot(lab, tmp_path):
    high = "from IPython.display import HTML\nHTML('<div style=\"height: 2500px; background: teal\"></div><p>end</p>')"
    with lab.open(written(tmp_path, "high", high)) as notebook:
        notebook.run_all()
        window = notebook.page.viewport_size
        picture = PIL.Image.open(notebook.screenshot("output", notebook.output(1))).convert("RGB")
        column = [picture.getpixel((picture.width // 2, y)) for y in range(picture.height)]
        assert column.count((0, 128, 128)) == 2500
        assert notebook.page.viewport_size == window


def test_nothing_is_left_running():
    with lab_server.serve() as server:
        runtime = server.root.parent / "runtime"
        server.ask("api/kernels", "POST")
        # what a kernel started, in a session of its own
        start = [sys.executable, "-c", "import time; time.sleep(60)"]
        stray = subprocess.Popen(start, env={"JUPYTER_RUNTIME_DIR": str(runtime)}, start_new_session=True)
        running = lab_server.users_of(runtime)
        assert stray.pid in [process.pid for process in running]
        assert any("ipykernel_launcher" in process.cmdline() for process in running)
    stray.wait(10)  # raises where it lives on
    assert lab_server.users_of(runtime) == [] and not runtime.exists()


def test_a_server_that_does_not_start_shows_its_log(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "no number")
    with pytest.raises(AssertionError, match=r"(?s)got its end, exit status 1.*PYTHONHASHSEED"), lab_server.serve():
        pass


def test_a_chromium_that_is_named_is_the_one(monkeypatch):
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    found = chromium.find()
    monkeypatch.setenv(chromium.VARIABLE, sys.executable)  # runs, and is no Chromium
    with pytest.raises(ValueError, match="KD_KIT_CHROMIUM: expected a Chromium"):
        chromium.find()
    monkeypatch.setenv(chromium.VARIABLE, found)
    monkeypatch.setattr(chromium, "NAMES", ())
    assert chromium.find() == found


def test_without_a_chromium_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert chromium.find() is None
    assert chromium.main() == 1
    said = capsys.readouterr()
    assert said.out == "" and "apt-get install chromium" in said.err and "KD_KIT_CHROMIUM" in said.err
