"""The embedded default: a tiny real teacher, a tiny student with another tokenizer, and real English text.

Everything that a first run needs lies in this package, so that it runs with the network off: the teacher is a
Qwen3-style mixture of experts trained on Jane Austen, the student an untrained Llama, and their tokenizers
are cuts of Qwen3's and SmolLM2's, which disagree as the real ones do. ``assets/PROVENANCE.md`` says where
each file comes from; ``python -m kd_kit.offline build`` makes them all again.

A wheel inside a Kaggle notebook has no room for them. There they are one attached file, ``embedded_pair.whl`` (a zip;
Kaggle would unpack what it knows as one), checked against the hash that the wheel brings.

The text has three parts: what the student learns from (two novels), what the teacher learnt from (these and
three more, so that it knows what the student cannot), and Persuasion, which neither has seen.
"""

import bz2
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from kd_kit.kaggle_place import attached, kaggle_input

TEACHER = "embedded-teacher"
STUDENT = "embedded-student"

ASSETS = Path(__file__).parent / "assets"
# The pair as an attached file, and what a wheel without the pair knows of it.
PAIR_FILE = "embedded_pair.whl"
PAIR_RECORD = "embedded_pair.json"
CHAPTER_BREAK = "\n\f\n"

# The novels of each part. The student's 1.1 MB are also the teacher's: it is to be taught on text that its
# teacher knows well.
PARTS = {
    "student": ("northanger_abbey", "sense_and_sensibility"),
    "teacher": ("emma", "mansfield_park", "northanger_abbey", "pride_and_prejudice", "sense_and_sensibility"),
    "held_out": ("persuasion",),
}

__all__ = ["STUDENT", "TEACHER", "asset_folder", "corpus"]


def asset_folder(name: str) -> Path:
    """The folder that ``transformers``' ``from_pretrained`` takes for one of the two embedded names.

    ``TEACHER`` has configuration, tokenizer and weights (float16: pass a ``dtype`` to compute in another);
    ``STUDENT`` has no weights, since it starts from scratch.

    Raises:
        ValueError: another name, or the pair neither lies in the package nor is attached.
    """
    folders = {TEACHER: "teacher", STUDENT: "student"}
    if name not in folders:
        raise ValueError(
            f"asset_folder: expected {TEACHER!r} or {STUDENT!r}, got {name!r}; "
            "give any other model's hub name or folder to transformers directly"
        )
    return assets() / folders[name]


def corpus(part: str) -> list[str]:
    """The chapters of one part of the embedded text, in order: one line per paragraph, blank lines between.

    ``"student"``: Northanger Abbey and Sense and Sensibility, 81 chapters, 1.1 MB.
    ``"teacher"``: these, Emma, Mansfield Park and Pride and Prejudice, 245 chapters, 3.5 MB.
    ``"held_out"``: Persuasion, 24 chapters, 0.46 MB; in neither of the others.

    Raises:
        ValueError: another part, or the pair neither lies in the package nor is attached.

    Example:
        >>> corpus("held_out")[0][:56]
        'Sir Walter Elliot, of Kellynch Hall, in Somersetshire, w'
    """
    if part not in PARTS:
        raise ValueError(f"corpus: expected one of {sorted(PARTS)}, got {part!r}; see the docstring for what they hold")
    chapters: list[str] = []
    for novel in PARTS[part]:
        packed = (assets() / "corpus" / f"{novel}.txt.bz2").read_bytes()
        chapters += bz2.decompress(packed).decode("utf-8").split(CHAPTER_BREAK)
    return chapters


def assets() -> Path:
    """The folder with the pair and its text: the package's own, else the attached one, unpacked for this machine.

    Raises:
        ValueError: it is not there, or it is another one than this package was built with.
    """
    if (ASSETS / "teacher").is_dir():
        return ASSETS
    record = Path(__file__).parent / PAIR_RECORD
    if not record.is_file():
        raise ValueError(
            f"kd_kit.offline: expected the embedded pair in {str(ASSETS)!r}, which is not there; install the package "
            "with its data, from a clone"
        )
    digest = json.loads(record.read_text(encoding="utf-8"))["sha256"]
    unpacked = Path(tempfile.gettempdir()) / f"kd_kit-embedded-pair-{digest[:16]}"
    if unpacked.is_dir():
        return unpacked
    found = {}
    for folder in attached(PAIR_FILE):
        data = (folder / PAIR_FILE).read_bytes()
        found[str(folder / PAIR_FILE)] = hashlib.sha256(data).hexdigest()
        if found[str(folder / PAIR_FILE)] == digest:
            return _unpack(data, unpacked)
    if found:
        other = ", ".join(f"{path} with {sha}" for path, sha in found.items())
        raise ValueError(
            f"kd_kit.offline: expected an embedded pair with SHA-256 {digest}, got {other}; attach the one that was "
            "built with this notebook: delete the data set kd-kit-embedded-pair of your account and push again"
        )
    raise ValueError(
        f"kd_kit.offline: expected the embedded pair ({PAIR_FILE}) in an attached data set, got none under "
        f"{kaggle_input()}; attach OWNER/kd-kit-embedded-pair in the editor (Add Input, Your Work), or build the "
        "kernel with --dataset OWNER/kd-kit-embedded-pair and push it, which makes that data set"
    )


def _unpack(data: bytes, folder: Path) -> Path:
    """The files of a zip in a folder that appears whole or not at all, also with several processes at once."""
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}-"))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(part)
        os.replace(part, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same files
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
