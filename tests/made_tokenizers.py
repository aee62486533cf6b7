"""Tiny tokenizers of every kind, made here: nothing is downloaded."""

from __future__ import annotations

import functools
import json
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PerceiverTokenizer, PreTrainedTokenizerFast

from kd_kit.spelling import byte_alphabet, read_vocabulary

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
    "one space in front": " indented",
    "leading line ends": "\n\r\n the",
    "nothing": "",
    "a space": " ",
    "combining": "e\u0301 n\u0303o \u0ba8\u0bbf \u0e01\u0e33 z\u0335\u0321\u0323a\u0300\u0316",
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


def gemma_style() -> PreTrainedTokenizerFast:
    """No space in front, long runs of white space as pieces that are added tokens, too, specials among the first."""
    runs = ["▁" * n for n in range(2, 17)] + ["\n" * n for n in range(2, 5)] + ["\t\t"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz\n\t"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *runs, *letters, "th", "the", "▁the"]
    vocab = {token: i for i, token in enumerate(names)}
    merges = [(run[0] * cut, run[cut:]) for run in runs for cut in range(1, len(run))]
    merges += [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return wrap(tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def byte_normalizer() -> PreTrainedTokenizerFast:
    """Bytes written as letters by the normalizer, not by the pre-tokenizer."""
    tokenizer = byte_level()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("Ġ[a-z]+"), "isolated")
    backend.decoder = decoders.Fuse()
    return wrap(backend, eos_token="<|endoftext|>")


LETTERS = {b: c for c, b in byte_alphabet().items()}
PAIRS_OF_BYTES = byte_alphabet() | {"Ġt": 256, "he": 257, "ĊĊ": 258}


class TwoBytes(ByT5Tokenizer):
    """A tokenizer in Python whose tokens have up to two bytes, written as GPT-2 writes them."""

    def get_vocab(self):
        return PAIRS_OF_BYTES | {"</s>": 259}

    added_tokens_decoder = property(lambda self: {259: AddedToken("</s>", special=True)})
    all_special_ids = property(lambda self: [259])
    eos_token_id = property(lambda self: 259)
    bos_token_id = pad_token_id = unk_token_id = property(lambda self: None)

    def tokenize(self, text, **kwargs):
        return re.findall("Ġt|he|ĊĊ|.", "".join(LETTERS[b] for b in text.encode()))

    def convert_tokens_to_ids(self, tokens):
        return [PAIRS_OF_BYTES[token] for token in tokens]


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
    "bpe, metaspace never": lambda: sentencepiece_bpe("never"),
    "unigram, normalizer": lambda: sentencepiece_unigram("normalizer"),
    "unigram, metaspace never": lambda: sentencepiece_unigram("never"),
    "unigram, metaspace always": lambda: sentencepiece_unigram("always"),
    "gemma": gemma_style,
    "byte level, by the normalizer": byte_normalizer,
    "python, bytes": ByT5Tokenizer,
    "python, bytes, other offset": PerceiverTokenizer,
    "python, pairs of bytes": TwoBytes,
}


@functools.cache
def read() -> dict:
    """Every kind of tokenizer, and its vocabulary."""
    made = {name: build() for name, build in BUILDERS.items()}
    return {name: (tokenizer, read_vocabulary(tokenizer, name)) for name, tokenizer in made.items()}
