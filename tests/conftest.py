"""Small models, tokenizers and batches that many tests share. Nothing here needs a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is first imported: no test asks the network
# read when torch is first imported: two and more threads add in another order than one, and runs in this process are
# compared bit for bit with runs in others
os.environ["OMP_NUM_THREADS"] = "1"

import dataclasses
import signal
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings

from kd_kit.align import align, byte_ends
from kd_kit.types import IGNORE, DistillBatch

# a shell starts what it runs in the background with Interrupt switched off, for the processes that tests start, too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples on every machine; a slow machine is no failure
settings.register_profile("quick", deadline=None, derandomize=True, database=None)
settings.load_profile("quick")

FAMILIES = ("llama", "gpt2", "phi", "qwen3_moe", "gemma2", "granite", "cohere")


def tiny_config(family: str, vocab: int = 64, **changes):
    """The configuration of a causal language model with two layers of width 16."""
    import transformers

    common = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,  # or else its embedding, which starts every window here, would be 0
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    special = {
        "llama": ("LlamaConfig", common),
        "gpt2": (
            "GPT2Config",
            {
                "vocab_size": vocab,
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 128,
                "bos_token_id": 0,
                "eos_token_id": 0,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
        ),
        "phi": ("PhiConfig", common),
        "qwen3_moe": ("Qwen3MoeConfig", common | experts),
        "gemma2": ("Gemma2Config", common | {"head_dim": 8, "final_logit_softcapping": 2.0}),
        "granite": ("GraniteConfig", common | {"logits_scaling": 0.25}),
        "cohere": ("CohereConfig", common | {"logit_scale": 8.0}),
    }
    name, arguments = special[family]
    return getattr(transformers, name)(**(arguments | changes))


def build_tiny(family: str = "llama", seed: int = 0, spread: float = 12.0, **changes):
    """A tiny causal language model whose predictions are far from uniform, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread if "embed" in name or "head" in name or "wte" in name else 4.0)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias.copy_(torch.linspace(-1, 1, len(bias)))
    return model.eval()


def collate_by_hand(
    items: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]],
    *,
    pad: int = 0,
    more_student: int = 0,
    more_teacher: int = 0,
) -> DistillBatch:
    """A batch of (student ids, their byte lengths, teacher ids, their byte lengths), each with a start token of no
    bytes, padded with ``pad`` and with ``more_*`` further columns of it.
    """
    b = len(items)
    t = max(len(item[0]) for item in items) + more_student
    s = max(len(item[2]) for item in items) + more_teacher
    matched = [align(byte_ends(np.array(item[1])), byte_ends(np.array(item[3]))) for item in items]
    c = max(max(m.spans for m in matched), 1)
    student, teacher = torch.full((b, t), pad), torch.full((b, s), pad)
    targets, teacher_targets = torch.full((b, t), IGNORE), torch.full((b, s), IGNORE)
    target_bytes, index = torch.zeros(b, t, dtype=torch.long), torch.zeros(b, t, dtype=torch.long)
    aligned = torch.zeros(b, t, dtype=torch.bool)
    span_student, span_teacher = torch.zeros(b, c + 1, dtype=torch.long), torch.zeros(b, c + 1, dtype=torch.long)
    span_mask = torch.zeros(b, c, dtype=torch.bool)
    for n, ((s_ids, s_len, t_ids, _), m) in enumerate(zip(items, matched, strict=True)):
        i, j = len(s_ids), len(t_ids)
        student[n, :i], teacher[n, :j] = torch.tensor(s_ids), torch.tensor(t_ids)
        targets[n, : i - 1], teacher_targets[n, : j - 1] = torch.tensor(s_ids[1:]), torch.tensor(t_ids[1:])
        target_bytes[n, : i - 1] = torch.tensor(s_len[1:])
        index[n, :i] = torch.from_numpy(m.teacher_index).clamp(min=0)
        aligned[n, : i - 1] = torch.from_numpy(m.aligned[:-1])
        span_student[n], span_teacher[n] = int(m.student_boundaries[-1]), int(m.teacher_boundaries[-1])
        span_student[n, : m.spans + 1] = torch.from_numpy(m.student_boundaries)
        span_teacher[n, : m.spans + 1] = torch.from_numpy(m.teacher_boundaries)
        span_mask[n, : m.spans] = True
    return DistillBatch(
        student,
        targets,
        target_bytes,
        teacher,
        teacher_targets,
        index,
        aligned,
        torch.flatten(targets != IGNORE).nonzero().squeeze(-1),
        torch.flatten(aligned).nonzero().squeeze(-1),
        aligned,  # no vocabulary here: only aligned positions can be taught
        torch.flatten(aligned).nonzero().squeeze(-1),
        torch.zeros(int(aligned.sum()), 3, dtype=torch.long),
        torch.zeros_like(aligned),  # nor are any two tokens the same bytes
        torch.zeros(0, dtype=torch.long),
        torch.zeros(b, dtype=torch.long),
        span_student,
        span_teacher,
        span_mask,
        _span_rows(span_student, span_teacher, span_mask, t, s),
        torch.arange(b),
        torch.arange(b),
    )


def _span_rows(student, teacher, mask, t: int, s: int) -> torch.Tensor:
    window, span = mask.nonzero(as_tuple=True)
    ends = window * t + student[window, span + 1], window * s + teacher[window, span + 1]
    return torch.stack(ends, dim=-1)


def random_items(seed: int, rows: int, *, student: int = 40, teacher: int = 40, low: int = 12, high: int = 24):
    """Made-up tokenizations of made-up texts; ids below ``student`` and ``teacher``, and a start token of no bytes."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(rows):
        size = int(rng.integers(low, high))
        cuts = [np.sort(rng.permutation(np.arange(1, size))[: size // 2]) for _ in range(2)]
        sides = []
        for cut, vocab in zip(cuts, (student, teacher), strict=True):
            lengths = [0, *np.diff([0, *cut, size]).tolist()]
            sides += [[0, *rng.integers(1, vocab, len(lengths) - 1).tolist()], lengths]
        items.append(tuple(sides))
    return items


@pytest.fixture(scope="session")
def tiny_models():
    """One tiny model of every family, made once."""
    return {family: build_tiny(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def embedded_pair():
    """The tokenizers of the embedded pair."""
    from kd_kit.models import build_tokenizers

    return build_tokenizers()


@pytest.fixture(scope="session")
def embedded_teacher():
    """The embedded teacher in float32 on the CPU; tests may not change it."""
    from kd_kit.models import build_teacher

    return build_teacher(device="cpu")


@pytest.fixture(scope="session")
def embedded_batch(embedded_pair):
    """Three windows of the held-out novel in both tokenizations, of unequal lengths."""
    from kd_kit import offline

    chapter = offline.corpus("held_out")[0]
    items = []
    for text in (chapter[:150], chapter[400:640], "The café cost 1,234 \U0001f642 in 1811.\n\n  (So they said.)"):
        s, s_len, t, t_len = embedded_pair.encode([text])[0]
        start = embedded_pair.student_vocab.start_id, embedded_pair.teacher_vocab.start_id
        items.append(([start[0], *s.tolist()], [0, *s_len.tolist()], [start[1], *t.tolist()], [0, *t_len.tolist()]))
    return collate_by_hand(items)


def live(model, bridge, top_k: int = 64, *, over: str = "taught"):
    """A teacher that is asked for its ``top_k`` largest cells over a bridge, as :func:`bound` terms ask."""
    from kd_kit.readings import BridgeReading, Needs
    from kd_kit.teacher import LiveTeacher

    return LiveTeacher(model, bridge, Needs((BridgeReading("bridge", bridge, top_k, over=over),)))


def cells_of(signal):
    """The cells of the only reading of a signal."""
    (cells,) = signal.cells.values()
    return cells


def bound(term, bridge):
    """The term for a pair of tokenizers of which only the bridge is looked at."""
    from kd_kit.terms import Setup

    return term.bound(Setup(None, None, SimpleNamespace(bridge=bridge)))


def untaught(batch: DistillBatch) -> DistillBatch:
    """The same batch of a pair of tokenizers that never meet: no position can be taught."""
    none = torch.zeros(0, dtype=torch.long)
    return dataclasses.replace(
        batch,
        aligned=torch.zeros_like(batch.aligned),
        aligned_rows=none,
        taught=torch.zeros_like(batch.taught),
        taught_rows=none,
        prefix=none.reshape(0, 3),
        same=torch.zeros_like(batch.same),
        same_rows=none,
    )
