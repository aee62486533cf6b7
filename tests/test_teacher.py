"""The live teacher against the definition, one position at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import build_tiny, cells_of, collate_by_hand, live, random_items, untaught
from helpers import LETTERS, toy_data, toy_pair

from kd_kit.head import Head, head_of
from kd_kit.losses import student_cells
from kd_kit.readings import (
    BridgeReading,
    Needs,
    SharedReading,
    SortedReading,
    StrictReading,
    direct_bridge,
    same_bridge,
)
from kd_kit.teacher import LiveTeacher, default_reading
from kd_kit.types import IGNORE, Cells
from kd_kit.vocab import Bridge, Vocabulary


def ends(ids, vocabulary):
    """Bytes read after every token of a row; a special token has none."""
    at, out = 0, []
    for i in ids:
        at += 0 if i in vocabulary.special else len(vocabulary.tokens[i])
        out.append(at)
    return out


def longest_prefix(token: bytes, student) -> int | None:
    """The student's id for the longest of its tokens that begins ``token``."""
    for n in range(len(token), 0, -1):
        for i, spelled in enumerate(student.tokens):
            if spelled == token[:n] and i not in student.special:
                return i
    return None


def naive_distribution(model, ids: list[int], position: int, table: list[int | None], student_size: int):
    """The teacher's next-token distribution after ``ids[: position + 1]`` in student terms, [V' + 1] float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[: position + 1]]), use_cache=False).logits[0, -1]
    probs = logits[: len(table)].double().softmax(-1).tolist()
    out = torch.zeros(student_size + 1, dtype=torch.float64)
    for p, home in zip(probs, table, strict=True):
        out[student_size if home is None else home] += p
    return out


def dense(signal: Cells, row: int, size: int):
    """[size + 1] float32: a row of the signal with every cell in its place, tail last."""
    out = torch.zeros(size + 1)
    out[signal.ids[row]] = signal.log_probs[row].exp()
    out[-1] = signal.tail[row].exp()
    return out


def check_row(signal, row, expected, k):
    """A row of the signal holds the K largest cells of ``expected``, largest first, and the rest in its tail."""
    size = len(expected) - 1
    cells = signal.ids[row]
    assert len(set(cells.tolist())) == k
    torch.testing.assert_close(signal.log_probs[row].exp().double(), expected[cells], atol=1e-5, rtol=1e-3)
    assert (signal.log_probs[row].exp().diff() <= 0).all()
    outside = torch.ones(size, dtype=torch.bool)
    outside[cells] = False
    if outside.any():
        assert expected[:-1][outside].max() <= expected[cells].min() + 1e-5
    rest = float(expected[:-1][outside].sum() + expected[-1])
    assert float(signal.tail[row].exp()) == pytest.approx(rest, abs=2e-5)


@pytest.fixture(scope="module")
def embedded_table(embedded_pair):
    """The bridge of the embedded pair by a loop; end of document means end of document."""
    teacher, student = embedded_pair.teacher_vocab, embedded_pair.student_vocab
    first = {}
    for i, token in enumerate(student.tokens):
        if token and i not in student.special and token not in first:
            first[token] = i
    out = []
    for i, token in enumerate(teacher.tokens):
        if i in teacher.special:
            out.append(student.end_id if i == teacher.end_id else None)
        else:
            out.append(next((first[token[:n]] for n in range(len(token), 0, -1) if token[:n] in first), None))
    for i in (300, 1000, 2222, 3333, 4000):
        assert out[i] == longest_prefix(teacher.tokens[i], student)
    return out


@pytest.mark.parametrize("k", [1, 16, 2048])
def test_the_signal_of_the_embedded_pair(embedded_pair, embedded_teacher, embedded_batch, embedded_table, k):
    batch, student, teacher = embedded_batch, embedded_pair.student_vocab, embedded_pair.teacher_vocab
    signal = cells_of(live(embedded_teacher, embedded_pair.bridge, k).signal(batch))
    assert signal.ids.shape == signal.log_probs.shape == (len(batch.aligned_rows), k)
    assert (signal.ids.dtype, signal.log_probs.dtype, signal.tail.dtype) == (torch.int64, torch.float32, torch.float32)
    torch.testing.assert_close(signal.log_probs.exp().sum(-1) + signal.tail.exp(), torch.ones(len(signal.tail)))
    width = batch.student_ids.shape[1]
    # positions by bytes, found again here from the ids alone
    row, checked = 0, 0
    for n in range(len(batch.student_ids)):
        s_ends = ends(batch.student_ids[n, : int((batch.targets[n] >= 0).sum()) + 1].tolist(), student)
        ids = batch.teacher_ids[n, : int((batch.teacher_targets[n] >= 0).sum()) + 1].tolist()
        t_ends = ends(ids, teacher)
        for t, here in enumerate(s_ends[:-1]):
            if here not in t_ends:
                continue
            assert batch.aligned_rows[row] == n * width + t
            if row % 9 == 0 or here == 0:
                position = max(j for j, there in enumerate(t_ends) if there == here)
                expected = naive_distribution(embedded_teacher, ids, position, embedded_table, student.size)
                check_row(signal, row, expected, k)
                checked += 1
            row += 1
    assert row == len(batch.aligned_rows)
    assert checked > 10


def test_the_embedded_teacher_knows_what_comes_next(embedded_pair, embedded_teacher, embedded_batch):
    """An end-to-end check of direction: the signal gives the student's real next token far more than chance."""
    batch = embedded_batch
    signal = cells_of(live(embedded_teacher, embedded_pair.bridge, 2048).signal(batch))
    targets = batch.targets.flatten()[batch.aligned_rows]
    probs = torch.stack([dense(signal, row, 2048) for row in range(len(targets))])
    right, early, late = (probs.gather(1, targets.roll(by)[:, None]).log() for by in (0, -1, 1))
    assert right.mean() > -6.5
    assert max(early.mean(), late.mean()) < right.mean() - 1


@pytest.fixture(scope="module")
def hand():
    """A batch of made-up tokenizations, and a table from 40 teacher tokens to 30 student tokens and the tail."""
    table = torch.randint(0, 31, (40,), generator=torch.Generator().manual_seed(2))
    return collate_by_hand(random_items(5, 3, student=30, teacher=40)), Bridge(table, 30, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "qwen3_moe", "gemma2", "granite", "cohere"])
def test_every_family_teaches(tiny_models, hand, family):
    model, (batch, bridge) = tiny_models[family], hand
    signal = cells_of(live(model, bridge, 7).signal(batch))
    table = [None if v == 30 else v for v in bridge.table.tolist()]
    width = batch.student_ids.shape[1]
    for row, flat in enumerate(batch.aligned_rows.tolist()):
        n, t = divmod(flat, width)
        ids = batch.teacher_ids[n].tolist()
        check_row(signal, row, naive_distribution(model, ids, int(batch.teacher_index[n, t]), table, 30), 7)


def test_padded_rows_get_no_mass(hand):
    batch, bridge = hand
    model = build_tiny("llama", vocab=48)
    before = cells_of(live(model, bridge, 30).signal(batch))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        hidden = model.model(input_ids=batch.teacher_ids).last_hidden_state.flatten(0, 1)
        head[40:] = 100 * hidden[:8]
        assert (head_of(model).logits(hidden[:8]).argmax(-1) >= 40).all()
    after = cells_of(live(model, bridge, 30).signal(batch))
    for f in dataclasses.fields(before):
        assert torch.equal(getattr(before, f.name), getattr(after, f.name))


def test_padding_of_a_window_changes_nothing(tiny_models, hand):
    _, bridge = hand
    items = random_items(5, 3, student=30, teacher=40)
    teacher = live(tiny_models["qwen3_moe"], bridge, 30)
    plain = cells_of(teacher.signal(collate_by_hand(items)))
    wider = cells_of(teacher.signal(collate_by_hand(items, pad=17, more_student=5, more_teacher=9)))
    for row in range(len(plain.tail)):
        torch.testing.assert_close(dense(plain, row, 30), dense(wider, row, 30), atol=1e-5, rtol=1e-4)


def test_windows_are_taught_each_for_itself(tiny_models, hand):
    _, bridge = hand
    items = random_items(5, 3, student=30, teacher=40)
    teacher = live(tiny_models["llama"], bridge, 30)
    together = cells_of(teacher.signal(collate_by_hand(items)))
    row = 0
    for item in items:
        alone = cells_of(teacher.signal(collate_by_hand([item])))
        for n in range(len(alone.tail)):
            torch.testing.assert_close(dense(together, row, 30), dense(alone, n, 30), atol=1e-5, rtol=1e-4)
            row += 1
    assert row == len(together.tail)


def test_chunks_of_rows_change_nothing(tiny_models, hand, monkeypatch):
    batch, bridge = hand
    teacher = live(tiny_models["llama"], bridge, 5)
    whole = cells_of(teacher.signal(batch))
    monkeypatch.setattr("kd_kit.head.Head.chunk_rows", lambda self: 4)
    chunked = cells_of(teacher.signal(batch))
    torch.testing.assert_close(chunked.log_probs, whole.log_probs)
    torch.testing.assert_close(chunked.tail, whole.tail)


def test_relabelled_teacher_ids_change_nothing(hand):
    """A teacher whose ids are shuffled together with the bridge says the same."""
    batch, bridge = hand
    model, shuffled = (build_tiny("llama", vocab=40, tie_word_embeddings=False) for _ in range(2))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))  # new id of every old one
    with torch.no_grad():
        for layer in ("get_input_embeddings", "get_output_embeddings"):
            getattr(shuffled, layer)().weight[order] = getattr(model, layer)().weight
    table = torch.empty_like(bridge.table)
    table[order] = bridge.table
    plain = cells_of(live(model, bridge, 30).signal(batch))
    renamed = dataclasses.replace(batch, teacher_ids=order[batch.teacher_ids])
    ours = cells_of(live(shuffled, Bridge(table, 30, 0), 30).signal(renamed))
    for row in range(len(plain.tail)):
        torch.testing.assert_close(dense(plain, row, 30), dense(ours, row, 30), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_half_precision_teacher_is_close(hand, family, dtype):
    batch, bridge = hand
    model = build_tiny(family, spread=4.0)
    exact = cells_of(live(model, bridge, 30).signal(batch))
    half = cells_of(live(model.to(dtype), bridge, 30).signal(batch))
    assert (half.log_probs.dtype, half.tail.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(half.log_probs.exp().sum(-1) + half.tail.exp(), torch.ones(len(half.tail)))
    apart = max(float((dense(exact, row, 30) - dense(half, row, 30)).abs().max()) for row in range(len(half.tail)))
    assert apart < (0.02 if dtype == torch.float16 else 0.15)


def test_the_signal_may_enter_a_graph(tiny_models, hand):
    batch, bridge = hand
    model = tiny_models["llama"]
    signal = cells_of(live(model, bridge, 6).signal(batch))
    for f in dataclasses.fields(signal):
        value = getattr(signal, f.name)
        assert not value.requires_grad
        assert not value.is_inference()
    logits = torch.randn(len(signal.tail), 30).requires_grad_()
    cells, _ = student_cells(logits, signal.ids)
    weight = torch.cat([signal.log_probs, signal.tail.unsqueeze(-1)], dim=-1)
    (cells * weight).sum().backward()
    assert logits.grad.isfinite().all()
    signal.tail.add_(0)  # and be written to
    assert all(p.grad is None for p in model.parameters())


def test_the_batch_is_left_alone(tiny_models, hand):
    batch, bridge = hand
    live(tiny_models["llama"], bridge, 6).signal(batch)
    assert not any(getattr(batch, f.name).is_inference() for f in dataclasses.fields(batch))


def test_nothing_aligned_is_an_empty_signal(tiny_models, hand):
    batch, bridge = hand
    none = untaught(batch)
    signal = cells_of(live(tiny_models["llama"], bridge, 6).signal(none))
    assert (signal.ids.shape, signal.log_probs.shape, signal.tail.shape) == ((0, 6), (0, 6), (0,))
    assert (signal.ids.dtype, signal.log_probs.dtype, signal.tail.dtype) == (torch.int64, torch.float32, torch.float32)
    assert not signal.tail.is_inference()


@pytest.mark.parametrize("k", [0, -3, 31])
def test_k_out_of_range(tiny_models, hand, k):
    with pytest.raises(ValueError, match=rf"expected 1 <= top_k <= 30 .*student's vocabulary.*got {k}"):
        live(tiny_models["llama"], hand[1], k)


# ---- the ways to read it


def ask(model, pair, *readings, **needs):
    """A teacher that is asked for these."""
    return LiveTeacher(model, pair.bridge, Needs(readings, **needs))


@pytest.fixture(scope="module")
def toy():
    """A pair of toy tokenizers, a batch of windows of unequal lengths, and a teacher with padded rows in its head."""
    pair = toy_pair()
    batch = toy_data(pair, window=20).train.collate([0, 3, 5, 7])
    assert min(len(r) for r in (batch.aligned_rows, batch.same_rows, batch.span_rows)) > 20
    assert len(batch.taught_rows) > len(batch.aligned_rows)
    return pair, batch, build_tiny("llama", vocab=40)


def read_before(batch, flat: int) -> tuple[list[int], int]:
    """The teacher's ids up to its position at or before a flat student position; and the position of the student."""
    row, at = divmod(flat, batch.student_ids.shape[1])
    return batch.teacher_ids[row, : int(batch.teacher_index[row, at]) + 1].tolist(), row


def teacher_probs(model, ids: list[int], size: int) -> list[float]:
    """The next-token distribution after these tokens, over the tokenizer's entries."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits[:size].double().softmax(-1).tolist()


def home(token: bytes, vocab: Vocabulary) -> int:
    found = longest_prefix(token, vocab)
    return vocab.size if found is None else found


def carried(model, pair, batch, row: int, flat: int) -> torch.Tensor:
    """The teacher's distribution in the student's tokens at a taught position, also inside a teacher token."""
    teacher, student = pair.teacher_vocab, pair.student_vocab
    depth = int(batch.prefix[row, 0])
    ids, window = read_before(batch, flat)
    follows = teacher.tokens[int(batch.teacher_ids[window, len(ids)])][:depth]
    probs = teacher_probs(model, ids, teacher.size)
    out = torch.zeros(student.size + 1, dtype=torch.float64)
    for t, p in enumerate(probs):
        if t in teacher.special:
            out[student.end_id] += 0 if depth else p
        elif teacher.tokens[t].startswith(follows):
            out[home(teacher.tokens[t][depth:], student)] += p
    return out / out.sum()


@pytest.mark.parametrize("over", ["taught", "aligned"])
@pytest.mark.parametrize("k", [3, None])
def test_the_bridge_at_aligned_positions_and_inside_tokens(toy, over, k):
    pair, batch, model = toy
    reading = BridgeReading("bridge", pair.bridge, k, over=over)
    cells = ask(model, pair, reading).signal(batch).cells[reading.key]
    taught, rows = batch.taught_rows.tolist(), getattr(batch, f"{over}_rows").tolist()
    assert cells.ids.shape == (len(rows), k or pair.student_vocab.size)
    for n, flat in enumerate(rows):
        check_row(cells, n, carried(model, pair, batch, taught.index(flat), flat), cells.ids.shape[1])


@pytest.mark.parametrize("k", [1, 4, None])
def test_the_strict_reading_is_the_teacher_over_what_both_have(toy, k):
    pair, batch, model = toy
    student, teacher = pair.student_vocab, pair.teacher_vocab
    reading = StrictReading(pair, k)
    shared = {t: student.tokens.index(token) for t, token in enumerate(teacher.tokens) if token in student.tokens}
    among = reading.among(student.size + 3, torch.device("cpu"))
    assert {v for v, used in enumerate(among.tolist()) if used} == set(shared.values())
    assert reading.rows.tolist() == list(shared)
    assert 10 < len(shared) < min(student.size, teacher.size)
    cells = ask(model, pair, reading).signal(batch).cells[reading.key]
    assert cells.ids.shape == (len(batch.same_rows), k or len(shared))
    for n, flat in enumerate(batch.same_rows.tolist()):
        ids, _ = read_before(batch, flat)
        probs = teacher_probs(model, ids, teacher.size)
        whole = sum(probs[t] for t in shared)
        expected = torch.zeros(student.size + 1, dtype=torch.float64)
        for t, v in shared.items():
            expected[v] = probs[t] / whole
        check_row(cells, n, expected, k or len(shared))


@pytest.mark.parametrize("k", [1, 4, None])
def test_the_shared_reading_is_the_teacher_given_that_both_have_it(toy, k):
    pair, batch, model = toy
    student, teacher = pair.student_vocab, pair.teacher_vocab
    reading = SharedReading(pair, k)
    shared = {t: student.tokens.index(token) for t, token in enumerate(teacher.tokens) if token in student.tokens}
    cells = ask(model, pair, reading).signal(batch).cells[reading.key]
    assert cells.ids.shape == (len(batch.aligned_rows), k or len(shared))
    for n, flat in enumerate(batch.aligned_rows.tolist()):
        probs = teacher_probs(model, read_before(batch, flat)[0], teacher.size)
        expected = torch.zeros(student.size + 1, dtype=torch.float64)
        for t, v in shared.items():
            expected[v] = probs[t] / sum(probs[t] for t in shared)
        check_row(cells, n, expected, k or len(shared))


@pytest.mark.parametrize("kind", [SharedReading, StrictReading])
def test_only_the_rows_that_are_looked_at_pass_the_head(toy, kind, monkeypatch):
    """And with a reading of all tokens beside it, or span likelihoods, it says the same."""
    pair, batch, model = toy
    reading = kind(pair, 4)
    seen = heads_asked(monkeypatch)
    alone = ask(model, pair, reading).signal(batch).cells[reading.key]
    assert {width for _, width in seen} == {len(reading.rows)}
    assert len(reading.rows) < pair.teacher_vocab.size
    for teacher in (
        ask(model, pair, reading, BridgeReading("bridge", pair.bridge, 4)),
        ask(model, pair, reading, span_log_probs=True),
    ):
        seen.clear()
        other = teacher.signal(batch).cells[reading.key]
        assert {width for _, width in seen} == {pair.teacher_vocab.size}
        assert torch.equal(alone.ids, other.ids)
        torch.testing.assert_close(alone.log_probs, other.log_probs)
        torch.testing.assert_close(alone.tail, other.tail)


@pytest.mark.parametrize("k", [1, 5, None])
def test_the_sorted_reading_is_the_largest_probabilities_whatever_they_stand_for(toy, k):
    pair, batch, model = toy
    size = pair.teacher_vocab.size
    reading = SortedReading(size, k)
    cells = ask(model, pair, reading).signal(batch).cells[reading.key]
    assert cells.ids is None
    assert cells.log_probs.shape == (len(batch.aligned_rows), k or size)
    for n, flat in enumerate(batch.aligned_rows.tolist()):
        expected = sorted(teacher_probs(model, read_before(batch, flat)[0], size), reverse=True)
        torch.testing.assert_close(cells.log_probs[n].exp().tolist(), expected[: k or size], atol=1e-5, rtol=1e-3)
        assert float(cells.tail[n].exp()) == pytest.approx(sum(expected[k or size :]), abs=2e-5)


def sampled_by_hand(probs: torch.Tensor, k: int, place: int) -> list[int]:
    """Systematic draws: the tokens that k equal steps from a hash of the place fall on."""
    x = place * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    start = ((x ^ (x >> 31)) >> 11) / 2**53
    below = probs.cumsum(0)
    return [int((below <= (i + start) / k * float(below[-1])).sum()) for i in range(k)]


@pytest.mark.parametrize("over", ["taught", "aligned"])
def test_a_sampled_reading_draws_from_what_the_bridge_carries(toy, over):
    pair, batch, model = toy
    k, size = 7, pair.student_vocab.size
    reading = BridgeReading("bridge", pair.bridge, k, sampled=True, over=over)
    cells = ask(model, pair, reading).signal(batch).cells[reading.key]
    taught, width, same = batch.taught_rows.tolist(), batch.student_ids.shape[1], 0
    rows = getattr(batch, f"{over}_rows").tolist()
    for n, flat in enumerate(rows):
        expected = carried(model, pair, batch, taught.index(flat), flat)
        sample, at = int(batch.sample[flat // width]), flat % width
        drawn = sampled_by_hand(expected, k, sample * 2**24 + at)
        same += [v if v < size else None for v in drawn] == [
            None if p == -torch.inf else v
            for v, p in zip(cells.ids[n].tolist(), cells.log_probs[n].tolist(), strict=True)
        ]
        used = cells.log_probs[n] > -torch.inf
        mass = expected[cells.ids[n]][used]
        torch.testing.assert_close(cells.log_probs[n][used].exp().double(), mass, atol=1e-5, rtol=1e-3)
        assert float(cells.tail[n].exp()) == pytest.approx(max(float(expected[-1]), 1e-7), abs=1e-5)
    assert same >= len(rows) - 1, "rounding may move a draw that falls on an edge"


def test_draws_are_the_same_in_every_batch(toy):
    """Alone, in another order, padded, and one row at a time."""
    pair, _, model = toy
    windows = toy_data(pair, window=20).train
    reading = BridgeReading("bridge", pair.bridge, 5, sampled=True)
    teacher = ask(model, pair, reading)

    def draws(indices) -> dict:
        batch = windows.collate(indices)
        cells, width = teacher.signal(batch).cells[reading.key], batch.student_ids.shape[1]
        places = [(int(batch.sample[f // width]), f % width) for f in batch.taught_rows.tolist()]
        assert len(set(places)) == len(places)
        return dict(zip(places, cells.ids.tolist(), strict=True))

    whole = draws([0, 1, 2, 3, 4, 5])
    assert draws([5, 3, 1, 0, 2, 4]) == whole
    alone = {}
    for index in range(6):
        alone |= draws([index])
    assert alone == whole
    assert len({tuple(ids) for ids in whole.values()}) > len(whole) / 2


# an id that only the teacher has; it begins with "ab"
LARGER = (*LETTERS, b"ab", b" a", b"cd", b"<|mark|>", b"abe", b"<|user|>")
SMALLER = LARGER[:-2]


def test_the_same_bridge_keeps_every_number_and_the_direct_one_too(toy):
    """Special tokens included; what only the teacher has goes where its bytes send it, or nowhere."""
    pair = toy_pair(LARGER, SMALLER, specials=((0, 12, 14), (0, 12)))
    size = len(SMALLER)
    assert pair.kinship == "extends"
    windows = toy_data(pair).train
    batch = windows.collate(range(len(windows)))
    model = build_tiny("llama", vocab=30)
    ends = dataclasses.replace(pair, teacher_vocab=dataclasses.replace(pair.teacher_vocab, end_id=14))
    assert same_bridge(ends).table[14] == size, "an end of document that only the teacher has is no token here"
    same = BridgeReading("same", same_bridge(pair), None)
    direct = BridgeReading("direct", direct_bridge(len(LARGER), size), None, over="aligned")
    assert direct.bridge.shared == size
    cells = ask(model, pair, same, direct).signal(batch).cells
    taught, inside = batch.taught_rows.tolist(), 0
    for n, flat in enumerate(taught):
        if int(batch.prefix[n, 0]):
            inside += 1
            continue
        probs = teacher_probs(model, read_before(batch, flat)[0], len(LARGER))
        expected = torch.tensor([*probs[:size], 0.0], dtype=torch.float64)
        expected[SMALLER.index(b"ab")] += probs[13]
        expected[-1] = probs[14]
        check_row(cells[same.key], n, expected, size)
        expected = torch.tensor([*probs[:size], probs[13] + probs[14]], dtype=torch.float64)
        check_row(cells[direct.key], batch.aligned_rows.tolist().index(flat), expected, size)
    assert inside > 2


def test_ids_of_the_same_bytes_keep_their_numbers_over_the_same_bridge():
    """SentencePiece has "a" twice: as a piece, and as the byte that it falls back on."""
    tokens = (*LETTERS, b"ab", b"a")
    vocab = Vocabulary("twice", tokens, frozenset([0]), 0, 0, 0, unused=frozenset([10]))
    pair = dataclasses.replace(toy_pair(), teacher_vocab=vocab, student_vocab=vocab)
    assert pair.kinship == "same"
    assert same_bridge(pair).table.tolist() == list(range(11))


def heads_asked(monkeypatch) -> list[tuple[int, int]]:
    """Filled with (rows, tokens) of every product with a head."""
    seen, logits = [], Head.logits

    def counted(self, hidden):
        seen.append((len(hidden), len(self.weight)))
        return logits(self, hidden)

    monkeypatch.setattr(Head, "logits", counted)
    return seen


def teacher_places(batch, rows) -> set[tuple[int, int]]:
    """The teacher's positions that these positions of the student ask about."""
    width = batch.student_ids.shape[1]
    return {(f // width, int(batch.teacher_index.flatten()[f])) for f in rows.tolist()}


@pytest.mark.parametrize("kind", [SharedReading, StrictReading])
def test_with_more_experts_a_reading_of_some_tokens_is_the_same_beside_others(toy, kind):
    """The mean of two distributions, given some tokens, is not the mean of the two given these."""
    pair, batch, _ = toy
    model, reading = build_tiny("qwen3_moe"), kind(pair, 4)

    def said(*readings):
        teacher = LiveTeacher(model, pair.bridge, Needs(readings), more_experts=4)
        return teacher.signal(batch).cells[reading.key]

    alone, beside = said(reading), said(reading, BridgeReading("bridge", pair.bridge, 4))
    assert torch.equal(alone.ids, beside.ids)
    torch.testing.assert_close(alone.log_probs, beside.log_probs, atol=1e-6, rtol=1e-6)


def test_several_readings_are_each_what_it_is_alone(toy, monkeypatch):
    """From one softmax per position, in chunks that end anywhere."""
    pair, batch, model = toy
    readings = [
        BridgeReading("bridge", pair.bridge, 4),
        BridgeReading("bridge", pair.bridge, 6, over="aligned"),
        BridgeReading("bridge", pair.bridge, 5, sampled=True),
        StrictReading(pair, 3),
        SortedReading(pair.teacher_vocab.size, 5),
    ]
    alone = {r.key: ask(model, pair, r).signal(batch).cells[r.key] for r in readings}
    assert len(alone) == len(readings), "every one has its own key"
    seen = heads_asked(monkeypatch)
    monkeypatch.setattr("kd_kit.head.Head.chunk_rows", lambda self: 7)
    monkeypatch.setattr("kd_kit.teacher_rows.rows_at_once", lambda device, width: 3)
    together = ask(model, pair, *reversed(readings)).signal(batch).cells
    assert together.keys() == alone.keys()
    for key, cells in alone.items():
        for f in dataclasses.fields(cells):
            one, other = getattr(cells, f.name), getattr(together[key], f.name)
            assert one is other is None or torch.allclose(one.double(), other.double(), atol=1e-5), (key, f.name)
    rows = [n for n, _ in seen]
    assert sum(rows) == len(teacher_places(batch, batch.taught_rows)), "every position of the teacher once"
    assert sum(rows) < len(batch.taught_rows), "also where several of the student's stand inside one token"
    assert max(rows) == 7


def test_positions_that_no_reading_is_about_are_not_asked(toy, monkeypatch):
    pair, batch, model = toy
    seen = heads_asked(monkeypatch)
    ask(model, pair, SortedReading(pair.teacher_vocab.size, 5)).signal(batch)
    rows = sum(n for n, _ in seen)
    assert rows == len(teacher_places(batch, batch.aligned_rows)) < len(batch.taught_rows)
    seen.clear()
    signal = ask(model, pair, row_states=True, teacher_states=frozenset([1])).signal(batch)
    assert seen == []
    assert signal.cells == {}


def test_spans_and_readings_share_one_pass_over_the_head(toy, monkeypatch):
    pair, batch, model = toy
    reading = BridgeReading("bridge", pair.bridge, 4)
    spans = ask(model, pair, span_log_probs=True).signal(batch).span_log_probs
    cells = ask(model, pair, reading).signal(batch).cells[reading.key]
    seen = heads_asked(monkeypatch)
    both = ask(model, pair, reading, span_log_probs=True).signal(batch)
    assert sum(n for n, _ in seen) <= int((batch.teacher_targets != IGNORE).sum())
    torch.testing.assert_close(both.span_log_probs, spans)
    torch.testing.assert_close(both.cells[reading.key].log_probs, cells.log_probs)


@pytest.mark.parametrize("k", [0, -1, 1000])
def test_readings_refuse_a_k_out_of_range(toy, k):
    pair, _, _ = toy
    shared = sum(token in pair.student_vocab.tokens for token in pair.teacher_vocab.tokens)
    for build, most in (
        (lambda: BridgeReading("bridge", pair.bridge, k), pair.student_vocab.size),
        (lambda: StrictReading(pair, k), shared),
        (lambda: SortedReading(pair.teacher_vocab.size, k), pair.teacher_vocab.size),
    ):
        with pytest.raises(ValueError, match=rf"expected 1 <= top_k <= {most} .*got {k}; lower top_k="):
            build()


def test_what_several_terms_need_is_asked_once(toy):
    pair, _, _ = toy
    one = Needs((BridgeReading("bridge", pair.bridge, 4),), row_states=True, teacher_states=frozenset([1]))
    two = Needs(
        (BridgeReading("bridge", pair.bridge, 4), BridgeReading("bridge", pair.bridge, 5)),
        span_log_probs=True,
        teacher_states=frozenset([2]),
        student_attention=frozenset([1]),
    )
    both = one | two
    assert [r.top_k for r in both.readings] == [4, 5]
    assert both.row_states
    assert both.span_log_probs
    assert both.teacher_states == {1, 2}
    assert both.student_attention == {1}
    assert not both.routing
    assert both.teacher
    assert not Needs(student_states=frozenset([1])).teacher


def test_the_default_is_the_largest_64_or_all(toy):
    pair, batch, model = toy
    assert default_reading(pair.bridge).top_k == pair.student_vocab.size < 64
    assert LiveTeacher(model, pair.bridge).signal(batch).cells.keys() == {default_reading(pair.bridge).key}


# ---- what else it knows


def test_span_log_probs_are_sums_over_the_teachers_own_tokens(toy, monkeypatch):
    pair, batch, model = toy
    for chunk in (1000, 5):
        monkeypatch.setattr("kd_kit.head.Head.chunk_rows", lambda self, chunk=chunk: chunk)
        found = ask(model, pair, span_log_probs=True).signal(batch).span_log_probs
        assert found.shape == batch.span_mask.shape
        for row in range(len(found)):
            ids = batch.teacher_ids[row].tolist()
            for c, there in enumerate(batch.span_mask[row].tolist()):
                first, last = batch.span_teacher[row, c : c + 2].tolist() if there else (0, 0)
                expected = 0.0
                for at in range(first, last):
                    probs = teacher_probs(model, ids[: at + 1], pair.teacher_vocab.size)
                    expected += float(torch.tensor(probs[ids[at + 1]]).log())
                assert float(found[row, c]) == pytest.approx(expected, abs=1e-3)
    lengths = batch.span_teacher.diff(dim=1)[batch.span_mask]
    assert lengths.max() > 1


def test_a_token_that_the_teacher_rules_out_leaves_its_span_finite(toy):
    """A gap of more than a hundred nats is a probability of 0 in float32."""
    pair, batch, _ = toy
    model = build_tiny("llama", vocab=40, spread=4000.0, tie_word_embeddings=False)
    found = ask(model, pair, span_log_probs=True).signal(batch).span_log_probs
    assert found.isfinite().all()
    assert found.min() < -80


def hidden_after(model, ids: list[int], layer: int) -> torch.Tensor:
    """The state after a layer of the last of these tokens; after the last layer's norm, as the head sees it."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
    return states[layer][0, -1].float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_states_at_aligned_rows_and_at_span_ends(tiny_models, toy, family):
    pair, batch, _ = toy
    model = tiny_models[family]
    signal = ask(model, pair, row_states=True, teacher_states=frozenset([1, 2])).signal(batch)
    assert signal.row_states.shape == (len(batch.aligned_rows), 16)
    assert signal.row_states.dtype == torch.float32
    for n, flat in enumerate(batch.aligned_rows.tolist()):
        expected = hidden_after(model, read_before(batch, flat)[0], -1)
        torch.testing.assert_close(signal.row_states[n], expected, atol=1e-4, rtol=1e-3)
    assert list(signal.states) == [1, 2]
    for n, (_, flat) in enumerate(batch.span_rows.tolist()):
        row, at = divmod(flat, batch.teacher_ids.shape[1])
        for layer, states in signal.states.items():
            expected = hidden_after(model, batch.teacher_ids[row, : at + 1].tolist(), layer)
            torch.testing.assert_close(states[n], expected, atol=1e-4, rtol=1e-3)
    assert len(batch.span_rows) == len(signal.states[1])


def test_routing_at_span_ends_and_attention_of_every_position(tiny_models, toy):
    pair, batch, _ = toy
    model = tiny_models["qwen3_moe"]
    signal = ask(model, pair, routing=frozenset([2]), teacher_attention=frozenset([1])).signal(batch)
    block = model.model.layers[1].mlp
    heard = []
    hook = block.gate.register_forward_pre_hook(lambda module, args: heard.append(args[0].reshape(-1, 16)))
    for n, (_, flat) in enumerate(batch.span_rows.tolist()):
        row, at = divmod(flat, batch.teacher_ids.shape[1])
        with torch.no_grad():
            model(input_ids=batch.teacher_ids[row : row + 1, : at + 1], use_cache=False)
            expected = (heard[-1][-1] @ block.gate.weight.T).softmax(-1)
        torch.testing.assert_close(signal.routing[2][n], expected, atol=1e-5, rtol=1e-3)
    hook.remove()
    assert signal.routing[2].shape == (len(batch.span_rows), 4)
    with torch.no_grad():
        layer = model.model.layers[0]
        states = layer.input_layernorm(model.model.embed_tokens(batch.teacher_ids))
        for kind in "qkv":
            expected = getattr(layer.self_attn, f"{kind}_proj")(states)
            torch.testing.assert_close(signal.attention[1][kind], expected, atol=1e-5, rtol=1e-4)
    assert list(signal.attention) == [1]


def test_more_experts_are_averaged_in_probability_space_and_states_are_the_first_pass(toy):
    pair, batch, _ = toy
    few, many = build_tiny("qwen3_moe"), build_tiny("qwen3_moe", num_experts_per_tok=4)
    size = pair.teacher_vocab.size
    needs = Needs(
        (SortedReading(size, None), BridgeReading("bridge", pair.bridge, None, over="aligned")),
        row_states=True,
        span_log_probs=True,
        teacher_states=frozenset([2]),
        routing=frozenset([2]),
        teacher_attention=frozenset([2]),
    )
    signal = LiveTeacher(few, pair.bridge, needs, more_experts=4).signal(batch)
    plain = LiveTeacher(few, pair.bridge, needs).signal(batch)
    keys = [r.key for r in needs.readings]
    apart = 0.0
    for n, flat in enumerate(batch.aligned_rows.tolist()):
        ids, _ = read_before(batch, flat)
        one, two = (teacher_probs(model, ids, size) for model in (few, many))
        mean = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
        apart = max(apart, max(abs(a - b) for a, b in zip(one, two, strict=True)))
        torch.testing.assert_close(
            signal.cells[keys[0]].log_probs[n].exp().tolist(), sorted(mean, reverse=True), atol=1e-5, rtol=1e-3
        )
        expected = torch.zeros(pair.student_vocab.size + 1, dtype=torch.float64)
        for v, p in zip(pair.bridge.table.tolist(), mean, strict=True):
            expected[v] += p
        check_row(signal.cells[keys[1]], n, expected, pair.student_vocab.size)
    assert apart > 0.001, "the two passes say different things, by far more than is told apart here"
    for name in ("row_states", "states", "routing", "attention"):
        first, other = getattr(signal, name), getattr(plain, name)
        flat = [(first, other)] if isinstance(first, torch.Tensor) else [(first[2], other[2])]
        flat = [(a[k], b[k]) for a, b in flat for k in a] if isinstance(flat[0][0], dict) else flat
        assert all(torch.equal(a, b) for a, b in flat), name
    assert not torch.allclose(signal.span_log_probs, plain.span_log_probs)
    assert {m.top_k for m in few.modules() if hasattr(m, "top_k")} == {2}, "the model is as it was"
    row = int(batch.span_mask.any(1).nonzero()[0])
    c = int(batch.span_mask[row].nonzero()[0])
    first, last = batch.span_teacher[row, c : c + 2].tolist()
    ids, expected = batch.teacher_ids[row].tolist(), 0.0
    for at in range(first, last):
        both = [teacher_probs(model, ids[: at + 1], size)[ids[at + 1]] for model in (few, many)]
        expected += float(torch.tensor(sum(both) / 2).log())
    assert float(signal.span_log_probs[row, c]) == pytest.approx(expected, abs=1e-3)


def test_a_second_pass_is_made_only_for_what_it_is_averaged_into(toy, tiny_models, monkeypatch):
    pair, batch, _ = toy
    passes = []
    body = LiveTeacher._body
    monkeypatch.setattr(LiveTeacher, "_body", lambda self, batch: passes.append(1) or body(self, batch))
    LiveTeacher(tiny_models["qwen3_moe"], pair.bridge, Needs(row_states=True), more_experts=3).signal(batch)
    assert len(passes) == 1


def test_a_teacher_that_is_asked_something_else_is_the_same_teacher(toy, tiny_models):
    pair, _, _ = toy
    teacher = LiveTeacher(tiny_models["qwen3_moe"], pair.bridge, more_experts=3)
    other = teacher.asked(Needs(row_states=True))
    assert (other.model, other.bridge, other.more_experts) == (teacher.model, teacher.bridge, 3)
    assert other.needs.row_states
    assert not teacher.needs.row_states


def test_nothing_taught_is_an_empty_signal_of_everything(toy, tiny_models):
    pair, batch, _ = toy
    none = dataclasses.replace(
        untaught(batch), span_mask=torch.zeros_like(batch.span_mask), span_rows=batch.span_rows[:0]
    )
    readings = (
        StrictReading(pair, 3),
        SortedReading(pair.teacher_vocab.size, 5),
        BridgeReading("bridge", pair.bridge, 4),
    )
    needs = Needs(readings, True, True, frozenset([1]), routing=frozenset([1]), teacher_attention=frozenset([1]))
    signal = LiveTeacher(tiny_models["qwen3_moe"], pair.bridge, needs).signal(none)
    for reading, k in zip(readings, (3, 5, 4), strict=True):
        cells = signal.cells[reading.key]
        assert (cells.log_probs.shape, cells.tail.shape) == ((0, k), (0,))
        assert (cells.ids is None) == isinstance(reading, SortedReading)
        assert cells.ids is None or (cells.ids.shape, cells.ids.dtype) == ((0, k), torch.int64)
    assert signal.row_states.shape == signal.states[1].shape == (0, 16)
    assert signal.routing[1].shape == (0, 4)
    assert signal.span_log_probs.shape == batch.span_mask.shape
    assert not signal.span_log_probs.any()
    signal.mapped(lambda tensor: tensor.requires_grad_() if tensor.is_floating_point() else tensor)
