"""A JupyterLab of its own: loopback, random token, temporary folders, one kernel, nothing left behind.

It reads no configuration and no kernels of the user, writes none, and asks nobody for news.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # every cell in the document, also those out of sight: a locator finds them all
    "notebook-extension/tracker": {"windowingMode": "none"},
    # the file changes when a test saves it, and not in between
    "docmanager-extension/plugin": {"autosave": False},
}
KERNEL = "Python 3 (ipykernel)"


@dataclass(frozen=True)
class Server:
    """A running JupyterLab.

    Attributes:
        url: of its root, ends with a slash.
        token: what a request shows to be let in.
        root: the folder whose notebooks it serves, and where kernels start.
    """

    url: str
    token: str
    root: Path

    def ask(self, path: str, method: str = "GET") -> object:
        """The JSON that its REST API answers at ``path`` (``api/sessions``), or None where the answer is empty."""
        request = urllib.request.Request(
            self.url + path, method=method, headers={"Authorization": f"token {self.token}"}
        )
        # a proxy of the environment is for other machines
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def end_kernels(self) -> None:
        """Shut down every kernel and wait until each is gone."""
        for kernel in self.ask("api/kernels"):
            self.ask(f"api/kernels/{kernel['id']}", "DELETE")


@contextmanager
def serve(*, timeout: float = 90) -> Iterator[Server]:
    """A JupyterLab whose one kernel is this Python; killed at the end, with its kernels and what they started.

    Args:
        timeout: seconds until it must answer.

    Raises:
        AssertionError: it ended, or did not answer in time; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="kd_kit_lab_", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        environment = _environment(place)
        root = place / "notebooks"
        log = place / "server.log"
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"),
            *(f"--ServerApp.root_dir={root}", "--KernelSpecManager.allowed_kernelspecs={'python3'}"),
            *("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"),
            *(["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
            # should this process be killed itself, the server notices that nobody is there
            *("--MappingKernelManager.cull_idle_timeout=600", "--ServerApp.shutdown_no_activity_timeout=600"),
        ]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        try:
            url = _wait_until_it_answers(process, place / "runtime", log, timeout)
            yield Server(url, environment["JUPYTER_TOKEN"], root)
        finally:
            _kill(process, place)


def _environment(place: Path) -> dict[str, str]:
    """The environment of server and kernels, with the folders and files that it names."""
    # what would point to other folders, another token, another kind of notebook service
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "JPY_", "IPYTHON", "KAGGLE_"))
    }
    folders = {
        "JUPYTER_CONFIG_DIR": place / "config",
        "JUPYTER_DATA_DIR": place / "data",
        "JUPYTER_RUNTIME_DIR": place / "runtime",
        "JUPYTER_PATH": place / "path",  # searched before the folders of system, environment and user
        "JUPYTERLAB_SETTINGS_DIR": place / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": place / "workspaces",
        "IPYTHONDIR": place / "ipython",
    }
    for folder in (*folders.values(), place / "notebooks"):
        folder.mkdir()
    for name, values in SETTINGS.items():
        file = folders["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    kernel = folders["JUPYTER_PATH"] / "kernels" / "python3"
    kernel.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": start, "display_name": KERNEL, "language": "python", "metadata": {"debugger": True}}
    (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    return environment | {
        **{name: str(folder) for name, folder in folders.items()},
        "JUPYTER_TOKEN": secrets.token_hex(24),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _wait_until_it_answers(process: subprocess.Popen, runtime: Path, log: Path, timeout: float) -> str:
    """Its address, once it serves pages: it chose the port itself and wrote it into its runtime folder."""
    end = time.monotonic() + timeout
    note = runtime / f"jpserver-{process.pid}.json"
    while time.monotonic() < end and process.poll() is None:
        try:
            facts = json.loads(note.read_text(encoding="utf-8"))
            Server(facts["url"], facts["token"], runtime).ask("api/status")
            return facts["url"]
        except (OSError, ValueError, urllib.error.URLError):  # not written, half written, not listening yet
            time.sleep(0.2)
    ended = process.poll()
    what = f"none within {timeout:g} s" if ended is None else f"its end, exit status {ended}"
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise AssertionError(f"serve: expected an answer of JupyterLab, got {what}; the end of its log:\n{tail}")


def _kill(process: subprocess.Popen, place: Path) -> None:
    """End the server, its kernels and what those started.

    Each kernel is the leader of its own session, and one whose server died is nobody's child: what they share is the
    runtime folder in their environment.
    """
    process.terminate()  # the server shuts its kernels down
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    for _ in range(3):  # one may be starting another right now
        left = users_of(place / "runtime")
        for other in left:
            other.kill()
        if not left:
            return
        psutil.wait_procs(left, timeout=5)


def users_of(runtime: Path) -> list[psutil.Process]:
    """Every process of this user whose Jupyter runtime folder this is."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("JUPYTER_RUNTIME_DIR") == str(runtime):
                found.append(process)
        except psutil.Error:  # ended just now, or another user's
            continue
    return found
