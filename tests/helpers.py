"""Small builders that the tests share: the embedded pair, a two-layer student, a few pages of text, tiny runs."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is first imported: no test asks the network

import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kd_kit import build_data, build_teacher, build_tokenizers, build_trainer, kd_term, lm_term
from kd_kit.history import History
from kd_kit.inside import InsideBridge
from kd_kit.offline import STUDENT, asset_folder, corpus
from kd_kit.pair import TokenizerPair
from kd_kit.session import Session
from kd_kit.tensor_tree import flatten_optimizer
from kd_kit.terms import LossTerm
from kd_kit.types import LossValue
from kd_kit.vocab import Vocabulary

ROOT = Path(__file__).resolve().parent.parent

TIMES = ("seconds", "tokens_per_second", "seconds_left", "seconds_to_finish", "times_floor")
"""Fields of a record that two equal runs need not share."""


@functools.cache
def pair():
    return build_tokenizers()


@functools.cache
def teacher(dtype: torch.dtype | None = None):
    """The embedded teacher; frozen, so the tests may share it."""
    return build_teacher(device="cpu", dtype=dtype)


def tiny_student(seed: int = 0, **changes):
    """The embedded student's configuration with two layers of width 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(asset_folder(STUDENT))
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    for name, value in (small | {"initializer_range": 0.1} | changes).items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float().train()


def pages(count: int = 8, size: int = 500) -> list[str]:
    """The first paragraphs of ``count`` chapters, each a document."""
    return [chapter[:size] for chapter in corpus("student")[:count]]


@functools.cache
def small_data(batch_size: int = 2, window: int = 32, count: int = 8, size: int = 500):
    # so many windows to a batch, whatever their lengths
    return build_data(pages(count, size), pair(), held_out=0.25, window=window, batch_size=batch_size, pack=False)


class ToyPair(TokenizerPair):
    """Two vocabularies that read a text greedily, each time with the longest of their tokens that fits."""

    def encode(self, texts: list[str]):
        found = []
        for text in texts:
            sides = []
            for vocab in (self.student_vocab, self.teacher_vocab):
                ids = np.array(greedy(vocab, text.encode()), dtype=np.int64)
                sides += [ids, vocab.lengths[ids]]
            found.append(tuple(sides))
        return found


def greedy(vocab: Vocabulary, text: bytes) -> list[int]:
    ids = {t: i for i, t in reversed(list(enumerate(vocab.tokens))) if t and i not in vocab.special}
    longest, out, at = max(map(len, ids)), [], 0
    while at < len(text):
        found = next(ids[text[at : at + n]] for n in range(longest, 0, -1) if text[at : at + n] in ids)
        out.append(found)
        at += len(vocab.tokens[found])
    return out


LETTERS = (b"<s>", b"a", b"b", b"c", b"d", b"e", b"f", b" ", b"\n")
"""A start token, and every byte of :func:`toy_texts`."""

TOY_STUDENT = (*LETTERS, b"ab", b"cd", b" a", b"ef", b"de", b"bc", b"\n ", b"   ", b"fab", b" cd", b"ee")
TOY_TEACHER = (
    *LETTERS,
    b" ab",
    b"abc",
    b"cd",
    b"cde",
    b"ef",
    b"fa",
    b" a",
    b"  ",
    b"    ",
    b"\n\n",
    b"bcd",
    b"ab",
    b"  a",
)


def toy_vocabulary(*tokens: bytes, special: tuple[int, ...] = (0,)) -> Vocabulary:
    return Vocabulary("toy", tokens, frozenset(special), 0, 0, 0)


def toy_pair(teacher=TOY_TEACHER, student=TOY_STUDENT, *, specials=((0,), (0,))) -> ToyPair:
    """A pair of tokenizers of a few dozen tokens; the first of each starts and ends documents."""
    vocabs = [toy_vocabulary(*t, special=s) for t, s in zip((teacher, student), specials, strict=True)]
    return ToyPair(None, None, *vocabs, InsideBridge(*vocabs), f"{vocabs}{teacher}{student}")


def toy_texts(count: int = 8, size: int = 60, seed: int = 0) -> list[str]:
    """Random letters with spaces and line ends, also several of them in a row."""
    rng = np.random.default_rng(seed)
    pieces = ["a", "b", "c", "d", "e", "f", "ab", "bcd", "cde", "efab", " ", " ", " a", " cd", "   ", "\n\n  ", "\n"]
    return ["".join(rng.choice(pieces, size))[:size] + "f" for _ in range(count)]


def toy_data(pair: ToyPair, *, window: int = 24, batch_size: int = 3, **texts):
    return build_data(toy_texts(**texts), pair, held_out=0.2, window=window, batch_size=batch_size)


class Part(nn.Module):
    """A term with parameters of its own: it guesses one number from the student's hidden states."""

    def __init__(self, width: int = 32, seed: int = 0):
        super().__init__()
        self.guess = nn.Linear(width, 1)
        with torch.no_grad():
            self.guess.weight.normal_(generator=torch.Generator().manual_seed(seed))
            self.guess.bias.zero_()

    def forward(self, output, signal, batch) -> LossValue:
        rows = output.hidden.flatten(0, 1)[batch.rows]
        error = (self.guess(rows).squeeze(-1).float() - 1.0) ** 2
        return LossValue(error.sum(), torch.tensor(float(len(rows))))


def part_term(weight: float = 0.1, seed: int = 0) -> LossTerm:
    return LossTerm(name="part", weight=weight, unit="", healthy=(0, 100), value=Part(seed=seed))


def session_at(folder: Path, *, precision: str = "no") -> Session:
    """On the CPU, where two equal runs are equal bit for bit, also on a machine with a GPU."""
    return Session(folder, device="cpu", precision=precision)


def make_trainer(folder: Path, *, student=None, data=None, session=None, model="embedded", **arguments):
    """A trainer of a few steps on the embedded pair; ``model`` is the teacher."""
    arguments = {"steps": 6, "eval_every": 2, "eval_windows": 4, "learning_rate": 1e-2} | arguments
    arguments.setdefault("terms", [lm_term(0.1), kd_term(0.9, top_k=8)])
    return build_trainer(
        student if student is not None else tiny_student(),
        teacher() if model == "embedded" else model,
        data or small_data(),
        session=session or session_at(folder),
        **arguments,
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """Everything that was trained, copied."""
    return {name: p.detach().clone() for name, p in trainer.module.named_parameters()}


def assert_same_tensors(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_run(one, other) -> None:
    """Two trainers hold the same weights and optimizer state, bit for bit, and measured the same."""
    assert one.step == other.step
    assert_same_tensors(weights_of(one), weights_of(other))
    tensors, described = flatten_optimizer(one.optimizer.state_dict())
    other_tensors, other_described = flatten_optimizer(other.optimizer.state_dict())
    assert described == other_described
    assert_same_tensors(tensors, other_tensors)
    assert measured(one.history) == measured(other.history)


def measured(history: History) -> list[dict]:
    """What was measured, without times and events."""
    kept = [r for r in history.records if r["kind"] in ("train", "eval", "reference")]
    return [{key: value for key, value in r.items() if key not in TIMES} for r in kept]


def with_scaler(trainer, monkeypatch, scale: float = 2.0**12):
    """The trainer of a card without bfloat16: its gradients are scaled. Here on the CPU, where nothing overflows."""
    from accelerate.optimizer import AcceleratedOptimizer

    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator = trainer.accelerator
    monkeypatch.setattr(type(accelerator), "mixed_precision", property(lambda self: "fp16"))
    accelerator.native_amp, accelerator.scaler = True, scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    accelerator._optimizers = [trainer.optimizer]
    return trainer


def naive_nats(model, ids: torch.Tensor, targets: torch.Tensor) -> float:
    """Negative log-likelihood of one row's targets from the model's own logits, one position at a time."""
    from kd_kit.types import IGNORE

    with torch.no_grad():
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].double()
    total = 0.0
    for position, target in enumerate(targets.tolist()):
        if target != IGNORE:
            row = logits[position]
            total += float(torch.logsumexp(row, 0) - row[target])
    assert math.isfinite(total)
    return total
