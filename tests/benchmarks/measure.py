"""What the benchmarks share: taking turns, peak memory in a process of its own, and results that can be read later.

Machines are noisy, so what is compared takes turns in one process, and what is said is a ratio of medians.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Target:
    """A figure with what it should be.

    Attributes:
        what: the figure, in words. measured, limit: "at most" or "at least", as ``way`` says.
    """

    what: str
    measured: float
    limit: float
    way: str = "at most"

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.way == "at most" else self.measured >= self.limit


def alternate(
    work: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every piece of work in every round; all take their turn in each.

    On a card the clock waits for what has been started.

    Args:
        clock: ``time.process_time`` for work of one thread on a processor that others use, too.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(warm + rounds):
        for name, run in work.items():
            _settle()
            began = clock()
            run()
            _settle()
            if number >= warm:
                found[name].append(clock() - began)
    return found


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over the rounds of one piece of work's seconds over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def added_memory(work: Callable[[], object]) -> int:
    """Bytes of memory at the peak of some work above what was there before it: the card's where there is one.

    Only a fresh process gives a true figure, see :func:`alone`.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    work()
    return _status("VmHWM") - before


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(script: str | Path, *arguments: str) -> dict:
    """What a script prints as JSON in its last line, run in a process of its own with the same number of threads.

    What is freed there goes back to the system at once, so that the peak of its memory is that of the tensors that were
    alive together, as on a card; left alone, the C library keeps blocks of up to 32 MiB for later. That costs time:
    seconds of such a process are not to be compared.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    with_name = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    if with_name:
        name = with_name[0].split(":", 1)[1].strip()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used",
        "card": card,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def save(name: str, rows: Iterable[Mapping[str, object]], targets: Iterable[Target] = (), notes: str = "") -> Path:
    """Write ``results/<name>.json`` and print it as a table.

    Args:
        rows: alike, one mapping a row: column to figure or word.
        notes: what a reader must know to read the table, in a sentence or two.
    """
    rows, targets = [dict(row) for row in rows], list(targets)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    said = {
        "command": " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "notes": notes,
        "rows": rows,
        "targets": [asdict(target) | {"met": target.met} for target in targets],
    }
    path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print(as_table(rows))
    for target in targets:
        met = "" if target.met else " - missed"
        print(f"{target.what}: {target.measured:.3g}, wanted {target.way} {target.limit:g}{met}")
    return path


def as_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a table in Markdown; numbers with three digits that matter."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_cell(row.get(head, "")) for head in heads) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
