"""One notebook open in JupyterLab: what a person does with it, and what they see."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from lab_server import KERNEL
from playwright.sync_api import ConsoleMessage, Error, Locator, Page, Request

STEP = 20.0  # seconds that one click, menu or redraw may take on a busy machine
MENUS = {"edit": "Edit", "file": "File", "kernel": "Kernel", "run": "Run"}


class LabError(AssertionError):
    """A step in the browser did not do what it should; its screenshot is named in the message."""


class Notebook:
    """One open notebook.

    A cell is named by its position among all cells, or by a text: a tag of it, or else a piece of its source, that
    belongs to this cell alone.

    Attributes:
        page: Playwright's, for what is not here.
        path: the file that JupyterLab works on.
        page_errors: exceptions that nothing caught in the page, with their stacks. A test asks that there are none.
        console_errors: what the page wrote to the console as an error.
        outside: addresses beyond this machine that the page asked for; the browser refuses them all.
    """

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.path = path
        self.page_errors: list[str] = []
        self.console_errors: list[str] = []
        self.outside: list[str] = []
        page.on("pageerror", lambda error: self.page_errors.append(error.stack or f"{error.name}: {error.message}"))
        page.on("console", self._note_console)
        page.on("request", self._note_request)

    # ---- running

    def load(self, url: str, *, timeout: float = 60) -> None:
        """Open the address, and wait until the notebook is there and its kernel idle.

        The notebook's own indicator says idle before there is a kernel: the status bar knows better.
        """
        with self._step("open", "the notebook and an idle kernel"):
            self.page.goto(url, timeout=1000 * timeout)
            self.page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for(timeout=1000 * timeout)
            self._wait(self._idle, timeout)
            self.page.keyboard.press("ControlOrMeta+b")  # the file browser takes room and shows nothing
            self.page.locator("#jp-left-stack").wait_for(state="hidden")

    def run_all(self, *, timeout: float = 120) -> nbformat.NotebookNode:
        """Run > Run All Cells; the saved notebook, once every code cell ran and the kernel is idle again.

        Raises:
            LabError: a cell failed that has no tag ``raises-exception`` (its traceback is in the message), or it took
                longer than ``timeout`` seconds.
        """
        with self._step("run_all", "every code cell to run"):
            self._forget_counts()
            self.menu("runmenu:run-all")
            return self._finished(timeout)

    def restart_and_run_all(self, *, timeout: float = 120) -> nbformat.NotebookNode:
        """Run > Restart Kernel and Run All Cells; otherwise as ``run_all``."""
        with self._step("restart_and_run_all", "every code cell to run in a new kernel"):
            self._forget_counts()
            self.menu("runmenu:restart-and-run-all")
            self.page.locator(".jp-Dialog button.jp-mod-accept").click()
            return self._finished(timeout)

    def start_all(self) -> None:
        """Run > Run All Cells, without waiting for the end: for what is to be seen or done meanwhile."""
        with self._step("start_all", "the first cell to start"):
            self._forget_counts()
            self.menu("runmenu:run-all")
            self._wait(self._started, STEP)

    def interrupt(self, *, timeout: float = STEP) -> nbformat.NotebookNode:
        """Kernel > Interrupt Kernel; the saved notebook, once the kernel is idle again, whether or not cells failed."""
        with self._step("interrupt", "an idle kernel"):
            self.menu("kernelmenu:interrupt")
            self._wait(self._stopped, timeout)
            return self.save()

    def save(self) -> nbformat.NotebookNode:
        """File > Save Notebook; the file as it is then."""
        with self._step("save", "the notebook to be written"):
            written = re.compile(rf"/api/contents/{re.escape(self.path.name)}\b")
            with self.page.expect_response(lambda a: a.request.method == "PUT" and bool(written.search(a.url))) as put:
                self.menu("docmanager:save")
            if not put.value.ok:
                raise LabError(f"the server answered {put.value.status} {put.value.status_text}")
            return nbformat.read(self.path, as_version=4)

    def menu(self, command: str) -> None:
        """Click a menu's entry, named by JupyterLab's command: ``kernelmenu:interrupt``."""
        with self._step(f"menu {command}", "its entry in a menu"):
            bar = self.page.locator("#jp-menu-panel .lm-MenuBar-item")
            entry = self.page.locator(f'.lm-Menu-item[data-command="{command}"]').first
            menu = {"docmanager:save": "file"}.get(command, command.split("menu:")[0])
            bar.filter(has_text=re.compile(rf"^{MENUS[menu]}$")).click()
            entry.click()
            entry.wait_for(state="hidden")

    # ---- finding

    def cell(self, which: int | str) -> Locator:
        """The whole cell: prompt, source, outputs."""
        return self.page.locator(".jp-NotebookPanel .jp-Notebook .jp-Cell").nth(self._position(which))

    def output(self, which: int | str, child: int | None = None) -> Locator:
        """All outputs of the cell, or the one at position ``child``."""
        area = self.cell(which).locator(".jp-Cell-outputArea")
        return area if child is None else area.locator("> .jp-OutputArea-child").nth(child)

    def button(self, tooltip: str, *, within: Locator | None = None) -> Locator:
        """The widget button with this tooltip."""
        return self._scope(within).locator(f"button.jupyter-button[title={_quoted(tooltip)}]")

    def slider(self, description: str, *, within: Locator | None = None) -> Locator:
        """The widget slider with this description or tooltip."""
        return self._described(".widget-slider", description, within)

    def dropdown(self, description: str, *, within: Locator | None = None) -> Locator:
        """The widget dropdown with this description or tooltip; the toolbar's choice of a cell type is none."""
        return self._described(".widget-dropdown", description, within)

    # ---- doing

    def click(self, tooltip: str, *, within: Locator | None = None) -> None:
        """Click the widget button with this tooltip, once it is there and enabled."""
        with self._step(f"click {tooltip!r}", "one enabled button with this tooltip"):
            self.button(tooltip, within=within).click()

    def choose(self, dropdown: Locator, option: str) -> None:
        """Choose the option with this label."""
        with self._step(f"choose {option!r}", "one dropdown with this option"):
            dropdown.locator("select").select_option(label=option)

    def drag(self, slider: Locator, *, to: float) -> str:
        """Drag a horizontal slider's handle with the mouse; what it reads then.

        Args:
            to: where on the track to let go: 0 its left end, 1 its right end.

        Raises:
            LabError: no such slider, or its value did not change.
        """
        with self._step(f"drag to {to:g}", "one slider whose value changes"):
            handle = slider.locator(".noUi-handle")
            handle.scroll_into_view_if_needed()
            before = handle.get_attribute("aria-valuenow")
            track, start = slider.locator(".noUi-base").bounding_box(), handle.bounding_box()
            mouse = self.page.mouse
            mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
            mouse.down()
            mouse.move(track["x"] + to * track["width"], track["y"] + track["height"] / 2, steps=8)
            mouse.up()
            self._wait(lambda: handle.get_attribute("aria-valuenow") != before, STEP)
            return slider.locator(".widget-readout").inner_text()

    # ---- seeing

    def watch(self, locator: Locator, attribute: str | None = None) -> Watch:
        """Note what it shows now, to wait for a change: its text, or an attribute (``src`` of an image)."""
        with self._step("watch", "one element to watch"):
            return Watch(self, locator, attribute)

    def sees(self, locator: Locator, text: str | re.Pattern, *, timeout: float = STEP) -> str:
        """Wait until the element's text contains or matches this; the text."""
        pattern = re.compile(re.escape(text)) if isinstance(text, str) else text
        with self._step("sees", f"a text with {pattern.pattern!r}"):
            seen = ""

            def matches() -> bool:
                nonlocal seen
                seen = locator.text_content() or ""
                return bool(pattern.search(seen))

            self._wait(matches, timeout, lambda: seen)
            return seen

    def screenshot(self, name: str, locator: Locator | None = None) -> Path:
        """Save a picture of the page, or of all of one element, also where it is higher than the window.

        Returns:
            the PNG, in the folder named by KD_KIT_SCREENSHOTS, or else build/browser.
        """
        path = screenshots() / f"{self.path.stem}_{name}.png"
        with self._step(f"screenshot {name}", "a visible element"):
            if locator is None:
                self.page.screenshot(path=path)
                return path
            size, needed = self.page.viewport_size, locator.bounding_box()["height"] + 200  # menus and status bar
            if needed > size["height"]:
                self.page.set_viewport_size({"width": size["width"], "height": int(needed)})
            locator.scroll_into_view_if_needed()
            locator.screenshot(path=path)
            self.page.set_viewport_size(size)
        return path

    # ---- inside

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.console_errors.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:", request.url):
            self.outside.append(request.url)

    def _position(self, which: int | str) -> int:
        cells = nbformat.read(self.path, as_version=4).cells
        if isinstance(which, int):
            found = [which] if 0 <= which < len(cells) else []
        else:
            found = [at for at, cell in enumerate(cells) if which in cell.metadata.get("tags", ())]
            found = found or [at for at, cell in enumerate(cells) if which in cell.source]
        if len(found) != 1:
            raise LabError(f"cell: expected {which!r} to name one of {len(cells)} cells, got {found}; name another")
        return found[0]

    def _scope(self, within: Locator | None) -> Locator:
        return self.page.locator(".jp-NotebookPanel .jp-Notebook") if within is None else within

    def _described(self, kind: str, name: str, within: Locator | None) -> Locator:
        label = self.page.locator(".widget-label")
        exactly = label.filter(has_text=re.compile(rf"^\s*{re.escape(name)}\s*$"))
        titled = self.page.locator(f".widget-label[title={_quoted(name)}]")
        return self._scope(within).locator(kind).filter(has=exactly.or_(titled))

    def _status(self) -> str:
        return self.page.locator("#jp-main-statusbar").text_content(timeout=1000 * STEP) or ""

    def _idle(self) -> bool:
        return f"{KERNEL} | Idle" in self._status()

    def _prompts(self) -> dict[int, str]:
        """What stands before each code cell that has a source, by the cell's position: ``[3]:``, ``[*]:``, ``[ ]:``."""
        all_prompts = self.page.evaluate(
            "[...document.querySelectorAll('.jp-NotebookPanel .jp-Notebook .jp-Cell')]"
            ".map(cell => cell.querySelector('.jp-InputPrompt')?.textContent ?? '')"
        )
        cells = nbformat.read(self.path, as_version=4).cells
        return {
            at: all_prompts[at].replace("\xa0", " ")
            for at, cell in enumerate(cells)
            if cell.cell_type == "code" and cell.source.strip() and at < len(all_prompts)
        }

    def _forget_counts(self) -> None:
        """Edit > Clear Outputs of All Cells: a number before a cell then says that it ran since."""
        self.menu("editmenu:clear-all")
        self._wait(lambda: not any(re.search(r"\d", prompt) for prompt in self._prompts().values()), STEP)

    def _started(self) -> bool:
        prompts = self._prompts().values()
        return not prompts or any(re.search(r"[\d*]", prompt) for prompt in prompts)

    def _stopped(self) -> bool:
        return self._idle() and not any("*" in prompt for prompt in self._prompts().values())

    def _finished(self, timeout: float) -> nbformat.NotebookNode:
        self._wait(self._started, min(timeout, 2 * STEP))
        self._wait(self._stopped, timeout)
        saved = self.save()
        for at, cell in enumerate(saved.cells):
            failures = [out for out in cell.get("outputs", ()) if out.output_type == "error"]
            if failures and "raises-exception" not in cell.metadata.get("tags", ()):
                trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(failures[0].traceback))
                raise LabError(f"cell {at} failed:\n{trace}")
        left = [at for at, prompt in self._prompts().items() if not re.search(r"\d", prompt)]
        if left:
            raise LabError(f"the kernel is idle, but cells {left} did not run")
        return saved

    def _wait(self, condition: Callable[[], object], timeout: float, seen: Callable[[], str] = lambda: "") -> None:
        """Ask again and again, while the page lives on; ``seen`` tells what there was instead.

        Raises:
            TimeoutError: the condition does not hold after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                instead = f", but {seen()[:300]!r}" if seen() else ""
                raise TimeoutError(f"not within {timeout:g} s{instead}")
            self.page.wait_for_timeout(100)

    @contextmanager
    def _step(self, name: str, expected: str) -> Iterator[None]:
        """Turn what goes wrong inside into one LabError, with a screenshot and the state of the page."""
        try:
            yield
        except (Error, TimeoutError, LabError) as error:
            if getattr(error, "reported", False):  # by a step inside this one
                raise
            failure = LabError(f"{name}: expected {expected}, got: {error}\n{self._state()}\n{self._evidence(name)}")
            failure.reported = True
            raise failure from error

    def _state(self) -> str:
        try:
            dialogs = [" ".join(text.split()) for text in self.page.locator(".jp-Dialog").all_text_contents()]
            status = " ".join(self.page.locator("#jp-main-statusbar").inner_text().split())
            lines = [f"status bar: {status}", f"prompts: {self._prompts()}", f"dialogs: {dialogs}"]
        except Error as error:  # the page itself is gone
            lines = [f"page: {error}"]
        return "\n".join([*lines, f"page errors: {self.page_errors}", f"console: {self.console_errors[-3:]}"])

    def _evidence(self, name: str) -> str:
        path = screenshots() / f"{self.path.stem}_failed_{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.png"
        try:
            self.page.screenshot(path=path)
        except Error as error:
            return f"no screenshot: {error}"
        return f"screenshot: {path}"


class Watch:
    """What an element showed last, to see it change or stand still."""

    def __init__(self, notebook: Notebook, locator: Locator, attribute: str | None) -> None:
        self.locator = locator
        self._notebook = notebook
        self._attribute = attribute
        self.last = self._now()

    def _now(self) -> str:
        if self._attribute is None:
            return self.locator.text_content() or ""
        return self.locator.get_attribute(self._attribute) or ""

    def changed(self, *, timeout: float = STEP) -> str:
        """Wait until it shows something else than last time; what it shows."""
        with self._notebook._step("changed", f"another {self._attribute or 'text'} than {self.last[:200]!r}"):
            self._notebook._wait(lambda: self._now() != self.last, timeout)
            self.last = self._now()
            return self.last

    def still(self, seconds: float = 2.0, *, timeout: float = STEP) -> str:
        """Wait until it shows the same for so long; what it shows."""
        with self._notebook._step("still", f"the same {self._attribute or 'text'} for {seconds:g} s"):
            since = time.monotonic()

            def same_long_enough() -> bool:
                nonlocal since
                now = self._now()
                if now != self.last:
                    self.last, since = now, time.monotonic()
                return time.monotonic() - since >= seconds

            self._notebook._wait(same_long_enough, timeout)
            return self.last


def screenshots() -> Path:
    """The folder for pictures, made where missing."""
    folder = Path(os.environ.get("KD_KIT_SCREENSHOTS") or Path(__file__).parents[2] / "build" / "browser")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _quoted(text: str) -> str:
    """As a string of CSS."""
    return json.dumps(text, ensure_ascii=False)
