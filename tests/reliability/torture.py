"""Strike runs in every way for a long while, count what was lost, and print one table: ``make torture``.

    python tests/reliability/torture.py [--quick] [--seed 1] [--out FILE] [--only kills,clocks]

Ends with status 1 if anything was lost or went wrong in silence. The seed is printed; with it, and the number in the
note, a failure can be had again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where helpers.py and bad_rows.py are

import numpy as np
from bad_rows import LIMIT, WINDOW, bad_rows
from campaign import Counts, kill_campaign, table
from helpers import pages, pair
from memory_lack import memory_campaign
from not_finite import finite_campaign
from simulated_clock import clock_campaign

from kd_kit import build_data


def rows_campaign(folder: Path, seed: int, count: int, progress: Callable[[str], None]) -> Counts:
    """``count`` rows, about half of them bad: each is refused for its own reason, and no good one is."""
    counts = Counts("bad rows")
    rows, expected = bad_rows(np.random.default_rng(seed), count)
    data = build_data(
        rows, pair(), held_out=[pages()[0]], window=WINDOW, batch_size=2, max_characters=LIMIT, max_refused=1
    )
    report = data.train.report
    wanted = {row: reason for reason, found in expected.items() for row in found}
    given = {row: reason for reason, found in report.refused.items() for row in found}
    counts.tried = len(wanted)
    counts.silent = len(wanted.keys() - given.keys())  # taken for text
    counts.lost = len(given.keys() - wanted.keys())  # good text that was refused
    others = [row for row in wanted.keys() & given.keys() if wanted[row] != given[row]]
    counts.lost += len(others)
    if (report.read, report.used) != (count, count - len(given)):
        counts.lost += 1
    counts.notes.append(f"seed {seed}; {count:,} rows, {report.used:,} used; refused for another reason: {others[:5]}")
    return counts


CAMPAIGNS: dict[str, tuple[Callable[..., Counts], int, int]] = {
    "kills": (kill_campaign, 200, 20),
    "numbers": (finite_campaign, 100, 10),
    "memory": (memory_campaign, 20, 8),
    "clocks": (clock_campaign, 50, 8),
    "rows": (rows_campaign, 10_000, 1_000),
}
"""{name: (campaign, blows, blows with --quick)}"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the blows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table into this file, too")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(CAMPAIGNS), help="campaigns by name")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.only) - CAMPAIGNS.keys()
    if unknown:
        parser.error(f"expected campaigns out of {', '.join(CAMPAIGNS)}, got {', '.join(sorted(unknown))}")
    folder, counts, started = Path(tempfile.mkdtemp(prefix="kd_kit-torture-")), [], time.monotonic()
    print(f"seed {chosen.seed}", flush=True)
    try:
        for name in chosen.only:
            campaign, many, few = CAMPAIGNS[name]
            with contextlib.redirect_stdout(io.StringIO()):  # what the runs say
                counts.append(campaign(folder / name, chosen.seed, few if chosen.quick else many, progress))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = f"{table(counts)}\n{time.monotonic() - started:.0f} s\n"
    print(f"\n{result}", end="")
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(result)
    return int(any(c.lost or c.silent or not c.tried for c in counts))


def progress(line: str) -> None:
    """One line that is overwritten on a terminal; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
