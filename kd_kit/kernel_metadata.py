"""``kernel-metadata.json``: what Kaggle is asked for, made from arguments, and checked before Kaggle's client sees it.

The client ignores keys that it does not know, takes every name of a machine, and only prints a remark when a title
belongs to another address; the server then does something else than was asked for. Here these are errors.

Source: kaggle 2.2.5, ``KaggleApi.kernels_push``; the table of keys in its docs/kernels_metadata.md.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METADATA = "kernel-metadata.json"
PLACEHOLDER = "OWNER"

# Kaggle's limit is "1 MB"; the smaller reading of it.
SOURCE_LIMIT = 1_000_000

MACHINES = (
    "NvidiaTeslaT4",
    "NvidiaTeslaT4Highmem",
    "NvidiaL4",
    "NvidiaL4X1",
    "NvidiaTeslaA100",
    "NvidiaH100",
    "NvidiaRtxPro6000",
    "TpuV5E8",
    "TpuV6E8",
)
P100 = "NvidiaTeslaP100"
# What a session gets instead, as the client says it.
RETIRED = {"TpuV38": "TpuV5E8", "Tpu1VmV38": "TpuV5E8", "TpuV32": "a CPU", "TpuV2256": "a CPU"}

SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

LANGUAGES = ("python", "r", "rmarkdown")
KERNEL_TYPES = {"notebook": (".ipynb",), "script": (".py", ".r", ".R", ".rmd", ".Rmd")}
PINNING = ("original", "latest")
BOOLEANS = ("is_private", "enable_gpu", "enable_tpu", "enable_internet")
SOURCES = ("dataset_sources", "kernel_sources", "competition_sources", "model_sources")
KEYS = (
    "id",
    "id_no",
    "title",
    "code_file",
    "language",
    "kernel_type",
    *BOOLEANS,
    "machine_shape",
    *SOURCES,
    "keywords",
    "docker_image",
    "docker_image_pinning_type",
)


def kernel_metadata(
    owner: str,
    kernel: str,
    *,
    enable_internet: bool,
    title: str | None = None,
    machine_shape: str | None = None,
    enable_gpu: bool | None = None,
    enable_tpu: bool | None = None,
    is_private: bool = True,
    dataset_sources: Sequence[str] = (),
    kernel_sources: Sequence[str] = (),
    competition_sources: Sequence[str] = (),
    model_sources: Sequence[str] = (),
    keywords: Sequence[str] = (),
    language: str = "python",
    kernel_type: str = "notebook",
    code_file: str | None = None,
    docker_image: str | None = None,
    docker_image_pinning_type: str | None = None,
) -> dict[str, Any]:
    """The content of ``kernel-metadata.json``, with Kaggle's own names for its fields. Nothing is checked here.

    Args:
        owner: the Kaggle account; it also takes the place of ``OWNER`` in the sources.
        kernel: the last part of the kernel's address, kaggle.com/code/OWNER/KERNEL.
        enable_internet: always to be said, since Kaggle's documentation and its client differ in the default.
        title: made from ``kernel`` by default. Its address must be ``kernel`` again.
        machine_shape: Kaggle's name of a machine, ``"NvidiaTeslaT4"`` for two T4s; None for a CPU.
        enable_gpu, enable_tpu: follow from ``machine_shape`` by default.
        dataset_sources: ``"owner/slug"`` or ``"owner/slug/version"``.
        kernel_sources: other kernels whose output is attached, in the same form.
        model_sources: ``"owner/model/framework/variation/version"``.

    Example:
        >>> kernel_metadata("ada", "quickstart-cpu", enable_internet=False)["title"]
        'Quickstart Cpu'
    """
    machine = (machine_shape or "").lower()
    metadata: dict[str, Any] = {
        "id": f"{owner}/{kernel}",
        "title": kernel.replace("-", " ").title() if title is None else title,
        "code_file": code_file or f"{kernel}.ipynb",
        "language": language,
        "kernel_type": kernel_type,
        "is_private": is_private,
        "enable_gpu": machine.startswith("nvidia") if enable_gpu is None else enable_gpu,
        "enable_tpu": machine.startswith("tpu") if enable_tpu is None else enable_tpu,
        "enable_internet": enable_internet,
    }
    if machine_shape is not None:
        metadata["machine_shape"] = machine_shape
    named = zip(SOURCES, (dataset_sources, kernel_sources, competition_sources, model_sources), strict=True)
    for field, sources in named:
        metadata[field] = [re.sub(rf"^{PLACEHOLDER}/", f"{owner}/", source) for source in sources]
    metadata["keywords"] = list(keywords)
    if docker_image is not None:
        metadata["docker_image"] = docker_image
    if docker_image_pinning_type is not None:
        metadata["docker_image_pinning_type"] = docker_image_pinning_type
    return metadata


def validate(metadata: dict[str, Any] | str | Path, folder: str | Path | None = None) -> list[str]:
    """Remarks on a kernel's metadata that push may pass over, in sentences; what it may not is an error.

    Args:
        metadata: the content of ``kernel-metadata.json``, or the folder that holds it.
        folder: where its ``code_file`` lies; without it that file is not looked at.

    Raises:
        ValueError: with every problem that was found, one a line, each as ``field: expected X, got Y; what to do``.
    """
    if not isinstance(metadata, dict):
        folder = Path(metadata)
        metadata = read_metadata(folder)
    refuse(metadata, problems(metadata) + ([] if folder is None else source_problems(metadata, Path(folder))))
    return remarks(metadata)


def refuse(metadata: dict[str, Any], found: list[str]) -> None:
    """Raise where problems were found.

    Raises:
        ValueError: with all of them.
    """
    if found:
        name, count = metadata.get("id", "kernel metadata"), f"{len(found)} problem{'s' * (len(found) > 1)}"
        raise ValueError(f"validate: {name!r} has {count}:\n  " + "\n  ".join(found))


def read_metadata(folder: Path) -> dict[str, Any]:
    """What ``kernel-metadata.json`` in a folder says.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        raise ValueError(
            f"kernel metadata: expected {str(path)!r}, which does not exist; build the kernel first: "
            "python -m kd_kit kaggle build KERNEL --owner NAME"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"kernel metadata: expected JSON in {str(path)!r}, got {error}; build it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"kernel metadata: expected an object in {str(path)!r}, got {content!r}; build it again")
    return content


def remarks(metadata: dict[str, Any]) -> list[str]:
    """What is allowed and may yet surprise."""
    said = []
    if str(metadata.get("machine_shape", "")).lower() == P100.lower():
        said.append(
            "machine_shape: Kaggle has retired the P100 and runs such a session on T4 x2; push goes on, and the "
            "notebook adapts to the card that it gets"
        )
    elif metadata.get("enable_gpu") and not metadata.get("machine_shape"):
        said.append("machine_shape: none is named, so Kaggle gives its default GPU, T4 x2")
    return said


def problems(metadata: dict[str, Any]) -> list[str]:
    """Everything that is wrong with the metadata alone, one sentence each."""
    found = []
    for key in metadata:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            meant = f"did you mean {near[0]!r}?" if near else "take it out: Kaggle's client ignores it without a word"
            found.append(f"{key}: expected a key that Kaggle knows, got {key!r}; {meant}")
    found += _identity(metadata)
    for key, allowed in (("language", LANGUAGES), ("kernel_type", tuple(KERNEL_TYPES))):
        if metadata.get(key) not in allowed:
            found.append(f"{key}: expected one of {', '.join(allowed)}, got {metadata.get(key)!r}; write one of them")
    for key in BOOLEANS:
        if key not in metadata:
            if key == "enable_internet":
                found.append(
                    f"{key}: expected true or false, got nothing; write it: Kaggle's documentation and its client "
                    "differ in the default"
                )
        elif not isinstance(metadata[key], bool):
            found.append(f"{key}: expected true or false, got {metadata[key]!r}; write it without quotes")
    found += _machine(metadata)
    for key in SOURCES:
        found += _sources(key, metadata.get(key, []), metadata.get("id"))
    found += _strings("keywords", metadata.get("keywords", []))
    if "docker_image" in metadata and not (isinstance(metadata["docker_image"], str) and metadata["docker_image"]):
        found.append(f"docker_image: expected text, got {metadata['docker_image']!r}; leave the key out for Kaggle's")
    pinning = metadata.get("docker_image_pinning_type", "latest")
    if pinning not in PINNING:
        found.append(f"docker_image_pinning_type: expected one of {', '.join(PINNING)}, got {pinning!r}; write one")
    return found


def _identity(metadata: dict[str, Any]) -> list[str]:
    """Of ``id``, ``id_no``, ``title`` and ``code_file``."""
    found = []
    name, title, number, code = (metadata.get(key) for key in ("id", "title", "id_no", "code_file"))
    slug = None
    if not isinstance(name, str) or name.count("/") != 1:
        found.append(f"id: expected 'owner/slug', got {name!r}; name the account and the kernel, without a version")
    else:
        owner, slug = name.split("/")
        if owner == PLACEHOLDER:
            found.append(
                f"id: expected a Kaggle account, got the placeholder {PLACEHOLDER!r}; "
                "build the kernel for yours: python -m kd_kit kaggle build KERNEL --owner NAME"
            )
        elif not OWNER.fullmatch(owner):
            found.append(f"id: expected a Kaggle account, got {owner!r}; it stands in your profile's address")
        if not SLUG.fullmatch(slug):
            found.append(f"id: expected a slug of a-z, 0-9 and single hyphens, got {slug!r}; rename the kernel")
            slug = None
        elif len(slug) < 5:
            found.append(f"id: expected a slug of at least 5 characters, got {slug!r}; choose a longer one")
            slug = None
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        found.append(f"id_no: expected a whole number, got {number!r}; leave the key out, `id` is enough")
    if not isinstance(title, str) or len(title) < 5:
        found.append(f"title: expected at least 5 characters, got {title!r}; write one whose address is the slug")
    elif not title.isascii():
        found.append(
            f"title: expected plain letters, got {title!r}; the address that Kaggle makes of others is uncertain"
        )
    elif slug is not None and slugified(title) != slug:
        found.append(
            f"title: expected one whose address is {slug!r}, got {title!r} with {slugified(title)!r}; change one of "
            "them: Kaggle takes the title's"
        )
    if not isinstance(code, str) or not code:
        found.append(f"code_file: expected a file's name, got {code!r}; name the one file that is uploaded")
    elif Path(code).name != code:
        found.append(f"code_file: expected a file beside {METADATA}, got {code!r}; put it there")
    else:
        suffixes = KERNEL_TYPES.get(metadata.get("kernel_type", ""))
        if suffixes and Path(code).suffix not in suffixes:
            found.append(
                f"code_file: expected a {metadata['kernel_type']} ({', '.join(suffixes)}), got {code!r}; change it or "
                "kernel_type"
            )
    return found


def _machine(metadata: dict[str, Any]) -> list[str]:
    if "machine_shape" not in metadata:
        return []
    shape = metadata["machine_shape"]
    if not isinstance(shape, str) or not shape:
        return [f"machine_shape: expected a machine's name, got {shape!r}; leave the key out for a CPU"]
    retired = {name.lower(): instead for name, instead in RETIRED.items()}
    if shape.lower() in retired:
        return [
            f"machine_shape: expected a machine that Kaggle still has, got {shape!r}, whose sessions run on "
            f"{retired[shape.lower()]}; name one of {', '.join(MACHINES)}"
        ]
    known = {name.lower(): name for name in (*MACHINES, P100)}
    if known.get(shape.lower()) != shape:
        near = difflib.get_close_matches(shape.lower(), known, 1)
        meant = f"did you mean {known[near[0]]!r}?" if near else "leave the key out for a CPU"
        return [f"machine_shape: expected one of {', '.join(MACHINES)}, got {shape!r}; {meant}"]
    flag = "enable_tpu" if shape.startswith("Tpu") else "enable_gpu"
    if metadata.get(flag) is False or flag not in metadata:
        return [f"{flag}: expected true beside machine_shape {shape!r}, got {metadata.get(flag)!r}; write true"]
    return []


def _strings(key: str, value: Any) -> list[str]:
    if not isinstance(value, list | tuple):
        return [f"{key}: expected a list of text, got {value!r}; put it into [ ]"]
    return [f"{key}: expected text, got {item!r}; put it into quotes" for item in value if not isinstance(item, str)]


FORMS = {
    "dataset_sources": "'owner/slug' or 'owner/slug/version'",
    "kernel_sources": "'owner/slug' or 'owner/slug/version', the slug of at least 5 characters",
    "competition_sources": "'slug'",
    "model_sources": "'owner/model/framework/variation/version', the version a number",
}


def _sources(key: str, value: Any, name: Any) -> list[str]:
    found = _strings(key, value)
    if found:
        return found
    for source in value:
        if source.split("/")[0] == PLACEHOLDER and "/" in source:
            if not str(name).startswith(f"{PLACEHOLDER}/"):  # else said once, of the id
                found.append(f"{key}: expected a Kaggle account, got the placeholder in {source!r}; name the account")
        elif not _is_source(key, source.split("/")):
            found.append(f"{key}: expected {FORMS[key]}, got {source!r}; its address on Kaggle holds these parts")
    found += [
        f"{key}: expected every source once, got {s!r} twice; take one out" for s in set(value) if value.count(s) > 1
    ]
    return found


def _is_source(key: str, parts: list[str]) -> bool:
    plain = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part) for part in parts)
    if key == "competition_sources":
        return plain and len(parts) == 1
    if key == "model_sources":
        return plain and len(parts) == 5 and parts[4].isdecimal()
    versioned = len(parts) == 2 or (len(parts) == 3 and parts[2].isdecimal())
    return plain and versioned and (key == "dataset_sources" or len(parts[1]) >= 5)


def source_problems(metadata: dict[str, Any], folder: Path) -> list[str]:
    """Of the one file that is uploaded: that it is there, readable as what it is said to be, and below 1 MB."""
    code = metadata.get("code_file")
    if not isinstance(code, str) or not code or Path(code).name != code:
        return []  # said already
    path = folder / code
    if not path.is_file():
        return [
            f"code_file: expected {str(path)!r}, which does not exist; build the kernel: "
            "python -m kd_kit kaggle build KERNEL --owner NAME"
        ]
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        return [f"code_file: expected text in UTF-8, got {code!r}: {error}; build the kernel again"]
    return text_problems(metadata, text)


def text_problems(metadata: dict[str, Any], text: str) -> list[str]:
    """Of the text that is to be uploaded as ``code_file``."""
    try:
        sent = sent_text(text) if metadata.get("kernel_type") == "notebook" else text
    except ValueError as error:
        return [f"code_file: expected a notebook, got {metadata['code_file']!r}: {error}; build the kernel again"]
    size = len(sent.encode())
    if size > SOURCE_LIMIT:
        return [
            f"code_file: expected at most {SOURCE_LIMIT:,} bytes of source, got {size:,}; move what is large into a "
            "data set and attach that"
        ]
    return []


def sent_text(notebook: str) -> str:
    """What the client makes of a notebook's text before it sends it: no outputs, whole sources, ASCII.

    Raises:
        ValueError: it is no notebook.
    """
    content = json.loads(notebook)
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise ValueError("expected an object with cells")
    for cell in content["cells"]:
        if cell.get("cell_type") == "code" and "outputs" in cell:
            cell["outputs"] = []
        if isinstance(cell.get("source"), list):
            cell["source"] = "".join(cell["source"])
    return json.dumps(content)


def slugified(title: str) -> str:
    """The address that Kaggle makes of a title in plain letters.

    Example:
        >>> slugified("Distill T4x2, again!")
        'distill-t4x2-again'
    """
    # an apostrophe parts no word, and a comma no number: as the slugs of the client's own library
    text = re.sub(r"(?<=\d),(?=\d)", "", title.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")
