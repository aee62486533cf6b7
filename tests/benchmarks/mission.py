"""The first mission's shape without its files: vocabularies of its sizes, text to cut, models of random weights.

The teacher is a Qwen3-MoE of 24 layers (Huihui-MoE-1B), the student a Llama of 30 (SmolLM-135M). The text is made of
words that both vocabularies hold, of words that only one of them holds whole, and so of positions inside tokens of the
other: 84 to 94% of the student's positions are aligned, as on real English.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from kd_kit.data import DistillData, build_data
from kd_kit.inside import InsideBridge
from kd_kit.pair import TokenizerPair
from kd_kit.types import DistillBatch
from kd_kit.vocab import Vocabulary

STUDENT_HEAD, TEACHER_HEAD = 49_152, 151_936
"""Rows of the two heads; the teacher's has some behind the last entry of its tokenizer."""

STUDENT_WIDTH, TEACHER_WIDTH = 576, 1_024
STUDENT_LAYERS, TEACHER_LAYERS = 30, 24

_TEACHER_TOKENS = 151_669
SHARED = 39_234  # tokens of the same bytes
_LONGEST = 12  # bytes of a token: a space, a word of 7 and an ending of 4
_ENDINGS = 2_000  # of them, without a space before them
_TEACHERS, _STUDENTS = 0.11, 0.05  # shares of the words that only one side has whole


@dataclass(frozen=True)
class Words:
    """What text is made of: words that both vocabularies hold, and those that one of them cuts in two."""

    shared: tuple[bytes, ...]
    teachers: tuple[bytes, ...]
    students: tuple[bytes, ...]


class MadePair(TokenizerPair):
    """Two tokenizers that always take the longest token that fits."""

    @functools.cached_property
    def _ids(self) -> tuple[dict[bytes, int], ...]:
        sides = self.student_vocab, self.teacher_vocab
        return tuple({token: i for i, token in enumerate(v.tokens) if i not in v.special} for v in sides)

    def encode(self, texts: list[str]):
        found = []
        for text in texts:
            student, teacher = (np.array(_longest_first(ids, text.encode())) for ids in self._ids)
            found.append((student, self.student_vocab.lengths[student], teacher, self.teacher_vocab.lengths[teacher]))
        return found


@functools.cache
def made_pair(student: int = STUDENT_HEAD, teacher: int = _TEACHER_TOKENS) -> tuple[MadePair, Words]:
    """Two vocabularies of these sizes, 80% of the smaller one in both, and the words that they hold."""
    rng = np.random.default_rng(0)
    shared = min(SHARED, round(0.8 * min(student, teacher)))
    endings = _strings(rng, min(_ENDINGS, shared // 8), (2, 4))
    letters = [bytes([b]) for b in range(256)]
    words = [b" " + word for word in _strings(rng, shared - len(letters) - len(endings), (3, 7))]
    long = _joined(rng, words, endings, student + teacher - 2 * shared - 2)
    students, teachers = long[: student - shared - 1], long[student - shared - 1 :]
    both = [b"<s>", *letters, *endings, *words]
    vocabs = [
        Vocabulary(f"made {side}", (*both, *own), frozenset({0}), 0, 0, 0)
        for side, own in (("teacher", teachers), ("student", students))
    ]
    pair = MadePair(None, None, *vocabs, InsideBridge(*vocabs), f"made {student} {teacher}")
    return pair, Words(tuple(words), tuple(teachers), tuple(students))


def made_data(window: int, *, batch_size: int = 1, windows: int = 8, sizes: tuple[int, int] | None = None):
    """Data of at least ``windows`` windows of this length, and a few held out.

    Args:
        sizes: entries of the student's and the teacher's vocabulary; the mission's if left out.
    """
    pair, words = made_pair() if sizes is None else made_pair(*sizes)
    rng = np.random.default_rng(1)
    text = lambda: _text(rng, words, window).decode()  # noqa: E731 - twice, below
    data: DistillData = build_data(
        [text() for _ in range(windows)], pair, held_out=[text(), text()], window=window, batch_size=batch_size
    )
    return data


def full_batch(data: DistillData, windows: int) -> DistillBatch:
    """The longest windows of the training text as one batch, on the host."""
    lengths = [len(data.train.ids(i)[0]) for i in range(len(data.train))]
    return data.train.collate(sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[:windows])


def _text(rng, words: Words, tokens: int) -> bytes:
    kinds = rng.choice(3, round(1.1 * tokens), p=[1 - _TEACHERS - _STUDENTS, _TEACHERS, _STUDENTS])
    every = (words.shared, words.teachers, words.students)
    return b"".join([every[kind][rng.integers(len(every[kind]))] for kind in kinds])


def _strings(rng, count: int, lengths: tuple[int, int]) -> list[bytes]:
    """Different strings of letters."""
    found: dict[bytes, None] = {}
    while len(found) < count:
        letters = rng.integers(ord("a"), ord("z") + 1, (count, lengths[1]), dtype=np.uint8)
        for row, length in zip(letters, rng.integers(lengths[0], lengths[1] + 1, count), strict=True):
            found[row[:length].tobytes()] = None
    return list(found)[:count]


def _joined(rng, words: list[bytes], endings: list[bytes], count: int) -> list[bytes]:
    """Different words with endings, none of which is a word itself."""
    known, found = set(words), {}
    while len(found) < count:
        for a, b in zip(rng.integers(len(words), size=count), rng.integers(len(endings), size=count), strict=True):
            if (word := words[a] + endings[b]) not in known:
                found[word] = None
    return list(found)[:count]


def _longest_first(ids: dict[bytes, int], text: bytes) -> list[int]:
    longest, out, at = _LONGEST, [], 0
    while at < len(text):
        length = next(n for n in range(longest, 0, -1) if text[at : at + n] in ids)
        out.append(ids[text[at : at + length]])
        at += length
    return out


class Read(nn.Module):
    """A language model whose body has read its text already: final hidden states, and a head above them.

    Logits have a standard deviation of 4 nats: 64 tokens then hold some 80% of the mass, as a real teacher's do.
    """

    def __init__(self, windows: int, positions: int, width: int, rows: int, *, seed: int, device="cpu"):
        super().__init__()
        generator = torch.Generator(device).manual_seed(seed)
        self.body = _Answer(torch.empty(windows, positions, width, device=device).normal_(generator=generator))
        self.head = nn.Linear(width, rows, bias=False, device="meta")
        weight = torch.empty(rows, width, device=device).normal_(0, 4 * width**-0.5, generator=generator)
        self.head.weight = nn.Parameter(weight)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self) -> nn.Module:
        return self.body

    @property
    def hidden(self) -> nn.Parameter:
        """[windows, positions, width], what the body gives out."""
        return self.body.hidden


class _Output(NamedTuple):
    last_hidden_state: torch.Tensor


class _Answer(nn.Module):
    """A body that gives the same hidden states whatever it is asked."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = nn.Parameter(hidden)

    def forward(self, input_ids, use_cache: bool):
        return _Output(self.hidden)


_TEACHER = {
    "vocab_size": TEACHER_HEAD,
    "hidden_size": TEACHER_WIDTH,
    "num_hidden_layers": TEACHER_LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 3,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 3_072,
    "intermediate_size": 3_072,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
_STUDENT = {
    "vocab_size": STUDENT_HEAD,
    "hidden_size": STUDENT_WIDTH,
    "intermediate_size": 1_536,
    "num_hidden_layers": STUDENT_LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2_048,
}


def build_teacher(*, device="cpu", dtype=torch.float32, **changes) -> nn.Module:
    """A Qwen3-MoE with three experts per layer, of which a token passes one; random weights, frozen.

    Args:
        changes: of its configuration.
    """
    return _random("qwen3_moe", _TEACHER | changes, device, dtype).requires_grad_(False).eval()


def build_student(*, device="cpu", **changes) -> nn.Module:
    """A Llama of SmolLM-135M's shape; random weights in float32."""
    return _random("llama", _STUDENT | changes, device, torch.float32).train()


def _random(family: str, settings: dict, device, dtype) -> nn.Module:
    """A model of the configuration; its matrices repeat a stretch of random numbers, which is made in no time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.device(device):
        body = model.get_decoder()
        body.rotary_emb = type(body.rotary_emb)(config=config)  # holds frequencies, which are no random numbers
    stretch = torch.empty(2**22, device=device).normal_(0, 0.02, generator=torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # of a norm
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(stretch)):
                part = flat[start : start + len(stretch)]
                part.copy_(stretch[: len(part)])
    return model


def gigaflops(teacher_layers: int, student_layers: int, tokens: int, *, window: int = 512) -> dict[str, float]:
    """GFLOP of ``tokens`` tokens in the parts of a step; two per multiplication, attention over half a window.

    The student's forward and backward pass, which costs twice the forward one; the teacher's forward pass.
    """
    half = window / 2
    teacher = 2 * TEACHER_WIDTH * (2 * 2_048 + 2 * 1_024 + 3 * 3_072) + 4 * half * 2_048
    student = 2 * STUDENT_WIDTH * (2 * 576 + 2 * 192 + 3 * 1_536) + 4 * half * 576
    return {
        "teacher's body": teacher_layers * teacher * tokens / 1e9,
        "teacher's head": 2 * TEACHER_HEAD * TEACHER_WIDTH * tokens / 1e9,
        "student's body": 3 * student_layers * student * tokens / 1e9,
        "student's head": 3 * 2 * STUDENT_HEAD * STUDENT_WIDTH * tokens / 1e9,
    }
