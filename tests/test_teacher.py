"""The live teacher against the definition, one position at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import build_tiny, collate_by_hand, random_items, untaught

from kd_kit.head import head_of
from kd_kit.losses import student_cells
from kd_kit.teacher import LiveTeacher
from kd_kit.types import TeacherSignal
from kd_kit.vocab import Bridge


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


def dense(signal: TeacherSignal, row: int, size: int):
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
    signal = LiveTeacher(embedded_teacher, embedded_pair.bridge, top_k=k).signal(batch)
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
    signal = LiveTeacher(embedded_teacher, embedded_pair.bridge, top_k=2048).signal(batch)
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
    signal = LiveTeacher(model, bridge, top_k=7).signal(batch)
    table = [None if v == 30 else v for v in bridge.table.tolist()]
    width = batch.student_ids.shape[1]
    for row, flat in enumerate(batch.aligned_rows.tolist()):
        n, t = divmod(flat, width)
        ids = batch.teacher_ids[n].tolist()
        check_row(signal, row, naive_distribution(model, ids, int(batch.teacher_index[n, t]), table, 30), 7)


def test_padded_rows_get_no_mass(hand):
    batch, bridge = hand
    model = build_tiny("llama", vocab=48)
    before = LiveTeacher(model, bridge, top_k=30).signal(batch)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        hidden = model.model(input_ids=batch.teacher_ids).last_hidden_state.flatten(0, 1)
        head[40:] = 100 * hidden[:8]
        assert (head_of(model).logits(hidden[:8]).argmax(-1) >= 40).all()
    after = LiveTeacher(model, bridge, top_k=30).signal(batch)
    for f in dataclasses.fields(before):
        assert torch.equal(getattr(before, f.name), getattr(after, f.name))


def test_padding_of_a_window_changes_nothing(tiny_models, hand):
    _, bridge = hand
    items = random_items(5, 3, student=30, teacher=40)
    teacher = LiveTeacher(tiny_models["qwen3_moe"], bridge, top_k=30)
    plain = teacher.signal(collate_by_hand(items))
    wider = teacher.signal(collate_by_hand(items, pad=17, more_student=5, more_teacher=9))
    for row in range(len(plain.tail)):
        torch.testing.assert_close(dense(plain, row, 30), dense(wider, row, 30), atol=1e-5, rtol=1e-4)


def test_windows_are_taught_each_for_itself(tiny_models, hand):
    _, bridge = hand
    items = random_items(5, 3, student=30, teacher=40)
    teacher = LiveTeacher(tiny_models["llama"], bridge, top_k=30)
    together = teacher.signal(collate_by_hand(items))
    row = 0
    for item in items:
        alone = teacher.signal(collate_by_hand([item]))
        for n in range(len(alone.tail)):
            torch.testing.assert_close(dense(together, row, 30), dense(alone, n, 30), atol=1e-5, rtol=1e-4)
            row += 1
    assert row == len(together.tail)


def test_chunks_of_rows_change_nothing(tiny_models, hand, monkeypatch):
    batch, bridge = hand
    teacher = LiveTeacher(tiny_models["llama"], bridge, top_k=5)
    whole = teacher.signal(batch)
    monkeypatch.setattr("kd_kit.head.Head.chunk_rows", lambda self: 4)
    chunked = teacher.signal(batch)
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
    plain = LiveTeacher(model, bridge, top_k=30).signal(batch)
    renamed = dataclasses.replace(batch, teacher_ids=order[batch.teacher_ids])
    ours = LiveTeacher(shuffled, Bridge(table, 30, 0), top_k=30).signal(renamed)
    for row in range(len(plain.tail)):
        torch.testing.assert_close(dense(plain, row, 30), dense(ours, row, 30), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_half_precision_teacher_is_close(hand, family, dtype):
    batch, bridge = hand
    model = build_tiny(family, spread=4.0)
    exact = LiveTeacher(model, bridge, top_k=30).signal(batch)
    half = LiveTeacher(model.to(dtype), bridge, top_k=30).signal(batch)
    assert (half.log_probs.dtype, half.tail.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(half.log_probs.exp().sum(-1) + half.tail.exp(), torch.ones(len(half.tail)))
    apart = max(float((dense(exact, row, 30) - dense(half, row, 30)).abs().max()) for row in range(len(half.tail)))
    assert apart < (0.02 if dtype == torch.float16 else 0.15)


def test_the_signal_may_enter_a_graph(tiny_models, hand):
    batch, bridge = hand
    model = tiny_models["llama"]
    signal = LiveTeacher(model, bridge, top_k=6).signal(batch)
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
    LiveTeacher(tiny_models["llama"], bridge, top_k=6).signal(batch)
    assert not any(getattr(batch, f.name).is_inference() for f in dataclasses.fields(batch))


def test_nothing_aligned_is_an_empty_signal(tiny_models, hand):
    batch, bridge = hand
    none = untaught(batch)
    signal = LiveTeacher(tiny_models["llama"], bridge, top_k=6).signal(none)
    assert (signal.ids.shape, signal.log_probs.shape, signal.tail.shape) == ((0, 6), (0, 6), (0,))
    assert (signal.ids.dtype, signal.log_probs.dtype, signal.tail.dtype) == (torch.int64, torch.float32, torch.float32)
    assert not signal.tail.is_inference()


@pytest.mark.parametrize("k", [0, -3, 31])
def test_k_out_of_range(tiny_models, hand, k):
    with pytest.raises(ValueError, match=rf"LiveTeacher: expected 1 <= top_k <= 30 .*got {k}"):
        LiveTeacher(tiny_models["llama"], hand[1], top_k=k)
