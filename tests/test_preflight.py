import copy
import dataclasses
import gc
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_trainer, session_at, teacher, tiny_student
from torch import nn

import kd_kit as kd
from kd_kit import facts, plan_checks, preflight, trial_checks
from kd_kit.batching import Batching
from kd_kit.callbacks import EarlyStopping, PrintLines
from kd_kit.facts import FAIL, LOOK, OK, Facts
from kd_kit.preflight import run_preflight
from kd_kit.readings import Needs
from kd_kit.session import Session
from kd_kit.table import span
from kd_kit.terms import LossTerm
from kd_kit.types import LossValue


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """A trial collects garbage; what other tests have loaded need not be looked through every time."""
    gc.freeze()
    yield
    gc.unfreeze()


def every_term():
    return [
        *few_terms(),
        kd.span_term(),
        kd.layerwise_term(),
        kd.relation_term(),
        kd.attention_term(),
        kd.contrastive_term(),
        kd.router_term(),
    ]


def few_terms():
    return [kd.lm_term(), kd.kd_term(top_k=256), kd.feature_term()]


def build(folder, **arguments):
    return make_trainer(folder / "run", **{"steps": 300, "eval_every": 30, "terms": few_terms()} | arguments)


def line(found, check: str):
    """The line about ``check``, by the start of its name."""
    (one,) = [row for row in found.rows if row.check.startswith(check)]
    return one


def failed(found) -> set[str]:
    return {row.check for row in found.rows if row.verdict == FAIL}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A trial of a run with nothing wrong, and what was found."""
    trainer = build(tmp_path_factory.mktemp("healthy"), terms=every_term())
    trials, own = [], preflight.Trial

    def kept(one):
        trials.append(own(one))
        return trials[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "Trial", kept)
        found = run_preflight(trainer)
    return SimpleNamespace(trainer=trainer, found=found, trial=trials[0])


@pytest.fixture
def planned(healthy, monkeypatch):
    """The checks on another trainer, without another trial: for those that only read the plan."""

    def run(trainer):
        trial = SimpleNamespace(**vars(healthy.trial), need=healthy.trial.need)
        trial.rates = [(0, [("student", trainer.rate_at(0))])]
        names = {term.name for term in trainer.terms}
        terms = {name: term for name, term in trial.records[0]["terms"].items() if name in names}
        trial.records = [{**trial.records[0], "terms": terms}]
        monkeypatch.setattr(preflight, "Trial", lambda one: SimpleNamespace(run=lambda: trial))
        return run_preflight(trainer)

    return run


def test_a_healthy_run_passes(healthy):
    found = healthy.found
    assert found.ok, found
    names = [name for name, *_ in preflight._CHECKS]
    assert [row.check for row in found.rows] == [name for name in names if name != "padding"], "all is full here"
    looked_at = {row.check for row in found.rows if row.verdict == LOOK}
    assert looked_at <= {"size of the terms", "gradient shares"}, found
    assert "as an untrained student is not" in line(found, "size").cure
    assert "router" not in line(found, "gradient shares").cure, "its head starts from zeros"
    assert line(found, "save").measured.startswith("the same weights")
    assert "9 terms" in line(found, "dtypes").measured
    assert line(found, "top K").measured.startswith("256 of 2,048 cells")
    assert healthy.trainer.floor_seconds == healthy.trial.floor_seconds > 0


def test_it_prints(healthy):
    found = healthy.found
    lines = repr(found).splitlines()
    assert max(map(len, lines)) <= 112, "a notebook's cell"
    assert lines[0].split() == ["checked", "measured", "wanted"]
    assert lines[-1].startswith("-> ready; 17 checks in ")
    page = found._repr_html_()
    assert page.count("<tr>") == 18
    assert "teacher below student" in page
    assert found.table.rows[0][0] == OK


def test_one_cure_of_several_lines_is_said_once():
    rows = [preflight.Line(name, "", "", FAIL, "the same") for name in "ab"]
    rows.append(preflight.Line("c", "", "", LOOK, "another"))
    found = preflight.Preflight(tuple(rows), ("a note",), 3.0)
    assert not found.ok
    assert found.table.note.splitlines() == [
        "FAIL  a, b: the same",
        "look  c: another",
        "a note",
        "-> not ready; 3 checks in 3 s: 2 failed, 1 to look at",
    ]


# ---- 1: dtypes


class Careless(nn.Module):
    """A float32 map of the teacher's queries, whatever dtype they come in."""

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(width, 1)

    def forward(self, output, signal, batch) -> LossValue:
        theirs = self.map(signal.attention[2]["q"]).float()
        ours = output.hidden.float().mean()
        return LossValue((theirs.mean() - ours) ** 2 * len(batch.rows), torch.tensor(float(len(batch.rows))))


def careless_term():
    config = teacher().config
    value = Careless(config.num_attention_heads * config.head_dim)
    needs = Needs(teacher_attention=frozenset({2}))
    return LossTerm(name="mine", weight=0.1, unit="", healthy=(0, 10), value=value, needs=needs)


def test_a_map_without_a_cast_beside_a_half_teacher(tmp_path):
    found = run_preflight(build(tmp_path, model=teacher(torch.float16), terms=[*few_terms(), careless_term()]))
    one = line(found, "dtypes")
    assert one.verdict == FAIL
    assert "mine cannot be computed: RuntimeError" in one.cure
    assert "kd cannot" not in one.cure
    assert line(found, "held-out").verdict == OK, "what does not need the term is measured all the same"
    assert line(found, "share at half").verdict == OK
    assert {line(found, name).measured for name in ("learning", "gradient reaches", "save", "time")} == {"not measured"}


def test_it_is_found_with_a_teacher_in_full_precision_too(tmp_path):
    found = run_preflight(build(tmp_path, terms=[*few_terms(), careless_term()]))
    assert failed(found) == {"dtypes agree, no autocast"}
    assert "mine cannot be computed beside half-precision knowledge: RuntimeError" in line(found, "dtypes").cure


@pytest.mark.parametrize(
    ("terms", "said"),
    [([kd.lm_term(), kd.kd_term()], "kd is nan"), (few_terms(), "got NaN or infinity; load the model")],
)
def test_a_teacher_that_is_not_finite(tmp_path, terms, said):
    broken = copy.deepcopy(teacher())
    trainer = build(tmp_path, model=broken, terms=terms)  # which refuses one that is broken already
    with torch.no_grad():
        broken.get_output_embeddings().weight[5:9] = math.nan
    found = run_preflight(trainer)
    assert not found.ok
    assert said in line(found, "dtypes").cure
    assert {line(found, name).verdict for name in ("held-out", "gradient shares", "LM term", "learning")} == {FAIL}
    assert line(found, "share at half").verdict == OK


# ---- 2: sizes


def squares(output, signal, batch) -> LossValue:
    """A mean of squares that nothing divides: about 150."""
    rows = output.hidden.flatten(0, 1)[batch.rows].float()
    return LossValue((12.0 + rows).square().mean(-1).sum(), torch.tensor(float(len(rows))))


def test_a_raw_mean_of_squares(tmp_path):
    term = LossTerm(name="squares", weight=0.1, unit="mse", healthy=(0, 1), value=squares)
    found = run_preflight(build(tmp_path, terms=[*few_terms(), term]))
    one = line(found, "size")
    assert one.verdict == FAIL
    assert one.measured.startswith("4 terms, largest squares 138")
    assert one.cure.startswith("squares 138 (healthy 0 to 1 mse): divide")
    assert "1 - cosine" in one.cure


def sizes(values, *, vocabulary=2048, terms=None):
    pair = SimpleNamespace(student_vocab=SimpleNamespace(size=vocabulary))
    trainer = SimpleNamespace(terms=terms or [kd.lm_term()], data=SimpleNamespace(pair=pair))
    trial = SimpleNamespace(values=values, span_tokens=2.5, need=lambda *stages: None)
    return trial_checks.sizes(SimpleNamespace(trainer=trainer, trial=trial))


def test_an_untrained_student_of_a_large_vocabulary_is_no_fault():
    assert sizes({"lm": 13.4}, vocabulary=262_144)[1] == LOOK
    assert sizes({"lm": 13.8}, vocabulary=400_000)[1] == LOOK, "ln V + 1 is above the range's own bound there"
    assert sizes({"lm": 13.6}, vocabulary=262_144)[1] == FAIL, "above ln V + 1"
    terms = [kd.lm_term(), dataclasses.replace(kd.span_term(), build=None, rows=None, gather=None, value=print)]
    assert sizes({"lm": 10.9, "span": 28.0}, vocabulary=49_152, terms=terms)[1] == LOOK, "2.5 tokens of it"
    assert sizes({"lm": 10.9, "span": 30.0}, vocabulary=49_152, terms=terms)[1] == FAIL
    assert sizes({"lm": 10.5}, vocabulary=2048)[1] == FAIL
    assert sizes({"lm": 3.0})[1:] == (OK, "")
    assert sizes({"lm": -0.1})[1] == FAIL
    assert "kd.verify" in sizes({"lm": -0.1})[2]


def test_a_trained_student_has_no_such_excuse():
    terms = [kd.lm_term(), dataclasses.replace(kd.kd_term(), build=None, rows=print)]
    assert sizes({"lm": 3.0, "kd": 10.5}, vocabulary=262_144, terms=terms)[1] == FAIL
    assert sizes({"lm": 12.4, "kd": 10.5}, vocabulary=262_144, terms=terms)[1] == LOOK


def test_a_term_without_positions_is_said():
    assert "lm found nothing" in sizes({"lm": None, "kd": 1.0}, terms=[kd.lm_term()])[2]
    assert sizes({"lm": None})[1] == FAIL


# ---- 3 and 6: shares


def forge(trainer, **lines) -> None:
    """Lines that :meth:`kd_kit.stages.Schedule.check` would refuse."""
    object.__setattr__(trainer.schedule, "lines", lines)


def test_a_curriculum_that_waits_too_long(tmp_path, planned):
    trainer = build(tmp_path)
    forge(trainer, feature=((0.0, 0.0), (0.5, 0.067), (1.0, 1.0)))
    one = line(planned(trainer), "share at half")
    assert one.verdict == FAIL
    assert one.measured.startswith("feature 1")
    assert "kd.curriculum()" in one.cure


@pytest.mark.parametrize(
    "schedule", [kd.constant(), kd.piecewise(feature=[(0, 0), (0.4, 1)]), kd.piecewise(feature=[(0, 0), (1, 1)])]
)
def test_schedules_that_build_trainer_takes_hold_at_half_time(tmp_path, planned, schedule):
    one = line(planned(build(tmp_path, schedule=schedule)), "share at half")
    assert one.verdict == OK


def test_the_full_share_is_that_of_every_term_at_its_highest(tmp_path, planned):
    trainer = build(tmp_path)
    forge(trainer, feature=((0.0, 2.0), (0.5, 0.1), (1.0, 0.1)))
    weights = {t.name: t.weight for t in trainer.terms}
    others, one = weights["lm"] + weights["kd"], weights["feature"]
    expected = (0.1 * one / (others + 0.1 * one)) / (2 * one / (others + 2 * one))
    assert f"feature has {expected:.1%} of its full share" in line(planned(trainer), "share at half").cure


def test_an_lm_term_that_is_off_for_a_while(tmp_path, planned):
    trainer = build(tmp_path)
    forge(trainer, lm=((0.0, 1.0), (0.6, 1.0), (0.7, 0.0), (0.8, 1.0)))
    one = line(planned(trainer), "LM term")
    assert one.verdict == FAIL
    assert one.measured == "least share 0% at step 210"


def test_a_long_run_is_looked_at_in_its_corners(tmp_path, planned):
    trainer = build(tmp_path, steps=400_000, eval_every=20_000)
    forge(trainer, lm=((0.0, 1.0), (0.6, 1.0), (0.60001, 0.0), (0.60002, 1.0)))
    assert line(planned(trainer), "LM term").measured == "least share 0% at step 240,004"


def test_an_lm_term_that_is_not_felt(tmp_path):
    found = run_preflight(build(tmp_path, terms=[kd.lm_term(0.001), kd.kd_term(top_k=256)]))
    one = line(found, "LM term")
    assert one.verdict == FAIL
    assert "gradient" in one.measured
    assert line(found, "gradient shares").verdict == LOOK
    assert "lm 0." in line(found, "gradient shares").cure
    assert "kd 100%" in line(found, "gradient shares").cure


def test_terms_that_come_in_later_are_judged_by_half_time(tmp_path):
    found = run_preflight(build(tmp_path, schedule=kd.piecewise(feature=[(0.1, 0), (0.3, 1)])))
    assert line(found, "gradient reaches").verdict == OK, "its projector is trained from step 30 on"
    assert line(found, "gradient shares").verdict == OK
    assert "feature" in line(found, "gradient shares").measured


# ---- 4 and 5: lines and stopping


def test_a_line_per_step(tmp_path, planned):
    one = line(planned(build(tmp_path, steps=12_500, log_every=1, eval_every=500)), "printed")
    assert one.verdict == FAIL
    assert one.measured == "at most 12,530 lines in 12,500 steps"
    assert one.cure.endswith("build_trainer(log_every=100)")
    sparse = planned(build(tmp_path / "other", steps=12_500, log_every=100, eval_every=500))
    assert line(sparse, "printed")[1:4] == ("at most 155 lines in 12,500 steps", "under 400", OK)


def test_evaluations_are_lines_too(tmp_path, planned):
    one = line(planned(build(tmp_path, steps=50_000, log_every=1000, eval_every=50)), "printed")
    assert one.verdict == FAIL
    assert one.cure.endswith("build_trainer(eval_every=500)")


def test_two_printers(tmp_path, planned):
    trainer = build(tmp_path)
    trainer.callbacks.append(PrintLines(100))
    one = line(planned(trainer), "printed")
    assert one.verdict == LOOK
    assert "more than one PrintLines" in one.cure


def test_little_patience(tmp_path, planned):
    stops = EarlyStopping(patience=3, grace=50)
    one = line(planned(build(tmp_path, early_stopping=stops)), "early")
    assert (one.measured, one.verdict) == ("patience 3, from step 140", FAIL)
    assert "patience=20" in one.cure


def test_little_patience_that_comes_too_late_to_matter(tmp_path, planned):
    one = line(planned(build(tmp_path, early_stopping=EarlyStopping(patience=3))), "early")
    assert (one.measured, one.verdict) == ("patience 3, cannot act in 300 steps", LOOK)


def test_no_stopping(tmp_path, planned):
    assert line(planned(build(tmp_path, early_stopping=None)), "early")[1:4:2] == ("off", LOOK)


# ---- 7: cells


@pytest.mark.parametrize(("top_k", "said"), [(1, "raise top_k="), (None, "keeps every cell")])
def test_too_few_cells_and_all_of_them(tmp_path, top_k, said):
    found = run_preflight(build(tmp_path, terms=[kd.lm_term(), kd.kd_term(top_k=top_k)]))
    one = line(found, "top K")
    assert one.verdict == LOOK
    assert said in one.cure
    assert one.measured.startswith(f"{top_k or '2,048'}")


def test_cells_that_are_not_those_that_were_asked_for(tmp_path):
    trainer = build(tmp_path)
    trainer.module.needs.readings[0].top_k = 32  # the teacher is asked by the same object, the record by the trainer's
    trial = preflight.Trial(trainer)
    trial.cells = {trainer.module.needs.readings[0].key: (2048, 0.0)}
    assert trial_checks.top_k(Facts(trainer, trial, 0))[1] == FAIL


@pytest.mark.parametrize("method", ["uld", "strict", "projector"])
def test_other_ways_across_the_vocabularies(tmp_path, method):
    found = run_preflight(build(tmp_path, terms=[kd.lm_term(), kd.kd_term(method=method)]))
    assert found.ok, found
    cells = [row.measured for row in found.rows if row.check == "top K cells"]
    assert {"uld": "64 of 4,067", "strict": "64 of ", "projector": ""}[method] in "".join(cells)
    assert len(cells) == (method != "projector")


# ---- 8: rates


def test_a_rate_that_is_not_the_planned_one(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    own = type(trainer)._train_step

    def faster(self, *arguments):
        own(self, *arguments)
        self.optimizer.param_groups[0]["lr"] *= 2  # of the matrices; the vectors, in a group of that name too, not

    monkeypatch.setattr(type(trainer), "_train_step", faster)
    one = line(run_preflight(trainer), "learning")
    assert one.verdict == FAIL
    assert "student had 0.00333 at step 0 and should have had 0.00167" in one.cure


def test_a_rate_of_zero(tmp_path, planned):
    trainer = build(tmp_path)
    own = trainer.rate_at
    trainer.rate_at = lambda step: 0.0 if step == 7 else own(step)
    one = line(planned(trainer), "learning")
    assert one.verdict == FAIL
    assert "0 at step 7" in one.cure


def test_a_long_warm_up(tmp_path, planned):
    one = line(planned(build(tmp_path, lr_schedule=kd.LearningRate(warmup=0.5))), "learning")
    assert one.verdict == LOOK
    assert "peak 1.0e-02 at step 149" in one.measured


# ---- the others


def test_a_teacher_that_is_worse_than_the_student(tmp_path):
    worse = copy.deepcopy(teacher())
    with torch.no_grad():
        worse.get_output_embeddings().weight.mul_(-3.0)
    found = run_preflight(build(tmp_path, model=worse))
    one = line(found, "held-out")
    assert one.verdict == FAIL
    assert "nothing to teach" in one.cure
    assert not found.ok


def test_a_student_that_has_overtaken_its_teacher(healthy):
    trainer = SimpleNamespace(terms=healthy.trainer.terms, step=500)
    scores = {"student": SimpleNamespace(bits_per_byte=1.0), "teacher": SimpleNamespace(bits_per_byte=1.2)}
    trial = SimpleNamespace(scores=scores, need=lambda *stages: None)
    assert trial_checks.better(SimpleNamespace(taught=True, trainer=trainer, trial=trial))[1] == LOOK


def test_a_frozen_layer_of_the_student(tmp_path):
    student = tiny_student()
    student.model.layers[0].requires_grad_(False)
    found = run_preflight(build(tmp_path, student=student))
    one = line(found, "gradient reaches")
    assert one.verdict == LOOK
    assert "model.layers.0.self_attn.q_proj.weight" in one.cure
    assert "and 6 more" in one.cure


def test_a_layer_that_no_gradient_reaches(tmp_path):
    student = tiny_student()
    student.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, given, out: out.detach())
    one = line(run_preflight(build(tmp_path, student=student)), "gradient reaches")
    assert one.verdict == FAIL
    assert one.cure.startswith("no gradient reaches model.layers.0.mlp.gate_proj.weight: ")


def test_a_gradient_that_is_always_zero(tmp_path):
    student = tiny_student()
    student.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, given, out: out * 0.0)
    one = line(run_preflight(build(tmp_path, student=student)), "gradient reaches")
    assert one.verdict == LOOK
    assert "was 0 in every step" in one.cure


class Counts(nn.Module):
    """A term whose value depends on how often it was asked, which no checkpoint knows."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, output, signal, batch) -> LossValue:
        self.calls += 1
        rows = output.hidden.flatten(0, 1)[batch.rows].float()
        return LossValue((rows * math.sin(self.calls)).tanh().square().mean(-1).sum(), torch.tensor(float(len(rows))))


def test_state_that_no_checkpoint_holds(tmp_path):
    term = LossTerm(name="counts", weight=0.5, unit="", healthy=(0, 1), value=Counts())
    found = run_preflight(build(tmp_path, terms=[*few_terms(), term]))
    one = line(found, "save")
    assert one.verdict == FAIL
    assert one.measured.startswith("weights differ by up to")
    assert "buffer" in one.cure
    assert term.value.calls == 0


def test_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    found = run_preflight(trainer)
    assert failed(found) == {"disk", "save and resume"}
    assert "checkpoints would fail" in line(found, "disk").cure
    assert "bytes free" in line(found, "save").cure


@pytest.mark.parametrize(("share", "word"), [(0.9, FAIL), (1.1, LOOK), (1.3, OK)])
def test_a_disk_beside_what_will_be_kept(tmp_path, planned, healthy, monkeypatch, share, word):
    """Four checkpoints (two newest, best, being written), best weights and their replacement, an export."""
    trainer = build(tmp_path)
    kept = 4 * healthy.trial.saved_bytes + 3 * 4 * sum(p.numel() for p in trainer.student.parameters())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(share * kept)))
    assert line(planned(trainer), "disk").verdict == word


def test_what_is_on_disk_already_needs_no_more_room(tmp_path, planned, healthy):
    trainer = build(tmp_path)
    before = line(planned(trainer), "disk").measured
    folder = trainer.session.folder / "ckpt" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(2 * healthy.trial.saved_bytes))
    after = line(planned(trainer), "disk").measured
    assert float(after.split()[0]) < 0.7 * float(before.split()[0])


def timed(folder, seconds: float, **arguments):
    """A trainer in a session that has this long left."""
    session = Session(folder / "run", device="cpu", precision="no", budget=seconds)
    session._started = time.monotonic()
    return build(folder, session=session, **arguments)


def with_pace(planned, healthy, trainer, seconds: float):
    healthy.trial.step_seconds, before = seconds, healthy.trial.step_seconds
    try:
        return line(planned(trainer), "time")
    finally:
        healthy.trial.step_seconds = before


def test_a_session_that_is_too_short(tmp_path, planned, healthy):
    one = with_pace(planned, healthy, timed(tmp_path, 1000.0, steps=10_000), 1.0)
    assert one.verdict == LOOK
    assert "it takes 11 sessions" in one.cure
    assert "finish_in_session=True" in one.cure


def test_a_session_that_is_over(tmp_path, planned, healthy):
    trainer = timed(tmp_path, 3600.0)
    trainer.session._started -= 3550
    assert with_pace(planned, healthy, trainer, 1.0).verdict == FAIL


def test_a_short_session_keeps_less_for_its_end(tmp_path, planned, healthy):
    """So that a minute can be tried."""
    assert with_pace(planned, healthy, timed(tmp_path, 50.0), 1.0).verdict == LOOK


def test_a_session_that_suffices(tmp_path, planned, healthy):
    one = with_pace(planned, healthy, timed(tmp_path, 4000.0), 1.0)
    assert one.verdict == OK
    assert one.measured.startswith("300 steps x 1.")


@pytest.mark.parametrize(("seconds", "word"), [(4000.0, OK), (1000.0, LOOK)])
def test_a_run_that_ends_with_its_session(tmp_path, planned, healthy, seconds, word):
    trainer = timed(tmp_path, seconds, steps=10_000, finish_in_session=True)
    assert with_pace(planned, healthy, trainer, 1.0).verdict == word


def test_a_card_that_is_too_small(tmp_path, planned, monkeypatch):
    trainer = build(tmp_path)
    monkeypatch.setattr(trial_checks, "device_memory", lambda device: 2**20)
    one = line(planned(trainer), "memory")
    assert one.verdict == FAIL
    assert "batch_size" in one.cure


def test_a_step_far_above_its_floor(tmp_path, planned, healthy, monkeypatch):
    monkeypatch.setattr(healthy.trial, "step_seconds", 9 * healthy.trial.floor_seconds)
    one = line(planned(build(tmp_path)), "cost")
    assert one.verdict == LOOK
    assert one.measured.startswith("a step takes 9.0 x its floor")


def test_tokenizers_that_rarely_meet(healthy):
    for share, word in ((0.3, LOOK), (0.05, FAIL)):
        records = [{"aligned_share": 0.01, "taught_share": share}]
        trial = SimpleNamespace(records=records, need=lambda *stages: None)
        assert trial_checks.heard(SimpleNamespace(taught=True, trial=trial))[1] == word


def test_without_a_teacher(tmp_path):
    found = run_preflight(build(tmp_path, model=None, terms=[kd.lm_term()]))
    assert found.ok, found
    names = {row.check for row in found.rows}
    assert not names & {"top K cells", "positions", "held-out text", "gradient shares"}
    assert line(found, "LM term").measured == "least share 100% at step 0"


def test_a_run_in_the_background_is_refused(tmp_path):
    trainer = build(tmp_path)
    trainer._loop = object()
    with pytest.raises(ValueError, match="expected a trainer at rest"):
        run_preflight(trainer)
    trainer._loop = None


def test_a_run_that_has_steps_on_disk_which_are_not_loaded(tmp_path):
    build(tmp_path, steps=300).fit(2)
    again = build(tmp_path, steps=300)
    found = run_preflight(again)
    assert "checkpoint of step 2" in found.notes[0]
    again.resume()
    later = run_preflight(again)
    assert later.notes == ()
    assert line(later, "learning").measured.startswith("step 2:")


def test_a_check_that_breaks_leaves_the_others(tmp_path, planned, monkeypatch):
    monkeypatch.setattr(trial_checks, "memory_of", lambda trainer: 1 / 0)
    found = planned(build(tmp_path))
    assert failed(found) == {"memory"}
    assert line(found, "memory").cure == "ZeroDivisionError: division by zero"
    assert len(found.rows) == len(preflight._CHECKS) - 1, "nothing is padded here"


def test_words_for_sizes_and_times():
    assert [facts.gigabytes(n) for n in (2**19, 2**25, 3 * 2**30)] == ["0.5 MiB", "32 MiB", "3.0 GiB"]
    assert [facts.seconds(n) for n in (0.02, 0.5, 12)] == ["20 ms", "0.50 s", "12.0 s"]
    assert [span(n) for n in (20, 600, 9000)] == ["20 s", "10 min", "2.5 h"]
    assert [plan_checks._round_up(n) for n in (1, 3, 84, 101)] == [1, 5, 100, 200]
    assert [facts.percent(n) for n in (0, 0.5, 0.012, 1e-5)] == ["0%", "50%", "1.2%", "1.0e-05"]


def test_the_session_of_the_helpers_has_no_limit(tmp_path, planned):
    assert "no limit" in line(planned(build(tmp_path, session=session_at(tmp_path / "run"))), "time").measured


def test_much_padding_is_looked_at(monkeypatch):
    """Only where there is any; with what it is for models that cannot hold windows apart."""

    def found(pack, *, apart: bool):
        batching = Batching(lengths, window=64, batch_size=8, pack=pack)
        data = SimpleNamespace(batching=batching, window=64)
        trainer = SimpleNamespace(data=data, student="student", teacher=None)
        monkeypatch.setattr(plan_checks, "why_not_packed", lambda model, width: None if apart else "it mixes them")
        return plan_checks.padding(SimpleNamespace(trainer=trainer))

    lengths = np.full((200, 2), 64)
    assert found(None, apart=True) is None
    lengths = np.random.default_rng(0).integers(3, 60, (200, 1)).repeat(2, axis=1)
    assert found(None, apart=True)[1] == OK
    measured, word, cure = found(None, apart=False)
    assert word == LOOK
    assert int(measured.split("%")[0]) > 20
    assert "the student cannot hold several windows" in cure
    assert "build_data(pack=False)" in cure
    assert found(False, apart=False)[1] == OK
