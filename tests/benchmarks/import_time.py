"""What ``import kd_kit`` costs beside what it stands on: ``import torch, accelerate``.

    OMP_NUM_THREADS=1 python tests/benchmarks/import_time.py [--rounds 5]

Fresh processes that take turns; seconds of the import alone, without the start of Python.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from measure import Target, ratio, save

BASE, OURS, LARGER = "torch, accelerate", "kd_kit", "torch, accelerate, transformers"
_TIMED = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"


def once(what: str) -> float:
    done = subprocess.run([sys.executable, "-c", _TIMED.format(what)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {BASE: [], OURS: [], LARGER: []}
    for number in range(rounds + 1):
        for what, found in times.items():
            seconds = once(what)
            if number:  # the first round reads the files from the disk
                found.append(seconds)
    rows = [
        {"import": what, "seconds": statistics.median(found), "x of the first": ratio(times, what, BASE)}
        for what, found in times.items()
    ]
    wanted = Target("import kd_kit over import torch, accelerate", ratio(times, OURS, BASE), 1.15)
    save("import_time", rows, [wanted], "transformers is imported when a model or a tokenizer is built, not before.")


if __name__ == "__main__":
    main()
