"""``python -m kd_kit.offline build``: makes every file under ``assets`` again, the trained teacher included.

Fetch, unpack, cut, train, write down: about half an hour on one CPU thread, nearly all of it training.
"""

import argparse
import bz2
import json
import tempfile
from pathlib import Path
from typing import Any

from kd_kit.offline import ASSETS, CHAPTER_BREAK, PARTS
from kd_kit.offline.austen import novels
from kd_kit.offline.cut import prefix_cut
from kd_kit.offline.fetch import AUSTEN, QWEN3, SMOLLM2, source_file
from kd_kit.offline.provenance import provenance
from kd_kit.offline.shapes import student_config, teacher_config

START = "<|endoftext|>"
QWEN3_ENTRIES, QWEN3_SPECIALS = 4064, (START, "<|im_start|>", "<|im_end|>")
SMOLLM2_ENTRIES = 2048
STEPS = 8000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kd_kit.offline")
    verbs = parser.add_subparsers(required=True, metavar="build")
    verb = verbs.add_parser("build", help="make the embedded assets again")
    verb.add_argument("--work", type=Path, default=Path("build/offline"), help="folder of the package files")
    verb.add_argument("--out", type=Path, default=ASSETS, help="the assets folder to write")
    verb.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of the teacher")
    arguments = parser.parse_args()
    build(arguments.work.resolve(), arguments.out.resolve(), arguments.steps)


def build(work: Path, out: Path, steps: int) -> None:
    """Write all assets to ``out``. A failed build leaves the old teacher in place: it is replaced last."""
    texts = novels(source_file(AUSTEN, work).read_bytes())
    write_corpus(texts, out / "corpus")
    print(f"corpus: {sum(map(len, texts.values()))} chapters", flush=True)

    cut = qwen3_cut(source_file(QWEN3, work))
    write_tokenizer(cut, out / "teacher", eos_token=START, pad_token=START)
    cut = smollm2_cut(source_file(SMOLLM2, work))
    write_tokenizer(cut, out / "student", bos_token=START, eos_token=START, unk_token=START)
    student_config(vocabulary=SMOLLM2_ENTRIES).save_pretrained(out / "student")
    print("tokenizers: written", flush=True)

    lessons = [text for novel in PARTS["teacher"] for text in texts[novel]]
    figures = train_teacher(lessons, out / "teacher", steps)
    figures |= measure(texts, out)
    (out / "PROVENANCE.md").write_text(provenance(out, steps=steps, figures=figures), encoding="utf-8")
    print(json.dumps(figures, indent=1), flush=True)


def write_corpus(texts: dict[str, list[str]], folder: Path) -> None:
    """One bzip2 file per novel: on these texts a seventh smaller than xz."""
    folder.mkdir(parents=True, exist_ok=True)
    for novel, chapters in texts.items():
        (folder / f"{novel}.txt.bz2").write_bytes(bz2.compress(CHAPTER_BREAK.join(chapters).encode("utf-8")))


def qwen3_cut(source: Path) -> dict:
    """The teacher's tokenizer: 256 bytes, 3,808 merges, and three specials after them."""
    full = json.loads(source.read_text(encoding="utf-8"))
    return prefix_cut(full, entries=QWEN3_ENTRIES, specials=QWEN3_SPECIALS)


def smollm2_cut(source: Path) -> dict:
    """The student's tokenizer: 17 specials, 235 bytes, 1,796 merges, and the splitting of digits.

    A GGUF file only names its pre-tokenizer ("smollm"), and transformers reads every name as plain byte
    level. The model's own tokenizer splits digits first, so that is put back.
    """
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    full = json.loads(reader.backend_tokenizer.to_str())
    specials = [token["content"] for token in full["added_tokens"]]
    cut = prefix_cut(full, entries=SMOLLM2_ENTRIES, specials=specials)
    digits = {"type": "Digits", "individual_digits": True}
    cut["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, full["pre_tokenizer"]]}
    cut["post_processor"] = None  # the reader's template adds no token
    return cut


def write_tokenizer(cut: dict, folder: Path, **specials: str) -> None:
    """The two files of a fast tokenizer, of the general class: a named class would put its own pattern in."""
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.from_str(json.dumps(cut)).save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_teacher(texts: list[str], folder: Path, steps: int) -> dict[str, Any]:
    """Train the teacher on ``texts`` and put its half-precision weights and configuration into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd_kit.offline.pretrain import token_stream, train

    torch.set_num_threads(1)  # sums in one order, so that a machine's second build equals its first
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = tokenizer.convert_tokens_to_ids(START)
    model = AutoModelForCausalLM.from_config(teacher_config(vocabulary=len(tokenizer), end_of_text=start))
    stream = token_stream(tokenizer, texts, start=start)
    train(model, stream, start=start, steps=steps, log=lambda line: print(line, flush=True))

    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        model.to(torch.float16).save_pretrained(fresh)
        state_both_names(Path(fresh) / "config.json", "num_experts", "num_local_experts")
        for path in sorted(Path(fresh).iterdir()):
            path.chmod(0o644)  # safetensors writes for the owner only
            path.replace(folder / path.name)  # whoever reads meanwhile sees the old file or the new
    return {"parameters": model.num_parameters(), "tokens of the teacher's text": len(stream)}


def state_both_names(path: Path, old: str, new: str) -> None:
    """State a setting under its name in transformers 4 too: version 5 reads both but writes only ``new``."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config[old] = config[new]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def measure(texts: dict[str, list[str]], out: Path) -> dict[str, float]:
    """Held-out figures of what was written, as a user would load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kd_kit.offline.pretrain import bits_per_byte, expert_shares

    held_out = [text for novel in PARTS["held_out"] for text in texts[novel]]
    known = texts["sense_and_sensibility"]
    size = sum(len(text.encode("utf-8")) for text in held_out)
    figures = {}
    for name in ("teacher", "student"):
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in held_out)
        figures[f"{name}: bytes per token, Persuasion"] = round(size / tokens, 3)
    tokenizer = AutoTokenizer.from_pretrained(out / "teacher")
    model = AutoModelForCausalLM.from_pretrained(out / "teacher", dtype=torch.float32)
    start = tokenizer.convert_tokens_to_ids(START)
    for title, part in (("Persuasion (held out)", held_out), ("Sense and Sensibility (trained on)", known)):
        bits = bits_per_byte(model, tokenizer, part, start=start)
        figures[f"teacher: bits per byte, {title}"] = round(bits, 4)
    shares = expert_shares(model, tokenizer, held_out, start=start)
    for layer, working in enumerate((shares > 0.01).sum(-1).tolist()):
        figures[f"teacher: experts with over 1% of the choices, layer {layer}, Persuasion"] = working
    return figures


if __name__ == "__main__":
    main()
