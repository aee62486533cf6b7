"""kd_kit/ranges.py: one table, and the README shows it."""

from __future__ import annotations

import pytest
from helpers import ROOT

from kd_kit.demo import Recipe, terms_of
from kd_kit.history import verdict
from kd_kit.ranges import RANGES


def rows() -> dict[str, list[str]]:
    """{term: the cells of its row} of the README's table of terms."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`").removesuffix("_term"): row for row in cells if row[0].endswith("_term`")}


@pytest.mark.parametrize("name", Recipe().terms)
def test_the_readme_shows_the_range_of_every_term(name):
    _, _, unit, healthy, impossible, *_, source = rows()[name]
    entry = RANGES[name]
    low, high = entry["healthy"]
    assert unit == entry["unit"]
    assert healthy == f"{low:g} to {high:g}"
    bounds = [f"below {entry['impossible_below']:g}"]
    if "impossible_above" in entry:
        bounds.append(f"above {entry['impossible_above']:g}")
    assert impossible == ", ".join(bounds)
    assert source


def test_terms_carry_the_table():
    for term in terms_of(Recipe()):
        entry = RANGES[term.name]
        assert (term.unit, term.healthy, term.floor) == (entry["unit"], entry["healthy"], entry.get("floor"))
        assert term.impossible_below == entry["impossible_below"]
        assert term.impossible_above == entry.get("impossible_above")
        assert term.source == entry["source"]


@pytest.mark.parametrize("name", RANGES)
def test_ranges_are_in_order(name):
    entry = RANGES[name]
    low, high = entry["healthy"]
    assert entry["impossible_below"] <= low < high < entry.get("impossible_above", float("inf"))
    assert verdict(entry, (low + high) / 2) == "healthy"


@pytest.mark.parametrize(
    ("name", "value"), [("kd", 34.0), ("feature", 150.0), ("layerwise", 200.0), ("attention", 90.0), ("lm", 20.0)]
)
def test_what_a_run_once_took_for_a_loss_is_impossible(name, value):
    """Values of that size come from a missing normalisation and not from training."""
    assert verdict(RANGES[name], value) == "impossible"
