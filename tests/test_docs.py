"""The papers, the pages and the messages that the words of the project promise are there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import kd_kit

sys.path.insert(0, str(Path(__file__).parent / "docs"))

from build import MODULES, build, one_a_line

ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{4,5})(?![\d.]*\d)")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "tests").rglob("README.md")),
    ]
}
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "kd_kit").rglob("*.py"))}


def papers(text: str) -> set[str]:
    """arXiv numbers that stand behind an address of arXiv's, or as the text of a link to one."""
    return set(re.findall(r"arxiv\.org/(?:abs|pdf|html)/(\d{4}\.\d{4,5})", text, re.IGNORECASE))


# --- citation


def references() -> list[dict]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_every_paper_that_is_named_is_cited():
    cited = papers((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for where, text in {**PAGES, **SOURCES}.items():
        missing = papers(text) - cited
        assert not missing, f"{where} names arXiv {sorted(missing)}, which CITATION.cff lacks"


def test_no_paper_is_cited_that_nobody_uses():
    used = set().union(*(set(ARXIV.findall(text)) for text in (*PAGES.values(), *SOURCES.values())))
    cited = papers((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited <= used, f"CITATION.cff cites {sorted(cited - used)}, which nothing here names"


def test_the_citation_is_complete_and_of_this_version():
    cff = references()
    assert cff["cff-version"] == "1.2.0"
    assert cff["version"] == kd_kit.__version__
    for entry in cff["references"]:
        assert entry["type"] in ("article", "conference-paper", "generic", "report", "book", "thesis"), entry
        assert entry["title"], entry
        assert entry["authors"], entry
    urls = [entry["url"] for entry in cff["references"] if "url" in entry]
    assert len(urls) == len(set(urls))


@pytest.mark.skipif(importlib.util.find_spec("cffconvert") is None, reason="cffconvert is no part of the tests")
def test_the_citation_is_valid():
    from cffconvert import Citation

    Citation((ROOT / "CITATION.cff").read_text(encoding="utf-8")).validate()


def test_the_changelog_has_this_version():
    assert f"## {kd_kit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- links


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in its address."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_to_be_found_from_the_readme():
    assert all(f"]({page})" in PAGES["README.md"] for page in PAGES if page.startswith("docs/"))


# --- troubleshooting


def troubles() -> list[str]:
    """The messages in the first column of the table."""
    return re.findall(r"^\| `([^`]+)`", PAGES["docs/troubleshooting.md"], re.MULTILINE)


def spoken() -> str:
    """All sources with the quotes between two parts of one message taken out, and with one mark for what varies."""
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(SOURCES.values()))
    return re.sub(r"\{[^{}]*\}", "…", joined)


def test_every_quoted_message_is_one_that_the_kit_says():
    found, said = troubles(), spoken()
    assert len(found) >= 10
    for message in found:
        assert message in said, f"the table quotes {message!r}, which kd_kit does not say"


# --- API pages


def test_arguments_that_share_a_line_are_taken_apart():
    written = """First line.

    Args:
        one: of these. two, three: more. Not an: argument.
        four: a rate, 5e-4. five: None. False
            in its second line. six: last.

    Source: nobody. no: section.
"""
    entries = one_a_line(written).splitlines()
    assert [line.strip() for line in entries[3:9]] == [
        "one: of these.",
        "two, three: more. Not an: argument.",
        "four: a rate, 5e-4.",
        "five: None. False",
        "in its second line.",
        "six: last.",
    ]
    assert entries[-1].strip() == "Source: nobody. no: section."
    assert one_a_line("No sections.") == "No sections."


def test_the_modules_of_the_pages_are_there():
    for name in MODULES:
        assert name.startswith("!") or importlib.util.find_spec(name) is not None, name


@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="pdoc is an extra")
@pytest.mark.filterwarnings("ignore:Error parsing type annotation")
def test_the_pages_have_every_public_name(tmp_path):
    words = kd_kit.__doc__
    assert build(tmp_path, ("kd_kit", "kd_kit.report")) == tmp_path / "index.html"
    page = (tmp_path / "kd_kit.html").read_text(encoding="utf-8")
    for name in kd_kit.__all__:
        assert f'id="{name}"' in page or f"kd_kit/{name}.html" in page, name
    assert "kd_kit/report.html" in page
    shown = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)  # the sources keep their own marks
    assert not re.findall(r":(?:func|class|meth|mod):", shown)
    losses = (tmp_path / "kd_kit" / "losses.html").read_text(encoding="utf-8")
    assert "<li><strong>student:</strong>" in losses, "shapes are a list"
    assert kd_kit.__doc__ == words
