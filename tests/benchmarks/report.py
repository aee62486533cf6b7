"""All results as tables in the README beside this file, with what was wanted, command, machine and date.

    python tests/benchmarks/report.py

Reads ``results/*.json``, as :func:`measure.save` writes them, and replaces what stands between the two markers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from measure import RESULTS, as_table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def section(name: str, result: Mapping) -> str:
    """One result as Markdown."""
    machine = result["machine"]
    card = "" if machine["card"] == "none" else f", {machine['card']}"
    about = f"Python {machine['python']}, torch {machine['torch']}, {result['date']}"
    parts = [
        f"### {name}",
        as_table(result["rows"]),
        *([targets(result["targets"])] if result["targets"] else []),
        *([result["notes"]] if result["notes"] else []),
        f"`{result['command']}` on {machine['processor']}{card}; {about}.",
    ]
    return "\n\n".join(parts)


def targets(found: list[Mapping]) -> str:
    """What was wanted and what came out."""
    rows = [
        {
            "wanted": target["what"],
            "measured": float(target["measured"]),
            "limit": f"{target['way']} {target['limit']:g}",
            "": "met" if target["met"] else "**missed**",
        }
        for target in found
    ]
    return as_table(rows)


def with_results(text: str, results: Mapping[str, Mapping]) -> str:
    """The README's text with these results between its markers.

    Raises:
        ValueError: it has not both markers, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"report: expected {BEGIN} and behind it {END} in {README.name}, got a file without")
    tables = "\n\n".join(section(name, result) for name, result in results.items())
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def main() -> None:
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    README.write_text(with_results(README.read_text(encoding="utf-8"), results), encoding="utf-8")
    missed = [(name, t["what"]) for name, result in results.items() for t in result["targets"] if not t["met"]]
    print(f"{README.name}: {len(results)} results, {len(missed)} targets missed")
    for name, what in missed:
        print(f"  {name}: {what}")


if __name__ == "__main__":
    main()
