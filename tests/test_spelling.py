"""The bytes that tokens spell, for every kind of tokenizer that can be read exactly; the rest is refused."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    BUILDERS,
    BYTES,
    SPECIAL,
    TEXTS,
    byte_level,
    read,
    sentencepiece_bpe,
    wrap,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, CanineTokenizer

from kd_kit.spelling import byte_alphabet, read_vocabulary, text_ids
from kd_kit.vocab import Vocabulary, build_bridge


@pytest.fixture(scope="module")
def readers():
    return read()


def encode(tokenizer, text: str) -> np.ndarray:
    return text_ids(tokenizer, [text])[0]


def check_lengths(tokenizer, vocabulary: Vocabulary, text: str) -> None:
    """The lengths add up, and every prefix of the tokens stands at that byte of the text."""
    text = vocabulary.normalise(text)
    raw, ids = text.encode(), encode(tokenizer, text)
    lengths = vocabulary.token_lengths(ids, raw)
    assert lengths is not None, f"{text!r} as {tokenizer.convert_ids_to_tokens(ids.tolist())}"
    assert lengths.dtype == np.int64
    assert (lengths >= 0).all()
    assert lengths.sum() == len(raw)
    at = 0
    for i, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        assert vocabulary.tokens[i].endswith(raw[at : at + length])
        at += length


def test_the_byte_alphabet_is_a_bijection():
    alphabet = byte_alphabet()
    assert len(alphabet) == 256
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())


def test_the_byte_alphabet_is_that_of_transformers():
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    if not hasattr(convert, "bytes_to_unicode"):
        pytest.skip("this transformers keeps it elsewhere")
    assert byte_alphabet() == {c: b for b, c in convert.bytes_to_unicode().items()}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_lengths_add_up(readers, kind, text):
    tokenizer, vocabulary = readers[kind]
    if "<0x41>" in text and kind.startswith("unigram"):
        # the library's Unigram finds the names of bytes and specials in a text, since they are in its list: such a
        # text is refused, not measured wrongly
        assert vocabulary.token_lengths(encode(tokenizer, text), text.encode()) is None
    else:
        check_lengths(tokenizer, vocabulary, text)


@settings(max_examples=300)
@given(text=st.text(max_size=60).map(lambda t: t.replace("▁", "_")))
def test_lengths_add_up_on_random_text(readers, text):
    for tokenizer, vocabulary in readers.values():
        check_lengths(tokenizer, vocabulary, text)


@settings(max_examples=100)
@given(text=st.text(alphabet="ab \n\t\r\U0001f642é中<|", max_size=40))
def test_lengths_add_up_on_awkward_text(readers, text):
    for tokenizer, vocabulary in readers.values():
        check_lengths(tokenizer, vocabulary, text)


def test_a_text_that_is_not_given_back_is_refused_and_never_measured_wrongly(readers):
    text = "the mark ▁ of SentencePiece"
    for name, (tokenizer, vocabulary) in readers.items():
        lengths = vocabulary.token_lengths(encode(tokenizer, text), text.encode())
        assert lengths.sum() == len(text.encode()) if "byte" in name else lengths is None
    ids = encode(readers["byte level"][0], "other text")
    assert readers["byte level"][1].token_lengths(ids, b"this text") is None


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("string", ["</s>", "<s>", "<|endoftext|>", "<|im_start|>", "<unk>", "<pad>", "[CLS]", "<bos>"])
def test_the_name_of_a_special_token_is_text(readers, kind, string):
    tokenizer, vocabulary = readers[kind]
    for text in (string, f"a{string}b", f" {string} "):
        ids = encode(tokenizer, text)
        if kind.startswith("unigram") and string in ("</s>", "<s>", "<unk>"):
            assert set(ids.tolist()) & vocabulary.special, "the library finds it in its list"
            assert vocabulary.token_lengths(ids, text.encode()) is None, "so the text is refused"
        else:
            assert not set(ids.tolist()) & vocabulary.special
            check_lengths(tokenizer, vocabulary, text)


def test_a_special_token_is_never_text(readers):
    for kind, (_, vocabulary) in readers.items():
        for i in vocabulary.special:
            assert vocabulary.token_lengths(np.array([i]), vocabulary.tokens[i]) is None, kind


SEGMENTS = [
    *("a<tool>the", "<tool>the", "<tool> the", "a<tool>\nthe"),
    *("<tool>", "a <tool>", "<tool><tool>  a", " <tool>b"),
]


@pytest.mark.parametrize("how", ["normalizer", "replace", "always", "first", "never", "byte level"])
@pytest.mark.parametrize("normalized", [False, True])
def test_spaces_that_are_written_behind_added_tokens_are_not_counted(how, normalized):
    tokenizer = byte_level(prefix=True) if how == "byte level" else sentencepiece_bpe(how)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=normalized)])
    vocabulary = read_vocabulary(tokenizer, how)
    assert vocabulary.added == {tokenizer.convert_tokens_to_ids("<tool>")}
    for text in SEGMENTS:
        if how == "normalizer" and normalized and text == "a <tool>":  # the added token is "▁<tool>" now, by its id
            assert vocabulary.token_lengths(encode(tokenizer, text), text.encode()) is None
        else:
            check_lengths(tokenizer, vocabulary, text)


def test_written_spaces_by_hand():
    vocabulary = Vocabulary("t", (b" a", b"<t>", b" ", b"b"), frozenset(), None, None, 0, added=frozenset({1}))

    def lengths(ids, text):
        found = vocabulary.token_lengths(np.array(ids, dtype=np.int64), text)
        return None if found is None else found.tolist()

    assert lengths([0, 1, 0], b" a<t> a") == [2, 3, 2]
    assert lengths([0, 1, 0], b"a<t>a") == [1, 3, 1]
    assert lengths([0, 1, 0], b" a<t>a") == [2, 3, 1]
    assert lengths([2, 3], b"b") == [0, 1]
    assert lengths([2, 2, 3], b" b") == [0, 1, 1]
    assert lengths([0, 0], b"aa") is None, "not behind an added token"
    assert lengths([0, 1, 2, 2], b"a<t>") is None, "two spaces"
    assert lengths([0, 1], b"a<t>x") is None
    assert lengths([], b"") == []
    assert lengths([], b"x") is None


def test_a_space_in_front_makes_the_first_token_a_byte_shorter(readers):
    tokenizer, vocabulary = readers["bpe, normalizer"]
    ids = encode(tokenizer, "the")
    assert vocabulary.bytes_of(ids) == b" the"
    lengths = vocabulary.token_lengths(ids, b"the")
    assert lengths.sum() == 3
    assert lengths[0] == vocabulary.lengths[ids[0]] - 1
    assert vocabulary.lengths[ids[0]] == len(vocabulary.tokens[ids[0]]), "the vocabulary itself is left alone"


def test_what_the_vocabularies_hold(readers):
    level = readers["byte level"][1]
    assert level.tokens[level.end_id] == b"<|endoftext|>"
    assert level.special == {0, 1}
    assert (level.start_id, level.end_id, level.pad_id) == (0, 0, 0)
    assert {bytes([b]) for b in range(256)} <= set(level.tokens)
    assert not level.unused
    piece = readers["bpe, normalizer"][1]
    assert (piece.start_id, piece.end_id, piece.pad_id) == (1, 2, 2)
    assert piece.special == {0, 1, 2}
    assert piece.tokens[3:259] == tuple(bytes([b]) for b in range(256))
    assert (level.lengths == [len(t) for t in level.tokens]).all()
    assert "byte level" in repr(level)


def test_unicode_forms_are_applied_in_order():
    tokenizer = byte_level(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.NFC()]))
    vocabulary = read_vocabulary(tokenizer, "t")
    assert vocabulary.forms == ("NFD", "NFC")
    assert vocabulary.normalise("e\u0301") == "é"


def test_a_beginning_token_goes_before_every_window():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    assert read_vocabulary(tokenizer, "t").start_id == 1


def test_what_a_byte_model_holds(readers):
    vocabulary = readers["python, bytes"][1]
    assert vocabulary.tokens[3:259] == tuple(bytes([b]) for b in range(256))
    assert vocabulary.special == {0, 1, 2, *range(259, 384)}
    assert (vocabulary.start_id, vocabulary.end_id, vocabulary.pad_id) == (0, 1, 0)
    other = readers["python, bytes, other offset"][1]
    assert other.tokens[6:] == tuple(bytes([b]) for b in range(256))
    assert (other.start_id, other.end_id) == (1, 2)
    bridge = build_bridge(vocabulary, other)
    assert bridge.table[3:259].tolist() == list(range(6, 262))
    assert bridge.shared == 256


def test_runs_of_white_space_that_were_added_once_more_are_spaces(readers):
    tokenizer, vocabulary = readers["gemma"]
    assert encode(tokenizer, "a    the").tolist() == tokenizer.convert_tokens_to_ids(["a", "▁▁▁▁", "the"])
    assert vocabulary.tokens[tokenizer.convert_tokens_to_ids("▁▁▁▁")] == b"    "
    assert vocabulary.tokens[tokenizer.convert_tokens_to_ids("\n\n")] == b"\n\n"
    for n in range(1, 40):
        check_lengths(tokenizer, vocabulary, " " * n + "the" + " " * n + "\n" * n)
    ids = encode(tokenizer, "a▁▁b")  # U+2581 itself in a text
    assert vocabulary.token_lengths(ids, "a▁▁b".encode()) is None


@pytest.mark.parametrize("how", ["as it is made", "later"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_padding_token_that_is_a_piece_of_text_stays_text(kind, how):
    tokenizer = byte_level() if kind == "bytes" else sentencepiece_bpe("always")
    if how == "later":
        tokenizer.pad_token = "a"
    else:
        named = {"eos_token": "<|endoftext|>"} if kind == "bytes" else SPECIAL
        tokenizer = wrap(tokenizer.backend_tokenizer, **named, pad_token="a")
    vocabulary = read_vocabulary(tokenizer, "t")
    letter = tokenizer.convert_tokens_to_ids("a")
    assert vocabulary.pad_id == letter
    assert letter not in vocabulary.special
    assert vocabulary.end_id in vocabulary.special
    check_lengths(tokenizer, vocabulary, "a car")


def test_the_end_of_a_document_is_never_text():
    tokenizer = byte_level()
    tokenizer.eos_token = tokenizer.pad_token = ","
    vocabulary = read_vocabulary(byte_level(), "t")
    assert vocabulary.token_lengths(encode(tokenizer, "a b"), b"a b") is not None
    with pytest.raises(ValueError, match=r"'t' .*it uses a special token as text"):
        read_vocabulary(tokenizer, "t")  # the probe has commas, and so has every text


def test_a_special_name_without_an_id_is_passed_over():
    tokenizer = byte_level()
    tokenizer.mask_token = "<never added>"
    assert read_vocabulary(tokenizer, "t").special == {0, 1}


def test_the_unknown_token_is_special_though_nobody_says_so():
    tokenizer = sentencepiece_bpe("never")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"] = []
    assert 0 in read_vocabulary(wrap(Tokenizer.from_str(json.dumps(spec))), "t").special


def test_compatibility_forms_are_the_text_that_is_learnt():
    tokenizer = byte_level(normalizer=normalizers.NFKC())
    vocabulary = read_vocabulary(tokenizer, "t")
    assert vocabulary.forms == ("NFKC",)
    assert vocabulary.normalise("ﬁ½") == "fi1⁄2"
    check_lengths(tokenizer, vocabulary, "ﬁ ½ ㎞ e\u0301")
    assert vocabulary.token_lengths(encode(tokenizer, "ﬁ"), "ﬁ".encode()) is None, "unless it is normalised first"


@pytest.mark.parametrize("bytes_last", [False, True])
def test_byte_tokens_are_unused_where_a_piece_spells_the_same(bytes_last):
    tokenizer = sentencepiece_bpe("normalizer", bytes_last=bytes_last)
    vocabulary = read_vocabulary(tokenizer, "t")
    names = tokenizer.convert_ids_to_tokens(range(vocabulary.size))
    unused = {names[i] for i in vocabulary.unused}
    assert {"<0x61>", "<0x20>"} <= unused <= set(BYTES)
    assert "<0x00>" not in unused, "nothing else spells it"


def test_an_added_token_is_what_text_uses():
    tokenizer = byte_level()
    tokenizer.add_tokens(["  "])  # GPT-NeoX adds runs of spaces that its merges know, too
    tokenizer.add_tokens([" "])
    vocabulary = read_vocabulary(tokenizer, "t")
    used = tokenizer.convert_tokens_to_ids(" ")
    assert encode(tokenizer, "a b")[1] == used
    assert tokenizer.convert_tokens_to_ids("Ġ") in vocabulary.unused
    assert used not in vocabulary.unused


REFUSED = {
    "Lowercase": normalizers.Lowercase(),
    "Strip": normalizers.Strip(),
    "BertNormalizer": normalizers.BertNormalizer(),
    "StripAccents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "Replace": normalizers.Replace(Regex(r"\s+"), " "),
    "Nmt": normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()]),
    "Prepend": normalizers.Prepend("x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_text_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"read_vocabulary: .*'this one', which changes it by {name};"):
        read_vocabulary(byte_level(normalizer=REFUSED[name]), "this one")


def test_word_pieces_are_refused():
    words = {w: i for i, w in enumerate(["[UNK]", "The", "the", "##s", "w", "##o", "."])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with pytest.raises(ValueError, match=r"read_vocabulary: .* byte for byte, got from 'bert' .*The caf"):
        read_vocabulary(wrap(tokenizer, unk_token="[UNK]"), "bert")
    tokenizer.normalizer = normalizers.BertNormalizer()
    with pytest.raises(ValueError, match="BertNormalizer"):
        read_vocabulary(wrap(tokenizer, unk_token="[UNK]"), "bert")


def test_bytes_without_fallback_are_refused():
    tokenizer = sentencepiece_bpe("normalizer")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["byte_fallback"] = False
    with pytest.raises(ValueError, match=r"'no fallback' .*no byte fallback: they become its unknown token"):
        read_vocabulary(wrap(Tokenizer.from_str(json.dumps(spec)), **SPECIAL), "no fallback")
    pieces = [("<unk>", 0.0), *[(c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz"]]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(ValueError, match=r"'t5' .*no byte fallback: they become its unknown token"):
        read_vocabulary(wrap(unigram, unk_token="<unk>"), "t5")


CUTS = {
    "white space": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)]),
    "characters": pre_tokenizers.Sequence([pre_tokenizers.Split("e", "removed"), pre_tokenizers.ByteLevel(False)]),
}


@pytest.mark.parametrize("what", CUTS)
def test_a_pre_tokenizer_that_drops_text_is_refused(what):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = CUTS[what]
    with pytest.raises(ValueError, match=f"'t' .*it drops, adds or replaces {what}, so its positions"):
        read_vocabulary(tokenizer, "t")


class Changing(ByT5Tokenizer):
    """A tokenizer in Python that changes a text before it reads it."""

    change = staticmethod(str)

    def tokenize(self, text, **kwargs):
        return super().tokenize(self.change(text), **kwargs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (str.lower, "it lower-cases"),
        (str.strip, "it drops, adds or replaces white space"),
        (lambda text: unicodedata.normalize("NFD", text), "it normalises to NFD"),
        (lambda text: text.replace("e", ""), "it drops, adds or replaces characters"),
        (lambda text: "", "it was loaded without its vocabulary"),
    ],
)
def test_a_tokenizer_in_python_that_changes_the_text_is_refused(change, reason):
    tokenizer = Changing()
    tokenizer.change = change
    with pytest.raises(ValueError, match=f"read_vocabulary: .*'mine' .*{reason}"):
        read_vocabulary(tokenizer, "mine")


def test_characters_by_number_are_refused():
    with pytest.raises(ValueError, match=r"read_vocabulary: .*'canine', whose ids are the numbers of Unicode"):
        read_vocabulary(CanineTokenizer(), "canine")


def test_a_part_in_python_that_changes_the_text_is_refused():
    class Upper:
        def normalize(self, text):
            text.uppercase()

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Normalizer.custom(Upper())
    with pytest.raises(ValueError, match=r"'mine', which changes it by Custom;"):
        read_vocabulary(tokenizer, "mine")


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"read_vocabulary: .*got object for 'slow', .*; load it with .*use_fast=True"):
        read_vocabulary(object(), "slow")


def test_a_template_with_special_tokens_does_not_disturb():
    tokenizer = sentencepiece_bpe("normalizer")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    check_lengths(tokenizer, read_vocabulary(tokenizer, "t"), "with a template")
