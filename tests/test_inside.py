"""The teacher at positions inside its own tokens, against sums in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import cells_of, live

from kd_kit import build_data, build_teacher, build_tokenizers, offline
from kd_kit.align import Ragged
from kd_kit.collate import Collator, Side
from kd_kit.inside import InsideBridge
from kd_kit.pair import TokenizerPair
from kd_kit.vocab import Bridge, Vocabulary


def vocabulary(*tokens: bytes, special: tuple[int, ...] = ()) -> Vocabulary:
    return Vocabulary("toy", tokens, frozenset(special), None, None, 0)


TEACHER = vocabulary(b"<s>", b"a", b"ab", b"abc", b"abd", b"b", b"abcd", b"\xff", b"\xffa", special=(0,))
STUDENT = vocabulary(b"a", b"b", b"c", b"d", b"cd", b"<pad>", special=(5,))


def project(bridge: InsideBridge, probs: torch.Tensor, token: int, depth: int) -> torch.Tensor:
    first, last = (torch.tensor([edge]) for edge in bridge.span(token, depth))
    return bridge.project_at(probs, depth, first, last)


def naive(probs: torch.Tensor, read: bytes) -> list[float]:
    """q over the student's tokens and the tail, straight from the definition."""
    out = [0.0] * (STUDENT.size + 1)
    starts = [t for t in range(TEACHER.size) if TEACHER.tokens[t].startswith(read) and t not in TEACHER.special]
    if not read:
        starts = list(range(TEACHER.size))
    whole = sum(float(probs[t]) for t in starts)
    for t in starts:
        rest = b"" if t in TEACHER.special else TEACHER.tokens[t][len(read) :]
        fits = [v for v in range(STUDENT.size) if v not in STUDENT.special and rest.startswith(STUDENT.tokens[v])]
        home = max(fits, key=lambda v: len(STUDENT.tokens[v]), default=STUDENT.size)
        out[home] += float(probs[t]) / whole
    return out


@pytest.mark.parametrize(("token", "depth"), [(3, 0), (3, 1), (3, 2), (6, 1), (6, 2), (6, 3), (4, 2), (8, 1)])
def test_the_rest_of_a_token_is_the_naive_sum(token, depth):
    bridge = InsideBridge(TEACHER, STUDENT)
    probs = torch.softmax(torch.randn(1, TEACHER.size, generator=torch.Generator().manual_seed(token)), -1)
    got = project(bridge, probs, token, depth)[0]
    assert got.tolist() == pytest.approx(naive(probs[0], TEACHER.tokens[token][:depth]), abs=1e-6)
    assert float(got.sum()) == pytest.approx(1.0)


def test_a_token_that_ends_there_says_nothing_about_what_follows():
    bridge = InsideBridge(TEACHER, STUDENT)
    probs = torch.zeros(1, TEACHER.size)
    probs[0, 2] = 1.0  # all on "ab", and "ab" has been read
    got = project(bridge, probs, 3, 2)[0]
    assert got[:-1].sum() == 0
    assert got[-1] == 1


def test_a_teacher_that_gives_nothing_to_the_text_stays_finite():
    bridge = InsideBridge(TEACHER, STUDENT)
    probs = torch.zeros(1, TEACHER.size)
    probs[0, 5] = 1.0
    got = project(bridge, probs, 3, 2)
    assert torch.isfinite(got).all()


def test_special_tokens_continue_no_text():
    teacher = vocabulary(b"a", b"ab", b"ab|", special=(2,))
    bridge = InsideBridge(teacher, STUDENT)
    got = project(bridge, torch.tensor([[0.2, 0.2, 0.6]]), 1, 1)[0]
    assert got[1] == pytest.approx(0.5)  # "ab" against "a"; the special one is not counted
    assert got[-1] == pytest.approx(0.5)


def test_a_plain_bridge_refuses_what_it_cannot_do():
    plain = Bridge(torch.zeros(4, dtype=torch.long), 2, 0)
    with pytest.raises(ValueError, match="inside teacher tokens"):
        plain.project_at(torch.ones(1, 4), 1, torch.tensor([0]), torch.tensor([2]))


@pytest.fixture(scope="module")
def pair():
    return build_tokenizers()


@pytest.fixture(scope="module")
def data(pair):
    return build_data(
        offline.corpus("student")[:2], pair, held_out=offline.corpus("held_out")[:1], window=64, batch_size=4
    )


def test_a_batch_names_what_was_read_at_every_taught_position(data, pair):
    """Depth and range against the bytes of the window itself."""
    batch = data.train.collate(range(0, 24, 2))
    width, long = batch.student_ids.shape[1], batch.teacher_ids.shape[1]
    tokens = pair.teacher_vocab.tokens
    kinds = {"aligned": 0, "inside": 0}
    for row, (depth, first, last) in zip(batch.taught_rows.tolist(), batch.prefix.tolist(), strict=True):
        n, i = divmod(row, width)
        j = int(batch.teacher_index[n, i])
        ours = pair.student_vocab.bytes_of(batch.student_ids[n, 1 : i + 1].tolist())
        theirs = pair.teacher_vocab.bytes_of(batch.teacher_ids[n, 1 : j + 1].tolist())
        read = ours[len(theirs) :]
        assert ours.startswith(theirs)
        assert len(read) == depth
        if depth:
            following = tokens[int(batch.teacher_ids[n, j + 1])]
            assert j + 1 < long
            assert following.startswith(read)
            names = {
                t for t in range(len(tokens)) if tokens[t].startswith(read) and t not in pair.teacher_vocab.special
            }
            assert last - first == len(names)
        kinds["inside" if depth else "aligned"] += 1
    assert kinds["aligned"] == len(batch.aligned_rows)
    assert kinds["inside"] > 20
    assert len(batch.taught_rows) == len(batch.rows), "on this text the teacher can be heard everywhere"


def test_the_teacher_inside_its_tokens_knows_the_text_better_than_chance(data, pair):
    """End to end, and the sharpest test of an off-by-one: the rest of a word is easier than its beginning."""
    batch = data.train.collate(range(8))
    cells = cells_of(live(build_teacher(), pair.bridge, 64).signal(batch))
    inside = batch.prefix[:, 0] > 0
    targets = batch.targets.flatten()[batch.taught_rows]
    right = (cells.ids[:, 0] == targets).float()
    assert right[inside].mean() > 0.35
    mass = cells.log_probs.exp().sum(-1) + cells.tail.exp()
    assert torch.allclose(mass, torch.ones_like(mass), atol=1e-4)


def test_spans_are_the_tokens_that_start_with_the_prefix():
    bridge = InsideBridge(TEACHER, STUDENT)
    for token in range(1, TEACHER.size):
        for depth in range(1, len(TEACHER.tokens[token]) + 1):
            first, last = bridge.span(token, depth)
            named = {TEACHER.tokens[t] for t in range(1, TEACHER.size)}
            wanted = {t for t in named if t.startswith(TEACHER.tokens[token][:depth])}
            assert set(np.array(sorted(named), dtype=object)[first:last]) == wanted


def prefixes_of_a_first_token(student_token: bytes, teacher_token: bytes) -> list[int]:
    """What a window says about the position before its first token, which covers the text ``She``."""
    teacher = vocabulary(b"<s>", teacher_token, special=(0,))
    student = vocabulary(b"<s>", student_token, special=(0,))
    pair = TokenizerPair(None, None, teacher, student, InsideBridge(teacher, student))
    side = Side(Ragged.of([np.array([0, 1])]), np.array([0, 3]))
    matched, both = np.array([0, 1]), np.array([True, True])
    found = Collator(pair).prefixes(side, side, matched, both, np.array([True, False]))
    return found[0].tolist()


def test_a_space_that_only_one_side_writes_before_a_text_is_not_taught():
    assert prefixes_of_a_first_token(b"She", b"She")[0] == 0
    assert prefixes_of_a_first_token(b" She", b" She")[0] == 0, "both write it: nothing differs"
    assert prefixes_of_a_first_token(b"She", b" She") == [1, 0, 1], "the teacher's space has been read already"
    assert prefixes_of_a_first_token(b" She", b"She")[0] == -1, "no teacher token begins with the student's space"
