"""A notebook in JupyterLab in a headless Chromium, used as a person uses it: menus, mouse, eyes.

    with open_lab() as lab, lab.open("notebooks/01_quickstart.ipynb") as notebook:
        notebook.run_all(timeout=300)
        table = notebook.watch(notebook.output("table"))
        notebook.drag(notebook.slider("temperature"), to=0.8)
        print(table.changed())
        notebook.screenshot("table", table.locator)

Every step is bounded. One that fails raises a LabError that tells the state of the page, and leaves a screenshot.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromium
from lab_server import Server, serve
from notebook_page import STEP, LabError, Notebook
from playwright.sync_api import Browser, sync_playwright

__all__ = ["Lab", "LabError", "Notebook", "open_lab"]

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)


@contextmanager
def open_lab(*, width: int = 1200, height: int = 1000) -> Iterator[Lab]:
    """JupyterLab and a browser with a window of this size in CSS pixels; both are gone at the end.

    Raises:
        ValueError: there is no Chromium.
    """
    executable = chromium.find()
    if executable is None:
        raise ValueError(f"open_lab: expected a Chromium, got none; {chromium.ADVICE}")
    with serve() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            yield Lab(server, browser, width, height)
        finally:
            browser.close()


class Lab:
    """A running JupyterLab, and the browser that shows it."""

    def __init__(self, server: Server, browser: Browser, width: int, height: int) -> None:
        self.server = server
        self._browser = browser
        self._size = {"width": width, "height": height}

    @contextmanager
    def open(self, path: str | Path, *, name: str | None = None) -> Iterator[Notebook]:
        """A copy of the notebook, opened, with its kernel ready; kernel and page are gone at the end.

        Args:
            path: the notebook; JupyterLab gets a copy, so this file never changes.
            name: of the copy, and the first part of its screenshots' names; the file's own name without one.
        """
        copy = self.server.root / f"{name or Path(path).stem}.ipynb"
        shutil.copyfile(path, copy)
        context = self._browser.new_context(viewport=self._size)
        context.set_default_timeout(1000 * STEP)
        try:
            notebook = Notebook(context.new_page(), copy)
            notebook.load(f"{self.server.url}lab/tree/{copy.name}?reset&token={self.server.token}")
            yield notebook
        finally:
            context.close()
            self.server.end_kernels()
