"""Kaggle's own command line as a child process, and what its text means.

The client exits with 0 when the server refuses a push, and only prints which sources it left out. So every answer is
read, and a failure is one sentence with a cure.

Source: kaggle 2.2.5, ``kaggle/cli.py`` and ``kaggle/api/kaggle_api_extended.py``.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CREDENTIALS_HELP = (
    "make a token at https://www.kaggle.com/settings/api (Generate New Token) and save it to ~/.kaggle/access_token, "
    "or run `kaggle auth login`"
)
_NO_CLIENT = "Kaggle's client is not installed; install it: python -m pip install kaggle six"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TAIL = 5  # lines of an answer that is quoted whole


class KaggleError(RuntimeError):
    """Kaggle or its client did not do what was asked; the message is a sentence that says why and what to do.

    ``status`` is the HTTP status where it is known: 401, 403, 404, 429, 500.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Pushed:
    """What Kaggle made of a push. ``remarks`` are its own, one plain line each."""

    kernel: str
    version: int | None
    url: str
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        version = "" if self.version is None else f" as version {self.version}"
        return "\n".join([*self.remarks, f"{self.kernel}: pushed{version}, {self.url}"])


@dataclass(frozen=True)
class KernelStatus:
    """How a kernel's last session stands.

    Attributes:
        state: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED or CANCEL_ACKNOWLEDGED.
        failure: Kaggle's message, or nothing.
    """

    kernel: str
    state: str
    failure: str = ""

    @property
    def running(self) -> bool:
        return self.state in ("QUEUED", "RUNNING", "CANCEL_REQUESTED")

    def __str__(self) -> str:
        return f"{self.kernel}: {self.state}" + (f", {self.failure}" if self.failure else "")


def ask_client(*arguments: str, limit: float) -> tuple[str, str]:
    """What the client prints, as (output, errors).

    Args:
        arguments: behind ``kaggle``.
        limit: seconds after which it is stopped.

    Raises:
        KaggleError: it is missing, took too long, or ended with a failure.
    """
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            [*_client(), "-W", *arguments],  # without its remark on newer releases
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=limit,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KaggleError(
            f"Kaggle did not answer within {limit:g} seconds; whether it took the request is not known: look at your "
            "account, then try again"
        ) from error
    output, errors = (_ANSI.sub("", text).replace("\r", "\n").strip() for text in (done.stdout, done.stderr))
    if done.returncode:
        raise _failure(output, errors)
    return output, errors


def _client() -> list[str]:
    """Of this environment, else the one on the PATH."""
    found = importlib.util.find_spec("kaggle")
    if found is not None and found.origin is not None:  # a mere folder of that name, as a clone has, has none
        return [sys.executable, "-m", "kaggle"]
    program = shutil.which("kaggle")
    if program is None:
        raise KaggleError(_NO_CLIENT)
    return [program]


def _has_credentials() -> bool:
    """Whether the client has something to sign in with, in the places where it looks."""
    given = os.environ.get
    if given("KAGGLE_API_TOKEN") or (given("KAGGLE_USERNAME") and given("KAGGLE_KEY")):
        return True
    home = Path.home()
    config = [home / ".kaggle", Path(given("XDG_CONFIG_HOME") or home / ".config") / "kaggle"]
    config = [Path(given("KAGGLE_CONFIG_DIR") or folder) for folder in config]
    places = [folder / "kaggle.json" for folder in config]
    places += [home / ".kaggle" / name for name in ("access_token", "access_token.txt", "credentials.json")]
    return any(place.is_file() for place in places)


# What tells an answer's status: remarks of the client, which not every release makes, and words of Kaggle's.
_SIGNS = {
    429: r"rate limited|too many requests",
    403: r"you don't have access|cannot access kernel|was denied|forbidden",
    404: r"the resource was not found|(?<!file )\bnot found\b",
    500: r"a problem on kaggle's side|internal (server )?error|service unavailable|bad gateway",
}
_CURES = {
    400: "it does not understand the request: build the kernel again, with the newest client (pip install -U kaggle)",
    403: "is the owner in its id your account, and is what it attaches yours or public? `kaggle config view` says who "
    "you are",
    404: "it knows no such thing: check the owner and the slug",
    429: "too many requests in a short time: wait some minutes, then try again",
    500: "the fault is on its side: try again later",
}


def _failure(output: str, errors: str) -> KaggleError:
    """What a client that ended with a failure meant."""
    text = f"{errors}\n{output}"
    if "Authentication required" in output or "Authentication required" in errors:
        if _has_credentials():
            return KaggleError(
                f"Kaggle does not take your credentials (401): expired, revoked or mistyped; {CREDENTIALS_HELP}", 401
            )
        return KaggleError(f"no credentials for Kaggle were found; {CREDENTIALS_HELP}", 401)
    missing = re.search(r"No module named '?([\w.]+)", text)
    if missing:
        return KaggleError(
            f"Kaggle's client does not start, its module {missing[1]} is missing; install it: python -m pip install "
            f"--upgrade kaggle {missing[1].split('.')[0]}"
        )
    if denied := re.search(r"[Cc]annot access kernel '([^']+)'", text):
        return KaggleError(
            f"Kaggle shows you no kernel {denied[1]} (403): it was never pushed, its owner is not the account of your "
            "token, or the token is not accepted; `kaggle config view` says who you are",
            403,
        )
    status = next((code for code, sign in _SIGNS.items() if re.search(sign, text.lower())), None)
    if named := re.search(r"\b([45]\d\d) (?:Client|Server) Error", text):
        status = int(named[1])
    said = _paragraph(errors or output)
    if status is not None:
        cure = _CURES.get(status) or (_CURES[500] if status >= 500 else "correct what it names, then try again")
        return KaggleError(f"Kaggle refused ({status}): {said}; {cure}", status)
    if re.search(r"Max retries exceeded|ConnectionError|NameResolution|ProxyError|Connection aborted", text):
        return KaggleError(
            f"Kaggle cannot be reached: {said[:200]}; check the network (and http_proxy), then try again"
        )
    return KaggleError(
        f"Kaggle's client failed: {said}; a newer one may say more (python -m pip install --upgrade kaggle), and "
        "https://www.kaggle.com/code shows what Kaggle has"
    )


def _paragraph(text: str) -> str:
    """The first paragraph, on one line."""
    return " ".join(text.split("\n\n")[0].split()) or "it did not say why"


_UNKNOWN = re.compile(r"not valid (tags|\w+ sources) and could not\s+be added to the kernel: (.*)")


def read_push(kernel: str, output: str, errors: str) -> Pushed:
    """What the text of ``kaggle kernels push`` means, whatever its exit status was.

    Raises:
        KaggleError: Kaggle refused, or left out sources, or the text is none that is known.
    """
    refused = re.search(r"Kernel push error: (.*)", output, flags=re.DOTALL)
    if refused:
        raise KaggleError(f"Kaggle refused to push {kernel}: {_paragraph(refused[1])}")
    done = re.search(r"Kernel version (?:(\d+) )?successfully \w+.*?(https?://\S+)", output, flags=re.DOTALL)
    if not done:
        raise KaggleError(
            f"the answer to pushing {kernel} is none that is known, so whether it runs is not: "
            f"{' '.join(output.splitlines()[-_TAIL:]) or 'nothing was said'}; look at https://www.kaggle.com/code/{kernel}"
        )
    left_out, remarks = [], []
    for what, names in _UNKNOWN.findall(output):
        if what == "tags":
            remarks.append(f"Kaggle does not know the keywords {names}")
            continue
        unknown = _names(names)
        if what == "kernel sources" and kernel in unknown:  # its earlier sessions failed, or were killed
            unknown.remove(kernel)
            remarks.append(f"{kernel} has no output yet to go on from: this session begins anew")
        if unknown:
            left_out.append(f"{what} {', '.join(unknown)}")
    version = None if done[1] is None else int(done[1])
    if left_out:
        raise KaggleError(
            f"Kaggle pushed {kernel} as version {version}, but without {'; '.join(left_out)}, which it does not know "
            f"or you may not read: cancel that session at {done[2]}, correct the sources, and push again"
        )
    return Pushed(kernel, version, done[2], (*remarks, *retired(errors)))


def retired(errors: str) -> list[str]:
    """The client's warning of a machine that Kaggle no longer has, as one plain line."""
    found = re.search(r"Warning: (.*? is retired\.)\s+([^\n]*)", errors)
    return [f"Kaggle: {found[1]} {found[2].strip()}"] if found else []


def read_status(kernel: str, output: str) -> KernelStatus:
    """What the text of ``kaggle kernels status`` means.

    Raises:
        KaggleError: the text is none that is known.
    """
    found = re.search(r'has status "(?:\w+\.)?(\w+)"', output)
    if not found:
        raise KaggleError(f"the answer to the status of {kernel} is none that is known: {_paragraph(output)}")
    message = re.search(r'Failure message: "(.*)"', output, flags=re.DOTALL)
    return KernelStatus(kernel, found[1].upper(), " ".join(message[1].split()) if message else "")


def _names(text: str) -> list[str]:
    """Of a printed list."""
    try:
        return [str(name) for name in ast.literal_eval(text.strip())]
    except (ValueError, SyntaxError):
        return [text.strip()]
