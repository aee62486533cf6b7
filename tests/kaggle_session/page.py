"""The page of an executed notebook as a person sees it: in Chromium, with JavaScript off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromium
from playwright.sync_api import Locator, sync_playwright

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


class Page:
    """A page of nbconvert's."""

    def __init__(self, page):
        self._page = page

    def cell(self, piece: str) -> Locator:
        """The code cell of which the source has this piece."""
        return self._page.locator(".jp-CodeCell").filter(has=self._page.locator(".jp-InputArea").filter(has_text=piece))

    def pictures(self, piece: str) -> list[Locator]:
        """The pictures in the output of a cell that are visible and hold something."""
        images = self.cell(piece).locator(".jp-OutputArea-output img").all()
        return [image for image in images if image.is_visible() and self._size(image) > (300, 200)]

    def _size(self, image: Locator) -> tuple[int, int]:
        return tuple(image.evaluate("image => [image.naturalWidth, image.naturalHeight]"))

    def text(self, piece: str) -> str:
        """What of a cell's output can be read."""
        return "\n".join(part.inner_text() for part in self.cell(piece).locator(".jp-OutputArea-output").all())

    def screenshot(self, path: Path, *pieces: str) -> Path:
        """A picture of the cells with these pieces of source, from the first to the last, or of the whole page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not pieces:
            self._page.screenshot(path=path, full_page=True)
            return path
        boxes = [self.cell(piece).bounding_box() for piece in pieces]
        top, bottom = min(box["y"] for box in boxes), max(box["y"] + box["height"] for box in boxes)
        clip = {"x": 0, "y": top, "width": self._page.viewport_size["width"], "height": bottom - top}
        self._page.screenshot(path=path, full_page=True, clip=clip)
        return path


@contextmanager
def open_page(html: Path, *, width: int = 1100) -> Iterator[Page]:
    """The page in a window of this width, in CSS pixels.

    Raises:
        ValueError: there is no Chromium.
    """
    executable = chromium.find()
    if executable is None:
        raise ValueError(f"open_page: expected a Chromium, got none; {chromium.ADVICE}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        try:
            page = browser.new_context(java_script_enabled=False, viewport={"width": width, "height": 900}).new_page()
            page.goto(html.as_uri())
            yield Page(page)
        finally:
            browser.close()
