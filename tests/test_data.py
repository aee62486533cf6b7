"""kd_kit/data.py: windows, batches, and what becomes of bad input."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from bad_rows import undecodable
from helpers import pages, pair, small_data, toy_pair, toy_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit import build_data, build_tokenizers
from kd_kit.offline import STUDENT, TEACHER, asset_folder
from kd_kit.rows import read_texts
from kd_kit.types import IGNORE

WINDOW = 32


def build(texts, **arguments):
    return build_data(texts, pair(), **({"held_out": [pages()[0]], "window": WINDOW, "batch_size": 2} | arguments))


def spelled(vocab, ids) -> bytes:
    """The bytes of a row of ids, the document-start token left out."""
    return vocab.bytes_of(ids[1:] if ids[0] == vocab.start_id else ids)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_every_window_decodes_to_its_text_on_both_sides():
    data = small_data()
    for windows in (data.train, data.held_out):
        for index in range(len(windows)):
            batch = windows.collate([index])
            text = windows.text(index)
            assert text
            assert spelled(pair().student_vocab, batch.student_ids[0].tolist()) == text.encode()
            assert spelled(pair().teacher_vocab, batch.teacher_ids[0].tolist()) == text.encode()
            assert batch.student_ids.shape[1] <= WINDOW
            assert batch.teacher_ids.shape[1] <= WINDOW


def test_training_windows_are_the_documents_one_after_the_other():
    texts = pages()
    data = build(texts)
    whole = ["" for _ in texts]
    for index, (document, *_) in enumerate(data.train.table):
        whole[document] += data.train.text(index)
    assert whole == texts


@pytest.mark.parametrize("stride", [None, 1, 5, 16, 31, 32, 1000])
def test_scored_bytes_of_the_held_out_windows_are_the_bytes_of_the_documents(stride):
    held_out = [
        "Anne hoped she had outlived the age of blushing. " * 6,
        "Été à Besançon: 12,345 — naïve… ☕",
        pages()[3],
    ]
    data = build(pages(2), held_out=held_out, stride=stride)
    size = sum(len(t.encode()) for t in held_out)
    assert data.held_out.scored_bytes == size
    batches = list(data.held_out.in_order(3))
    assert sum(int(b.target_bytes.sum()) for b in batches) == size
    teacher_bytes = 0
    for batch in batches:
        for target in batch.teacher_targets[batch.teacher_targets != IGNORE].tolist():
            teacher_bytes += len(pair().teacher_vocab.tokens[target])
    assert teacher_bytes == size


def test_with_a_stride_every_byte_is_scored_once_and_has_context():
    """Marks every byte that some window charges; a byte charged twice, or never, would show."""
    texts = pages(3)
    data = build(pages(2), held_out=texts, stride=8)
    vocab = pair().student_vocab
    charged = [np.zeros(len(t.encode()), int) for t in texts]
    for batch in data.held_out.in_order(4):
        for row, sample in enumerate(batch.sample.tolist()):
            document, first, _, _ = data.held_out.table[sample]
            at = int(first)
            for position, token in enumerate(batch.student_ids[row].tolist()):
                target = int(batch.targets[row, position])
                at += 0 if token == vocab.start_id else len(vocab.tokens[token])
                if target != IGNORE:
                    charged[document][at : at + len(vocab.tokens[target])] += 1
                    assert position > 0 or first == 0 or data.held_out.table[sample, 2] == first
    for marks in charged:
        assert (marks == 1).all()
    overlapping = data.held_out.table[:, 2] > data.held_out.table[:, 1]
    assert overlapping[1:].any(), "a stride of a quarter window must give context"


def test_targets_are_the_next_token_and_padding_has_none():
    data = build(["Short one.", *pages(3)], batch_size=5)
    vocabs = pair().student_vocab, pair().teacher_vocab
    padded = 0
    for position in range(data.batches_per_epoch):
        batch = next(data.batches(0, [position]))
        for row, sample in enumerate(batch.sample.tolist()):
            alone = data.train.collate([sample])
            sides = (
                (alone.student_ids, alone.targets, batch.student_ids, batch.targets),
                (alone.teacher_ids, alone.teacher_targets, batch.teacher_ids, batch.teacher_targets),
            )
            for (ids, targets, padded_ids, padded_targets), vocab in zip(sides, vocabs, strict=True):
                length = ids.shape[1]
                assert ids[0, 0] == vocab.start_id
                for i in range(length - 1):  # the naive loop: without context every position predicts the next token
                    assert targets[0, i] == ids[0, i + 1]
                assert targets[0, length - 1] == IGNORE
                assert torch.equal(padded_ids[row, :length], ids[0])
                assert torch.equal(padded_targets[row, :length], targets[0])
                assert (padded_targets[row, length:] == IGNORE).all()
                assert (padded_ids[row, length:] == vocab.pad_id).all()
                padded += padded_ids.shape[1] - length
        assert torch.equal(batch.rows, (batch.targets.flatten() != IGNORE).nonzero().squeeze(-1))
        assert torch.equal(batch.aligned_rows, batch.aligned.flatten().nonzero().squeeze(-1))
        assert (batch.target_bytes[batch.targets == IGNORE] == 0).all()
        for target, size in zip(batch.targets.flatten().tolist(), batch.target_bytes.flatten().tolist(), strict=True):
            assert size == (0 if target == IGNORE else len(vocabs[0].tokens[target]))
    assert padded > 0


def test_aligned_positions_stand_at_the_same_byte():
    batch = small_data().train.collate([0, 3, 5])
    assert batch.aligned.any()
    assert (~batch.aligned & (batch.targets != IGNORE)).any()
    for row, position in batch.aligned.nonzero().tolist():
        at = int(batch.teacher_index[row, position])
        ours = spelled(pair().student_vocab, batch.student_ids[row, : position + 1].tolist())
        theirs = spelled(pair().teacher_vocab, batch.teacher_ids[row, : at + 1].tolist())
        assert ours == theirs
        assert batch.teacher_targets[row, at] != IGNORE


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=120), min_size=1, max_size=4))
def test_any_text_is_either_given_back_exactly_or_counted(texts):
    try:
        kept, report = read_texts(texts)
    except ValueError as error:
        assert "expected at least one text" in str(error)
        return
    data = build([*kept, "One that always works."], held_out=["Something else."], max_refused=1)
    refused = sum(len(rows) for rows in data.train.report.refused.values())
    assert data.train.report.used + refused == data.train.report.read == len(kept) + 1
    assert report.read == len(texts)
    normal = [pair().normalise(t).encode() for t in [*kept, "One that always works."]]
    for index in range(len(data.train)):  # a window may be cut inside a character, so bytes are compared
        batch = data.train.collate([index])
        window = spelled(pair().student_vocab, batch.student_ids[0].tolist())
        assert window == spelled(pair().teacher_vocab, batch.teacher_ids[0].tolist())
        assert any(window in t for t in normal)


def test_text_with_combining_marks_is_composed_on_both_sides():
    decomposed = "Cafe\u0301 au lait, a\u0308 la carte, x\u0301 stays, " * 3
    data = build([decomposed, "Plain."], held_out=[decomposed])
    composed = pair().normalise(decomposed)
    assert composed != decomposed
    assert data.train.text(0).startswith("Café au lait")
    assert data.held_out.scored_bytes == len(composed.encode())
    assert sum(int(b.target_bytes.sum()) for b in data.held_out.in_order(2)) == len(composed.encode())
    assert not data.train.report.refused


def test_a_special_token_in_a_text_is_text():
    text = "He wrote <|endoftext|> and <|im_start|> on the board."
    data = build([text, text])
    assert data.train.text(0) == text
    for vocab, ids in ((pair().student_vocab, "student_ids"), (pair().teacher_vocab, "teacher_ids")):
        row = getattr(data.train.collate([0]), ids)[0, 1:].tolist()
        assert not vocab.special.intersection(row)


# --- what the teacher can be heard about -----------------------------------------------------------------------------

CODE = (
    "def mean(values, weights=None):\n    total = 0\n    for value in values:\n        if value > 0:\n"
    "            total += value\n\n\n    return total   # of all\n\n\tx  =   1\n"
    "      y = [\n                 2,\n   ]\n \n  \n"
)


def naive_masks(batch, row: int, pair) -> dict[str, list[bool]]:
    """By position of a window: aligned, taught, same, and left out for white space; from the tokens' bytes alone."""
    out = {name: [] for name in ("aligned", "taught", "same", "whitespace")}
    student, teacher = pair.student_vocab, pair.teacher_vocab
    theirs = batch.teacher_ids[row].tolist()
    last = int((batch.teacher_targets[row] != IGNORE).nonzero().max()) + 1  # of the teacher's tokens, not padding
    for i, target in enumerate(batch.targets[row].tolist()):
        found = dict.fromkeys(out, False)
        here = len(student.bytes_of(batch.student_ids[row, 1 : i + 1].tolist()))
        j = max(j for j in range(last + 1) if len(teacher.bytes_of(theirs[1 : j + 1])) <= here)
        if target != IGNORE and j < last:
            says, other = student.tokens[target], teacher.tokens[theirs[j + 1]]
            meet = len(teacher.bytes_of(theirs[1 : j + 1])) == here
            if any(len(token) > 1 and token.isspace() for token in (says, other)) and not (meet and says == other):
                found["whitespace"] = True
            else:
                found |= {"aligned": meet, "taught": True, "same": meet and says == other}
        for name, value in found.items():
            out[name].append(value)
    return out


def code_windows(kind: str):
    """Windows of a pair of tokenizers that cut indented code differently."""
    if kind == "toy":
        pair_of = toy_pair()
        return pair_of, build_data(toy_texts(), pair_of, held_out=toy_texts(2, seed=5), window=24, stride=8)
    return pair(), build_data([CODE * 2, *pages(2, 200)], pair(), held_out=[CODE], window=48, stride=16)


@pytest.mark.parametrize("kind", ["toy", "embedded"])
def test_white_space_that_both_sides_cut_differently_is_left_out_and_all_else_is_there(kind):
    pair_of, data = code_windows(kind)
    seen = dict.fromkeys(("aligned", "taught", "same", "whitespace"), 0)
    inside = 0
    for windows in (data.train, data.held_out):
        for batch in windows.in_order(3):
            for row in range(len(batch.sample)):
                expected = naive_masks(batch, row, pair_of)
                for name in ("aligned", "taught", "same"):
                    assert getattr(batch, name)[row].tolist() == expected[name], name
                assert int(batch.whitespace[row]) == sum(expected["whitespace"])
                for name, found in expected.items():
                    seen[name] += sum(found)
            for name in ("aligned", "taught", "same"):
                rows = getattr(batch, f"{name}_rows")
                assert torch.equal(rows, getattr(batch, name).flatten().nonzero().squeeze(-1))
                assert set(rows.tolist()) <= set(batch.rows.tolist())
            assert len(batch.prefix) == len(batch.taught_rows)
            inside += int((batch.prefix[:, 0] > 0).sum())
            assert int((batch.prefix[:, 0] == 0).sum()) == len(batch.aligned_rows)
    assert all(count > 20 for count in seen.values()), seen
    assert seen["aligned"] + inside == seen["taught"]
    assert inside > 5


def test_inside_a_run_of_white_space_the_same_bytes_are_still_another_cut():
    """Three spaces as "a " + "  " against "a" + "  " + " ": after the first, both sides' next token is "  "."""
    pair_of = toy_pair(teacher=(b"<s>", b"a", b" ", b"  "), student=(b"<s>", b"a", b" ", b"  ", b"a "))
    batch = build_data(["aa   aaa  a"] * 2, pair_of, held_out=0.5, window=16).train.collate([0])
    spelled_as = [
        [vocab.tokens[i] for i in ids[0, 1:].tolist()]
        for vocab, ids in ((pair_of.student_vocab, batch.student_ids), (pair_of.teacher_vocab, batch.teacher_ids))
    ]
    assert spelled_as[0][:4] == [b"a", b"a ", b"  ", b"a"]
    assert spelled_as[1][:5] == [b"a", b"a", b"  ", b" ", b"a"]
    expected = naive_masks(batch, 0, pair_of)
    assert expected["whitespace"][2]
    assert batch.taught[0].tolist() == expected["taught"]
    assert int(batch.whitespace[0]) == sum(expected["whitespace"])


@pytest.mark.parametrize("kind", ["toy", "embedded"])
def test_every_scored_span_ends_where_both_have_read_the_same_bytes(kind):
    pair_of, data = code_windows(kind)
    sides = ("student", pair_of.student_vocab), ("teacher", pair_of.teacher_vocab)
    for batch in (data.train.collate([0, 2, 1]), data.held_out.collate([1, 2, 0])):
        expected = []
        for row in range(3):
            read = []  # bytes before every position, by side
            for side, vocab in sides:
                ids = getattr(batch, f"{side}_ids")[row].tolist()
                targets = (batch.targets if side == "student" else batch.teacher_targets)[row]
                size = int((targets != IGNORE).nonzero().max()) + 2
                read.append([len(vocab.bytes_of(ids[1 : i + 1])) for i in range(size)])
            scored = min(read[0][i] for i in range(len(read[0])) if batch.targets[row, i] != IGNORE)
            both = sorted(set(read[0]) & set(read[1]))
            # the span up to each common boundary but the first; its bytes are charged from `scored` on
            expected += [(row, a, b) for a, b in itertools.pairwise(both) if a >= scored]
        found = []
        width, long = batch.student_ids.shape[1], batch.teacher_ids.shape[1]
        for (ours, theirs), window, span in zip(
            batch.span_rows.tolist(), *map(torch.Tensor.tolist, batch.spans_of()), strict=True
        ):
            (row, i), (other, j) = divmod(ours, width), divmod(theirs, long)
            assert row == other == window
            starts = int(batch.span_student[row, span]), int(batch.span_teacher[row, span])
            assert (i, j) == (int(batch.span_student[row, span + 1]), int(batch.span_teacher[row, span + 1]))
            bytes_read = [
                [len(vocab.bytes_of(getattr(batch, f"{side}_ids")[row, 1 : at + 1].tolist())) for at in ends]
                for (side, vocab), ends in zip(sides, zip(starts, (i, j), strict=True), strict=True)
            ]
            assert bytes_read[0] == bytes_read[1]
            found.append((row, *bytes_read[0]))
        assert found == expected
        assert len(found) == int(batch.span_mask.sum()) > 10


def test_a_batch_knows_the_document_of_every_window():
    texts = pages(4)
    data = build(texts)
    seen = set()
    for batch in data.train.in_order(3):
        for row, document in enumerate(batch.document.tolist()):
            window = spelled(
                pair().student_vocab, batch.student_ids[row][: int((batch.targets[row] >= 0).sum()) + 1].tolist()
            )
            assert [i for i, text in enumerate(texts) if window in text.encode()] == [document]
            seen.add(document)
    assert seen == set(range(4))


# --- order -----------------------------------------------------------------------------------------------------------


def samples(data, seed, positions, workers=0) -> list[list[int]]:
    return [b.sample.tolist() for b in data.batches(seed, positions, workers=workers)]


def test_batches_are_a_function_of_seed_and_position():
    data = small_data()
    count = 2 * data.batches_per_epoch + 3
    whole = samples(data, 7, range(count))
    for start in (0, 1, data.batches_per_epoch - 1, data.batches_per_epoch, count - 1):
        assert samples(data, 7, range(start, count)) == whole[start:]
    again = build_data(pages(8, 500), pair(), held_out=0.25, window=WINDOW, batch_size=2)
    assert samples(again, 7, range(count)) == whole
    assert samples(data, 8, range(count)) != whole


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
def test_workers_change_nothing():
    data = small_data()
    one = list(data.batches(0, range(3, 9), workers=0))
    two = list(data.batches(0, range(3, 9), workers=2))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        for name in a.__dataclass_fields__:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_fetching_data_leaves_the_global_random_state_alone():
    np.random.seed(3)
    torch.manual_seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(small_data().batches(0, range(4)))
    build(pages(3), held_out=0.4)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    data = build(pages(4), batch_size=1)
    size = len(data.train)
    first = [row[0] for row in samples(data, 0, range(size))]
    second = [row[0] for row in samples(data, 0, range(size, 2 * size))]
    assert sorted(first) == sorted(second) == list(range(size))
    assert first != second
    assert first != list(range(size))


def test_fewer_windows_than_a_batch_are_one_batch():
    data = build(["A single short text."], batch_size=8)
    assert data.batches_per_epoch == 1
    assert samples(data, 0, range(3)) == [[0], [0], [0]]


def test_a_limit_spreads_over_the_whole_set():
    windows = small_data().held_out
    chosen = sorted(i for b in windows.in_order(2, limit=3) for i in b.sample.tolist())
    assert chosen[0] == 0
    assert chosen[-1] == len(windows) - 1
    assert len(chosen) == 3
    everything = sorted(i for b in windows.in_order(4, limit=10**6) for i in b.sample.tolist())
    assert everything == list(range(len(windows)))


# --- held out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.99])
def test_held_out_documents_are_not_in_train(share):
    texts = [f"Document number {i} says {'hello ' * (i + 1)}" for i in range(10)]
    data = build(texts, held_out=share)
    train = {data.train.text(i)[:18] for i in range(len(data.train))}
    whole = {bytes_of(data.train, d).decode() for d in range(len(data.train.documents))}
    apart = {bytes_of(data.held_out, d).decode() for d in range(len(data.held_out.documents))}
    assert train
    assert whole | apart == set(texts)
    assert not whole & apart
    assert len(apart) == min(max(1, round(share * 10)), 9)
    assert repr(build(texts, held_out=share)) == repr(data), "the choice depends on the seed alone"


def bytes_of(windows, document: int) -> bytes:
    return pair().student_vocab.bytes_of(windows.documents[document].student_ids)


def test_another_seed_holds_out_other_documents():
    texts = [f"Document number {i}." for i in range(20)]
    chosen = {tuple(bytes_of(build(texts, held_out=0.2, seed=s).held_out, d) for d in range(4)) for s in range(4)}
    assert len(chosen) > 1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("one string", "got one string"),
        (None, "got None"),
        ([], "got none"),
        (["", " \n\t "], "got none"),
        ([None, 3], "got none"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a b"]})), r"with train; pass split='train'"),
        (datasets.Dataset.from_dict({"body": ["a b"]}), "pass column='body'"),
    ],
)
def test_unusable_texts_are_refused(texts, said):
    with pytest.raises(ValueError, match=f"^build_data: expected .*{said}"):
        build(texts)
    with pytest.raises(ValueError, match=f"^build_data: expected .*{said}"):
        build(pages(2), held_out=texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"window": 7}, "window of at least 8 tokens, got 7"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"held_out": 0}, "held_out between 0 and 1, or texts, got 0"),
        ({"held_out": 1}, "held_out between 0 and 1, or texts, got 1"),
        ({"held_out": 1.5}, "held_out between 0 and 1"),
        ({"held_out": -0.1}, "held_out between 0 and 1"),
        ({"held_out": float("nan")}, "held_out between 0 and 1"),
        ({"maximum": 1, "held_out": 0.5}, "two documents to hold some out, got one"),
        ({"maximum": 0}, "got none"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, said):
    with pytest.raises(ValueError, match=f"^build_data: expected .*{said}"):
        build(pages(3), **arguments)


def test_one_document_cannot_be_split_but_can_be_trained_on_beside_other_texts():
    with pytest.raises(ValueError, match=r"at least two documents"):
        build(["Only one here, with words."], held_out=0.5)
    assert len(build(["Only one here, with words."]).train.documents) == 1


def test_every_unusable_row_is_counted_with_its_number():
    rows = [
        "Good text one.",
        None,
        3,
        "",
        "half \ud800 pair",
        "Good text two.",
        f"Strange {undecodable()} sign.",
        ["x"],
    ]
    data = build(rows, max_refused=1)
    report = data.train.report
    assert report.read == 8
    assert report.used == 2
    refused = {reason.split(",")[0]: found for reason, found in report.refused.items()}
    assert refused == {
        "missing": [1],
        "not text but int": [2],
        "empty": [3],
        "with half a surrogate pair": [4],
        "not text but list": [7],
        "not given back byte for byte by one of the tokenizers": [6],
    }
    assert "2 of 8 documents used" in repr(data)


def test_counts_and_row_numbers_hold_with_a_held_out_share():
    strange = f"Strange {undecodable()} sign."
    rows = [None, *(t for i in range(8) for t in (f"Good text number {i}.", strange))]
    data = build(rows, held_out=0.5, max_refused=0.6)
    reports = data.train.report, data.held_out.report
    named = []
    for report in reports:
        assert report.used + sum(map(len, report.refused.values())) == report.read
        named += report.refused["not given back byte for byte by one of the tokenizers"]
    assert sum(r.read for r in reports) == len(rows)
    assert sorted(named) == [i for i, row in enumerate(rows) if row == strange]


def test_a_text_that_no_tokenizer_gives_back_is_refused_when_alone():
    with pytest.raises(ValueError, match=r"both tokenizers can read, got none: (.|\n)*not given back byte for byte"):
        build([f"{undecodable()}{undecodable()}"])


def test_maximum_counts_documents_that_can_be_used():
    assert build(["", *pages(5)], maximum=3).train.report.used == 3


# --- datasets --------------------------------------------------------------------------------------------------------


def test_a_data_set_gives_the_same_as_its_list():
    texts = pages(4)
    table = datasets.Dataset.from_dict({"body": texts, "n": list(range(4))})
    assert build(table, column="body").fingerprint == build(texts).fingerprint
    assert build(table["body"]).fingerprint == build(texts).fingerprint
    assert build(t for t in texts).fingerprint == build(texts).fingerprint
    with_gap = datasets.Dataset.from_dict({"text": [*texts, None]})
    assert build(with_gap).train.report.refused == {"missing": [4]}


def test_a_streamed_data_set_can_be_read():
    stream = datasets.Dataset.from_dict({"text": pages(4)}).to_iterable_dataset()
    assert build(stream, maximum=9).fingerprint == build(pages(4)).fingerprint
    assert len(build(stream, maximum=3).train.documents) == len(build(pages(3)).train.documents)
    with pytest.raises(ValueError, match=r"^build_data: expected maximum= with a stream of datasets"):
        build(stream)
    with pytest.raises(ValueError, match=r"expected maximum= with a stream"):
        build(pages(4), held_out=stream)


def test_the_fingerprint_sees_one_character():
    texts = pages(3)
    same = build(texts).fingerprint
    assert same == build(list(texts)).fingerprint
    for document in range(3):
        changed = list(texts)
        changed[document] = changed[document][:-1] + ("!" if changed[document][-1] != "!" else "?")
        assert build(changed).fingerprint != same
    assert build(texts, window=24).fingerprint != same
    assert build(texts, batch_size=3).fingerprint != same
    assert build([texts[0] + texts[1], texts[2]]).fingerprint != same


def test_repr_says_what_there_is():
    said = repr(small_data())
    assert "train " in said
    assert "held out" in said
    assert "6 documents" in said
    assert f"{small_data().batches_per_epoch:,} per epoch" in said


# --- fingerprints ----------------------------------------------------------------------------------------------------


def changed_tokenizer(folder, change):
    """The embedded pair with a student's tokenizer whose file ``change`` was made to; None changes nothing."""
    shutil.copytree(asset_folder(STUDENT), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    if change is not None:
        change(content)
    path.write_text(json.dumps(content))
    return build_tokenizers(TEACHER, folder)


def swap_tokens(content):
    vocab = content["model"]["vocab"]
    vocab["om"], vocab["st"] = vocab["st"], vocab["om"]


def add_token(content):
    added = {"id": len(content["model"]["vocab"]), "content": "Darcy", "special": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append(added | flags)


def test_fingerprints_see_one_changed_token(tmp_path):
    texts = pages(3)
    pairs = {
        name: changed_tokenizer(tmp_path / name, change)
        for name, change in (("copy", None), ("swapped", swap_tokens), ("added", add_token))
    }
    of_data = {
        name: build_data(texts, p, held_out=[pages()[0]], window=WINDOW, batch_size=2).fingerprint
        for name, p in pairs.items()
    }
    assert pairs["copy"].fingerprint == pair().fingerprint
    assert of_data["copy"] == build(texts).fingerprint
    assert len({p.fingerprint for p in pairs.values()}) == len(set(of_data.values())) == 3


def test_the_fingerprint_sees_the_order_of_documents_and_what_is_held_out():
    texts = pages(4)
    prints = {
        build(given_ones, held_out=held).fingerprint
        for given_ones, held in (
            (texts[:3], texts[3:]),
            ([texts[1], texts[0], texts[2]], texts[3:]),
            (texts[:2], texts[2:]),
            (texts[:2], [texts[3], texts[2]]),
        )
    }
    assert len(prints) == 4


def test_rows_that_are_refused_change_no_fingerprint():
    texts = pages(3)
    assert build([None, texts[0], "", texts[1], texts[2], "\0"]).fingerprint == build(texts).fingerprint


def test_fingerprints_are_the_same_in_another_process():
    code = (
        "from helpers import pages, pair\nfrom kd_kit import build_data\n"
        f"data = build_data(pages(3), pair(), held_out=[pages()[0]], window={WINDOW}, batch_size=2)\n"
        "print(data.fingerprint, pair().fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "4321", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.split() == [build(pages(3)).fingerprint, pair().fingerprint]
