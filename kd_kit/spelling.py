"""The bytes that the tokens of a tokenizer spell.

Every kind of tokenizer is read in the way that fits it and then proven on probe texts; one that changes text in a way
that cannot be undone is refused with a sentence that says how.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd_kit.vocab import Vocabulary

# What a tokenizer must give back byte for byte before it is used: words, contractions, digits, runs of white space,
# line ends, accents, emoji, other scripts, and white space at both ends.
PROBES = (
    "The café's 1,234 words, we'll\tsee:\n\n  if x==1:\r\n    y = 'naïve' # 東京 ☕ 👩‍🚀 end",
    "\n  Two lines\n  between spaces  ",
)

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
_META_SPACE = "\u2581"


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level BPE writes bytes with, each with its byte.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2, and its code.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def text_ids(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The tokens of every text, [n] int64 each; a string such as ``</s>`` is text, not a command."""
    if _backend(tokenizer) is not None:
        rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    else:  # transformers 4 forgets `split_special_tokens` on the way when a Python tokenizer is called
        pieces = [tokenizer.tokenize(text, split_special_tokens=True) for text in texts]
        rows = [tokenizer.convert_tokens_to_ids(row) for row in pieces]
    return [np.array(row, dtype=np.int64) for row in rows]


def read_vocabulary(tokenizer, name: str) -> Vocabulary:
    """The vocabulary of a tokenizer as bytes, proven on probe texts.

    Byte-level BPE (Qwen, SmolLM, GPT-2, Llama-3), SentencePiece with byte fallback (Llama-2, Gemma, Mistral) and
    models of single bytes (ByT5) are read exactly.

    Args:
        tokenizer: a tokenizer of transformers, with a Rust backend or written in Python.
        name: what to call it in messages.

    Raises:
        ValueError: a tokenizer that cannot be read as bytes (one that lower-cases, strips or drops text).
    """
    backend = _backend(tokenizer)
    if backend is None and not all(hasattr(tokenizer, a) for a in ("get_vocab", "tokenize", "convert_tokens_to_ids")):
        raise ValueError(
            f"read_vocabulary: expected a tokenizer of transformers, got {type(tokenizer).__name__} for {name!r}, "
            "whose tokens cannot be listed; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    parts = _python_parts(tokenizer, name) if backend is None else _rust_parts(backend, name)
    spellings, added = parts.spellings, parts.added
    special = {i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids)
    special &= set(spellings.values())  # a name that was given and never added has no id
    tokens, fallback = _tokens_as_bytes(parts, special)
    if backend is not None:
        special -= _spelled_by_text(tokenizer, backend, tokens, special)
        unknown = getattr(backend.model, "unk_token", None)
        special |= {spellings[unknown]} if unknown in spellings else set()
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id
    if start is None:
        # Models without a bos (Qwen) saw their pad / end-of-document token between documents.
        start = tokenizer.pad_token_id if tokenizer.pad_token_id in special else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end if end is not None else 0)
    vocabulary = Vocabulary(
        name,
        tuple(tokens),
        frozenset(special),
        start,
        end,
        int(pad),
        tuple(parts.forms),
        frozenset(_never_used(tokens, special, added, fallback)),
        frozenset(added) - special,
    )
    _prove(vocabulary, tokenizer)
    return vocabulary


def _backend(tokenizer):
    """The Rust tokenizer inside one of transformers, None where Python does the work."""
    return getattr(tokenizer, "backend_tokenizer", None)


@dataclass(frozen=True)
class _Parts:
    """What reading a vocabulary takes: every spelling with its id, the added tokens, and how to read the spellings."""

    spellings: dict[str, int]
    pieces: dict[str, int]  # the model's own spellings; left out where the bytes do not depend on them
    added: dict  # id -> AddedToken
    byte_level: bool
    offset: int | None = None
    forms: Sequence[str] = ()


def _rust_parts(backend, name: str) -> _Parts:
    """Parts of a tokenizer that says what it does to a text; a ValueError where that cannot be undone."""
    forms, other = _normalizers(_described(backend.normalizer))
    if other:
        raise ValueError(
            f"read_vocabulary: expected a tokenizer that keeps the text, got {name!r}, which changes it by "
            f"{', '.join(other)}; its tokens cannot be matched with the other model's by bytes, so choose a model "
            "whose tokenizer is byte-level BPE or SentencePiece with byte fallback"
        )
    described = [_described(part) for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder)]
    byte_level = "ByteLevel" in _types_in(described)
    pieces = {} if byte_level else backend.get_vocab(with_added_tokens=False)
    spellings = backend.get_vocab(with_added_tokens=True)
    return _Parts(spellings, pieces, backend.get_added_tokens_decoder(), byte_level, forms=forms)


def _python_parts(tokenizer, name: str) -> _Parts:
    """Parts of a tokenizer that cannot be asked what it does to a text: read in the way that fits, then proven."""
    offset, added, spellings = _byte_offset(tokenizer, name), tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    pieces = {token: i for token, i in spellings.items() if i not in added}
    if any(len(token) > 1 for token in pieces):
        offset = None  # its first ids happen to be those of bytes
    return _Parts(spellings, pieces, added, all(map(frozenset(byte_alphabet()).issuperset, pieces)), offset)


def _tokens_as_bytes(parts: _Parts, special: set[int]) -> tuple[list[bytes], set[int]]:
    """The bytes of every id, and the ids that SentencePiece writes single bytes with where it has no piece."""
    alphabet = byte_alphabet()
    letters, values = frozenset(alphabet), str.maketrans({c: chr(b) for c, b in alphabet.items()})
    tokens = [b""] * (max(parts.spellings.values(), default=-1) + 1)
    fallback = set()
    for token, i in parts.spellings.items():
        # Gemma's runs of spaces are pieces that were added once more: what they mean is what the piece means
        if i in parts.added and (i in special or token not in parts.pieces):
            tokens[i] = parts.added[i].content.encode()
        elif parts.offset is not None:
            tokens[i] = bytes([i - parts.offset]) if 0 <= i - parts.offset < 256 else token.encode()
        elif parts.byte_level:
            tokens[i] = token.translate(values).encode("latin-1") if letters.issuperset(token) else token.encode()
        elif token.startswith("<0x") and (match := _BYTE_TOKEN.match(token)):
            tokens[i] = bytes([int(match[1], 16)])
            fallback.add(i)
        else:
            tokens[i] = token.replace(_META_SPACE, " ").encode()
    return tokens, fallback


def _spelled_by_text(tokenizer, backend, tokens: list[bytes], special: set[int]) -> set[int]:
    """Ids that a tokenizer calls special and that text uses all the same, such as ``!`` for padding.

    Only where merges make tokens: a Unigram model finds ``</s>`` in a text because it is in its list, and means the
    end of a document by it. The ends of documents are never text.
    """
    if type(backend.model).__name__ != "BPE":
        return set()
    asked = sorted(special - {tokenizer.bos_token_id, tokenizer.eos_token_id})
    found = set()
    for before in ("", "\n") if asked else ():  # the second for a tokenizer that writes a space before a text
        read = text_ids(tokenizer, [before + tokens[i].decode(errors="replace") for i in asked])
        found |= {i for i, ids in zip(asked, read, strict=True) if i in ids}
    return found


def _never_used(tokens: list[bytes], special, added, fallback) -> set[int]:
    """Ids whose bytes another id has too: added tokens are cut out of a text first, byte tokens are the last resort."""
    pieces = (i for i in range(len(tokens)) if i not in added and i not in fallback)
    first: dict[bytes, int] = {}
    unused = set()
    for i in (*sorted(added), *pieces, *sorted(fallback.difference(added))):
        if tokens[i] and i not in special and first.setdefault(tokens[i], i) != i:
            unused.add(i)
    return unused


def _byte_offset(tokenizer, name: str) -> int | None:
    """By how much the ids of a byte model exceed the bytes (ByT5: 3), None for another kind of tokenizer."""
    text = "1\u6771"  # nothing that a tokenizer would lower-case, strip or normalise
    ids, raw = text_ids(tokenizer, [text])[0].tolist(), text.encode()
    if ids == [ord(c) for c in text]:
        raise ValueError(
            f"read_vocabulary: expected tokens that a model predicts, got {name!r}, whose ids are the numbers of "
            "Unicode characters (CANINE): such a model hashes them and has no head over them; choose another model"
        )
    offsets = {i - b for i, b in zip(ids, raw, strict=False)}
    return offsets.pop() if len(ids) == len(raw) and len(offsets) == 1 else None


def _prove(vocabulary: Vocabulary, tokenizer) -> None:
    """Raise unless the tokens of the probe texts are the probe texts, byte for byte."""
    texts = [vocabulary.normalise(probe) for probe in PROBES]
    for ids, text in zip(text_ids(tokenizer, texts), texts, strict=True):
        if vocabulary.token_lengths(ids, text.encode()) is None:
            spelled = vocabulary.bytes_of(ids.tolist())
            at = next((i for i, (a, b) in enumerate(zip(spelled, text.encode(), strict=False)) if a != b), 0)
            unknown = getattr(tokenizer, "unk_token_id", None) in ids.tolist()
            raise ValueError(
                f"read_vocabulary: expected tokens that spell the text byte for byte, got from {vocabulary.name!r} "
                f"{spelled[max(at - 10, 0) : at + 20]!r} where the text has "
                f"{text.encode()[max(at - 10, 0) : at + 20]!r}; {_what_changed(spelled, text, unknown)}, so its "
                "positions cannot be matched by bytes"
            )


def _what_changed(spelled: bytes, text: str, unknown: bool) -> str:
    """In words, what a tokenizer did to a text that its tokens spell as something else."""
    if spelled == text.encode():
        return "it uses a special token as text"
    if not spelled:
        return "it was loaded without its vocabulary and gives no tokens"
    if unknown:
        return "it has no token for some characters and no byte fallback: they become its unknown token"
    read = spelled.decode(errors="replace")
    if read.split() == text.split() or "".join(read.split()) == "".join(text.split()):
        return "it drops, adds or replaces white space"
    if "".join(read.split()) == "".join(text.lower().split()):
        return "it lower-cases"
    for form in sorted(_UNICODE_FORMS):
        if read.strip() == unicodedata.normalize(form, text).strip():
            return f"it normalises to {form}"
    return "it drops, adds or replaces characters"


def _described(part) -> dict | None:
    """A part of a Rust tokenizer as tokenizer.json has it."""
    if part is None:
        return None
    try:
        return json.loads(part.__getstate__())
    except Exception:  # the library raises a bare one for a part that is written in Python
        return {"type": "Custom"}


def _types_in(node) -> set[str]:
    """Every ``type`` named anywhere in a part of a tokenizer.json."""
    if isinstance(node, dict):
        return ({node["type"]} if isinstance(node.get("type"), str) else set()) | _types_in(list(node.values()))
    if isinstance(node, list):
        return set().union(*map(_types_in, node)) if node else set()
    return set()


def _normalizers(node) -> tuple[list[str], list[str]]:
    """Unicode forms in order, and the names of normalizers that change text in another way."""
    if node is None or node["type"] == "ByteLevel":  # bytes as printable characters
        return [], []
    if node["type"] == "Sequence":
        pairs = [_normalizers(child) for child in node["normalizers"]]
        return [f for forms, _ in pairs for f in forms], [o for _, other in pairs for o in other]
    if node["type"] in _UNICODE_FORMS:
        return [node["type"]], []
    # SentencePiece writes spaces as U+2581, and may put one in front: both are undone when tokens are read as bytes.
    if node["type"] == "Prepend" and node.get("prepend") == _META_SPACE:
        return [], []
    if node["type"] == "Replace" and node.get("content") == _META_SPACE and node.get("pattern") == {"String": " "}:
        return [], []
    return [], [node["type"]]
