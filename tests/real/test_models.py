"""Everything that must hold, on weights that somebody else trained: SmolLM2-135M-Instruct, dense and upcycled."""

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


@pytest.fixture(scope="module")
def from_qwen():
    """Qwen3's tokenizer teaches, SmolLM2's learns."""
    return kd.build_tokenizers(teacher=tokenizer("qwen3"), student=tokenizer("smollm2"))


def small(kind: str, **changes):
    """An untrained model with Qwen3's padded vocabulary of 151,936 rows."""
    import transformers

    shape = {"vocab_size": 151_936, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = getattr(transformers, f"{kind}Config")(**(shape | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config).float()


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


def test_verify_a_real_mixture_into_a_student_with_qwens_tokenizer(mixture, to_qwen):
    found = kd.verify(to_qwen, mixture, small("Llama"), all_terms(), window=48)
    print(found)
    assert found.ok, found


def test_verify_a_mixture_with_qwens_tokenizer_into_a_real_student(smollm2, from_qwen):
    teacher = small("Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    found = kd.verify(from_qwen, teacher, smollm2, all_terms(), window=48)
    print(found)
    assert found.ok, found


def test_no_value_is_impossible_at_the_start(mixture, smollm2, from_qwen, to_qwen):
    """Two pretrained models that are one function, with one tokenizer; and two with different tokenizers."""
    texts = [text[:4000] for text in list(assets.sotu().values())[-3:]]
    for pair, student in ((to_qwen, small("Llama")), (kd.build_tokenizers(to_qwen.teacher, to_qwen.teacher), smollm2)):
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
