"""A machine as a Kaggle session has it: Kaggle's versions, /kaggle's folders elsewhere, no kd_kit, no network.

    ran = run_session(folder, notebook, {"datasets/me/text": some_folder})
    ran.code, ran.log, ran.notebook, ran.html

The notebook is executed by papermill and made a page by nbconvert, as Kaggle does it, both of the environment that
``make kaggle-test`` makes of requirements.txt. Each session gets a new, empty environment on top of that one, so that
what the notebook installs is gone with it, as on Kaggle.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "KD_KIT_KAGGLE_PYTHON"
CLOSED = "http://127.0.0.1:9"  # a port that nobody listens on: whatever asks the network fails at once
PLAIN_PATH = "/usr/local/bin:/usr/bin:/bin"
PATIENCE = 420  # seconds that one session may take


def kaggle_python() -> Path:
    """The interpreter with Kaggle's versions.

    Raises:
        ValueError: there is none.
    """
    python = Path(os.environ.get(VARIABLE) or ROOT / ".venv-kaggle" / "bin" / "python")
    if not python.is_file():
        raise ValueError(
            f"kaggle_python: expected an environment with Kaggle's versions, got no {str(python)!r}; make kaggle-test "
            f"makes one, or name its interpreter in {VARIABLE}"
        )
    return python.absolute()  # not resolved: the link is what tells Python which environment it is


@dataclass(frozen=True)
class Ran:
    """What a session left.

    Attributes:
        code: papermill's exit status; log: what it and the cells printed. seconds: from start to end.
        working: the output folder, that Kaggle would keep. html: the page. changed: inputs that are no longer as they
        were attached.
    """

    code: int
    log: str
    seconds: float
    executed: Path
    working: Path
    html: Path
    changed: frozenset[str]

    @cached_property
    def notebook(self):
        return nbformat.read(self.executed, as_version=4)

    def cell(self, piece: str):
        """The code cell of which the source has this piece; there must be one."""
        found = [c for c in self.notebook.cells if c.cell_type == "code" and piece in c.source]
        assert len(found) == 1, f"expected one cell with {piece!r}, got {len(found)}"
        return found[0]

    def said(self, piece: str) -> str:
        """What the cell with this piece of source printed or showed, as text."""
        return "\n".join(text_of(output) for output in self.cell(piece).outputs)


def text_of(output) -> str:
    """An output as text: printed, shown, or an error's."""
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def run_session(
    folder: Path,
    notebook: str,
    inputs: Mapping[str, Path] | None = None,
    *,
    hub: str = "off",
) -> Ran:
    """Execute a notebook as a batch session does, and make the page of it.

    Args:
        folder: of this session; must not exist.
        notebook: the text of the .ipynb.
        inputs: folders that are attached, by their place below /kaggle/input. They are copied.
        hub: "off": the libraries are told that they are offline; "unreachable": they ask and nobody answers.
    """
    kaggle, work = folder / "kaggle", folder / "kaggle" / "working"
    for path in (kaggle / "input", work, folder / "home", folder / "tmp"):
        path.mkdir(parents=True)
    for place, source in (inputs or {}).items():
        shutil.copytree(source, kaggle / "input" / place)
    attached = listing(kaggle / "input")
    read_only(kaggle / "input")
    python = fresh_environment(folder / "env")
    source, executed, log = folder / "source.ipynb", folder / "__notebook__.ipynb", folder / "log.txt"
    source.write_text(notebook, encoding="utf-8")

    variables = session_variables(folder, python, hub)
    started = time.monotonic()
    papermill = ("-m", "papermill", source, executed, "-k", "python3", "--cwd", work, "--log-output")
    with log.open("wb") as file:
        code = subprocess.run(
            [python, *papermill, "--no-progress-bar"],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        ).returncode
    seconds = time.monotonic() - started

    convert = ("-m", "nbconvert", "--to", "html", executed, "--output", "__results__", "--output-dir", folder)
    done = subprocess.run([python, *convert], cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"nbconvert: {done.stderr}"
    changed = listing(kaggle / "input") ^ attached
    return Ran(
        code,
        log.read_text(encoding="utf-8", errors="replace"),
        seconds,
        executed,
        work,
        folder / "__results__.html",
        frozenset(place for place, _ in changed),
    )


def session_variables(folder: Path, python: Path, hub: str) -> dict[str, str]:
    """The environment variables of a session: nothing of the shell that runs the tests, so no PYTHONPATH either."""
    base = kaggle_python().parent.parent
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED)
    return {
        "PATH": f"{python.parent}:{PLAIN_PATH}",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "LANG": "C.UTF-8",
        "JUPYTER_PATH": str(base / "share" / "jupyter"),  # nbconvert's templates
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "KD_KIT_KAGGLE": str(folder / "kaggle"),
        "OMP_NUM_THREADS": "1",  # sums in one order: runs are compared bit for bit
        **({"HF_HUB_OFFLINE": "1"} if hub == "off" else {}),
        **proxies,
    }


def fresh_environment(folder: Path) -> Path:
    """An empty environment that sees the packages of Kaggle's; what is installed goes into it. Its interpreter."""
    base, plain = kaggle_python(), {"PATH": PLAIN_PATH}
    subprocess.run([base, "-m", "venv", "--without-pip", folder], env=plain, check=True, timeout=120)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (theirs, ours) = (
        subprocess.run([python, "-c", ask], env=plain, check=True, capture_output=True, text=True, timeout=60).stdout
        for python in (base, folder / "bin" / "python")
    )
    (Path(ours.strip()) / "kaggle_image.pth").write_text(theirs)
    absent = "import importlib.util, sys; sys.exit(importlib.util.find_spec('kd_kit') is not None)"
    code = subprocess.run([folder / "bin" / "python", "-c", absent], cwd=folder, env=plain, timeout=60).returncode
    assert code == 0, "kd_kit is in the environment before the notebook has installed it"
    return folder / "bin" / "python"


def listing(folder: Path) -> frozenset[tuple[str, str]]:
    """Every file and folder below ``folder``, with the hash of what is in it."""
    found = set()
    for path in folder.rglob("*"):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found.add((path.relative_to(folder).as_posix(), content))
    return frozenset(found)


def read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
