"""A real step on this machine's CPU, and everything that can go wrong in one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kd_kit import real_pass as module
from kd_kit.cards import profile_for
from kd_kit.real_pass import first_line, real_pass, sdpa_backends

CPU = profile_for(None)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_this_machine_passes(precision):
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    before = torch.get_rng_state()
    assert real_pass("cpu", replace(CPU, precision=precision, teacher_dtype=dtype, experts="eager")) is None
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state"


def test_the_implementations_of_the_profile_are_the_ones_that_run(monkeypatch):
    import transformers

    seen = []
    drawn = module._drawn

    def watched(transformers, config, **arguments):
        seen.append(arguments)
        return drawn(transformers, config, **arguments)

    monkeypatch.setattr(module, "_drawn", watched)
    assert real_pass("cpu", replace(CPU, experts="eager", attention="eager")) is None
    assert [arguments["attn_implementation"] for arguments in seen] == ["eager", "eager"]
    asked = profile_for((7, 5)).experts_argument(transformers.__version__)
    assert {"attn_implementation": "eager", **asked} == seen[1]
    assert "no_such" in real_pass("cpu", replace(CPU, attention="no_such"))


def test_a_sum_that_fails_is_found_though_the_products_work(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nand more")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    assert real_pass("cpu", CPU) == (
        "forward and backward: RuntimeError: CUDA error: no kernel image is available for execution on the device"
    )


def test_a_backward_that_fails_is_found(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: invalid device function")

    monkeypatch.setattr(torch.Tensor, "backward", broken)
    assert real_pass("cpu", CPU) == "forward and backward: RuntimeError: CUDA error: invalid device function"


def test_wrong_numbers_are_found(monkeypatch):
    values = iter([torch.tensor(4.5), torch.tensor(5.5, requires_grad=True)])
    monkeypatch.setattr(module, "_loss", lambda *_: next(values))
    assert (
        real_pass("cpu", CPU) == "forward and backward: RuntimeError: expected a loss of 4.500 as on the CPU, got 5.500"
    )


def test_a_gradient_that_is_none_is_found(monkeypatch):
    real = module._loss
    monkeypatch.setattr(module, "_loss", lambda *inputs: real(*inputs).detach().requires_grad_())
    assert real_pass("cpu", CPU).endswith("expected a finite gradient, got a norm of 0.0")


def test_a_teacher_that_overflows_is_found(monkeypatch):
    drawn = module._drawn

    def huge(transformers, config, **arguments):
        model = drawn(transformers, config, **arguments)
        if "Moe" in type(config).__name__:
            with torch.no_grad():
                model.lm_head.weight.fill_(torch.inf)
        return model

    monkeypatch.setattr(module, "_drawn", huge)
    failed = real_pass("cpu", replace(CPU, teacher_dtype="float16"))
    assert failed == "mixture of experts in float16: RuntimeError: expected finite logits, got NaN or infinity"


def test_a_device_that_is_not_there_is_an_answer_and_no_crash():
    failed = real_pass("cuda:63", profile_for((7, 5)))
    assert failed.startswith("forward and backward: ")


def test_the_kernels_of_attention_are_tried():
    found = sdpa_backends("cpu", "float32")
    assert "math" in found
    assert "memory-efficient" not in found, "which a CPU does not have"


@pytest.mark.parametrize(
    ("text", "line"), [("\n\n one \n two", "one"), ("", "no reason given"), ("\n ", "no reason given")]
)
def test_first_line(text, line):
    assert first_line(RuntimeError(text)) == line
