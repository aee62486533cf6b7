"""The tests with other versions than those of constraints.txt, an environment after the other, and a table of it.

    python tests/compat/run.py [kaggle oldest newest] [--pin torch==2.13.0] [--jobs 2] [--keep FOLDER]

``kaggle`` is Kaggle's image, ``oldest`` the lower ends of the ranges in setup.cfg, ``newest`` what the registry has.
Warnings are errors, as everywhere; in ``oldest`` only those that this project's own lines raise, since libraries of
that age warn about what is newer than they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAMES = ("kaggle", "oldest", "newest")
SHOWN = ("python", "torch", "transformers", "accelerate", "datasets", "numpy", "matplotlib", "safetensors")
ITS_OWN_WARNINGS = ("-o", "filterwarnings=default\nerror:::kd_kit\nerror:::test_")
VERSIONS = f"""
import platform
from importlib.metadata import version
print(platform.python_version(), *[version(name) for name in {SHOWN[1:]}])
"""


def environment(name: str, folder: Path, pins: list[str]) -> Path:
    """The interpreter of an environment with this project in it, made where it is not there yet."""
    venv = folder / name
    python = venv / "bin" / "python"
    ready = venv / ".ready"
    wanted = (HERE / f"{name}.txt").read_text(encoding="utf-8") + "\n".join(pins)
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(HERE / f"{name}.txt"), *pins], check=True)
        subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python


def run(name: str, python: Path, jobs: int, report: Path) -> dict[str, str]:
    """One environment's tests, as a row of the table."""
    versions = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    print(f"\n{name}: " + ", ".join(f"{what} {v}" for what, v in zip(SHOWN, versions, strict=True)), flush=True)
    began = time.monotonic()
    command = [str(python), "-m", "pytest", "-q", "-n", str(jobs), "--dist", "loadfile", f"--junitxml={report}"]
    command += ["-p", "no:cacheprovider", *(ITS_OWN_WARNINGS if name == "oldest" else ())]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    passed = int(suite["tests"]) - failed - int(suite["skipped"])
    minutes = (time.monotonic() - began) / 60
    row = dict(zip(SHOWN, versions, strict=True)) | {"passed": f"{passed:,}", "skipped": suite["skipped"]}
    return {"environment": name} | row | {"failed": str(failed), "minutes": f"{minutes:.0f}"}


def table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=(*NAMES, []), help="environments; all of them if left out")
    parser.add_argument("--pin", action="append", default=[], help="a requirement on top, such as torch==2.13.0")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, default=ROOT / ".venv-compat", help="folder of the environments")
    given = parser.parse_args()
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    rows = []
    for name in given.names or NAMES:
        python = environment(name, given.keep.resolve(), given.pin)
        rows.append(run(name, python, given.jobs, build / f"compat-{name}.xml"))
        (build / "compat.md").write_text(table(rows) + "\n", encoding="utf-8")
    print("\n" + table(rows))
    sys.exit(any(row["failed"] != "0" for row in rows))


if __name__ == "__main__":
    main()
