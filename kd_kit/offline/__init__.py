"""The embedded default: a tiny real teacher, a tiny student with another tokenizer, and real English text.

Everything that a first run needs lies in this package, so that it runs with the network off: the teacher is a
Qwen3-style mixture of experts trained on Jane Austen, the student an untrained Llama, and their tokenizers
are cuts of Qwen3's and SmolLM2's, which disagree as the real ones do. ``assets/PROVENANCE.md`` says where
each file comes from; ``python -m kd_kit.offline build`` makes them all again.

The text has three parts: what the student learns from (two novels), what the teacher learnt from (these and
three more, so that it knows what the student cannot), and Persuasion, which neither has seen.
"""

import bz2
from pathlib import Path

TEACHER = "embedded-teacher"
STUDENT = "embedded-student"

ASSETS = Path(__file__).parent / "assets"
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
        ValueError: another name.
    """
    folders = {TEACHER: ASSETS / "teacher", STUDENT: ASSETS / "student"}
    if name not in folders:
        raise ValueError(
            f"asset_folder: expected {TEACHER!r} or {STUDENT!r}, got {name!r}; "
            "give any other model's hub name or folder to transformers directly"
        )
    return folders[name]


def corpus(part: str) -> list[str]:
    """The chapters of one part of the embedded text, in order: one line per paragraph, blank lines between.

    ``"student"``: Northanger Abbey and Sense and Sensibility, 81 chapters, 1.1 MB.
    ``"teacher"``: these, Emma, Mansfield Park and Pride and Prejudice, 245 chapters, 3.5 MB.
    ``"held_out"``: Persuasion, 24 chapters, 0.46 MB; in neither of the others.

    Raises:
        ValueError: another part.

    Example:
        >>> corpus("held_out")[0][:56]
        'Sir Walter Elliot, of Kellynch Hall, in Somersetshire, w'
    """
    if part not in PARTS:
        raise ValueError(f"corpus: expected one of {sorted(PARTS)}, got {part!r}; see the docstring for what they hold")
    chapters: list[str] = []
    for novel in PARTS[part]:
        packed = (ASSETS / "corpus" / f"{novel}.txt.bz2").read_bytes()
        chapters += bz2.decompress(packed).decode("utf-8").split(CHAPTER_BREAK)
    return chapters
