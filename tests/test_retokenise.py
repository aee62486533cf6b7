"""Rows for another tokenizer: the ones that a slow loop makes, and a model that can still read."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import pages, pair, teacher, tiny_student
from made_tokenizers import byte_level, gemma_style

from kd_kit import build_data, build_student, export, score
from kd_kit.retokenise import retokenised, spelled_by
from kd_kit.spelling import read_vocabulary


def naive_pieces(token: bytes, vocab) -> list[int]:
    """Longest first, over all tokens at every byte."""
    usable = [i for i in range(vocab.size) if vocab.tokens[i] and i not in vocab.special and i not in vocab.unused]
    found = []
    while token:
        fits = [i for i in usable if token.startswith(vocab.tokens[i])]
        best = max(fits, key=lambda i: len(vocab.tokens[i]), default=None)
        found += [] if best is None else [best]
        token = token[1 if best is None else len(vocab.tokens[best]) :]
    return found


@pytest.mark.parametrize("there", [byte_level, gemma_style])
def test_pieces_are_those_of_a_slow_loop(there):
    new, old = read_vocabulary(there(), "new"), pair().student_vocab
    pieces = spelled_by(new, old)
    for i, token in enumerate(new.tokens):
        if i not in new.special:
            assert pieces[i] == naive_pieces(token, old), token
    assert sum(len(some) > 1 for some in pieces) > 10, "or else the test sees nothing"


def test_bytes_without_a_token_are_left_out_and_specials_of_one_name_are_one():
    old, new = read_vocabulary(byte_level(), "old"), read_vocabulary(byte_level(vocab_size=500), "new")
    object.__setattr__(old, "special", old.special | {old.tokens.index(b"e")})
    pieces = spelled_by(new, old)
    assert pieces[new.tokens.index(b"e")] == []
    here, there = new.tokens.index(b"<|im_start|>"), old.tokens.index(b"<|im_start|>")
    assert pieces[here] == [there]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [None, 4200])
def test_every_row_is_the_mean_of_its_pieces(tied, rows):
    old, new = pair().student_vocab, pair().teacher_vocab
    model = tiny_student(tie_word_embeddings=tied)
    tables = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    made = retokenised(model, pair().student, pair().teacher, rows=rows)
    assert made is model
    assert model.config.vocab_size == (rows or new.size)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    pieces = spelled_by(new, old)
    for table, layer in zip(tables, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        mean = table[: old.size].mean(0)
        shrunk = layer is model.get_output_embeddings() and not tied
        expected = []
        for i in range(len(layer.weight)):
            some = pieces[i] if i < new.size else []
            row = table[some].mean(0) if some else mean
            expected.append(mean + (row - mean) / (max(len(some), 1) ** 0.5 if shrunk else 1.0))
        torch.testing.assert_close(layer.weight.detach(), torch.stack(expected), atol=1e-6, rtol=1e-4)
    ids = torch.tensor([[1, 2, model.config.vocab_size - 1]])
    assert model(ids).logits.shape == (1, 3, model.config.vocab_size)


def test_its_own_tokenizer_leaves_a_model_as_it_was():
    model = tiny_student()
    before = copy.deepcopy(model)
    retokenised(model, pair().student, pair().student)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-4)


def test_every_row_takes_gradient_and_the_configuration_names_the_new_tokenizer():
    model = tiny_student(pad_token_id=3)
    retokenised(model, pair().student, pair().teacher)
    config, there = model.config, pair().teacher
    assert (config.bos_token_id, config.eos_token_id) == (there.bos_token_id, there.eos_token_id)
    model.get_input_embeddings()(torch.tensor([3])).sum().backward()
    assert model.get_input_embeddings().weight.grad[3].ne(0).all()


def test_a_head_with_a_bias_gets_one_for_every_token():
    from conftest import build_tiny

    model = build_tiny("phi", vocab=pair().student_vocab.size)
    bias = model.get_output_embeddings().bias.detach().clone()
    retokenised(model, pair().student, pair().teacher)
    pieces = spelled_by(pair().teacher_vocab, pair().student_vocab)
    expected = torch.stack([bias[some].mean() if some else bias.mean() for some in pieces])
    torch.testing.assert_close(model.get_output_embeddings().bias.detach(), expected)


def test_a_trained_model_still_reads_with_another_tokenizer():
    """The embedded teacher with the student's tokenizer, on the novel that it never saw, beside random rows."""
    data = build_data(pages(), pair(), held_out=pages(4), window=64, batch_size=4)
    made = retokenised(copy.deepcopy(teacher()), pair().teacher, pair().student)
    lost = copy.deepcopy(made)
    with torch.no_grad():
        std = float(teacher().get_input_embeddings().weight.std())
        lost.get_input_embeddings().weight.normal_(std=std)
    own = score(teacher(), data.held_out, side="teacher").bits_per_byte
    found, random = (score(model, data.held_out).bits_per_byte for model in (made, lost))
    print(f"own tokenizer {own:.3f}, made rows {found:.3f}, random rows {random:.3f}")
    assert own < found < 0.7 * random


def test_build_student_with_a_tokenizer(tmp_path):
    folder = export(tiny_student(seed=4), tmp_path / "student", pair())
    there = tmp_path / "tokenizer"
    pair().teacher.save_pretrained(there)
    expected = retokenised(tiny_student(seed=4), pair().student, pair().teacher).state_dict()
    for tokenizer in (pair().teacher, there, str(there)):
        model = build_student(folder, tokenizer=tokenizer)
        assert model.training
        assert all(torch.equal(expected[n], tensor) for n, tensor in model.state_dict().items())
    export(model, tmp_path / "again")
    again = build_student(tmp_path / "again").state_dict()
    assert all(torch.equal(expected[n], tensor) for n, tensor in again.items())
    fresh = build_student(folder, from_scratch=True, seed=3, tokenizer=pair().teacher)
    assert fresh.config.vocab_size == fresh.get_output_embeddings().weight.shape[0] == pair().teacher_vocab.size
    assert fresh.get_input_embeddings().weight.ne(0).all()
    assert fresh.get_input_embeddings().weight.detach().std() == pytest.approx(0.1, rel=0.05)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected the model's own tokenizer as old_tokenizer, got one of"):
        retokenised(tiny_student(vocab_size=100), pair().student, pair().teacher)
    with pytest.raises(ValueError, match=r"expected at least .* rows, one per token, got rows=5"):
        retokenised(tiny_student(), pair().student, pair().teacher, rows=5)
    folder = export(tiny_student(seed=4), tmp_path / "alone")  # without a tokenizer there are no old tokens
    with pytest.raises(ValueError, match=r"build_student\(name=\): expected a folder with a tokenizer"):
        build_student(folder, tokenizer=pair().teacher)
    with pytest.raises(ValueError, match=r"build_student\(tokenizer=\)"):
        build_student(export(tiny_student(), tmp_path / "s", pair()), tokenizer=tmp_path / "nothing")
