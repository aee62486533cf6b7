import pytest
import torch
from conftest import build_tiny
from helpers import make_trainer, small_data, tiny_student

import kd_kit as kd
from kd_kit.head import CHUNK_BYTES, body_of
from kd_kit.memory import Memory, device_memory, estimate_memory, memory_of, process_peak, size_of

SIZES = {
    "parameters": 1000,
    "trained": 900,
    "teacher_bytes": 5000,
    "tokens": 64,
    "layers": 2,
    "width": 16,
    "inner": 32,
    "vocabulary": 100,
}


def test_every_figure_by_hand():
    assert estimate_memory(**SIZES) == Memory(
        weights=4000,
        gradients=3600,
        optimizer=7200,
        teacher=5000,
        activations=64 * 2 * (38 * 16 + 16 * 32),
        logits=4 * 64 * 100 * 4,
    )
    half = estimate_memory(**SIZES, half=True)
    assert (half.weights, half.activations) == (6000, 64 * 2 * (30 * 16 + 9 * 32))
    assert half.total == 6000 + 3600 + 7200 + 5000 + half.activations + half.logits
    assert half.largest == "logits"


def test_logits_are_never_more_than_a_chunk_and_its_copies():
    assert estimate_memory(**SIZES | {"vocabulary": 150_000, "tokens": 4096}).logits == 4 * CHUNK_BYTES


def kept_for_backward(model, ids, *, half: bool) -> int:
    """Bytes of everything but the weights that a forward pass keeps."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        body_of(model)(input_ids=ids, use_cache=False)
    return sum(found.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("inner", [192, 640])
def test_activations_are_those_that_a_forward_pass_keeps(half, inner):
    width = 96
    changes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = build_tiny("llama", **changes, head_dim=16).train()
    ids = torch.zeros(16, 64, dtype=torch.long)
    measured = kept_for_backward(model, ids, half=half)
    if half:  # the copies of the weights, which stand under weights
        measured -= 2 * sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    guess = estimate_memory(**SIZES | {"tokens": ids.numel(), "width": width, "inner": inner}, half=half)
    assert guess.activations == pytest.approx(measured, rel=0.1)


def test_of_a_trainer(tmp_path):
    student = tiny_student()
    trainer = make_trainer(tmp_path / "run", student=student)
    found = memory_of(trainer)
    count = sum(p.numel() for p in student.parameters())
    assert found.weights == 4 * count
    assert found.optimizer == 2 * found.gradients == 8 * count
    assert found.teacher == size_of(trainer.teacher.model.parameters())
    tokens = small_data().batch_size * small_data().window
    assert found.activations == tokens * 2 * (38 * 32 + 16 * 64)
    student.get_input_embeddings().weight.requires_grad_(False)
    assert memory_of(trainer).gradients < found.gradients


def test_of_a_trainer_without_teacher_and_of_a_mixture(tmp_path):
    size = small_data().pair.student_vocab.size
    student = build_tiny("qwen3_moe", vocab=size)
    trainer = make_trainer(tmp_path / "run", student=student, model=None, terms=[kd.lm_term()])
    found = memory_of(trainer)
    assert found.teacher == 0
    assert found.activations == 64 * 2 * (38 * 16 + 16 * 2 * 16), "two experts of width 16 per token"


def test_this_machine():
    there, peak = device_memory(torch.device("cpu")), process_peak()
    assert 2**28 < peak < there
