"""kd_kit/finite.py: what is not finite is counted, and modules are heard without being changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kd_kit.finite import Numbers, Watch, first_numbers, floats_of, numbers_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, NAN], "1 NaN of 2"),
        ([INF, INF, -INF, NAN], "1 NaN, 2 +inf, 1 -inf of 4"),
        ([-INF] * 1500, "1,500 -inf of 1,500"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_are_counted(values, said, dtype):
    found = numbers_of(torch.tensor(values, dtype=dtype))
    assert str(found) == said
    assert found.dtype == str(dtype).split(".")[1]


def test_finite_and_whole_numbers_have_none():
    assert numbers_of(torch.tensor([65504.0], dtype=torch.float16)) is None
    assert numbers_of(torch.tensor([3, 4])) is None
    assert numbers_of(torch.zeros(0)) is None


def test_tensors_are_found_in_containers():
    a, b, c = torch.zeros(1), torch.tensor([NAN]), torch.tensor([INF, 0.0])
    held = (a, [torch.tensor(3), {"x": b}], None, "text", {"y": (c,)})
    assert [t is u for t, u in zip(floats_of(held), (a, b, c), strict=True)] == [True] * 3
    assert first_numbers(held) == Numbers("float32", 1, 1, 0, 0)


class Block(nn.Module):
    """Two layers that read the same states."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, states, *, mask=None):
        return states + self.one(states) * self.two(states)


def test_what_is_computed_stays_bit_for_bit():
    torch.manual_seed(0)
    block, states = nn.Sequential(nn.Linear(4, 4), Block(), Block()), torch.randn(3, 4)
    plain = block(states)
    gradients = torch.autograd.grad(plain.square().sum(), list(block.parameters()))
    with Watch({"net": block}) as watch:
        heard = block(states)
        again = watch.gradients(lambda: torch.autograd.grad(heard.square().sum(), list(block.parameters())))
    assert torch.equal(plain, heard)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert watch.forward_place() is None
    assert [call.name for call in watch.calls][:4] == ["net", "net.0", "net.1", "net.1.one"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_a_mask_of_minus_infinity_is_no_bad_input():
    block = Block()
    block.two.register_forward_hook(lambda module, args, output: output * NAN)
    block.register_forward_hook(lambda module, args, output: output * NAN)
    with Watch({"net": block}) as watch:
        block(torch.zeros(2, 4), mask=torch.tensor([-INF]))
    assert not watch.calls[0].given
    assert watch.forward_place() == ("net.two", Numbers("float32", 8, 8, 0, 0))


def test_arithmetic_between_the_parts_is_the_parents():
    block = Block()
    with torch.no_grad():
        for layer in (block.one, block.two):
            layer.weight.zero_()
            layer.bias.fill_(1e30)
    with Watch({"net": block}) as watch:
        block(torch.zeros(2, 4))
    assert watch.forward_place() == ("net", Numbers("float32", 8, 0, 8, 0))


def test_of_two_readers_of_one_tensor_the_right_one_is_named():
    """Their gradients are added up in the tensor that both read: seen there, either could be the one."""
    for name in ("one", "two"):
        block = nn.Sequential(nn.Linear(4, 4), Block())
        block[1].get_submodule(name).register_full_backward_hook(lambda module, given, out: (given[0] * NAN,))
        with Watch({"net": block}) as watch:
            total = block(torch.ones(2, 4)).sum()
            weights = list(block.parameters())
            taken = watch.gradients(lambda t=total, w=weights: torch.autograd.grad(t, w))
        bad = {id(w): n for w, g in zip(weights, taken, strict=True) if (n := numbers_of(g)) is not None}
        assert watch.backward_place(bad) == (f"net.1.{name}", Numbers("float32", 8, 8, 0, 0))


def test_a_reader_outside_is_told_from_the_modules():
    layer = nn.Linear(4, 4)
    with Watch({"net": layer}) as watch:
        states = watch.hear("loss", layer(torch.zeros(2, 4)))
        loss = (states - states.detach()).square().sum().sqrt()
        watch.gradients(lambda: torch.autograd.grad(loss, list(layer.parameters())))
    assert watch.heard() == ("loss", Numbers("float32", 8, 8, 0, 0))
    assert watch.backward_place({}) is None


def test_hooks_are_removed_after_an_error():
    block = Block()
    with pytest.raises(RuntimeError, match="shape"), Watch({"net": block}):
        block(torch.zeros(2, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())
