"""The embedded pair: what ships is whole and real, and the build's pure parts do what they say."""

import bz2
import doctest
import hashlib
import io
import json
import math
import os
import re
import socket
import struct
import sys
import tempfile
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kd_kit import offline
from kd_kit.offline import ASSETS, STUDENT, TEACHER, asset_folder, corpus
from kd_kit.offline.austen import NOVELS, chapters, character_vector, novels, unwrap, zlib_blocks
from kd_kit.offline.cut import base_symbols, prefix_cut
from kd_kit.offline.fetch import Package, package_file, source_file
from kd_kit.offline.pretrain import (
    bits_per_byte,
    expert_shares,
    learning_rate_factor,
    random_windows,
    token_stream,
    train,
)
from kd_kit.offline.provenance import hashes
from kd_kit.offline.shapes import student_config, teacher_config

PROSE = "It was not that she didn't know: they'd said so, and she'll say it again. (Bath, 1814)"
TEXTS = {
    "prose": PROSE,
    "digits": "In 1818, 24 chapters; 3.14159 and 1,000,000.",
    "emoji": "a 😀 and a family 👨‍👩‍👧‍👦, done",
    "cjk": "漢字かな交じり文, 한국어",
    "contractions": "I'm, you're, he's, we'll, they'd've, DON'T, 'tis",
    "white space": "  two  spaces\n\n\ttab\n \n end ",
    "code": "def f(x):\n    return {'a': [x**2]}\n",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection is an error: what ships must need none."""

    def refuse(*arguments, **keywords):
        raise AssertionError(f"the embedded pair asked for the network: {arguments[1:]}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def tokenizers():
    return {name: AutoTokenizer.from_pretrained(asset_folder(name)) for name in (TEACHER, STUDENT)}


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(asset_folder(TEACHER), dtype=torch.float32).eval()


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# What ships


def test_asset_folder_names_the_choices():
    for name in (TEACHER, STUDENT):
        assert (asset_folder(name) / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match=r"asset_folder: expected 'embedded-teacher' or .*, got 'gpt2'; "):
        asset_folder("gpt2")


def test_provenance_matches_the_files():
    text = (ASSETS / "PROVENANCE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \|$", text, flags=re.MULTILINE)
    assert [(name, int(size.replace(",", "")), digest) for name, size, digest in rows] == hashes(ASSETS)
    assert {"teacher/model.safetensors", "student/config.json", "corpus/emma.txt.bz2"} <= {row[0] for row in rows}


def test_teacher_is_small_finite_and_half_precision():
    path = asset_folder(TEACHER) / "model.safetensors"
    assert path.stat().st_size < 5_000_000
    weights = load_file(path)
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in weights.values())
    assert sum(weight.numel() for weight in weights.values()) <= 2_450_000


def test_teacher_is_a_trained_mixture_with_padded_rows(teacher, tokenizers):
    config = teacher.config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen3_moe", 8, 2)
    assert config.norm_topk_prob and config.tie_word_embeddings and not config.output_router_logits
    assert len(tokenizers[TEACHER]) < config.vocab_size == teacher.get_output_embeddings().weight.shape[0]
    assert config.eos_token_id == config.pad_token_id == tokenizers[TEACHER].eos_token_id
    ids = torch.tensor([encode(tokenizers[TEACHER], "<|endoftext|>" + corpus("held_out")[0][:1000])])
    with torch.no_grad():
        logits = teacher(input_ids=ids).logits
    assert logits.isfinite().all()
    assert logits[0].softmax(-1)[:, len(tokenizers[TEACHER]) :].sum(-1).mean() < 0.001


def test_experts_share_the_work(teacher, tokenizers):
    """Every expert somewhere and several in every layer; not all in each, see PROVENANCE.md."""
    tokenizer = tokenizers[TEACHER]
    shares = expert_shares(teacher, tokenizer, corpus("held_out")[:3], start=tokenizer.eos_token_id)
    assert shares.shape == (4, 8) and torch.allclose(shares.sum(-1), torch.ones(4))
    assert (shares.max(dim=0).values > 0.05).all()
    assert ((shares > 0.01).sum(-1) >= 4).all() and shares.max() < 0.6


def test_teacher_knows_unseen_austen(teacher, tokenizers):
    """Measured when it was made: 1.613 on this slice. The bound leaves room for other arithmetic."""
    tokenizer = tokenizers[TEACHER]
    measured = bits_per_byte(teacher, tokenizer, [corpus("held_out")[1][:8000]], start=tokenizer.eos_token_id)
    assert 1.5 < measured < 1.65


def test_config_reads_in_both_generations_of_transformers():
    stored = json.loads((asset_folder(TEACHER) / "config.json").read_text(encoding="utf-8"))
    assert stored["num_experts"] == stored["num_local_experts"] == 8


def test_student_starts_from_scratch(tokenizers):
    folder = asset_folder(STUDENT)
    assert not list(folder.glob("*.safetensors"))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config)
    assert (config.model_type, config.vocab_size) == ("llama", len(tokenizers[STUDENT]))
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)
    assert 600_000 <= model.num_parameters() <= 900_000


# Tokenizers


@pytest.mark.parametrize("name", [TEACHER, STUDENT])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_round_trip(tokenizers, name, text):
    assert tokenizers[name].decode(encode(tokenizers[name], text)) == text


@pytest.mark.parametrize("name", [TEACHER, STUDENT])
def test_round_trip_of_the_corpus(tokenizers, name):
    for chapter in corpus("held_out")[:3]:
        assert tokenizers[name].decode(encode(tokenizers[name], chapter)) == chapter


def test_ids_are_the_real_ones(tokenizers):
    """What the uncut Qwen3 and SmolLM2 give for these words: every id lies below the cuts."""
    stated = {
        TEACHER: {
            "The quick": [785, 3974],
            " over the": [916, 279],
            "It's 1818,": [2132, 594, 220, 16, 23, 16, 23, 11],
        },
        STUDENT: {
            "The": [504],
            " over the": [690, 260],
            "It's 1818,": [1589, 506, 216, 33, 40, 33, 40, 28],
        },
    }
    for name, words in stated.items():
        assert {text: encode(tokenizers[name], text) for text in words} == words


def test_special_tokens_stand_where_the_originals_have_them(tokenizers):
    teacher, student = tokenizers[TEACHER], tokenizers[STUDENT]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert teacher.convert_tokens_to_ids(specials) == [4064, 4065, 4066] and len(teacher) == 4067
    assert student.convert_tokens_to_ids(specials) == [0, 1, 2] and len(student) == 2048
    assert (teacher.bos_token, teacher.eos_token, teacher.pad_token) == (None, *specials[:1] * 2)
    assert (student.bos_token, student.eos_token, student.pad_token) == (*specials[:1] * 2, None)
    for tokenizer in (teacher, student):
        assert tokenizer("a")["input_ids"] == encode(tokenizer, "a")  # nothing is added unasked


def test_digits_are_single(tokenizers):
    for tokenizer in tokenizers.values():
        assert len([token for token in tokenizer.tokenize("year 1818") if token.strip("Ġ").isdigit()]) == 4


def test_byte_symbols(tokenizers):
    counts = {name: len(base_symbols(json.loads(t.backend_tokenizer.to_str()))) for name, t in tokenizers.items()}
    assert counts == {TEACHER: 256, STUDENT: 235}


def test_the_tokenizers_disagree(tokenizers):
    """In where tokens end, and in what comes back: Qwen composes accents, SmolLM2 drops some controls."""
    chapter = corpus("held_out")[0]
    ends = {}
    for name, tokenizer in tokenizers.items():
        offsets = tokenizer(chapter, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ends[name] = {end for _, end in offsets}
    assert len(ends[TEACHER] - ends[STUDENT]) > 100 and len(ends[STUDENT] - ends[TEACHER]) > 100
    back = {name: tokenizer.decode(encode(tokenizer, "cafe\u0301 \x04.")) for name, tokenizer in tokenizers.items()}
    assert back == {TEACHER: "caf\u00e9 \x04.", STUDENT: "cafe\u0301 ."}


# Text


@pytest.fixture(scope="module")
def parts():
    return {part: corpus(part) for part in ("student", "teacher", "held_out")}


def test_the_examples_run():
    assert doctest.testmod(offline).attempted and not doctest.testmod(offline).failed


def test_corpus_parts(parts):
    sizes = {part: sum(len(text.encode()) for text in texts) for part, texts in parts.items()}
    assert {part: len(texts) for part, texts in parts.items()} == {
        "student": 81,
        "teacher": 245,
        "held_out": 24,
    }
    assert 1_000_000 < sizes["student"] < 1_200_000 < 3_400_000 < sizes["teacher"] < 3_700_000
    assert set(parts["student"]) < set(parts["teacher"])
    with pytest.raises(ValueError, match=r"corpus: expected one of \['held_out', 'student', 'teacher'\], got 'test'"):
        corpus("test")


def test_nothing_held_out_is_trained_on(parts):
    paragraphs = {
        part: {paragraph for text in texts for paragraph in text.split("\n\n") if len(paragraph) > 30}
        for part, texts in parts.items()
    }
    assert len(paragraphs["held_out"]) > 900
    assert not paragraphs["held_out"] & paragraphs["teacher"]


def test_paragraphs_are_unwrapped(parts):
    for text in [*parts["teacher"], *parts["held_out"]]:
        paragraphs = text.split("\n\n")
        assert all(paragraph == " ".join(paragraph.split()) != "" for paragraph in paragraphs)


# The pair as an attached file


@pytest.fixture
def without_assets(monkeypatch, tmp_path):
    """The package as a wheel without the pair, with a small pair's hash in it: (the pair's bytes, the inputs)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("teacher/config.json", "{}")
        archive.writestr("corpus/persuasion.txt.bz2", bz2.compress(f"one{offline.CHAPTER_BREAK}two".encode()))
    data = buffer.getvalue()
    package = tmp_path / "package"
    package.mkdir()
    record = {"file": offline.PAIR_FILE, "sha256": hashlib.sha256(data).hexdigest()}
    (package / offline.PAIR_RECORD).write_text(json.dumps(record))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(offline, "ASSETS", package / "assets")
    monkeypatch.setattr(offline, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path / "kaggle"))
    return data, tmp_path / "kaggle" / "input"


def attach(inputs, where, data):
    (inputs / where).mkdir(parents=True)
    (inputs / where / offline.PAIR_FILE).write_bytes(data)


@pytest.mark.parametrize("where", ["datasets/ada/kd-kit-embedded-pair", "kd-kit-embedded-pair"])
def test_an_attached_pair_is_used(without_assets, tmp_path, where):
    data, inputs = without_assets
    attach(inputs, where, data)
    assert asset_folder(TEACHER).parent.parent == tmp_path / "tmp"
    assert (asset_folder(TEACHER) / "config.json").read_text() == "{}"
    assert corpus("held_out") == ["one", "two"]
    assert len(list((tmp_path / "tmp").iterdir())) == 1, "unpacked once, and nothing half done"


def test_the_right_pair_of_several_is_used(without_assets):
    data, inputs = without_assets
    attach(inputs, "a-first-one", b"another pair")
    attach(inputs, "the-right-one", data)
    assert corpus("held_out") == ["one", "two"]


def test_another_process_may_unpack_at_the_same_time(without_assets, tmp_path, monkeypatch):
    data, inputs = without_assets
    attach(inputs, "pair", data)
    replace = os.replace

    def beaten(source, target):
        replace(source, target)
        raise OSError("not empty")

    monkeypatch.setattr(os, "replace", beaten)
    assert corpus("held_out") == ["one", "two"]


def test_a_pair_that_is_not_there_or_another_is_a_sentence(without_assets, tmp_path):
    data, inputs = without_assets
    with pytest.raises(
        ValueError, match=r"expected the embedded pair \(embedded_pair\.whl\) in an attached data set, got"
    ):
        corpus("held_out")
    attach(inputs, "pair", data + b"!")
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(
        ValueError, match=rf"expected an embedded pair with SHA-256 {digest}, got .*delete the data set"
    ):
        asset_folder(STUDENT)
    assert not list((tmp_path / "tmp").iterdir())
    (tmp_path / "package" / offline.PAIR_RECORD).unlink()
    with pytest.raises(ValueError, match="install the package with its data, from a clone"):
        corpus("held_out")


# The build's parts


def r_strings(*strings, flags=16, version=3):
    """A serialised R character vector, by hand: header, type and length, then each string with its own."""
    body = b"".join(struct.pack(">Ii", 0x40009, len(s.encode())) + s.encode() for s in strings)
    header = b"X\n" + struct.pack(">4I", version, 0x40201, 0x30500, 5) + b"UTF-8"
    return header + struct.pack(">2I", flags, len(strings)) + body


def test_character_vector():
    assert character_vector(r_strings("EMMA", "", "naïve £")) == ["EMMA", "", "naïve £"]
    with pytest.raises(ValueError, match="XDR"):
        character_vector(b"A\n3\n")
    with pytest.raises(ValueError, match="version 3, got 2"):
        character_vector(r_strings("a", version=2))
    with pytest.raises(ValueError, match="flags 16"):
        character_vector(r_strings("a", flags=13))
    missing = r_strings("")[:-4] + struct.pack(">i", -1)
    with pytest.raises(ValueError, match="missing values"):
        character_vector(missing)


def test_zlib_blocks():
    def block(content, length):
        return struct.pack(">I", length) + zlib.compress(content)

    assert list(zlib_blocks(block(b"one", 3) + block(b"three", 5))) == [b"one", b"three"]
    with pytest.raises(ValueError, match="expected a block of 4 bytes, got 3"):
        list(zlib_blocks(block(b"one", 4)))


def test_novels_checks_what_it_found():
    emma = r_strings("EMMA", "CHAPTER I", "text")
    data_base = struct.pack(">I", len(emma)) + zlib.compress(emma)
    with pytest.raises(ValueError, match="expected 55 chapters in emma, got 1"):
        novels(data_base)
    assert list(NOVELS) == sorted(path.name.removesuffix(".txt.bz2") for path in (ASSETS / "corpus").iterdir())


def test_chapters_keep_the_prose_only():
    first = ["TITLE", "VOLUME I", "CHAPTER I", "", "One", "two.", "", "Three."]
    lines = [*first, "VOLUME II", "Chapter 2", "Four.", "FINIS", "A later hand"]
    assert chapters(lines) == ["One two.\n\nThree.", "Four."]


def test_unwrap():
    lines = [
        "",
        "  Ends here.  Goes",
        "on.",
        " ",
        "",
        "* * *",
        "[At this point in the first edition]",
        "Next.",
    ]
    assert unwrap([*lines[:6], "", lines[6], "", lines[7]]) == "Ends here. Goes on.\n\nNext."


def small_bpe(first=()):
    """Two base symbols and three merges, with specials before them, or one named <end> after them."""
    tokens = [*first, "a", "b", "ab", "abab", "ba"]
    added = [{"id": place, "content": token} for place, token in enumerate(first)]
    return {
        "normalizer": {"type": "NFC"},
        "added_tokens": [*added, {"id": len(tokens), "content": "<end>"}],
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": ["a b", "ab ab", ["b", "a"]],
        },
    }


def test_prefix_cut_renumbers_specials_that_come_last():
    whole = small_bpe()
    cut = prefix_cut(whole, entries=4, specials=["<end>"])
    assert cut["model"]["vocab"] == {"a": 0, "b": 1, "ab": 2, "abab": 3}
    assert cut["model"]["merges"] == [["a", "b"], ["ab", "ab"]]
    assert cut["added_tokens"] == [{"id": 4, "content": "<end>"}]
    assert cut["normalizer"] == {"type": "NFC"} and whole == small_bpe()


def test_prefix_cut_keeps_specials_that_come_first():
    cut = prefix_cut(small_bpe(first=["<s>"]), entries=4, specials=["<s>"])
    assert cut["model"]["vocab"] == {"<s>": 0, "a": 1, "b": 2, "ab": 3}
    assert cut["model"]["merges"] == [["a", "b"]]
    assert cut["added_tokens"] == [{"id": 0, "content": "<s>"}]


def test_prefix_cut_can_keep_base_symbols_only():
    assert prefix_cut(small_bpe(), entries=2, specials=[])["model"]["merges"] == []


@pytest.mark.parametrize(
    ("change", "entries", "specials", "message"),
    [
        ({}, 1, [], "all 2 base symbols below id 1, got 1 there"),
        ({}, 4, ["<pad>"], r"got \['<pad>'\]"),
        ({"type": "Unigram"}, 4, [], "expected a BPE model, got Unigram"),
        ({"merges": ["ab ab", "a b"]}, 4, [], "another order"),
    ],
)
def test_prefix_cut_refuses(change, entries, specials, message):
    whole = small_bpe()
    whole["model"] |= change
    with pytest.raises(ValueError, match=message):
        prefix_cut(whole, entries=entries, specials=specials)


def test_prefix_cut_refuses_to_leave_an_id_empty():
    with pytest.raises(ValueError, match=r"got none of \['<s>'\]"):
        prefix_cut(small_bpe(first=["<s>"]), entries=4, specials=[])


def package(command):
    return Package("x", "1", "x-*.whl", command, "x/text.txt", "none")


def test_source_file_reuses_the_package_that_is_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "x-1.whl", "w") as archive:
        archive.writestr("x/text.txt", "content")
    assert source_file(package(("no-such-client",)), tmp_path).read_text() == "content"


def test_package_file_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="expected the client 'no-such-client' on this machine, got none"):
        package_file(package(("no-such-client",)), tmp_path)
    failing = (sys.executable, "-c", "import sys; sys.exit('no such package')")
    with pytest.raises(ValueError, match="it said: no such package"):
        package_file(package(failing), tmp_path)
    with pytest.raises(ValueError, match=r"expected one x-\*.whl in .*, got \[\]"):
        package_file(package((sys.executable, "-c", "")), tmp_path)


# Training


class Letters:
    """A tokenizer of three ids for a, b, c."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": ["abc".index(letter) for letter in text]}


def test_token_stream_begins_every_text():
    assert token_stream(Letters(), ["ab", "c"], start=3).tolist() == [3, 0, 1, 3, 2]


def test_random_windows_are_pieces_of_the_stream_behind_the_start():
    stream = torch.arange(100)
    windows = random_windows(stream, start=-1, window=5, batch_size=64, generator=torch.Generator().manual_seed(0))
    assert windows.shape == (64, 5) and (windows[:, 0] == -1).all()
    assert (windows[:, 1:].diff() == 1).all() and len(windows[:, 1].unique()) > 20
    whole = random_windows(stream, start=-1, window=100, batch_size=1, generator=torch.Generator())
    assert whole[0, 1:].tolist() == list(range(1, 100)) and stream[0] == 0


def test_learning_rate_rises_to_one_and_falls_to_zero():
    factors = [learning_rate_factor(step, steps=100, warm_up=10) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1.0 == max(factors)
    assert factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_bits_per_byte_of_a_uniform_model():
    """Four ids of equal probability are 2 bits a token, here 2 bits a byte, whatever the windows."""

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            assert (input_ids[:, 0] == 3).all()
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 4)})

    for window in (2, 3, 256):
        measured = bits_per_byte(Uniform(), Letters(), ["abcab", "c"], start=3, window=window)
        assert measured == pytest.approx(2.0)


def test_training_learns_and_repeats_itself():
    def trained():
        torch.manual_seed(0)
        config = teacher_config(vocabulary=5, end_of_text=4)
        config.num_hidden_layers, config.vocab_size = 1, 8
        model = AutoModelForCausalLM.from_config(config)
        lines = []
        train(model, torch.arange(4).repeat(20), start=4, steps=20, window=8, batch_size=4, log=lines.append)
        return model, lines

    model, lines = trained()
    assert len(lines) == 1 and lines[0].startswith("step    20 of 20  loss ")
    with torch.no_grad():
        ids = torch.tensor([[4, 0, 1, 2, 3, 0]])
        assert model(input_ids=ids, labels=ids).loss < math.log(8)
    again, _ = trained()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_shapes_pad_the_teacher_head_only():
    assert teacher_config(vocabulary=4067, end_of_text=4064).vocab_size == 4096
    assert teacher_config(vocabulary=4096, end_of_text=0).vocab_size == 4224
    assert student_config(vocabulary=2048).vocab_size == 2048
