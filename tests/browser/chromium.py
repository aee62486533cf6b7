"""Find a Chromium to drive, or install Debian's.

``python tests/browser/chromium.py`` prints the path of the one that the browser tests will use. Playwright's own builds
come from a download server, which not every machine may reach; a Chromium of the system is driven as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

VARIABLE = "KD_KIT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ADVICE = f"install one (Debian: apt-get install chromium), or name an executable in {VARIABLE}"


def version(executable: str) -> str | None:
    """What it says that it is, or None where it does not run (Ubuntu's package is the empty shell of a snap)."""
    try:
        said = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    line = said.stdout.strip()
    return line if said.returncode == 0 and "Chrom" in line else None


def find() -> str | None:
    """The path of a Chromium that runs: the one named in the environment, or else the first on PATH; None without one.

    Raises:
        ValueError: the environment names something that is no working Chromium. It is not passed over silently.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = shutil.which(named)
        if path is None or version(path) is None:
            raise ValueError(f"{VARIABLE}: expected a Chromium that answers --version, got {named!r}; {ADVICE}")
        return path
    return next((path for path in map(shutil.which, NAMES) if path and version(path)), None)


def install() -> None:
    """Install Debian's package, as root.

    Raises:
        ValueError: not root, or no apt-get, or apt-get failed; its messages stand above.
    """
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise ValueError(f"chromium: expected one of {', '.join(NAMES)} on PATH, got none that runs; {ADVICE}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
        # its lines go to stderr: stdout carries the path alone
        code = subprocess.run(command, env=quiet, stdout=sys.stderr, stdin=subprocess.DEVNULL).returncode
        if code:
            raise ValueError(f"chromium: expected {' '.join(command)} to succeed, got exit status {code}; {ADVICE}")


def main() -> int:
    try:
        path = find()
        if path is None:
            install()
            path = find()
        if path is None:
            raise ValueError(f"chromium: expected the installed package to run, got none that does; {ADVICE}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
