"""kd_kit/kd_terms.py: every way has nothing to teach a perfect student, is what its definition says, or is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
import torch
from conftest import FAMILIES, build_tiny, untaught
from helpers import LETTERS, TOY_STUDENT, make_trainer, pair, toy_data, toy_pair
from torch.nn import functional

from kd_kit import kd_term, lm_term, span_term
from kd_kit.head import Given, LogitRows, head_of
from kd_kit.kd_terms import METHODS, span_sums
from kd_kit.losses import forward_kl, jensen_shannon, reverse_kl, skew_kl, tempered
from kd_kit.module import DistillModule
from kd_kit.readings import Where
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import Setup

DIVERGENCES = (forward_kl, reverse_kl, jensen_shannon, skew_kl)
SIZE = len(TOY_STUDENT)
FAMILY = {method: {} for method in METHODS} | {
    "sampled": {"sampled": True, "top_k": 9},
    "shared": {"teacher_rows": "shared"},
}
"""Settings of the term by what it is called here."""


def term_of(kind: str, weight: float = 1.0, **settings):
    known = FAMILY[kind]
    settings = {"top_k": None} | known | settings
    return kd_term(weight, **({"method": kind} if kind in METHODS else {}), **settings)


def model_of(seed: int = 1, vocab: int = SIZE, **changes):
    return build_tiny(changes.pop("family", "llama"), seed=seed, **({"spread": 20.0, "vocab": vocab} | changes))


@pytest.fixture(scope="module")
def one():
    """A pair with the same tokenizer twice, and a batch of it."""
    same = toy_pair(TOY_STUDENT, TOY_STUDENT)
    return same, toy_data(same, window=16).train.collate([0, 2, 5])


@pytest.fixture(scope="module")
def two():
    """A pair of two tokenizers, and a batch of it."""
    other = toy_pair()
    return other, toy_data(other, window=20).train.collate([0, 3, 5, 7])


def run(term, student, model, tokenizers, batch, **more):
    """(mean, gradients by name, the module) of one term on one batch."""
    term = term.bound(Setup(student, model, tokenizers))
    module = DistillModule(student, [term])
    signal = LiveTeacher(model, tokenizers.bridge, module.needs, **more).signal(batch)
    module.zero_grad()
    total, sums, _ = module(batch, signal, [1 / max(term.count(batch), 1)])
    total.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    return float(sums[0]) / max(term.count(batch), 1), gradients, module


def largest(gradients, prefix: str = "student.") -> float:
    return max((float(g.abs().max()) for n, g in gradients.items() if n.startswith(prefix)), default=0.0)


# ---- the perfect student


def perfect_cases():
    """Every method with every divergence, temperature and support that it allows."""
    for method in METHODS:
        plain = [(forward_kl, 1.0)]
        ways = plain if method == "uld" else list(itertools.product(DIVERGENCES, (1.0, 3.0)))
        supports = (None,) if method == "projector" else (2, 7, None)
        for (divergence, temperature), top_k in itertools.product(ways, supports):
            yield pytest.param(
                {"method": method, "divergence": divergence, "temperature": temperature, "top_k": top_k},
                id=f"{method}-{divergence.__name__}-{temperature:g}-{top_k}",
            )


@pytest.mark.parametrize("settings", list(perfect_cases()))
def test_a_student_that_is_the_teacher_has_nothing_to_learn(one, settings):
    tokenizers, batch = one
    if settings["method"] == "strict" and settings["top_k"] is None:
        assert len(batch.same_rows) == len(batch.rows)
    mean, gradients, _ = run(kd_term(1.0, **settings), model_of(), model_of(), tokenizers, batch)
    assert abs(mean) < 2e-5
    # L1 has a kink at equality, where rounding decides the sign of each cell's slope
    assert settings["method"] == "uld" or largest(gradients) < 1e-3
    far, moved, _ = run(kd_term(1.0, **settings), model_of(seed=5), model_of(), tokenizers, batch)
    assert far > 0.02, "and another student has"
    assert largest(moved) > 0.01


@pytest.mark.parametrize("method", ["bridge", "same", "direct"])
def test_drawn_a_student_that_is_the_teacher_has_a_value_of_0_and_no_gradient_on_average(one, method):
    tokenizers, batch = one
    term, sums, sizes, draws = kd_term(1.0, method=method, sampled=True, top_k=4), {}, [], 64
    for number in range(draws):  # the same text in other places of a data set: other draws
        elsewhere = dataclasses.replace(batch, sample=batch.sample + 1000 * number)
        mean, gradients, _ = run(term, model_of(), model_of(), tokenizers, elsewhere)
        assert abs(mean) < 1e-5
        sizes.append(largest(gradients))
        sums = {name: sums.get(name, 0.0) + g / draws for name, g in gradients.items()}
    assert min(sizes) > 1e-3, "a single estimate has one"
    assert largest(sums) < 3 * max(sizes) / math.sqrt(draws)


@pytest.mark.parametrize("kind", [*METHODS, "sampled", "shared"])
def test_a_signal_of_the_neighbouring_position_is_far_off(one, kind):
    """Nothing here could be at its floor by accident: one position late, and the same models are far apart."""
    tokenizers, batch = one
    model = model_of()
    term = term_of(kind).bound(Setup(model, model, tokenizers))
    module = DistillModule(model, [term])
    signal = LiveTeacher(model, tokenizers.bridge, module.needs).signal(batch)
    late = signal.mapped(lambda tensor: tensor.roll(1, 0))
    right, wrong = (float(module(batch, s, [1.0])[1][0]) / term.count(batch) for s in (signal, late))
    assert abs(right) < 1e-4
    assert wrong > 0.2


# ---- the same and the direct method


def padded_models():
    """A teacher with 44 more rows than the tokenizer has entries, and a student with 7 more."""
    return model_of(seed=3, vocab=SIZE + 44), model_of(seed=4, vocab=SIZE + 7)


def plain_kd(model, student, batch, size: int) -> torch.Tensor:
    """KL(teacher || student) per target row as everyone writes it where both read the same tokens; float64."""
    with torch.no_grad():
        theirs = model(input_ids=batch.teacher_ids, use_cache=False).logits.flatten(0, 1)[batch.rows]
        ours = student(input_ids=batch.student_ids, use_cache=False).logits.flatten(0, 1)[batch.rows]
    log_p, log_q = theirs[:, :size].double().log_softmax(-1), ours.double().log_softmax(-1)[:, :size]
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("method", ["same", "direct"])
def test_on_one_tokenizer_with_heads_of_different_sizes_it_is_plain_kd(one, method):
    """Rows behind the tokenizer's last entry are no tokens: the teacher's get no mass, the student's are its tail."""
    tokenizers, batch = one
    model, student = padded_models()
    assert torch.equal(batch.teacher_ids, batch.student_ids)
    expected = plain_kd(model, student, batch, SIZE)
    mean, gradients, module = run(kd_term(1.0, method=method, top_k=None), student, model, tokenizers, batch)
    assert mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert module.terms[0].count(batch) == len(batch.rows)

    student.zero_grad()
    with torch.no_grad():
        log_p = model(input_ids=batch.teacher_ids).logits.flatten(0, 1)[batch.rows][:, :SIZE].log_softmax(-1)
    log_q = student(input_ids=batch.student_ids).logits.flatten(0, 1)[batch.rows].log_softmax(-1)[:, :SIZE]
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[f"student.{name}"], parameter.grad, atol=2e-5, rtol=1e-3)


def test_on_one_tokenizer_all_ways_by_ids_and_bytes_agree(one):
    tokenizers, batch = one
    model, student = padded_models()
    values = {
        (method, k): run(kd_term(1.0, method=method, top_k=k), student, model, tokenizers, batch)[0]
        for method in ("bridge", "same", "direct")
        for k in (3, None)
    }
    for k in (3, None):
        assert values["same", k] == pytest.approx(values["bridge", k], rel=1e-5)
        assert values["direct", k] == pytest.approx(values["bridge", k], rel=1e-5)
    assert values["same", 3] < values["same", None], "a tail hides differences"


@pytest.mark.parametrize("method", ["same", "direct"])
def test_ids_that_do_not_mean_the_same_are_refused_with_figures(tmp_path, method):
    mean_the_same = sum(
        a == b and a != b"" and (i in pair().teacher_vocab.special) == (i in pair().student_vocab.special)
        for i, (a, b) in enumerate(zip(pair().teacher_vocab.tokens, pair().student_vocab.tokens, strict=False))
    )
    said = (
        f"{mean_the_same:,} of 2,048 ids ({mean_the_same / 2048:.1%}) mean the same bytes while "
        f"{pair().bridge.shared:,} tokens exist in both under some id; use method='bridge'"
    )
    with pytest.raises(ValueError, match=rf"^kd_term\(method='{method}'\): expected one tokenizer .*{re.escape(said)}"):
        make_trainer(tmp_path / "run", terms=[lm_term(), kd_term(method=method)])
    assert not (tmp_path / "run" / "RUN.json").exists()


# ---- positions of every method


@pytest.mark.parametrize(
    ("settings", "over"),
    [
        ({}, "taught"),
        ({"inside": False}, "aligned"),
        ({"sampled": True, "top_k": 4}, "taught"),
        ({"method": "strict", "top_k": 4}, "same"),
        ({"method": "uld", "top_k": 4}, "aligned"),
        ({"method": "projector"}, "aligned"),
        ({"teacher_rows": "shared", "top_k": 4}, "aligned"),
    ],
)
def test_a_method_runs_over_the_positions_that_it_is_about(two, settings, over):
    """Only there is the student taught, and by each position as much as by any other."""
    tokenizers, batch = two
    settings = {"top_k": None} | settings
    model, student = model_of(vocab=40), model_of(seed=5, vocab=30)
    term = kd_term(1.0, **settings).bound(Setup(student, model, tokenizers))
    assert (term.over, term.count(batch)) == (over, len(getattr(batch, f"{over}_rows")))
    assert term.taught
    module = DistillModule(student, [term])
    hidden = []
    hook = student.model.register_forward_hook(lambda m, a, out: hidden.append(out.last_hidden_state))
    signal = LiveTeacher(model, tokenizers.bridge, module.needs).signal(batch)
    total, *_ = module(batch, signal, [1.0])
    hook.remove()
    (gradient,) = torch.autograd.grad(total, hidden[-1])
    felt = (gradient.abs().sum(-1) > 0).flatten().nonzero().squeeze(-1).tolist()
    # an L1 distance of the largest few may have no slope somewhere
    assert set(felt) <= set(getattr(batch, f"{over}_rows").tolist())
    assert len(felt) > 0.9 * term.count(batch)


NOWHERE = {
    "taught": untaught,
    "same": lambda batch: dataclasses.replace(  # aligned, but nowhere with the same next token
        batch, same=torch.zeros_like(batch.same), same_rows=batch.same_rows[:0]
    ),
}


@pytest.mark.parametrize(
    ("kind", "what"), [*((kind, "taught") for kind in [*METHODS, "sampled", "shared"]), ("strict", "same")]
)
def test_a_batch_without_a_position_is_a_finite_step_of_0(one, kind, what):
    tokenizers, batch = one
    none = NOWHERE[what](batch)
    mean, gradients, module = run(term_of(kind), model_of(seed=5), model_of(), tokenizers, none)
    assert mean == 0
    assert module.terms[0].count(none) == 0
    assert all(g.isfinite().all() and not g.any() for g in gradients.values())


@pytest.mark.parametrize("k", [3, None])
def test_the_strict_method_stays_finite_where_its_cells_are_all_that_both_have(two, k):
    """With K as large as that nothing is left for the student's tail, while a rounded tail of the teacher is."""
    tokenizers, batch = two
    for temperature, divergence in itertools.product((1.0, 4.0), DIVERGENCES):
        term = kd_term(1.0, method="strict", top_k=k, temperature=temperature, divergence=divergence)
        mean, gradients, _ = run(term, model_of(seed=5, vocab=30), model_of(vocab=40), tokenizers, batch)
        assert 0.01 < mean < 20
        assert 1e-3 < largest(gradients) < 1e3


def test_every_method_as_a_loop_over_positions(two):
    """One divergence, straight from the definitions, on a pair of tokenizers that differ."""
    tokenizers, batch = two
    model, student = model_of(vocab=40), model_of(seed=5, vocab=30)
    theirs, ours = tokenizers.teacher_vocab, tokenizers.student_vocab
    with torch.no_grad():
        p = model(input_ids=batch.teacher_ids).logits[..., : theirs.size].double().softmax(-1)
        q = student(input_ids=batch.student_ids).logits.double().softmax(-1)
    shared = [(t, ours.tokens.index(token)) for t, token in enumerate(theirs.tokens) if token in ours.tokens]
    sums = {"strict": 0.0, "uld": 0.0, "bridge": 0.0}
    width = batch.student_ids.shape[1]
    for flat in batch.aligned_rows.tolist():
        row, at = divmod(flat, width)
        teach, learn = p[row, int(batch.teacher_index[row, at])], q[row, at]
        one, other = (sorted(x.tolist(), reverse=True) for x in (teach, learn))
        one += [0.0] * (len(other) - len(one))
        sums["uld"] += sum(abs(a - b) for a, b in zip(one, other, strict=True))
        cells = torch.zeros(ours.size + 1, dtype=torch.float64)
        for t, v in enumerate(tokenizers.bridge.table.tolist()):
            cells[v] += teach[t]
        student_cells = torch.cat([learn[: ours.size], learn[ours.size :].sum().unsqueeze(0)])
        used = cells > 0
        # a tail of 0 is one of 1e-7: the difference of nothing to nothing
        sums["bridge"] += float((cells[used] * (cells[used] / student_cells[used]).log()).sum())
        if batch.same[row, at]:
            a = torch.stack([teach[t] for t, _ in shared])
            b = torch.stack([learn[v] for _, v in shared])
            a, b = a / a.sum(), b / b.sum()
            sums["strict"] += float((a * (a / b).log()).sum())
    counts = {"uld": len(batch.aligned_rows), "bridge": len(batch.aligned_rows), "strict": len(batch.same_rows)}
    assert len(batch.same_rows) < len(batch.aligned_rows)
    for method, total in sums.items():
        mean, _, _ = run(kd_term(1.0, method=method, top_k=None, inside=False), student, model, tokenizers, batch)
        assert mean == pytest.approx(total / counts[method], rel=1e-3), method


# ---- drawn from the teacher


def test_draws_estimate_the_divergence_without_bias(two):
    """The mean over many places is KL over the whole vocabulary, and its gradient that of KL."""
    tokenizers, _ = two
    size, n, k = tokenizers.student_vocab.size, 20_000, 4
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(1, tokenizers.teacher_vocab.size, generator=generator)).softmax(-1)
    logits = (2 * torch.randn(1, size, generator=generator)).requires_grad_()
    term = kd_term(sampled=True, top_k=k).bound(Setup(None, None, tokenizers))
    (reading,) = term.needs.readings
    none = torch.zeros(n, dtype=torch.long)
    cells = reading.read(probs.expand(n, -1), Where(0, none, none, torch.arange(n) * 7919))
    given = Given(
        torch.ones(n, dtype=torch.bool), cells.ids, torch.cat([cells.log_probs, cells.tail[:, None]], -1), plain=False
    )
    values = term.rows(LogitRows(logits.expand(n, -1), none, {reading.key: given}, None))
    cells = tokenizers.bridge.project(probs)[0, :-1]
    exact = (cells * (cells.log() - logits.log_softmax(-1)[0]))[cells > 0].sum()
    spread = float(values.detach().std())
    assert spread > 0.05, "a single estimate is far off"
    assert float(values.detach().mean()) == pytest.approx(float(exact.detach()), abs=4 * spread / math.sqrt(n))
    ours, theirs = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (values.mean(), exact))
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0.02)
    assert term.meta["impossible_below"] < 0, "an estimate may come out negative"


def test_draws_of_one_place_never_change(one):
    """So that a resumed run and a cached teacher see what the first run saw: in value too, whatever the batch."""
    tokenizers, _ = one
    windows = toy_data(tokenizers, window=16).train
    model, student = model_of(), model_of(seed=5)
    whole = windows.collate([0, 2, 5])
    term = kd_term(1.0, sampled=True, top_k=3)
    mean, _, _ = run(term, student, model, tokenizers, whole)
    parts = [
        run(term, student, model, tokenizers, windows.collate([i]))[0] * len(windows.collate([i]).taught_rows)
        for i in (5, 0, 2)
    ]
    assert sum(parts) == pytest.approx(mean * len(whole.taught_rows), rel=1e-4)


# ---- the projector


def projector_of(student, model, tokenizers):
    return kd_term(1.0, method="projector").bound(Setup(student, model, tokenizers)).rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_map_starts_as_the_identity_between_equal_models(one, family):
    """Whatever a family does to its logits: the student's head on mapped states gives the teacher's."""
    tokenizers, batch = one
    model, student = (model_of(family=family) for _ in range(2))
    module = DistillModule(student, [kd_term(1.0, method="projector").bound(Setup(student, model, tokenizers))])
    signal = LiveTeacher(model, tokenizers.bridge, module.needs).signal(batch)
    projected = module.parts["kd"]
    with torch.no_grad():
        logits = head_of(student).logits(projected.map(signal.row_states))
        expected = model(input_ids=batch.teacher_ids).logits.flatten(0, 1)[batch.aligned_rows]
    assert expected.std() > 0.4
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)


def test_the_map_starts_from_least_squares_between_different_models(two):
    tokenizers, _ = two
    model = model_of(seed=3, vocab=40, family="granite")  # of scale 4
    student = model_of(seed=4, vocab=30, hidden_size=12, head_dim=6)
    projected = projector_of(student, model, tokenizers)
    theirs, ours = tokenizers.teacher_vocab.tokens, tokenizers.student_vocab.tokens
    both = [(t, ours.index(token)) for t, token in enumerate(theirs) if token in ours]
    of = student.get_output_embeddings().weight.detach().double()[[v for _, v in both]]
    to = model.get_output_embeddings().weight.detach().double()[[t for t, _ in both]] * 4.0
    rest = of @ projected.map.weight.detach().double() - to
    assert projected.map.weight.shape == (12, 16)
    assert rest.norm() > 0.1 * to.norm(), "twelve numbers are not sixteen"
    assert (of.T @ rest).abs().max() < 1e-3 * (of.T @ to).abs().max(), "nothing that a linear map could still explain"


def test_the_map_learns_the_text_and_the_student_learns_what_it_says(two):
    """The target does not flow back, and the mapped side leaves the student's head alone."""
    tokenizers, batch = two
    model, student = model_of(vocab=40), model_of(seed=5, vocab=30)

    def squares(student, teacher):
        """A divergence of the user's own, which does not hold the teacher still."""
        return (student.exp() - teacher.exp()).square().sum(-1)

    for temperature, divergence in ((1.0, forward_kl), (2.0, reverse_kl), (1.0, squares)):
        term = kd_term(1.0, method="projector", temperature=temperature, divergence=divergence)
        mean, gradients, module = run(term, student, model, tokenizers, batch)
        count = len(batch.aligned_rows)
        states = LiveTeacher(model, tokenizers.bridge, module.needs).signal(batch).row_states
        weight = module.parts["kd"].map.weight.detach().clone().requires_grad_()
        head = student.get_output_embeddings().weight
        mapped = states @ weight.T @ head.detach().T
        own = functional.cross_entropy(mapped, batch.targets.flatten()[batch.aligned_rows])
        (expected,) = torch.autograd.grad(own, weight)
        torch.testing.assert_close(gradients["parts.kd.map.weight"], expected, atol=1e-5, rtol=1e-3)

        student.zero_grad()
        target = mapped.detach().log_softmax(-1)
        logits = student(input_ids=batch.student_ids).logits.flatten(0, 1)[batch.aligned_rows].log_softmax(-1)
        value = divergence(logits, target).mean()
        soft = temperature**2 * divergence(tempered(logits, temperature), tempered(target, temperature)).mean()
        soft.backward()
        assert mean == pytest.approx(float(value.detach()), rel=1e-4), "the map's own loss is not in the value"
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(gradients[f"student.{name}"], parameter.grad, atol=1e-5, rtol=1e-3)
        assert count < len(batch.rows)


def test_the_map_learns_to_predict_and_closes_on_the_text(two):
    tokenizers, batch = two
    model, student = model_of(vocab=40), model_of(seed=5, vocab=30)
    term = kd_term(1.0, method="projector").bound(Setup(student, model, tokenizers))
    module = DistillModule(student, [term])
    signal = LiveTeacher(model, tokenizers.bridge, module.needs).signal(batch)
    optimizer = torch.optim.Adam(module.parts.parameters(), lr=0.01)
    head, targets, values = head_of(student), batch.targets.flatten()[batch.aligned_rows], []
    for _ in range(20):
        with torch.no_grad():
            logits = head.logits(module.parts["kd"].map(signal.row_states))
            values.append(float(functional.cross_entropy(logits, targets)))
        module.zero_grad()
        module(batch, signal, [1 / len(targets)])[0].backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


def test_a_projector_wants_tokens_that_both_have():
    strangers = toy_pair((b"<s>", b"a", b"b"), (b"<e>", b"ba", b"b"))
    with pytest.raises(
        ValueError, match=r"method='projector'\): expected tokens that both vocabularies have.*got 1; use"
    ):
        projector_of(model_of(), model_of(), strangers)


# ---- refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "bytes"}, "method= one of 'bridge', 'strict', 'uld', 'projector', 'same', 'direct', got 'bytes'"),
        ({"top_k": 0}, "top_k of at least 1, or None for all, got 0"),
        ({"top_k": -2, "method": "strict"}, "top_k of at least 1, or None for all, got -2"),
        ({"temperature": 0.0}, "a temperature above 0, got 0.0"),
        ({"temperature": math.nan, "method": "projector"}, "a temperature above 0, got nan"),
        (
            {"method": "uld", "temperature": 2.0},
            "'uld' is a distance of its own; leave divergence= and temperature= out",
        ),
        ({"method": "uld", "divergence": reverse_kl}, "'uld' is a distance of its own; leave divergence="),
        ({"teacher_rows": "few"}, "expected teacher_rows='all' or 'shared', got 'few'"),
        ({"teacher_rows": "shared", "method": "same"}, "with teacher_rows='shared', got method='same'"),
        ({"teacher_rows": "shared", "sampled": True}, "with teacher_rows='shared', got method='bridge', sampled=True"),
        ({"sampled": True, "top_k": None}, r"sampled=True with a number of draws \(top_k=\).*got .*top_k=None"),
        ({"sampled": True, "divergence": reverse_kl}, "sampled=True with .*divergence=reverse_kl"),
        ({"sampled": True, "temperature": 2.0}, "sampled=True with .*temperature=2.0"),
        ({"sampled": True, "method": "strict"}, "sampled=True with .*got method='strict'"),
        ({"sampled": True, "method": "uld"}, "sampled=True with .*got method='uld'"),
        ({"sampled": True, "method": "projector"}, "sampled=True with .*got method='projector'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_at_once(settings, said):
    with pytest.raises(ValueError, match=rf"^kd_term: .*{said}"):
        kd_term(**settings)


def test_a_k_above_the_vocabulary_is_refused_when_the_trainer_is_built(tmp_path):
    tokens = pair().student_vocab.tokens
    shared = sum(
        v < 2048 and tokens[v] == t
        for t, v in zip(pair().teacher_vocab.tokens, pair().bridge.table.tolist(), strict=True)
    )
    for method, most in (("bridge", 2048), ("strict", shared), ("uld", pair().teacher_vocab.size)):
        terms = [lm_term(), kd_term(method=method, top_k=most + 1)]
        with pytest.raises(ValueError, match=rf"1 <= top_k <= {most} .*got {most + 1}; lower top_k="):
            make_trainer(tmp_path / "run", terms=terms)
        assert kd_term(method=method, top_k=most).bound(Setup(None, None, pair())).needs.readings[0].top_k == most


@pytest.mark.parametrize("kind", [*METHODS, "sampled", "shared"])
def test_a_term_says_what_it_is(kind):
    term = term_of(kind, 0.5, name="mine")
    assert (term.name, term.weight) == ("mine", 0.5)
    assert term.settings["method"] == (kind if kind in METHODS else "bridge")
    assert term.settings["sampled"] == (kind == "sampled")
    assert term.settings["divergence"] == "forward_kl"
    assert term.unit == ("L1 of sorted" if kind == "uld" else "nats/token")
    assert term.taught, "also before it is bound"


# ---- spans


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("spans", ["several", "all"])
def test_the_span_term_is_a_loop_over_spans(two, spans, temperature):
    tokenizers, batch = two
    model, student = model_of(vocab=40), model_of(seed=5, vocab=30)
    sides = []
    for side, net, size in (("teacher", model, tokenizers.teacher_vocab.size), ("student", student, None)):
        ids = getattr(batch, f"{side}_ids")
        with torch.no_grad():
            sides.append(
                (ids, net(input_ids=ids).logits[..., :size].double().log_softmax(-1), getattr(batch, f"span_{side}"))
            )
    total = count = 0
    for row, c in batch.span_mask.nonzero().tolist():
        a, b = (
            sum(float(log_probs[row, at, ids[row, at + 1]]) for at in range(*edges[row, c : c + 2].tolist()))
            for ids, log_probs, edges in sides
        )
        if int(batch.span_student[row, c + 1] - batch.span_student[row, c]) < (2 if spans == "several" else 1):
            continue
        count += 1
        if temperature is None:
            total += (a - b) + a * math.log(b / a)
        else:
            p, q = math.exp(a / temperature), math.exp(b / temperature)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    term = span_term(1.0, spans=spans, temperature=temperature)
    assert term.count(batch) == count > 5
    mean, gradients, _ = run(term, student, model, tokenizers, batch)
    assert mean == pytest.approx(total / count, rel=1e-3)
    assert largest(gradients) > 1e-3
    assert count < int(batch.span_mask.sum()) or spans == "all"


def test_a_span_term_finds_nothing_in_a_perfect_student_or_in_no_spans(one):
    tokenizers, batch = one
    mean, gradients, _ = run(span_term(1.0, spans="all"), model_of(), model_of(), tokenizers, batch)
    assert abs(mean) < 1e-6
    assert largest(gradients) < 1e-3
    assert span_term().count(batch) == 0, "one tokenizer: every span is one token"
    mean, gradients, _ = run(span_term(1.0), model_of(seed=5), model_of(), tokenizers, batch)
    assert mean == 0
    assert all(not g.any() for g in gradients.values())


def test_values_are_summed_over_the_spans_that_predict_them(two):
    _, batch = two
    values = torch.randn(len(batch.rows), requires_grad=True)
    found = span_sums(values, batch)
    assert found.shape == batch.span_mask.shape
    places = {flat: n for n, flat in enumerate(batch.rows.tolist())}
    width = batch.student_ids.shape[1]
    for row, c in batch.span_mask.nonzero().tolist():
        first, last = batch.span_student[row, c : c + 2].tolist()
        expected = sum(float(values.detach()[places[row * width + at]]) for at in range(first, last))
        assert float(found.detach()[row, c]) == pytest.approx(expected, abs=1e-5)
    found.sum().backward()
    assert set(values.grad.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"spans": "none"}, "spans='several' or 'all', got 'none'"),
        ({"temperature": 0.0}, "a temperature above 0, or None, got 0.0"),
        ({"temperature": math.nan}, "a temperature above 0, or None, got nan"),
    ],
)
def test_span_terms_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=f"^span_term: expected {said}"):
        span_term(**settings)


def test_letters_are_in_both_toy_vocabularies():
    """What the tests above rest on: the two share some tokens, and not all."""
    both = toy_pair()
    assert len(LETTERS) < both.bridge.shared < min(both.teacher_vocab.size, both.student_vocab.size)
    assert both.kinship == "different"


def test_a_divergence_may_be_named():
    from kd_kit import losses

    assert kd_term(divergence="reverse_kl").settings == kd_term(divergence=losses.reverse_kl).settings
    with pytest.raises(ValueError, match="expected divergence= one of forward_kl, reverse_kl, jensen_shannon, skew_kl"):
        kd_term(divergence="backward_kl")
    with pytest.raises(ValueError, match="expected a temperature above 0, got '2'"):
        kd_term(temperature="2")
    with pytest.raises(ValueError, match="expected a whole top_k of at least 1"):
        kd_term(top_k=6.5)
