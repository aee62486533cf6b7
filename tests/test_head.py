"""The chunked head: the same as the plain one, in less memory, for every family of models."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, build_tiny
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kd_kit.head import Given, Head, body_of, head_losses, head_of
from kd_kit.losses import cross_entropy, forward_kl, jensen_shannon, reverse_kl, student_cells, top_k_cells

N, D, V, K = 23, 8, 31, 5
KEY = "reading"

DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen": jensen_shannon}


def row_losses():
    """Cross-entropy over all rows, and divergences that are 0 where no teacher is."""

    def over(divergence):
        return lambda rows: divergence(rows.student(KEY), rows.teacher(KEY))

    losses = {name: over(divergence) for name, divergence in DIVERGENCES.items()}
    return {"lm": lambda rows: rows.nll, **losses}


@pytest.fixture(params=[True, False], ids=["whole rows", "few log-probabilities"])
def whole(request):
    """Both passes over the head."""
    return request.param


def example(n=N, d=D, v=V, k=K, *, dtype=torch.float32, seed=0, bias=True):
    """hidden, weight, bias (leaves with gradient) and what the losses need."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    shift = torch.randn(v, generator=generator).to(dtype).requires_grad_() if bias else None
    probs = torch.randn(n, v + 1, generator=generator).softmax(-1)
    ids, log_probs, tail = top_k_cells(probs, k)
    log_probs[1::3, -1] = -torch.inf  # some cells are unused
    teacher = torch.cat([log_probs, tail.unsqueeze(-1)], dim=-1).log_softmax(-1)
    targets = torch.randint(0, v, (n,), generator=generator)
    there = torch.rand(n, generator=generator) < 0.7
    return hidden, weight, shift, {"targets": targets, "given": {KEY: Given(there, ids, teacher)}}


def plain_losses(logits, targets, given):
    """The same losses from all logits at once and a softmax of its own, row by row."""
    cell_ids, teacher_cells, has_teacher = given[KEY].ids, given[KEY].cells, given[KEY].there
    log_probs = logits.float().log_softmax(-1)
    out = {"lm": functional.cross_entropy(logits.float(), targets, reduction="none")}
    cells, known = [], []
    for n in range(len(targets)):
        used = teacher_cells[n, :-1] > -torch.inf
        ids = cell_ids[n, used]
        outside = torch.ones(logits.shape[1], dtype=torch.bool)
        outside[ids] = False
        tail = log_probs[n, outside].logsumexp(-1)
        cells.append(torch.cat([log_probs[n, ids], tail.unsqueeze(0)]))
        known.append(teacher_cells[n, torch.cat([used, torch.tensor([True])])])
    for name, divergence in DIVERGENCES.items():
        rows = [divergence(c, t) if h else c.sum() * 0 for c, t, h in zip(cells, known, has_teacher, strict=True)]
        out[name] = torch.stack(rows)
    return out


def mixed(losses):
    """One number in which every row of every loss has its own weight."""
    generator = torch.Generator().manual_seed(9)
    return sum((values * torch.rand(values.shape, generator=generator)).sum() for values in losses.values())


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (4.0, 3.0)])
@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 100, None])
def test_chunked_is_plain(chunk, scale, softcap, whole):
    hidden, weight, bias, inputs = example()
    ours = head_losses(hidden, Head(weight, bias, scale, softcap), row_losses(), chunk=chunk, whole=whole, **inputs)
    gradients = torch.autograd.grad(mixed(ours), (hidden, weight, bias))
    logits = (hidden @ weight.T + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    theirs = plain_losses(logits, **inputs)
    expected = torch.autograd.grad(mixed(theirs), (hidden, weight, bias))
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].shape == (N,)
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], theirs[name], atol=3e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


def test_all_losses_of_one_pass_equal_each_alone(whole):
    hidden, weight, bias, inputs = example()
    head = Head(weight, bias)
    together = head_losses(hidden, head, row_losses(), chunk=6, whole=whole, **inputs)
    for name, loss in row_losses().items():
        alone = head_losses(hidden, head, {name: loss}, chunk=6, whole=whole, **inputs)[name]
        assert torch.equal(together[name], alone)
        ours = torch.autograd.grad(together[name].sum(), (hidden, weight, bias), retain_graph=True)
        theirs = torch.autograd.grad(alone.sum(), (hidden, weight, bias))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_without_a_teacher_rows_carry_none():
    hidden, weight, _, inputs = example(bias=False)
    seen = []

    def look(rows):
        seen.append(rows)
        return cross_entropy(rows.logits, rows.targets, rows.log_z)

    value = head_losses(hidden, Head(weight), {"lm": look}, targets=inputs["targets"], chunk=10)["lm"]
    expected = functional.cross_entropy(hidden @ weight.T, inputs["targets"], reduction="none")
    torch.testing.assert_close(value, expected)
    assert [len(rows.targets) for rows in seen] == [10, 10, 3]
    assert all(rows.given == {} for rows in seen)


def test_log_z_is_that_of_all_logits():
    hidden, weight, bias, inputs = example()
    seen = []

    def look(rows):
        seen.append((rows.log_z, rows.logits.logsumexp(-1), rows.student(KEY).logsumexp(-1)))
        return rows.log_z

    head_losses(hidden, Head(weight, bias), {"z": look}, chunk=6, **inputs)
    for log_z, expected, one in seen:
        torch.testing.assert_close(log_z, expected)
        torch.testing.assert_close(one, torch.zeros_like(one), atol=1e-5, rtol=0)


def test_a_readings_cells_are_computed_once(monkeypatch):
    """However many losses look at them, and log_z comes with them."""
    hidden, weight, bias, inputs = example()
    calls = []

    def counted(logits, ids, used=None):
        calls.append(len(logits))
        return student_cells(logits, ids, used)

    monkeypatch.setattr("kd_kit.head.student_cells", counted)
    losses = row_losses() | {"z": lambda rows: rows.log_z}
    with torch.no_grad():
        head_losses(hidden, Head(weight, bias), losses, chunk=10, **inputs)
        assert calls == [10, 10, 3]
        calls.clear()
        head_losses(hidden, Head(weight, bias), {"z": losses["z"]}, chunk=10, **inputs)
        assert calls == [10, 10, 3], "the pass that a loss will ask for"
        calls.clear()
        two = {**inputs["given"], "other": inputs["given"][KEY]}
        head_losses(hidden, Head(weight, bias), losses, chunk=10, targets=inputs["targets"], given=two)
        assert calls == [10, 10, 3], "a reading that nobody asks for costs nothing"


def drawn(n=N, v=V, k=40):
    """Cells as sampling makes them: more of them than tokens, so that some come twice."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, v, (n, k), generator=generator)
    cells = torch.randn(n, k + 1, generator=generator).log_softmax(-1)
    return Given(torch.ones(n, dtype=torch.bool), ids, cells, plain=False)


@pytest.mark.parametrize("order", [["drawn"], ["drawn", KEY], [KEY, "drawn"], ["ranks"], ["row_states"]])
def test_only_plain_cells_give_log_z(monkeypatch, order):
    """Of tokens that came twice, of ranks and of states there is no sum over the vocabulary."""
    hidden, weight, bias, inputs = example()
    there = torch.ones(N, dtype=torch.bool)
    made = {
        KEY: inputs["given"][KEY],
        "drawn": drawn(),
        "ranks": Given(there, None, drawn().cells, plain=False),
        "row_states": Given(there, states=torch.ones(N, 3)),
    }
    found = []

    def look(rows):
        torch.testing.assert_close(rows.log_z, rows.logits.logsumexp(-1))
        found.append(rows.log_z is not None)
        return rows.log_z

    def counted(logits, ids, used=None):
        assert ids.shape[1] == K, "drawn cells are not a sum over the vocabulary"
        return student_cells(logits, ids, used)

    monkeypatch.setattr("kd_kit.head.student_cells", counted)
    given = {name: made[name] for name in order}
    values = head_losses(hidden, Head(weight, bias), {"z": look}, targets=inputs["targets"], given=given, chunk=9)["z"]
    assert len(found) == 3
    torch.testing.assert_close(values, (hidden @ weight.T + bias).logsumexp(-1))


def test_where_no_teacher_is_the_student_stands_in_for_it():
    hidden, weight, bias, inputs = example()
    given = inputs["given"][KEY]
    spoilt = Given(given.there, given.ids, torch.where(given.there[:, None], given.cells, torch.nan))
    seen = []

    def look(rows):
        seen.append((rows.student(KEY).detach(), rows.teacher(KEY), rows.given[KEY]))
        return forward_kl(rows.student(KEY), rows.teacher(KEY))

    with torch.no_grad():
        head_losses(hidden, Head(weight, bias), {"kd": look}, targets=inputs["targets"], given={KEY: given}, chunk=100)
    ((ours, theirs, there),) = seen
    assert torch.equal(there.there, given.there)
    assert torch.equal(theirs[given.there], given.cells[given.there])
    assert torch.equal(theirs[~given.there], ours[~given.there])
    assert 0 < int(given.there.sum()) < N
    value = head_losses(
        hidden, Head(weight, bias), {"kd": look}, targets=inputs["targets"], given={KEY: spoilt}, chunk=7
    )["kd"]
    assert value[~given.there].abs().max() < 1e-6
    assert value[given.there].min() > 1e-3
    gradients = torch.autograd.grad(value.sum(), (hidden, weight, bias))
    assert all(g.isfinite().all() for g in gradients), "what stands in a row without a teacher reaches nothing"
    assert gradients[0][~given.there].abs().max() < 1e-6


def test_readings_of_several_sizes_and_states_come_chunk_by_chunk():
    hidden, weight, bias, inputs = example()
    *_, wide = example(k=2 * K, seed=7)
    states = torch.randn(N, 3)
    given = {
        KEY: inputs["given"][KEY],
        "wide": wide["given"][KEY],
        "row_states": Given(inputs["given"][KEY].there, states=states),
    }
    losses = {
        "small": lambda rows: forward_kl(rows.student(KEY), rows.teacher(KEY)),
        "wide": lambda rows: forward_kl(rows.student("wide"), rows.teacher("wide")),
        "state": lambda rows: rows.given["row_states"].states.sum(-1) * rows.given["row_states"].there,
    }
    head = Head(weight, bias)
    values = head_losses(hidden, head, losses, targets=inputs["targets"], given=given, chunk=6)
    for name, key in (("small", KEY), ("wide", "wide")):
        alone = head_losses(
            hidden, head, {name: losses[name]}, targets=inputs["targets"], given={key: given[key]}, chunk=100
        )
        torch.testing.assert_close(values[name], alone[name])
    torch.testing.assert_close(values["state"], states.sum(-1) * given["row_states"].there)


def test_a_loss_may_put_something_else_through_the_head():
    """The head that a loss sees is the student's own, gradient and all, also where chunks are recomputed."""
    hidden, weight, bias, inputs = example(bias=True)
    states = torch.randn(N, D)
    given = {"row_states": Given(torch.ones(N, dtype=torch.bool), states=states)}

    def other(rows):
        return rows.head.logits(rows.given["row_states"].states).square().sum(-1)

    head = Head(weight, bias, 0.5, 3.0)
    value = head_losses(hidden, head, {"other": other}, targets=inputs["targets"], given=given, chunk=5)["other"]
    expected = head.logits(states).square().sum(-1)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(v.sum(), (weight, bias)) for v in (value, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_what_is_given_keep_their_kind():
    given = drawn()
    part = given[slice(3, 7)]
    assert (len(part.there), part.plain, part.states) == (4, False, None)
    assert torch.equal(part.cells, given.cells[3:7])
    assert torch.equal(part.ids, given.ids[3:7])
    moved = given.to("meta")
    assert (moved.cells.device.type, moved.plain) == ("meta", False)


def test_without_gradient_nothing_is_kept(whole):
    hidden, weight, bias, inputs = example()
    with torch.no_grad():
        values = head_losses(hidden, Head(weight, bias), row_losses(), chunk=4, whole=whole, **inputs)
    assert not any(v.requires_grad for v in values.values())
    kept = head_losses(hidden, Head(weight, bias), row_losses(), chunk=4, whole=whole, **inputs)
    assert all(torch.equal(values[name], kept[name].detach()) for name in values)


@pytest.mark.parametrize("cells", [False, True])
def test_no_rows(cells, whole):
    hidden, weight, bias, inputs = example()
    given = {KEY: inputs["given"][KEY][:0]} if cells else None
    values = head_losses(
        hidden[:0], Head(weight, bias), row_losses(), targets=inputs["targets"][:0], given=given, whole=whole
    )
    assert list(values) == list(row_losses())
    assert all((v.shape, v.dtype) == ((0,), torch.float32) for v in values.values())


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_of_no_rows_is_refused(size, whole):
    hidden, weight, bias, inputs = example()
    with pytest.raises(ValueError, match=f"at least 1 row, got {size}"):
        head_losses(hidden, Head(weight, bias), row_losses(), chunk=size, whole=whole, **inputs)


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mixed_precision_outside_autocast(hidden_dtype, weight_dtype, whole):
    hidden, weight, bias, inputs = example()
    reference = head_losses(hidden, Head(weight, bias), row_losses(), chunk=7, whole=whole, **inputs)
    half, rows = weight.detach().to(weight_dtype).requires_grad_(), hidden.detach().to(hidden_dtype).requires_grad_()
    head = Head(half, bias.detach().to(weight_dtype))
    assert head.logits(rows).dtype == torch.float32
    ours = head_losses(rows, head, row_losses(), chunk=7, whole=whole, **inputs)
    mixed(ours).backward()
    assert (rows.grad.dtype, half.grad.dtype) == (hidden_dtype, weight_dtype)
    assert rows.grad.isfinite().all()
    assert half.grad.isfinite().all()
    loose = 0.1 if torch.bfloat16 in (hidden_dtype, weight_dtype) else 0.02
    for name in ours:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], reference[name], atol=loose, rtol=loose)


@pytest.mark.parametrize("power", [0, 4, 8, 12, 16])
@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32])
def test_loss_scaling_reaches_float32_arithmetic(power, hidden_dtype, whole):
    """A gradient made in half precision before the scaler multiplies would be off by a tenth at any scale."""
    hidden, weight, bias, inputs = example(n=64, v=2000, k=8)
    exact = torch.autograd.grad(
        mixed(head_losses(hidden, Head(weight, bias), row_losses(), chunk=16, whole=whole, **inputs)) / 4096,
        (weight, bias),
    )
    rows = hidden.detach().to(hidden_dtype)
    if hidden_dtype == torch.float16:
        exact = torch.autograd.grad(
            mixed(head_losses(rows.float(), Head(weight, bias), row_losses(), chunk=16, whole=whole, **inputs)) / 4096,
            (weight, bias),
        )
    scaled = (
        mixed(head_losses(rows, Head(weight, bias), row_losses(), chunk=16, whole=whole, **inputs)) / 4096 * 2**power
    )
    for ours, theirs in zip(torch.autograd.grad(scaled, (weight, bias)), exact, strict=True):
        assert ((ours / 2**power - theirs).norm() / theirs.norm()) < 1e-6


def test_under_fp16_autocast_a_scaled_gradient_is_close(whole):
    hidden, weight, bias, inputs = example(n=64, v=2000, k=8)
    exact = torch.autograd.grad(
        mixed(head_losses(hidden, Head(weight, bias), row_losses(), chunk=16, whole=whole, **inputs)) / 4096,
        (hidden, weight),
    )
    with torch.autocast("cpu", dtype=torch.float16):
        values = head_losses(hidden, Head(weight, bias), row_losses(), chunk=16, whole=whole, **inputs)
    assert all(v.dtype == torch.float32 for v in values.values())
    scale = 2**14
    for ours, theirs in zip(torch.autograd.grad(mixed(values) / 4096 * scale, (hidden, weight)), exact, strict=True):
        assert ((ours / scale - theirs).norm() / theirs.norm()) < 5e-3


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    def __init__(self):
        super().__init__()
        self.elements, self.shapes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return out


def test_all_logits_are_never_made(whole):
    n, v, chunk = 512, 640, 16
    hidden, weight, bias, inputs = example(n=n, v=v)
    with Largest() as forward:
        total = mixed(head_losses(hidden, Head(weight, bias), row_losses(), chunk=chunk, whole=whole, **inputs))
    with Largest() as backward:
        total.backward()
    for seen in (forward, backward):
        assert (chunk, v) in seen.shapes, "the watch sees the chunks"
        assert seen.elements <= chunk * v, f"a tensor of {seen.elements:,} elements in {sorted(seen.shapes)}"


def test_cells_that_are_many_are_looked_at_chunk_by_chunk():
    """With every token a cell the log-probabilities of all rows would be as large as all logits."""
    n, v, chunk = 128, 640, 16
    hidden, weight, bias, inputs = example(n=n, v=v, k=400)
    with Largest() as seen:
        total = mixed(head_losses(hidden, Head(weight, bias), row_losses(), chunk=chunk, whole=False, **inputs))
        total.backward()
    assert seen.elements <= chunk * v, f"a tensor of {seen.elements:,} elements in {sorted(seen.shapes)}"


def test_a_graph_keeps_no_logits(whole):
    """What autograd holds between forward and backward: rows and weights, not the chunks' logits."""
    n, v = 256, 640
    hidden, weight, bias, inputs = example(n=n, v=v)
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = mixed(head_losses(hidden, Head(weight, bias), row_losses(), chunk=16, whole=whole, **inputs))
    assert held
    assert sum(held.values()) < 4 * n * v / 4
    total.backward()


def test_the_default_chunk_fits_its_memory():
    assert Head(torch.zeros(2**20, 1)).chunk_rows() == 16
    assert Head(torch.zeros(2**18, 1)).chunk_rows() == 64
    assert Head(torch.zeros(2048, 1)).chunk_rows() == 8192


def test_the_head_of_some_tokens():
    hidden, weight, bias, _ = example()
    ids = torch.tensor([4, 0, 30])
    for head in (Head(weight, bias, 0.5, 3.0), Head(weight)):
        torch.testing.assert_close(head.of(ids).logits(hidden), head.logits(hidden)[:, ids])


def test_padded_rows_are_cut():
    hidden, weight, bias, _ = example()
    head = Head(weight, bias, 0.5, 3.0)
    short = head.cut(V - 4)
    assert (short.scale, short.softcap) == (0.5, 3.0)
    torch.testing.assert_close(short.logits(hidden), head.logits(hidden)[:, : V - 4])
    assert Head(weight).cut(3).logits(hidden).shape == (N, 3)


# ---- heads and bodies of transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_over_the_body_is_the_model(tiny_models, family):
    model = tiny_models[family]
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        theirs = model(input_ids=ids, use_cache=False).logits
        ours = head_of(model).logits(hidden)
    assert ours.std() > 0.5, "near-uniform logits would agree whatever the scale"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_the_families_do_is_known(tiny_models):
    heads = {family: head_of(model) for family, model in tiny_models.items()}
    assert {f: h.scale for f, h in heads.items() if h.scale != 1} == {"granite": 4.0, "cohere": 8.0}
    assert {f: h.softcap for f, h in heads.items() if h.softcap is not None} == {"gemma2": 2.0}
    assert [f for f, h in heads.items() if h.bias is not None] == ["phi"]


def test_the_gradient_reaches_tied_embeddings(whole):
    model = build_tiny("llama", tie_word_embeddings=True)
    ids = torch.tensor([[0, 5, 9]])
    hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0, :2]
    ours = head_losses(hidden, head_of(model), {"lm": row_losses()["lm"]}, targets=ids[0, 1:], chunk=1, whole=whole)[
        "lm"
    ].sum()
    (gradient,) = torch.autograd.grad(ours, model.get_input_embeddings().weight)
    theirs = functional.cross_entropy(model(input_ids=ids).logits[0, :2], ids[0, 1:], reduction="sum")
    (expected,) = torch.autograd.grad(theirs, model.get_input_embeddings().weight)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_head_is_refused(tiny_models):
    body = tiny_models["llama"].model
    with pytest.raises(ValueError, match=r"head_of: expected a causal language model .*got LlamaModel; load it with"):
        head_of(body)
    with pytest.raises(ValueError, match=r"body_of: .*got Linear; load it with"):
        body_of(nn.Linear(2, 2))
