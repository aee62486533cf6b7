"""Tokenizers, teachers and students by name, folder, GGUF file, or the embedded pair.

What comes back are the plain objects of transformers that a user already knows. transformers is imported inside the
builders: it takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from kd_kit import offline
from kd_kit.cards import profile_for
from kd_kit.data import DistillData
from kd_kit.experts import ask_once_per_layer
from kd_kit.head import alone_with, body_of, head_of
from kd_kit.modes import modes_kept
from kd_kit.pair import TokenizerPair, pair_tokenizers
from kd_kit.processes import is_first, own_device
from kd_kit.pruning import kept_layers, shorter_config
from kd_kit.retokenise import name_specials, retokenised
from kd_kit.spelling import read_vocabulary
from kd_kit.students import shortened
from kd_kit.vocab import Vocabulary


def _locate(name: str | os.PathLike, where: str) -> tuple[str, dict]:
    """The path or hub name that transformers wants, and extra arguments (for a GGUF file).

    Raises:
        ValueError: a path that is no model folder and no GGUF file.
    """
    text = os.fspath(name)
    if text in (offline.TEACHER, offline.STUDENT):
        return str(offline.asset_folder(text)), {}
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{where}: expected a GGUF file, got {text!r}, which does not exist; check the path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "tokenizer_config.json").is_file():
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ValueError(
                f"{where}: expected a model folder with config.json, got {text!r}, which holds {inside}; "
                "pass the folder that save_pretrained wrote"
            )
        return str(path), {}
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ValueError(f"{where}: expected a model folder, got {text!r}, which does not exist; check the path")
    return text, {}


def _from_pretrained(loader, name: str | os.PathLike, where: str, **arguments):
    located, extra = _locate(name, where)
    try:
        with _no_progress_bars():
            return loader.from_pretrained(located, **extra, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        hint = (
            "check the folder (weights missing: build_student(..., from_scratch=True); tokenizer missing: save it "
            "there)"
            if Path(located).is_dir()
            else "no folder of that name is here, so it was looked for on the hub: check the spelling, that the "
            "internet is on and, for a gated model, that you are logged in"
        )
        raise ValueError(
            f"{where}: expected a model that transformers can load, got {os.fspath(name)!r} "
            f"({type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}); {hint}"
        ) from error


@contextlib.contextmanager
def _no_progress_bars():
    """A tiny model's loading bar is noise in a notebook's saved output; the user's own setting comes back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build_tokenizers(teacher=offline.TEACHER, student=offline.STUDENT) -> TokenizerPair:
    """Load both tokenizers, read them as bytes and build the bridge between their vocabularies.

    Args:
        teacher, student: a hub name, a folder, a GGUF file, or a tokenizer object of transformers. The embedded pair
            when left out.

    Raises:
        ValueError: nothing loadable there, or a tokenizer that cannot be read as bytes.
    """
    teacher_tokenizer, teacher_name = _load_tokenizer(teacher, "build_tokenizers", "teacher")
    student_tokenizer, student_name = _load_tokenizer(student, "build_tokenizers", "student")
    return pair_tokenizers(teacher_tokenizer, student_tokenizer, teacher_name=teacher_name, student_name=student_name)


def _load_tokenizer(source, where: str, who: str):
    """A tokenizer and what to call it; an object of transformers is taken as it is."""
    from transformers import AutoTokenizer

    if hasattr(source, "convert_ids_to_tokens"):
        return source, getattr(source, "name_or_path", "") or who
    folder, extra = _locate(source, f"{where}({who}=)")
    # transformers 5.0 makes an empty tokenizer of a folder that holds none
    if Path(folder).is_dir() and not extra and not any(_is_of_a_tokenizer(path) for path in Path(folder).iterdir()):
        raise ValueError(
            f"{where}({who}=): expected a folder with a tokenizer, got {os.fspath(source)!r}, which has none; save it "
            "there (tokenizer.save_pretrained), or name another place"
        )
    return _from_pretrained(AutoTokenizer, source, f"{where}({who}=)"), os.fspath(source)


def _is_of_a_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab", "merges")) or path.suffix in (".model", ".tiktoken")


def _gguf_arguments() -> dict:
    """Unpack GGUF weights to plain ones: packed weights neither train nor save."""
    try:
        from transformers import GgufConfig
    except ImportError:  # before 5.2x plain weights are what one gets
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def build_teacher(
    name: str | os.PathLike = offline.TEACHER,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
):
    """A frozen causal language model in evaluation mode, dense or mixture of experts.

    Args:
        name: a hub name, a folder, a GGUF file, or the embedded teacher.
        device: where it lives; the first GPU if there is one, of several processes each its own. On a second one
            ("cuda:1") the student has the first for itself.
        dtype: half precision on a GPU, since a frozen teacher needs no more: bfloat16 from capability 8.0, float16
            below; float32 on the CPU.
        quantize: "nf4" or "int8" keeps the linear layers of the body in 4 or 8 bits, for a teacher that is too large
            otherwise; slower, and a little less exact. Needs bitsandbytes (``pip install 'kd_kit[quantized]'``). What
            share of the weights that is gets printed: transformers 5 keeps experts in one tensor a layer, which
            bitsandbytes leaves as it is.

    Raises:
        ValueError: nothing loadable there, or bitsandbytes is missing.
    """
    import transformers

    device = torch.device(device or own_device())
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise ValueError(
            f"build_teacher: expected device= as 'cpu' or one of {cards} cards, got {str(device)!r}; leave it out, "
            "or take kd.doctor().teacher_device"
        )
    profile = profile_for(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)
    dtype = dtype or getattr(torch, profile.teacher_dtype)
    extra = _gguf_arguments() if os.fspath(name).endswith(".gguf") else {}
    extra |= profile.experts_argument(transformers.__version__)
    if quantize is not None:
        extra |= _quantized(quantize, dtype, os.fspath(name).endswith(".gguf")) | {"device_map": {"": device}}
    model = _from_pretrained(transformers.AutoModelForCausalLM, name, "build_teacher", dtype=dtype, **extra)
    if quantize is None:
        model = model.to(device)
    else:
        packed, whole = _packed_bytes(model)
        if is_first():
            print(f"teacher: {packed / 1e6:,.1f} of {whole / 1e6:,.1f} MB of weights are in {quantize}")
    ask_once_per_layer(model)
    return model.eval().requires_grad_(False)


def _quantized(kind: str, dtype: torch.dtype, gguf: bool) -> dict:
    """What transformers is told so that a model's linear layers are packed."""
    if kind not in ("nf4", "int8"):
        raise ValueError(f"build_teacher: expected quantize= 'nf4', 'int8' or None, got {kind!r}")
    if gguf:
        raise ValueError(
            "build_teacher: expected a hub name or a folder with quantize=, got a GGUF file, which is packed already; "
            "leave quantize= out, or load the model that it was made from"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"build_teacher: expected bitsandbytes for quantize={kind!r}, got an environment without it; "
            "pip install 'kd_kit[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    how = {"load_in_8bit": True}
    if kind == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(llm_int8_skip_modules=list(_NEVER_PACKED), **how)}


_NEVER_PACKED = ("lm_head", "embed_out", "gate", "router", "shared_expert_gate")
"""Heads, which the kit multiplies by itself, and routers: a few numbers that decide which experts run."""


def _packed_bytes(model) -> tuple[int, int]:
    """Bytes of the weights that are packed, and of all."""
    sizes = [(p.element_size() == 1, p.numel() * p.element_size()) for p in model.parameters()]
    return sum(size for packed, size in sizes if packed), sum(size for _, size in sizes)


def build_student(
    name=offline.STUDENT,
    *,
    layers: int | Sequence[int] | None = None,
    keep: str = "ends",
    data: DistillData | None = None,
    from_scratch: bool | None = None,
    seed: int = 0,
    tokenizer=None,
):
    """A trainable causal language model with float32 weights, whole or with some of its layers.

    Args:
        name: a hub name, a folder, a GGUF file, or the embedded student; with ``layers=`` also a model that you have,
            which is copied.
        layers: keep so many of its layers, or those of these numbers (from 1).
        keep: which ones, where ``layers`` is a number: "ends" leaves out a block in the middle, "spaced" keeps every
            k-th with the first and the last. See :func:`kd_kit.pruning.kept_layers`.
        data: with ``layers=``, print bits per byte of 16 of its held-out windows: as the student starts, with all
            layers, and the same shape from scratch. Its student side must be this model's tokenizer, or ``tokenizer``.
        from_scratch: take only the configuration and draw new weights. None: the embedded student always, anything
            else never.
        seed: of the new weights; the caller's random state is left as it was.
        tokenizer: a tokenizer object, folder or hub name: the model's own tokenizer is replaced by this one, and rows
            are made from the rows of the old tokens that spell it (:func:`kd_kit.retokenise.retokenised`).

    Raises:
        ValueError: nothing loadable there, layers that are not there (:func:`kd_kit.pruning.pruned`), or a tokenizer
            that cannot be read as bytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if layers is None and data is not None:
        raise ValueError("build_student: expected layers= with data=, got data= alone; kd.score says how good it is")
    if layers is not None and isinstance(name, nn.Module):
        if tokenizer is not None:
            raise ValueError(
                "build_student: expected a name or a folder with tokenizer=, so that the old tokenizer is found there, "
                f"got a {type(name).__name__}; give it the tokenizer first: kd_kit.retokenise.retokenised(model, old, "
                "new)"
            )
        return shortened(name, layers, keep, data)
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(
            f"build_student: expected a hub name, a folder or a GGUF file, got {type(name).__name__}; a model that you "
            "have already is a student as it is, or with layers= the source of a shorter one"
        )
    if from_scratch is None:
        from_scratch = os.fspath(name) == offline.STUDENT
    if from_scratch and data is not None:
        raise ValueError(
            "build_student: expected a source with weights with data=, got new weights, which start from nothing; "
            "leave data= out"
        )
    if from_scratch:
        config = _from_pretrained(AutoConfig, name, "build_student")
        config.dtype = torch.float32
        if tokenizer is not None:
            new, new_name = _load_tokenizer(tokenizer, "build_student", "tokenizer")
            config.get_text_config().vocab_size = read_vocabulary(new, new_name).size
            name_specials(config.get_text_config(), new)
        if layers is not None:
            config = shorter_config(config, kept_layers(config.get_text_config().num_hidden_layers, layers, keep))
        with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the states of GPUs are not touched
            torch.default_generator.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
    else:
        extra = _gguf_arguments() if os.fspath(name).endswith(".gguf") else {}
        model = _from_pretrained(AutoModelForCausalLM, name, "build_student", dtype=torch.float32, **extra)
        if tokenizer is not None:
            old, _ = _load_tokenizer(name, "build_student", "name")
            model = retokenised(model, old, _load_tokenizer(tokenizer, "build_student", "tokenizer")[0])
        if layers is not None:
            model = shortened(model, layers, keep, data)
    return model.train()


def check_model(model, vocab: Vocabulary, window: int, who: str) -> None:
    """Raise before any long work if a model cannot serve this tokenizer, this window or this kit's head pass.

    Raises:
        ValueError: fewer embedding rows than tokens, a window longer than the model's context, or a head whose
            logits are not what :class:`kd_kit.head.Head` computes.
    """
    head = head_of(model)
    rows, entries = head.weight.shape[0], vocab.size
    if rows < entries:
        raise ValueError(
            f"build_trainer: expected a {who} with at least {entries} rows for its tokenizer's {entries} entries, "
            f"got {rows}; the tokenizer belongs to another model"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and window > context:
        raise ValueError(
            f"build_trainer: expected a window within the {who}'s context of {context} tokens, got {window}; "
            f"call build_data(window={context}) or less"
        )
    ids = torch.arange(min(8, entries), device=head.weight.device).unsqueeze(0)
    with alone_with(model), modes_kept(model), torch.no_grad():
        model.eval()
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        ours = head.logits(body_of(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not theirs.isfinite().all():
        raise ValueError(
            f"build_trainer: expected finite {who} logits, got NaN or infinity from {type(model).__name__} in "
            f"{head.weight.dtype}; load it in a dtype that holds its range: build_{who}(..., dtype=torch.float32)"
            if who == "teacher"
            else f"build_trainer: expected finite {who} logits, got NaN or infinity from {type(model).__name__}; "
            "its weights are broken, so load it again"
        )
    gap = (theirs - ours).abs().max() / theirs.abs().max().clamp(min=1e-6)
    if not gap < 0.01:
        raise ValueError(
            f"build_trainer: expected {who} logits that are a linear head over its final hidden states, got logits "
            f"that differ by {float(gap):.0%} from that; {type(model).__name__} does something to its logits that "
            "kd_kit.head does not know (it knows bias, scale and soft-capping)"
        )


def write_student(student, folder: Path, tokenizer=None) -> None:
    """A plain transformers folder: weights, configuration and, if given, the tokenizer."""
    with _no_progress_bars():
        student.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for the owner only; this is to be given away
