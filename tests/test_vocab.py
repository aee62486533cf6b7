"""Vocabularies as bytes, for the three kinds of tokenizer that can be read exactly, and the bridge between them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kd_kit.vocab import Bridge, Vocabulary, build_bridge, byte_alphabet, read_vocabulary, special_map

PROSE = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want",
    "of a wife. However little known the feelings or views of such a man may be on his first entering a",
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered",
    "as the rightful property of some one or other of their daughters. def f(x):\n    return x + 1\n",
]
TEXTS = {
    "prose": "She was a woman of mean understanding, little information, and uncertain temper.",
    "code": "def f(xs: list[int]) -> dict:\n\treturn {x: x**2 for x in xs if x % 2 == 0}  # squares\n",
    "emoji": "ok \U0001f642\U0001f642 \U0001f469‍\U0001f680 flag \U0001f1eb\U0001f1f7 thumb \U0001f44d\U0001f3fd",
    "cjk": "東京都は日本の首都。中文字符 한국어",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n",
    "spaces": "a  b   c        d \t\t e\n\n\n   f    ",
    "leading spaces": "   indented",
    "special strings": "<|endoftext|> and </s> and <s>x</s> <unk> <0x41> are text",
    "accents": "naïve café Ångström é (decomposed) ﬁ ligature",
    "controls": "a\x00b\x07c\x7f \u200b\ufeff\u00ad end",
    "one letter": "a",
}


def wrap(tokenizer: Tokenizer, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def byte_level(*, prefix: bool = False, normalizer=None, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return wrap(tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _sentencepiece_decoder():
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _spaced(tokenizer: Tokenizer, how: str) -> Tokenizer:
    """With spaces written the way that Llama-2 (normalizers) or newer conversions (pre-tokenizer) write them."""
    if how == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif how == "replace":  # Gemma: no space is put in front
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=how, split=how == "first")
    tokenizer.decoder = _sentencepiece_decoder()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def sentencepiece_bpe(how: str, bytes_last: bool = False) -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    plain.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learnt = json.loads(plain.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    names = ["<unk>", "<s>", "</s>"] + (pieces + BYTES if bytes_last else BYTES + pieces)
    merges = [tuple(m) for m in learnt["merges"]]
    vocab = {token: i for i, token in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    return wrap(_spaced(tokenizer, how), **SPECIAL)


def sentencepiece_unigram(how: str) -> PreTrainedTokenizerFast:
    letters = [(c, -6.0) for c in "▁abcdefghijklmnopqrstuvwxyzABS.,:()#\n"]
    words = [(w, -3.0) for w in ("▁the", "▁a", "▁of", "ing", "▁and", "▁in", "tion", "▁▁", "er")]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *[(b, -12.0) for b in BYTES], *letters, *words]
    return wrap(_spaced(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True)), how), **SPECIAL)


BUILDERS = {
    "byte level": byte_level,
    "byte level, space in front": lambda: byte_level(prefix=True),
    "byte level, NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "bpe, normalizer": lambda: sentencepiece_bpe("normalizer"),
    "bpe, replace": lambda: sentencepiece_bpe("replace", bytes_last=True),
    "bpe, metaspace always": lambda: sentencepiece_bpe("always"),
    "bpe, metaspace first": lambda: sentencepiece_bpe("first"),
    "unigram, normalizer": lambda: sentencepiece_unigram("normalizer"),
    "unigram, metaspace never": lambda: sentencepiece_unigram("never"),
}


@pytest.fixture(scope="module")
def readers():
    """Every kind of tokenizer, and its vocabulary."""
    made = {name: build() for name, build in BUILDERS.items()}
    return {name: (tokenizer, read_vocabulary(tokenizer, name)) for name, tokenizer in made.items()}


def encode(tokenizer, text: str) -> np.ndarray:
    ids = tokenizer([text], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"][0]
    return np.array(ids, dtype=np.int64)


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
        # the library's Unigram reads the name of a byte as that byte: such a text is refused, not measured wrongly
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
        assert lengths.sum() == len(text.encode()) if name.startswith("byte level") else lengths is None
    ids = encode(readers["byte level"][0], "other text")
    assert readers["byte level"][1].token_lengths(ids, b"this text") is None


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
    with pytest.raises(ValueError, match="drops, adds or replaces characters"):
        read_vocabulary(wrap(Tokenizer.from_str(json.dumps(spec)), **SPECIAL), "no fallback")


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"read_vocabulary: .*got object for 'slow'; load it with .*use_fast=True"):
        read_vocabulary(object(), "slow")


def test_a_template_with_special_tokens_does_not_disturb():
    tokenizer = sentencepiece_bpe("normalizer")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    check_lengths(tokenizer, read_vocabulary(tokenizer, "t"), "with a template")


# ---- the bridge


def words(*tokens: str | bytes, special=(), start=None, end=None, unused=()) -> Vocabulary:
    spelled = tuple(t.encode() if isinstance(t, str) else t for t in tokens)
    return Vocabulary("words", spelled, frozenset(special), start, end, 0, (), frozenset(unused))


def naive_table(teacher: Vocabulary, student: Vocabulary, specials: dict[int, int]) -> list[int]:
    """Every student token held against every teacher token; the longest that is a prefix wins."""
    out = []
    for t, spelled in enumerate(teacher.tokens):
        if t in teacher.special:
            out.append(specials.get(t, student.size))
            continue
        homes = [
            (len(s), -i)
            for i, s in enumerate(student.tokens)
            if s and i not in student.special and i not in student.unused and spelled.startswith(s)
        ]
        out.append(-max(homes)[1] if homes else student.size)
    return out


def test_the_longest_prefix_wins():
    student = words("t", "th", "the", "e", " ", " a", "<end>", special=[6], end=6)
    teacher = words("the", "there", "tha", "thx", "x", " and", "e", "<stop>", b"", special=[7], end=7)
    bridge = build_bridge(teacher, student)
    assert bridge.table.tolist() == [2, 2, 1, 1, 7, 5, 3, 6, 7]
    assert bridge.shared == 2
    assert (bridge.teacher_size, bridge.student_size) == (9, 7)
    assert "2 byte-identical, 2 without a home" in repr(bridge)


def test_text_never_goes_to_a_special_token_nor_to_an_unused_one():
    student = words("<s>", "a", "a", "b", special=[0], end=0, unused=[1])
    teacher = words("<s>", "<s>x", "a", "ab", "b")
    assert build_bridge(teacher, student).table.tolist() == [4, 4, 2, 2, 3]


tokens = st.lists(
    st.binary(min_size=0, max_size=4).map(lambda b: bytes(c % 3 + 97 for c in b)), min_size=1, max_size=25
)


@settings(max_examples=200)
@given(tokens, tokens, st.data())
def test_the_table_is_the_naive_one(teacher_tokens, student_tokens, data):
    ids = [st.sets(st.integers(0, len(side) - 1), max_size=3) for side in (teacher_tokens, student_tokens)]
    teacher = words(*teacher_tokens, special=data.draw(ids[0]))
    student = words(*student_tokens, special=data.draw(ids[1]))
    explicit = {t: data.draw(st.integers(0, student.size - 1)) for t in teacher.special if data.draw(st.booleans())}
    bridge = build_bridge(teacher, student, explicit)
    assert bridge.table.tolist() == naive_table(teacher, student, explicit)


def test_the_table_between_real_kinds_is_the_naive_one(readers):
    names = list(readers)
    for a, b in zip(names, names[1:] + names[:1], strict=True):
        teacher, student = readers[a][1], readers[b][1]
        if (teacher.tokens, teacher.special) != (student.tokens, student.special):
            bridge = build_bridge(teacher, student)
            assert bridge.table.tolist() == naive_table(teacher, student, special_map(teacher, student))


def test_letters_go_to_the_tokens_that_text_uses(readers):
    teacher = readers["byte level"][1]
    for kind in ("bpe, normalizer", "bpe, replace"):
        tokenizer, student = readers[kind]
        bridge = build_bridge(teacher, student)
        letter = teacher.tokens.index(b"a")
        assert tokenizer.convert_ids_to_tokens(int(bridge.table[letter])) == "a"


def test_specials_are_mapped_by_meaning():
    student = words("a", "<end>", special=[1], end=1, start=1)
    teacher = words("a", "<stop>", "<begin>", "<tool>", special=[1, 2, 3], end=1, start=2)
    assert special_map(teacher, student) == {1: 1, 2: 1}
    assert build_bridge(teacher, student).table.tolist() == [0, 1, 1, 2]
    assert build_bridge(teacher, student, {3: 1}).table.tolist() == [0, 2, 2, 1], "an explicit map is the whole map"
    assert special_map(teacher, words("a")) == {}
    # an end token that is not marked special is text
    assert special_map(words("a", "<stop>", end=1), student) == {}


@pytest.mark.parametrize("kind", BUILDERS)
def test_identical_tokenizers_give_the_identity(readers, kind):
    vocabulary = readers[kind][1]
    bridge = build_bridge(vocabulary, vocabulary)
    assert torch.equal(bridge.table, torch.arange(vocabulary.size))
    assert bridge.shared == vocabulary.size
    probs = torch.rand(3, vocabulary.size).softmax(-1)
    assert torch.equal(bridge.project(probs), torch.cat([probs, torch.zeros(3, 1)], dim=-1))


def test_the_identity_leaves_ids_without_a_token_out():
    vocabulary = words("a", b"", "b")
    assert build_bridge(vocabulary, vocabulary).table.tolist() == [0, 3, 2]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 5), st.integers(0, 1000))
def test_project_is_the_naive_sum_and_keeps_all_mass(table, rows, seed):
    bridge = Bridge(torch.tensor(table), 6, 0)
    probs = torch.rand(rows, len(table), generator=torch.Generator().manual_seed(seed)).softmax(-1)
    ours = bridge.project(probs)
    assert ours.shape == (rows, 7)
    assert ours.dtype == torch.float32
    expected = [[0.0] * 7 for _ in range(rows)]
    for n in range(rows):
        for t, v in enumerate(table):
            expected[n][v] += float(probs[n, t])
    torch.testing.assert_close(ours, torch.tensor(expected).reshape(rows, 7))
    torch.testing.assert_close(ours.sum(-1), torch.ones(rows))


def test_project_sums_half_precision_in_float32():
    # a thousand equal shares of one cell: in float16 the sum would stop growing
    bridge = Bridge(torch.zeros(4096, dtype=torch.long), 2, 0)
    probs = torch.full((1, 4096), 1 / 4096, dtype=torch.float16)
    assert bridge.project(probs).tolist() == [[1.0, 0.0, 0.0]]


def test_padded_rows_are_an_error():
    with pytest.raises(ValueError, match=r"Bridge.project: .*over 3 teacher tokens, got 5; cut the padded rows"):
        Bridge(torch.tensor([0, 1, 2]), 2, 0).project(torch.zeros(1, 5))
