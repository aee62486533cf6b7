"""The looks: what stands in the pictures, against the models asked by hand, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build_tiny
from helpers import make_trainer, pair, small_data, teacher, tiny_student, weights_of

import kd_kit as kd
from kd_kit import looks
from kd_kit.kd_terms import kd_term
from kd_kit.layer_looks import debiased_cka, standardised
from kd_kit.losses import relation_kl, relations
from kd_kit.terms import lm_term
from kd_kit.token_looks import next_tokens
from kd_kit.token_text import drawable, readable, window_tokens

TEXT = (
    "The café cost 1,234 \U0001f642 in 1811.\n\n\tfor x in range(3):\n\n        print('tōkyō')  # so they said, 東京."
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A run with every kind of layer term, on prose and on one odd text; no test may change it."""
    from kd_kit import offline

    texts = [TEXT, *(chapter[:600] for chapter in offline.corpus("student")[:3])]
    data = kd.build_data(texts, pair(), held_out=[TEXT], window=64, batch_size=2)
    terms = [lm_term(), kd_term(top_k=8), kd.feature_term(), kd.layerwise_term(), kd.attention_term(), kd.router_term()]
    return make_trainer(tmp_path_factory.mktemp("looks") / "run", data=data, terms=terms)


def words(figure) -> str:
    """Everything that is written in a figure."""
    import matplotlib.text

    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def of_kind(trainer, kind: str) -> tuple[int, int]:
    """The first (window, position) of a kind."""
    for window in range(len(trainer.data.train)):
        tokens = window_tokens(trainer.data.train, window)
        if kind in tokens.kinds[1:-1]:
            return window, tokens.kinds.index(kind, 1)
    raise AssertionError(kind)


def test_tokens_are_readable():
    assert readable(b" the\n\t") == "␣the⏎⇥"
    assert readable("é".encode()[:1]) == "C3"
    assert readable(b"\xe6\x9d") == "E6·9D"
    assert readable("\u200b".encode()) == "U+200B"
    assert drawable("aé") == "aé"
    assert drawable("東") == "U+6771"


def test_both_tokenizations_cover_the_window(trainer):
    for number in range(len(trainer.data.train)):
        tokens = window_tokens(trainer.data.train, number)
        text = trainer.data.train.text(number).encode()
        for side in (tokens.student, tokens.teacher):
            assert b"".join(side.texts).decode(errors="replace").encode() == text
            assert side.starts[1:] == side.ends[:-1]
            assert [b - a for a, b in zip(side.starts, side.ends, strict=True)] == list(map(len, side.texts))
        assert list(tokens.student.ids) == tokens.batch.student_ids[0].tolist()
        assert list(tokens.teacher.ids) == tokens.batch.teacher_ids[0].tolist()
        assert tokens.kinds[-1] == ""
        assert tokens.kinds.count("aligned") == int(tokens.batch.aligned.sum())


@pytest.mark.parametrize("kind", ["aligned", "inside", "untaught"])
def test_distributions_are_those_of_the_models(trainer, kind):
    window, position = of_kind(trainer, kind)
    tokens = window_tokens(trainer.data.train, window)
    student, theirs = next_tokens(trainer, tokens, position)
    with torch.no_grad():
        logits = trainer.student.eval()(input_ids=tokens.batch.student_ids).logits[0, position]
        trainer.student.train()
    assert torch.allclose(student, logits.softmax(-1), atol=1e-6)
    if kind == "untaught":
        assert theirs is None
        assert "not heard" in words(looks.distribution(trainer, position, window))
        return
    assert float(theirs.sum()) == pytest.approx(1.0, abs=1e-4)
    if kind == "aligned":
        with torch.no_grad():
            at = int(tokens.batch.teacher_index[0, position])
            probs = trainer.teacher.model(input_ids=tokens.batch.teacher_ids).logits[0, at]
        bridge = trainer.data.pair.bridge
        probs = probs[: bridge.teacher_size].softmax(-1)
        assert torch.allclose(theirs[:-1], bridge.project(probs.unsqueeze(0))[0, :-1], atol=1e-5)


def test_the_picture_of_a_distribution(trainer):
    window, position = of_kind(trainer, "aligned")
    tokens = window_tokens(trainer.data.train, window)
    figure = looks.distribution(trainer, position, window, token=7, top=5)
    ax = figure.axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert len(names) == 6
    assert names[-1] == "everything else"
    follows = drawable(readable(tokens.student.texts[position + 1]))[:18]
    assert follows in names
    assert drawable(readable(pair().student_vocab.tokens[7]))[:18] in names
    widths = [bar.get_width() for bar in ax.patches]
    assert sum(widths[0::2]) == pytest.approx(100, abs=0.1) == sum(widths[1::2])
    assert "KL(teacher || student)" in words(figure)
    assert figure.get_size_inches()[0] * figure.dpi == 1000


def test_the_picture_of_an_alignment(trainer):
    tokens = window_tokens(trainer.data.train, 0)
    figure = looks.alignment(trainer, length=200, position=3)
    framed = [box for ax in figure.axes for box in ax.patches if box.get_gid() == "position 3"]
    assert [(b.get_x(), b.get_x() + b.get_width()) for b in framed] == [
        (tokens.student.starts[4], tokens.student.ends[4])
    ]
    assert len(figure.axes) == math.ceil(min(200, tokens.bytes) / 60)
    lines = {line.get_xdata()[0] for ax in figure.axes for line in ax.lines}
    assert lines == {byte for byte in tokens.common if byte <= 200}
    colours = {tuple(box.get_facecolor()) for ax in figure.axes for box in ax.patches}
    assert len(colours) >= 3, "aligned, inside and the teacher's white at least"
    assert {"C3", "F0", "⇥"} <= set(words(figure).splitlines())


def test_similarity_is_one_with_itself_and_marks_the_runs_pairs(trainer):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    assert float(debiased_cka(states, 3 * states @ turn)) == pytest.approx(1.0, abs=1e-6)
    others = [float(debiased_cka(states, torch.randn(200, 40, generator=generator))) for _ in range(5)]
    assert abs(sum(others) / 5) < 0.02, "no bias, where the plain estimate says 0.4"
    both = states, states @ torch.randn(12, 20, generator=generator)
    moved = debiased_cka(both[0] + 5, both[1] - 3)
    assert float(moved) == pytest.approx(float(debiased_cka(*both)), abs=1e-4), "where the origin lies says nothing"
    wide = standardised(states * torch.linspace(1, 1000, 12) + 50)
    assert torch.allclose(wide.std(0), torch.ones(12, dtype=torch.float64))
    figure = looks.similarity(trainer)
    grid = figure.axes[0].images[0].get_array()
    assert grid.shape == (2, 4)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert {"feature: 2 ← 4", "layerwise: 1 ← 2", "router: 1 ← 2, 2 ← 4"} <= set(labels)
    assert "student layer" in words(figure)


def test_attention_shows_what_the_term_compares(trainer):
    figure = looks.attention(trainer, window=1, start=2, spans=6)
    ours, theirs, _, apart = figure.axes
    tokens = window_tokens(trainer.data.train, 1)
    batch, rows = tokens.batch, torch.arange(2, 8).unsqueeze(0)
    from kd_kit.head import body_of
    from kd_kit.losses import common_heads
    from kd_kit.taps import Taps, attention_widths

    both, values = [], []
    for model, ids, layer in (
        (trainer.student, batch.student_ids, 2),
        (trainer.teacher.model, batch.teacher_ids, 4),
    ):
        with torch.no_grad(), Taps(model, attention=[layer]) as taps:
            body_of(model)(input_ids=ids)
        both.append(taps.attention[layer])
    widths = attention_widths(trainer.student, 2), attention_widths(trainer.teacher.model, 4)
    for kind in "qkv":
        heads = common_heads(*(w[kind] for w in widths))
        pairs = [
            relations(x[kind], heads=heads, rows=rows, boundaries=b)
            for x, b in zip(both, (batch.span_student, batch.span_teacher), strict=True)
        ]
        values.append(relation_kl(*pairs, rows)[0])
    mean = torch.stack(values).mean(0)
    assert [bar.get_width() for bar in apart.patches] == pytest.approx(mean.tolist(), rel=1e-4)
    for ax in (ours, theirs):
        shown = torch.tensor(ax.images[0].get_array().filled(math.nan))
        before = torch.tensor([float(t.get_text()) for t in ax.texts])
        assert torch.allclose(shown.nan_to_num().sum(1) + before, torch.full((6,), 100.0), atol=0.6)
    labels = [t.get_text() for t in ours.get_yticklabels()]
    assert len(labels) == 6
    assert "␣" in "".join(labels)


def test_routing_shows_the_best_experts_and_their_load(trainer):
    figure = looks.routing(trainer, start=1, tokens=5)
    above, below = (ax for ax in figure.axes if ax.images and ax.get_ylabel() == "layer")
    assert above.images[0].get_array().shape == (4, 5)
    load = below.images[0].get_array()
    assert load.shape == (4, 8)
    assert load.mean(1).tolist() == pytest.approx([1.0] * 4)
    assert {t.get_text() for t in above.texts} <= {str(x) for x in range(8)}
    tokens = window_tokens(trainer.data.train, 0)
    assert [t.get_text() for t in above.get_xticklabels()] == [
        drawable(readable(t))[:9] for t in tokens.teacher.texts[1:6]
    ]


def test_looking_changes_nothing(trainer):
    weights, modes = weights_of(trainer), [m.training for m in trainer.module.modules()]
    rng = torch.get_rng_state()
    for look in (looks.similarity, looks.attention, looks.routing, looks.alignment, looks.distribution):
        look(trainer)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), weights_of(trainer).values(), strict=True))
    assert [m.training for m in trainer.module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", looks.__all__)
def test_every_look_checks_its_window(trainer, name, monkeypatch):
    last = len(trainer.data.train) - 1
    for window in (-1, last + 1, 1.5, True):
        with pytest.raises(ValueError, match=f"looks.{name}: expected a window of the training text, from 0 to {last}"):
            getattr(looks, name)(trainer, window=window)
    monkeypatch.setattr(type(trainer), "running", property(lambda self: True))
    with pytest.raises(ValueError, match="at rest"):
        getattr(looks, name)(trainer)


@pytest.mark.parametrize(
    ("look", "given", "sentence"),
    [
        ("distribution", {"position": 10**6}, "expected a position from 0 to"),
        ("distribution", {"token": -1}, "expected a token from 0 to"),
        ("distribution", {"top": 0}, "top= from 1 to 40"),
        ("alignment", {"start": 10**6}, "start= from byte 0"),
        ("alignment", {"length": 0}, "length from 1"),
        ("alignment", {"position": -1}, "position from 0"),
        ("similarity", {"windows": 0}, "at least one window"),
        ("attention", {"layers": {1: 1, 2: 2}}, "one pair of layers"),
        ("attention", {"layers": {1: 9}}, "from 1 to 4"),
        ("attention", {"start": 10**6}, "start= from span 0"),
        ("attention", {"spans": 1}, "2 to 32 spans"),
        ("routing", {"start": 10**6}, "start= from token 0"),
        ("routing", {"tokens": 0}, "1 to 48 tokens"),
    ],
)
def test_what_is_not_there_is_refused(trainer, look, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        getattr(looks, look)(trainer, **given)


def test_a_dense_teacher_has_no_routing_and_no_teacher_nothing_to_compare(tmp_path):
    dense = build_tiny("llama", vocab=pair().teacher_vocab.size, max_position_embeddings=128)
    trainer = make_trainer(tmp_path / "dense", model=dense, student=tiny_student())
    with pytest.raises(
        ValueError, match=r"looks\.routing: expected a mixture-of-experts teacher, got LlamaForCausalLM"
    ):
        looks.routing(trainer)
    assert looks.similarity(trainer).axes[0].images[0].get_array().shape == (2, 2)
    assert not looks.similarity(trainer).legends, "the run has no pairs of layers"
    alone = make_trainer(tmp_path / "alone", model=None, terms=[lm_term(1.0)], data=small_data())
    assert looks.alignment(alone).axes
    for name in ("distribution", "similarity", "attention", "routing"):
        with pytest.raises(ValueError, match="a run with a teacher"):
            getattr(looks, name)(alone)


def test_a_run_with_its_own_way_across_is_shown_by_it(tmp_path):
    """One tokenizer on both sides: the table of the kd term's own reading."""
    trainer = make_trainer(tmp_path / "run")
    assert teacher() is trainer.teacher.model
    reading = trainer.module.needs.readings[0]
    tokens = window_tokens(trainer.data.train, 0)
    position = tokens.kinds.index("aligned", 1)
    _, theirs = next_tokens(trainer, tokens, position)
    cells = trainer.teacher.signal(tokens.batch).cells[reading.key]
    row = tokens.batch.taught_rows.tolist().index(position)
    assert torch.allclose(theirs[cells.ids[row]], cells.log_probs[row].exp(), atol=1e-6)
