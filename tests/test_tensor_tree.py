import json
import math
import random
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd_kit.tensor_tree import capture_rng, flatten_optimizer, restore_rng, unflatten_optimizer

OPTIMIZERS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "AdamW, one tensor at a time": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=False),
    "AdamW, learning rate a tensor": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01)),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "LBFGS": lambda groups: torch.optim.LBFGS(groups[0]["params"], lr=0.01, history_size=3),
}


def through_json(described):
    return json.loads(json.dumps(described, allow_nan=False))


def assert_same(one, other, place="top"):
    """Equal values of equal types, all the way down; tensors bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, place
        assert one.cpu().contiguous().numpy().tobytes() == other.cpu().contiguous().numpy().tobytes(), place
    elif isinstance(one, dict):
        assert_same(list(one), list(other), place)
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{place}.{index}")
    elif isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other)), place
    else:
        assert one == other, place


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def make_optimizer(name, model):
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return OPTIMIZERS[name]([{"params": weights}, {"params": biases, "lr": 0.002}])


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_comes_back_exactly_and_trains_on_as_if_never_stopped(name):
    model = make_model()
    optimizer = make_optimizer(name, model)
    train(model, optimizer, 3, seed=1)
    tensors, described = flatten_optimizer(optimizer.state_dict())
    rebuilt = unflatten_optimizer(tensors, through_json(described))
    assert_same(optimizer.state_dict(), rebuilt)

    twin = make_model()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = make_optimizer(name, twin)
    twin_optimizer.load_state_dict(unflatten_optimizer({n: t.clone() for n, t in tensors.items()}, described))
    train(model, optimizer, 3, seed=2)
    train(twin, twin_optimizer, 3, seed=2)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


def test_an_optimizer_that_never_stepped_comes_back():
    state = make_optimizer("AdamW", make_model()).state_dict()
    tensors, described = flatten_optimizer(state)
    assert tensors == {}
    assert_same(state, unflatten_optimizer(tensors, through_json(described)))


def test_tensors_get_names_that_a_person_can_read():
    model = make_model()
    optimizer = make_optimizer("AdamW", model)
    train(model, optimizer, 1, seed=1)
    tensors, _ = flatten_optimizer(optimizer.state_dict())
    assert {"state.0.step", "state.0.exp_avg", "state.3.max_exp_avg_sq"} <= set(tensors)


def tensor_leaves():
    dtypes = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(lambda shape, dtype: (torch.rand(shape) * 9).to(dtype), shapes, st.sampled_from(dtypes))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.integers(-3, 3) | st.text("01.#", max_size=3) | st.tuples(st.integers(0, 1), st.booleans())
TREES = st.recursive(
    SCALARS | tensor_leaves(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES)
def test_any_tree_comes_back_exactly(tree):
    tensors, described = flatten_optimizer(tree)
    assert_same(tree, unflatten_optimizer(tensors, through_json(described)))


def test_keys_that_look_alike_do_not_swap_their_tensors():
    tree = {"a": {1: torch.tensor(1), "1": torch.tensor(2)}, "a.1": torch.tensor(3)}
    tensors, described = flatten_optimizer(tree)
    assert len(tensors) == 3
    assert_same(tree, unflatten_optimizer(tensors, through_json(described)))


def test_a_learning_rate_that_numpy_made_is_taken_as_a_float():
    _, described = flatten_optimizer({"lr": np.float64(0.1)})
    assert_same({"lr": 0.1}, unflatten_optimizer({}, through_json(described)))


def test_what_cannot_come_back_is_refused_by_its_place():
    with pytest.raises(TypeError, match=r"got function at param_groups\.0\.rule"):
        flatten_optimizer({"param_groups": [{"rule": make_model}]})


@pytest.mark.parametrize(
    "described",
    [{"tensor": "gone"}, {"what": 1}, [1], {"dict": [1]}, {"dict": [], "list": []}, {"tuple": None}, {}],
)
def test_a_description_that_does_not_fit_is_refused(described):
    with pytest.raises(ValueError, match="unflatten_optimizer: expected"):
        unflatten_optimizer({}, described)


def draw():
    return [
        *(random.random() for _ in range(3)),
        random.gauss(0, 1),
        *np.random.rand(3).tolist(),
        np.random.randn(),
        *torch.rand(3).tolist(),
        *torch.randn(5).tolist(),
        *torch.randperm(4).tolist(),
    ]


@pytest.mark.parametrize("drawn_before", [0, 1, 2, 700])
def test_every_generator_goes_on_bit_for_bit(drawn_before):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for _ in range(drawn_before):  # odd numbers leave half a pair of normals waiting in random and numpy
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    tensors, described = capture_rng()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    expected = draw(), draw()
    random.seed(6), np.random.seed(6), torch.manual_seed(6)
    assert restore_rng(tensors, through_json(described)) == []
    assert (draw(), draw()) == expected


def test_capturing_draws_nothing():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    capture_rng()
    assert draw() == expected


def test_numpy_that_was_never_imported_is_not_imported_for_its_state(monkeypatch):
    monkeypatch.delitem(sys.modules, "numpy")
    tensors, described = capture_rng()
    assert "numpy" not in tensors and "numpy" not in described and "numpy" not in sys.modules


def test_a_replaced_numpy_generator_is_refused(monkeypatch):
    monkeypatch.setattr(np.random, "get_state", lambda legacy: np.random.PCG64(1).state)
    with pytest.raises(ValueError, match="got 'PCG64'"):
        capture_rng()


def test_gpus_are_captured_once_in_use_and_told_when_missing(monkeypatch):
    states = {0: torch.tensor([1, 2], dtype=torch.uint8), 1: torch.tensor([3, 4], dtype=torch.uint8)}
    restored = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: restored.update({index: state}))
    assert not any(name.startswith("cuda") for name in capture_rng()[0])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    tensors, described = capture_rng()
    assert {"cuda.0", "cuda.1"} <= set(tensors)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert restore_rng(tensors, described) == ["cuda.1"]
    assert list(restored) == [0] and torch.equal(restored[0], states[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_generators_go_on_bit_for_bit():
    torch.rand(3, device="cuda")
    tensors, described = capture_rng()
    expected = torch.rand(5, device="cuda")
    torch.cuda.manual_seed_all(9)
    assert restore_rng(tensors, through_json(described)) == []
    assert torch.equal(torch.rand(5, device="cuda"), expected)
