"""kd_kit/models.py: where models come from, what is refused before any work, and the export."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import pytest
import torch
from helpers import make_trainer, pair, part_term, small_data, teacher, tiny_student

from kd_kit import build_data, build_student, build_teacher, build_tokenizers, export, lm_term, models
from kd_kit.head import head_of
from kd_kit.models import check_model
from kd_kit.offline import STUDENT, TEACHER, asset_folder


@pytest.fixture
def folder(tmp_path):
    """A student folder as ``save_pretrained`` writes it."""
    return export(tiny_student(seed=4), tmp_path / "student", pair())


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizers_from_names_folders_and_objects_are_the_same_pair():
    folders = build_tokenizers(asset_folder(TEACHER), str(asset_folder(STUDENT)))
    objects = build_tokenizers(pair().teacher, pair().student)
    mixed = build_tokenizers(TEACHER, pair().student)
    assert {folders.fingerprint, objects.fingerprint, mixed.fingerprint} == {pair().fingerprint}
    assert torch.equal(objects.bridge.table, pair().bridge.table)
    assert build_tokenizers(STUDENT, STUDENT).fingerprint != pair().fingerprint
    assert "embedded-teacher" in repr(pair())


# --- sources ---------------------------------------------------------------------------------------------------------


def test_the_teacher_is_frozen_in_evaluation_mode_and_float32_on_the_cpu():
    model = build_teacher(device="cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    half = teacher(torch.float16)
    assert {p.dtype for p in half.parameters() if p.is_floating_point()} == {torch.float16}


def test_the_embedded_student_depends_on_its_seed_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = build_student(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was used"
    torch.manual_seed(12)
    same, other = build_student(seed=1).state_dict(), build_student(seed=2).state_dict()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_the_student_trains_in_float32_whatever_the_folder_holds(folder):
    half = build_student(folder).half()
    half.save_pretrained(folder)
    model = build_student(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_folder_gives_its_weights_or_only_its_shape(folder):
    weights = tiny_student(seed=4).state_dict()
    loaded = build_student(str(folder)).state_dict()
    assert all(torch.equal(weights[n], loaded[n]) for n in weights)
    fresh = build_student(folder, from_scratch=True, seed=9).state_dict()
    assert fresh.keys() == weights.keys()
    assert any(not torch.equal(weights[n], fresh[n]) for n in weights)
    again = build_student(folder, from_scratch=True, seed=9).state_dict()
    assert all(torch.equal(again[n], fresh[n]) for n in fresh)
    frozen = build_teacher(folder, device="cpu")
    assert torch.equal(frozen.state_dict()["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_a_gguf_file_gives_its_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    config = tiny_student().config
    width, heads = config.hidden_size, config.num_attention_heads
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).mul(0.1).numpy()

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(300)
    embedding = tensor(300, width)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", tensor(300, width))
    writer.add_tensor("output_norm.weight", tensor(width))
    for name, shape in {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
        "attn_output": (width, width),
        "ffn_gate": (64, width),
        "ffn_up": (64, width),
        "ffn_down": (width, 64),
    }.items():
        writer.add_tensor(f"blk.0.{name}.weight", tensor(*shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    student = build_student(path)
    assert torch.equal(student.get_input_embeddings().weight.detach(), torch.from_numpy(embedding))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert student(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)
    frozen = build_teacher(str(path), device="cpu")
    assert not any(p.requires_grad for p in frozen.parameters())


# --- nothing loadable ------------------------------------------------------------------------------------------------

_BUILDERS = [
    pytest.param(build_teacher, id="teacher"),
    pytest.param(build_student, id="student"),
    pytest.param(lambda source: build_tokenizers(teacher=source), id="tokenizers"),
]


@pytest.mark.parametrize("build", _BUILDERS)
def test_a_folder_without_a_model_is_named_with_what_it_holds(build, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"^build_\w+.*: expected a model folder .*holds notes\.txt"):
        build(tmp_path)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(ValueError, match=r"holds nothing"):
        build(tmp_path)


@pytest.mark.parametrize("build", _BUILDERS)
def test_a_path_that_does_not_exist(build, tmp_path):
    for source in (tmp_path / "none", "./none", "~/none-of-this", "a/b/c"):
        with pytest.raises(ValueError, match=r"^build_\w+.*: expected a model folder, got .* does not exist"):
            build(source)
    with pytest.raises(ValueError, match=r"expected a GGUF file, got .* does not exist"):
        build(tmp_path / "none.gguf")


@pytest.mark.parametrize("build", _BUILDERS)
def test_a_wrong_hub_name_without_a_network(build, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^build_\w+.*: expected a model that transformers can load.*spelling"):
        build("no-such-user/no-such-model")


@pytest.mark.parametrize("build", _BUILDERS[:2])
def test_a_folder_whose_weights_are_missing_or_torn(build, folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^build_\w+: expected a model that transformers can load.*check the folder"):
        build(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"^build_\w+: expected a model that transformers can load.*check the folder"):
        build(folder)


def test_a_folder_whose_configuration_is_no_json(folder):
    (folder / "config.json").write_text("{torn")
    with pytest.raises(ValueError, match=r"^build_student: expected a model that transformers can load"):
        build_student(folder)


# --- checked before the run ------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    small = tiny_student(vocab_size=2000)
    with pytest.raises(ValueError, match=r"a student with at least 2048 rows .* got 2000; the tokenizer belongs"):
        make_trainer(tmp_path / "run", student=small)
    with pytest.raises(ValueError, match=r"a teacher with at least 4067 rows .* got 2048"):
        make_trainer(tmp_path / "run", model=tiny_student())
    assert not (tmp_path / "run" / "RUN.json").exists()
    make_trainer(tmp_path / "run", student=tiny_student(vocab_size=2100))


def test_a_window_longer_than_a_context_is_refused(tmp_path):
    data = build_data(["word " * 60, "other " * 60], pair(), held_out=0.5, window=40)
    with pytest.raises(ValueError, match=r"student's context of 32 tokens, got 40; call build_data\(window=32\)"):
        make_trainer(tmp_path / "run", student=tiny_student(max_position_embeddings=32), data=data)
    make_trainer(tmp_path / "run", student=tiny_student(max_position_embeddings=40), data=data)


def test_a_head_that_does_something_unknown_is_refused(tmp_path):
    student = tiny_student()
    student.lm_head.register_forward_hook(lambda module, inputs, logits: logits + torch.arange(logits.shape[-1]))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does something to its logits"):
        make_trainer(tmp_path / "run", student=student)
    assert student.training


def test_a_body_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"expected a causal language model with an output embedding, got LlamaModel"):
        check_model(tiny_student().model, pair().student_vocab, 32, "student")


def test_the_check_leaves_the_model_as_it_was():
    student = tiny_student()
    for mode in (True, False):
        student.train(mode)
        before = {n: t.clone() for n, t in student.state_dict().items()}
        check_model(student, pair().student_vocab, small_data().window, "student")
        assert student.training is mode
        assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())
        assert all(p.grad is None for p in student.parameters())


# --- export ----------------------------------------------------------------------------------------------------------


def test_an_export_is_a_plain_transformers_folder(tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer(tmp_path / "run", terms=[lm_term(0.5), part_term(0.5)], model=None, steps=2)
    trainer.fit()
    folder = export(trainer.student, tmp_path / "export", pair())
    plain = AutoModelForCausalLM.from_pretrained(folder)
    weights = trainer.student.state_dict()
    assert plain.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[n], t) for n, t in plain.state_dict().items())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= weights.keys(), "helper parameters were exported"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer("It is a truth", return_tensors="pt")
    out = plain.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > given["input_ids"].shape[1]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert build_tokenizers(TEACHER, folder).fingerprint == pair().fingerprint
    assert not list(folder.glob("*.bin")), "a pickle"


def test_a_card_that_is_not_there_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"expected device= as 'cpu' or one of \d+ cards, got 'cuda:99'; leave it out"):
        build_teacher("nowhere/at-all", device="cuda:99")


def test_an_export_without_tokenizers_has_only_the_model(tmp_path):
    folder = export(tiny_student(), tmp_path / "deep" / "export")
    assert not (folder / "tokenizer.json").exists()
    shutil.rmtree(folder)


# ---- a teacher in few bits


def without_bitsandbytes(monkeypatch):
    import transformers  # noqa: F401 - it looks for the library once, and remembers

    find = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda n: None if n == "bitsandbytes" else find(n))


def test_a_quantized_teacher_needs_its_library(monkeypatch):
    without_bitsandbytes(monkeypatch)
    with pytest.raises(
        ValueError, match=r"expected bitsandbytes for quantize='nf4'.*pip install 'kd_kit\[quantized\]'"
    ):
        build_teacher(quantize="nf4")


@pytest.mark.parametrize("kind", ["nf8", 4, True])
def test_an_unknown_quantization_is_refused(kind):
    with pytest.raises(ValueError, match=r"build_teacher: expected quantize= 'nf4', 'int8' or None, got"):
        build_teacher(quantize=kind)


def test_what_is_packed_already_is_not_packed_again(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="got a GGUF file, which is packed already; leave quantize= out"):
        build_teacher(tmp_path / "model.gguf", quantize="nf4")


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra: pip install 'kd_kit[quantized]'"
)
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and its types on a CPU
@pytest.mark.parametrize(("kind", "close"), [("nf4", 0.2), ("int8", 0.02)])
def test_a_quantized_teacher_says_nearly_the_same(kind, close, capsys):
    """Its head and its routers stay as they are, and it can be read like any other."""
    teacher, whole = build_teacher(quantize=kind), build_teacher()
    packed = float(re.search(r"teacher: ([\d.]+) of [\d.]+ MB of weights are in " + kind, capsys.readouterr().out)[1])
    assert packed > 0
    assert head_of(teacher).weight.dtype == torch.float32
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    ids = torch.tensor([pair().teacher.encode("It was a truth universally acknowledged, that she had no fortune.")])
    with torch.no_grad():
        ours, theirs = teacher(input_ids=ids).logits.log_softmax(-1), whole(input_ids=ids).logits.log_softmax(-1)
    gap = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert 0 < gap < close
    routers = [n for n, p in teacher.named_parameters() if re.search(r"mlp\.(gate|router)\.", n)]
    assert routers
    assert all(teacher.get_parameter(n).is_floating_point() for n in routers)
