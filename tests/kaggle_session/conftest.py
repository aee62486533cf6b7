"""What the sessions share: an account on a server of this machine, what was pushed there, one run of each kernel."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from kaggle_server import KaggleServer, kaggle_server
from kernels import CASES, OWNER, PAIR
from machine import ROOT, Ran, run_session

sys.path.append(str(ROOT / "tests" / "browser"))  # chromium.py: which browser there is


@dataclass(frozen=True)
class Sent:
    """A push: the folder that was built, and what the server was asked for."""

    folder: Path
    request: dict

    @property
    def notebook(self) -> str:
        return self.request["text"]


class Account:
    """A clone of the project, Kaggle's real client and an account on the server, used from the command line."""

    def __init__(self, server: KaggleServer, folder: Path):
        self.server, self.folder = server, folder
        self.out = folder / "build"
        (folder / "home").mkdir()

    def kaggle(self, *arguments: str) -> str:
        """What ``python -m kd_kit kaggle ...`` prints; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "kd_kit", "kaggle", *arguments],
            cwd=ROOT,
            env=self.server.environment(self.folder / "home"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"kaggle {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def build(self, kernel: str, parameters: dict, datasets: tuple[str, ...] = ()) -> Path:
        flags = [f"--set={name}={value!r}" for name, value in parameters.items()]
        flags += [f"--dataset={name}" for name in datasets]
        self.kaggle("build", kernel, "--owner", OWNER, "--out", str(self.out), *flags)
        return self.out / kernel

    def push(self, kernel: str) -> Sent:
        before = len(self.server.kernels.get(f"{OWNER}/{kernel}", ()))
        self.kaggle("push", kernel, "--out", str(self.out))
        saved = self.server.kernels[f"{OWNER}/{kernel}"]
        assert len(saved) == before + 1
        return Sent(self.out / kernel, saved[-1])

    def pair(self, folder: Path) -> Path:
        """The data set of the embedded pair as it was uploaded, in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.server.datasets[PAIR].items():
            (folder / name).write_bytes(content)
        return folder

    def ends(self, kernel: str, ran: Ran) -> None:
        """The last session of a kernel is over; its output is kept if it ended normally."""
        name = f"{OWNER}/{kernel}"
        self.server.status[name] = "ERROR" if ran.code else "COMPLETE"


@pytest.fixture(scope="session")
def new_account(tmp_path_factory):
    """Accounts on servers of their own: in a new one nothing has ever been pushed."""
    with ExitStack() as stack:
        made: list[Account] = []

        def make() -> Account:
            made.append(Account(stack.enter_context(kaggle_server()), tmp_path_factory.mktemp("account")))
            return made[-1]

        yield make
        assert [account.server.strays for account in made] == [[]] * len(made), "the client asked other hosts"


@pytest.fixture(scope="session")
def account(new_account):
    return new_account()


@pytest.fixture(scope="session")
def sent(account):
    """A kernel by its name: built with the parameters of its case and pushed, once."""
    done: dict[str, Sent] = {}

    def send(kernel: str) -> Sent:
        if kernel not in done:
            case = CASES[kernel]
            account.build(kernel, case.parameters, case.datasets)
            done[kernel] = account.push(kernel)
        return done[kernel]

    return send


@pytest.fixture(scope="session")
def session(sent, account, tmp_path_factory):
    """The one session of a kernel, by its name."""
    done: dict[str, Ran | Exception] = {}

    def run(kernel: str) -> Ran:
        if kernel not in done:
            folder = tmp_path_factory.mktemp(kernel)
            try:
                notebook = sent(kernel).notebook
                inputs = {CASES[kernel].pair_at: account.pair(folder / "pair")}
                done[kernel] = run_session(folder / "machine", notebook, inputs)
            except Exception as error:  # once is enough
                done[kernel] = error
        if isinstance(done[kernel], Exception):
            raise done[kernel].with_traceback(None)
        return done[kernel]

    return run
