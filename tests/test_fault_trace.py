"""kd_kit/fault_trace.py: whatever breaks a step is named exactly, and looking for it leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from helpers import (
    assert_same_run,
    assert_same_tensors,
    make_trainer,
    part_term,
    small_data,
    teacher,
    tiny_student,
    weights_of,
)
from torch import nn

import kd_kit.fault_trace
from kd_kit import feature_term, kd_term, lm_term
from kd_kit.fault_trace import Trace, trace
from kd_kit.tensor_tree import capture_rng
from kd_kit.terms import LossTerm
from kd_kit.types import LossValue

NAN, INF = math.nan, math.inf


def terms() -> list[LossTerm]:
    """Served by the head, by the whole batch, with trained parts, from layers of both models."""
    return [lm_term(0.2), kd_term(0.5, top_k=8), part_term(0.1), feature_term(0.2)]


def at_rest(folder, **arguments):
    """A trainer whose parts have settled, before its first step."""
    trainer = make_trainer(folder, **({"terms": terms()} | arguments))
    trainer.settle()
    trainer.module.train()
    return trainer


def micro_batches(trainer, count: int = 2) -> list:
    return list(trainer.data.batches(0, range(count)))


def found_in(trainer, batches=None, **arguments) -> Trace:
    return trace(trainer, batches or micro_batches(trainer), shares=trainer.shares_at(0), **arguments)


def windows_of(batches) -> list[int]:
    return sorted(int(i) for b in batches for i in b.sample.tolist())


def module_at(trainer, place: str) -> nn.Module:
    side, _, name = place.partition(".")
    return {
        "student": trainer.student,
        "teacher": trainer.teacher and trainer.teacher.model,
        "parts": trainer.module.parts,
    }[side].get_submodule(name)


class Spoil:
    """Puts a value into what a module gives out, where one window begins or at the end of every row."""

    def __init__(self, trainer, place: str, value: float, window: int | None = None):
        self.value = value
        self.ids = None
        model = trainer.teacher.model if place.startswith("teacher") else trainer.student
        if window is not None:
            alone = trainer.data.train.collate([window])
            self.ids = (alone.teacher_ids if place.startswith("teacher") else alone.student_ids)[0]
        body = model.get_decoder()
        self.handles = [
            body.register_forward_pre_hook(self.see, with_kwargs=True),
            module_at(trainer, place).register_forward_hook(self.spoil),
        ]

    def see(self, module, args, kwargs):
        ids = kwargs["input_ids"]
        self.spots = slice(None), -1
        if self.ids is not None:  # wherever in a row the window stands
            n = min(len(self.ids), ids.shape[1])
            self.spots = (ids.unfold(1, n, 1) == self.ids[:n]).all(-1).nonzero(as_tuple=True)

    def spoil(self, module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        states[(*self.spots, 0)] = self.value
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def remove(self):
        for handle in self.handles:
            handle.remove()


# --- weights


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("place", "term"),
    [
        ("student.model.embed_tokens.weight", None),
        ("student.model.layers.1.mlp.down_proj.weight", None),
        ("student.model.norm.weight", None),
        ("parts.part.guess.bias", "part"),
        ("teacher.model.layers.1.self_attn.q_proj.weight", None),
    ],
)
def test_a_broken_weight_is_named(tmp_path, place, term, value):
    trainer = at_rest(tmp_path, model=copy.deepcopy(teacher()))
    side, _, name = place.partition(".")
    model = trainer.teacher.model if side == "teacher" else trainer.module
    weight = model.get_parameter(name if side == "teacher" else place)
    with torch.no_grad():
        weight.view(-1)[3 % weight.numel()] = value
    kind = {"nan": "NaN", "inf": "+inf", "-inf": "-inf"}[str(value)]
    found = found_in(trainer)
    assert found == Trace("weights", term, place, "float32", f"1 {kind} of {weight.numel():,}")


def test_a_broken_buffer_is_named_and_a_mask_in_a_buffer_is_none(tmp_path):
    trainer = at_rest(tmp_path)
    trainer.student.model.register_buffer("kept_mask", torch.tensor([0.0, -INF]))
    assert found_in(trainer).where == "unknown"
    trainer.student.model.register_buffer("kept", torch.tensor([0.0, NAN]))
    found = found_in(trainer)
    assert (found.where, found.layer, found.numbers) == ("weights", "student.model.kept", "1 NaN of 2")


def test_all_broken_weights_are_counted(tmp_path):
    trainer = at_rest(tmp_path)
    with torch.no_grad():
        for layer in trainer.student.model.layers:
            layer.mlp.up_proj.weight.fill_(NAN)
    found = found_in(trainer)
    assert found.layer == "student.model.layers.0.mlp.up_proj.weight"
    assert found.note == "1 more of the weights are not finite"


# --- forward passes

STUDENT_PLACES = [
    "student.model.embed_tokens",
    "student.model.layers.0.input_layernorm",
    "student.model.layers.0.self_attn.q_proj",
    "student.model.layers.0.self_attn.o_proj",
    "student.model.layers.0.self_attn",
    "student.model.layers.0",
    "student.model.layers.1.post_attention_layernorm",
    "student.model.layers.1.mlp.act_fn",
    "student.model.layers.1.mlp.down_proj",
    "student.model.layers.1",
    "student.model.norm",
]
TEACHER_PLACES = [
    "teacher.model.embed_tokens",
    "teacher.model.layers.0.self_attn.v_proj",
    "teacher.model.layers.1.mlp",
    "teacher.model.layers.1",
    "teacher.model.norm",
]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", STUDENT_PLACES + TEACHER_PLACES)
def test_the_module_and_the_window_are_named(tmp_path, place, value):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    guilty = int(batches[1].sample[0])
    spoil = Spoil(trainer, place, value, guilty)
    try:
        found = found_in(trainer, batches)
    finally:
        spoil.remove()
    side = place.partition(".")[0]
    assert (found.where, found.layer, found.dtype, found.term) == (side, place, "float32", None)
    assert found.windows == [guilty]
    assert found.numbers.startswith("1 NaN of " if math.isnan(value) else "1 +inf of ")


@pytest.mark.parametrize("place", ["student.model.layers.1.mlp.up_proj", "teacher.model.layers.0"])
def test_all_windows_where_all_cause_it(tmp_path, place):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    spoil = Spoil(trainer, place, NAN)
    try:
        found = found_in(trainer, batches)
    finally:
        spoil.remove()
    assert found.layer == place
    assert found.windows == windows_of(batches)


def test_the_first_of_several_in_the_order_of_a_step(tmp_path):
    trainer = at_rest(tmp_path)
    spoils = [Spoil(trainer, p, NAN) for p in ("student.model.layers.0", "teacher.model.norm", "student.model.norm")]
    try:
        assert found_in(trainer).layer == "teacher.model.norm"
        spoils[1].remove()
        assert found_in(trainer).layer == "student.model.layers.0"
    finally:
        for spoil in spoils:
            spoil.remove()


def test_windows_that_only_break_together_are_named_together(tmp_path):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)

    def only_in_company(module, args, output):
        return output * (NAN if len(output) > 1 else 1.0)

    handle = trainer.student.model.norm.register_forward_hook(only_in_company)
    found = found_in(trainer, batches[:1])
    handle.remove()
    assert found.layer == "student.model.norm"
    assert found.windows == windows_of(batches[:1])


@pytest.mark.parametrize("guilty", [[5], [0, 11], [3, 4, 9]])
def test_windows_are_narrowed_down_in_few_passes(tmp_path, monkeypatch, guilty):
    trainer = at_rest(tmp_path, data=small_data(batch_size=12))
    batches = micro_batches(trainer, 1)
    guilty = sorted(int(batches[0].sample[i]) for i in guilty)
    spoils = [Spoil(trainer, "student.model.layers.0.mlp", NAN, window) for window in guilty]
    seen = []
    whole = kd_kit.fault_trace.look
    monkeypatch.setattr(kd_kit.fault_trace, "look", lambda *a, **k: seen.append(1) or whole(*a, **k))
    found = found_in(trainer, batches)
    for spoil in spoils:
        spoil.remove()
    assert len(seen) <= 1 + kd_kit.fault_trace.PASSES
    if len(guilty) == 1:
        assert found.windows == guilty
    assert set(guilty) <= set(found.windows) < set(windows_of(batches))


class Half(nn.Module):
    """A layer that computes in float16, whatever it is given."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer.half()

    def forward(self, states):
        return self.layer(states.half()).float()


def test_an_overflow_of_float16_is_named_with_its_dtype(tmp_path):
    student = tiny_student()
    student.model.layers[1].mlp.down_proj = Half(student.model.layers[1].mlp.down_proj)
    trainer = at_rest(tmp_path, student=student, terms=[lm_term()])
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.layer.weight.fill_(6e4)
    found = found_in(trainer)
    assert (found.where, found.layer, found.dtype) == (
        "student",
        "student.model.layers.1.mlp.down_proj.layer",
        "float16",
    )
    assert "inf" in found.numbers


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_overflow_in_a_head_is_named(tmp_path, side):
    """No module computes the logits of a run: its losses take the head's weight."""
    trainer = at_rest(tmp_path, model=copy.deepcopy(teacher()), student=tiny_student(tie_word_embeddings=False))
    model = trainer.student if side == "student" else trainer.teacher.model
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().sign() * 3e38, requires_grad=side == "student")
    found = found_in(trainer)
    assert (found.where, found.layer, found.dtype) == (side, f"{side}.lm_head", "float32")
    assert found.windows == windows_of(micro_batches(trainer))


def test_minus_infinity_of_a_gate_is_no_fault_beside_a_real_one(tmp_path):
    class Gate(nn.Module):
        def forward(self, states):
            kept = states.clone()
            kept[..., 0] = -INF
            return kept

    student = tiny_student()
    mlp = student.model.layers[0].mlp
    mlp.gate = Gate()
    mlp.register_forward_hook(lambda module, args, output: output + 0 * torch.softmax(module.gate(output), -1))
    trainer = at_rest(tmp_path, student=student)
    assert found_in(trainer).where == "unknown"
    spoil = Spoil(trainer, "student.model.layers.1.mlp", NAN)
    assert found_in(trainer).layer == "student.model.layers.1.mlp"
    spoil.remove()


# --- terms


def broken_term(value: float, *, window: int | None = None) -> LossTerm:
    def sums(output, signal, batch):
        hit = torch.tensor(True) if window is None else (batch.sample == window).any()
        total = output.hidden.float().square().sum()
        return LossValue(torch.where(hit, total * 0 + value, total), torch.tensor(float(len(batch.rows))))

    return LossTerm(name="own", weight=0.3, unit="", healthy=(0, 1), value=sums)


@pytest.mark.parametrize(("value", "said"), [(NAN, "NaN"), (INF, "+inf"), (-INF, "-inf")])
def test_a_term_is_named_with_its_window(tmp_path, value, said):
    guilty = int(micro_batches(make_trainer(tmp_path / "first"))[0].sample[1])
    found = found_in(at_rest(tmp_path / "run", terms=[*terms(), broken_term(value, window=guilty)]))
    assert found == Trace("term", "own", None, "float32", f"its sum is {said}", [guilty])


@pytest.mark.parametrize("name", ["lm", "kd"])
def test_a_term_of_rows_is_named(tmp_path, name):
    made = [lm_term(0.2), kd_term(0.5, top_k=8)]
    trainer = make_trainer(tmp_path, terms=made)
    old = next(t for t in trainer.module.terms if t.name == name)
    new = dataclasses.replace(old, rows=lambda rows: old.rows(rows) * NAN)
    trainer.terms = trainer.module.terms = tuple(new if t is old else t for t in trainer.module.terms)
    batches = micro_batches(trainer)
    assert found_in(trainer, batches) == Trace("term", name, None, "float32", "its sum is NaN", windows_of(batches))


def test_the_module_of_a_trained_part_is_named(tmp_path):
    trainer = at_rest(tmp_path)
    handle = module_at(trainer, "parts.part.guess").register_forward_hook(lambda module, args, output: output * NAN)
    batches = micro_batches(trainer)
    found = found_in(trainer, batches)
    handle.remove()
    assert (found.where, found.term, found.layer, found.dtype) == ("term", "part", "parts.part.guess", "float32")
    assert found.windows == windows_of(batches)
    assert found.note == "the sum of part is NaN"


# --- gradients


class Bad(torch.autograd.Function):
    """The identity, whose backward pass is wrong in the first number of some places."""

    @staticmethod
    def forward(ctx, states, value, spots):
        ctx.value, ctx.spots = value, spots
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[(*ctx.spots, 0)] = ctx.value
        return gradient, None, None


class BadBackward(Spoil):
    """The same inside a module: behind it, as far as its gradient is concerned."""

    def spoil(self, module, args):
        return (Bad.apply(args[0], self.value, self.spots), *args[1:])

    def __init__(self, trainer, place, value, window=None):
        super().__init__(trainer, place, value, window)
        self.handles.pop().remove()
        module = module_at(trainer, place)
        self.whole, self.module = module.forward, module
        module.forward = lambda states, *args, **kwargs: self.whole(
            Bad.apply(states, self.value, self.spots), *args, **kwargs
        )

    def remove(self):
        super().remove()
        del self.module.forward


GRADIENT_PLACES = [
    "student.model.layers.0.mlp",
    "student.model.layers.0.self_attn.k_proj",
    "student.model.layers.0.self_attn.o_proj",
    "student.model.layers.1.mlp.act_fn",
    "student.model.layers.1.mlp.up_proj",
    "student.model.layers.1.post_attention_layernorm",
    "student.model.layers.1",
    "student.model.norm",
]


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", GRADIENT_PLACES)
def test_the_module_of_a_bad_gradient_is_named(tmp_path, place, value):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    guilty = int(batches[1].sample[1])
    bad = BadBackward(trainer, place, value, guilty)
    found = found_in(trainer, batches)
    bad.remove()
    assert (found.where, found.term, found.layer, found.dtype) == ("gradient", "lm", place, "float32")
    assert found.windows == [guilty]


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "parts.part.guess.bias"]
)
def test_the_gradient_of_one_parameter_is_named(tmp_path, name):
    trainer = at_rest(tmp_path)
    whole = name if name.startswith("parts.") else f"student.{name}"
    weight = trainer.module.get_parameter(whole)
    handle = weight.register_hook(lambda gradient: gradient * NAN)
    batches = micro_batches(trainer)
    found = found_in(trainer, batches)
    handle.remove()
    term = "part" if name.startswith("parts.") else "lm"
    assert (found.where, found.term, found.layer) == ("gradient", term, whole)
    assert found.numbers == f"{weight.numel():,} NaN of {weight.numel():,}"
    assert found.windows == windows_of(batches)


def test_a_full_backward_hook_is_found_at_its_module(tmp_path):
    trainer = at_rest(tmp_path)
    spoiled = module_at(trainer, "student.model.layers.1.mlp.gate_proj")
    handle = spoiled.register_full_backward_hook(lambda module, given, out: tuple(g * NAN for g in given))
    found = found_in(trainer)
    handle.remove()
    assert (found.where, found.term, found.layer) == ("gradient", "lm", "student.model.layers.1.mlp.gate_proj")


def test_a_term_with_a_bad_gradient_of_its_own_is_named(tmp_path):
    def sums(output, signal, batch):
        states = output.hidden.float()
        return LossValue((states - states.detach()).square().sum().sqrt(), torch.tensor(float(len(batch.rows))))

    own = LossTerm(name="root", weight=0.3, unit="", healthy=(0, 1), value=sums)
    trainer = at_rest(tmp_path, terms=[*terms(), own])
    batches = micro_batches(trainer)
    found = found_in(trainer, batches)
    assert (found.where, found.term, found.layer, found.dtype) == ("gradient", "root", None, "float32")
    assert "in the term itself" in found.note
    assert found.windows == windows_of(batches)


def test_the_term_is_named_that_alone_passes_the_place(tmp_path):
    """Only the part's term goes through its layer; the others have gradients without fault."""
    trainer = at_rest(tmp_path)
    guess = module_at(trainer, "parts.part.guess")
    guess.weight.register_hook(lambda gradient: gradient * INF)
    found = found_in(trainer)
    assert (found.where, found.term, found.layer) == ("gradient", "part", "parts.part.guess.weight")


def test_an_absent_share_is_not_differentiated(tmp_path):
    trainer = at_rest(tmp_path)
    module_at(trainer, "parts.part.guess").weight.register_hook(lambda gradient: gradient * NAN)
    shares = trainer.shares_at(0) | {"part": 0.0}
    assert trace(trainer, micro_batches(trainer), shares=shares).where == "unknown"


def test_a_gradient_too_large_for_its_norm(tmp_path):
    trainer = at_rest(tmp_path, terms=[lm_term()])
    weight = trainer.student.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    found = found_in(trainer)
    assert (found.where, found.layer) == ("gradient", "student.model.layers.0.mlp.up_proj.weight")
    assert found.note == "every number is finite, and their norm is not: the largest is 1e+30"


def test_an_overflow_of_the_loss_scale_is_told_from_a_real_one(tmp_path):
    student = tiny_student()
    student.model.layers[1].mlp.down_proj = Half(student.model.layers[1].mlp.down_proj)
    trainer = at_rest(tmp_path, student=student, terms=[lm_term()])
    assert found_in(trainer).where == "unknown"
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer.accelerator.scaler = scaler
    before = scaler.state_dict()
    found = found_in(trainer)
    assert (found.where, found.term, found.dtype) == ("gradient", "lm", "float16")
    assert found.layer == "student.model.layers.1.mlp.down_proj"
    assert found.note.startswith("only with the loss scale of 1,099,511,627,776")
    assert scaler.state_dict() == before


def test_recomputed_layers_are_heard_once(tmp_path):
    trainer = at_rest(tmp_path)
    name = "activation" if hasattr(trainer.student, "activation_checkpointing_enable") else "gradient"
    kwargs = {"activation": "activation_checkpointing_kwargs", "gradient": "gradient_checkpointing_kwargs"}[name]
    getattr(trainer.student, f"{name}_checkpointing_enable")(**{kwargs: {"use_reentrant": False}})
    assert found_in(trainer).where == "unknown"
    bad = BadBackward(trainer, "student.model.layers.0.mlp", NAN)
    found = found_in(trainer)
    bad.remove()
    assert (found.where, found.layer) == ("gradient", "student.model.layers.0.mlp")


# --- nothing, and nothing left behind


def test_nothing_found_is_said(tmp_path):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    found = found_in(trainer, batches, measure=True)
    assert (found.where, found.term, found.layer) == ("unknown", None, None)
    assert found.note.startswith("not repeated: the same batch gives finite numbers now")
    assert sorted(found.windows) == windows_of(batches)


def test_a_search_that_fails_is_said_and_ends_nothing(tmp_path):
    trainer = at_rest(tmp_path)

    def fail(module, args, output):
        raise RuntimeError("no room")

    hooks = hooks_of(trainer)
    handle = trainer.student.model.register_forward_hook(fail)
    before = capture_rng()
    found = found_in(trainer)
    handle.remove()
    assert found.where == "unknown"
    assert found.note == "the search for the place broke off: RuntimeError: no room"
    assert_same_tensors(before[0], capture_rng()[0])
    assert hooks_of(trainer) == hooks


def test_with_the_random_state_of_the_step_dropout_drops_the_same(tmp_path):
    """A hook that breaks the step for one draw in eight is heard again."""
    trainer = at_rest(tmp_path, terms=[lm_term()])
    layer = trainer.student.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: output * (NAN if torch.rand(()) < 0.125 else 1.0))
    batches = micro_batches(trainer, 1)
    for seed in range(40):
        torch.manual_seed(seed)
        rng = capture_rng()
        breaks = float(torch.rand(())) < 0.125
        assert (found_in(trainer, batches, rng=rng).where == "student") == breaks


def hooks_of(trainer) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    models = {"run": trainer.module, "teacher": trainer.teacher.model}
    return [
        f"{side}.{name}{kind}"
        for side, model in models.items()
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    ]


@pytest.mark.parametrize("place", [None, "student.model.layers.0.mlp", "teacher.model.norm", "gradient"])
def test_a_run_goes_on_as_if_nothing_had_been_looked_for(tmp_path, place):
    runs = []
    for name in ("plain", "traced"):
        torch.manual_seed(3)
        student = tiny_student(attention_dropout=0.2)
        trainer = make_trainer(tmp_path / name, student=student, terms=terms())
        trainer.fit(steps=2)
        if name == "traced":
            spoil, hooks = None, hooks_of(trainer)  # transformers leaves some of its own in the teacher
            if place is not None:
                spoil = (
                    BadBackward(trainer, "student.model.layers.1.mlp", NAN)
                    if place == "gradient"
                    else Spoil(trainer, place, NAN)
                )
            weights, rng = weights_of(trainer), capture_rng()
            modes = [m.training for m in trainer.module.modules()]
            found = found_in(trainer, measure=True)
            assert found.where == (place.partition(".")[0] if place else "unknown")
            if spoil is not None:
                spoil.remove()
            assert hooks_of(trainer) == hooks
            assert all(p.grad is None for p in trainer.module.parameters())
            assert [m.training for m in trainer.module.modules()] == modes
            assert_same_tensors(weights, weights_of(trainer))
            after = capture_rng()
            assert_same_tensors(rng[0], after[0])
            assert rng[1] == after[1]
            trainer._rng = after  # what the run goes on with is what the search left
        trainer.fit()
        runs.append(trainer)
    assert_same_run(*runs)


def test_what_a_model_counts_in_its_buffers_is_put_back(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, states):
            self.seen += 1
            return states

    student = tiny_student()
    student.model.layers[0].mlp.counter = counter = Counting()
    student.model.layers[0].mlp.register_forward_hook(lambda module, args, output: module.counter(output))
    trainer = at_rest(tmp_path, student=student)
    before = float(counter.seen)
    found_in(trainer)
    assert float(counter.seen) == before > 0
