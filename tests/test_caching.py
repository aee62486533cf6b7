"""The teacher cache: what it holds is what the teacher says, whatever happens while it is built."""

from __future__ import annotations

import contextlib
import math
import shutil

import pytest
import torch
from helpers import assert_same_run, make_trainer, measured, pages, pair, session_at, small_data, tiny_student

from kd_kit import (
    attention_term,
    build_cache,
    build_data,
    build_probe,
    cache_report,
    evaluate,
    feature_term,
    kd_term,
    layerwise_term,
    lm_term,
    router_term,
    run_preflight,
    span_term,
)
from kd_kit.cache import Cache
from kd_kit.cached_teacher import CachedTeacher
from kd_kit.readings import Needs
from kd_kit.teacher import LiveTeacher

TERMS = {
    "bridge": lambda: kd_term(0.5, top_k=16),
    "all cells": lambda: kd_term(0.5, top_k=None),
    "sampled": lambda: kd_term(0.5, top_k=16, sampled=True),
    "strict": lambda: kd_term(0.5, method="strict"),
    "uld": lambda: kd_term(0.5, method="uld"),
    "projector": lambda: kd_term(0.5, method="projector"),
    "span": span_term,
    "feature": feature_term,
    "layerwise": layerwise_term,
    "router": router_term,
}


TIMED = {"time", "cost of a step", "memory", "disk"}
"""Checks of the preflight that depend on the machine."""


def trainer_at(folder, *names, data=None, **arguments):
    terms = [lm_term(0.5), *(TERMS[name]() for name in names or ("bridge", "span", "feature", "router"))]
    return make_trainer(folder, terms=terms, data=data or small_data(), **arguments)


def flat(signal) -> dict[str, torch.Tensor]:
    """Every tensor of a signal by a name; cells as probabilities of all tokens, since near ties may change places."""
    out = {}
    for key, cells in signal.cells.items():
        probs = cells.log_probs.exp()
        if cells.ids is not None:
            probs = torch.zeros(len(probs), pair().student_vocab.size).scatter_add(1, cells.ids, probs)
        out |= {f"{key}/cells": probs, f"{key}/tail": cells.tail.exp()}
    out |= {"row_states": signal.row_states, "span_log_probs": signal.span_log_probs}
    out |= {f"states/{layer}": tensor for layer, tensor in signal.states.items()}
    out |= {f"routing/{layer}": tensor for layer, tensor in signal.routing.items()}
    return {name: tensor for name, tensor in out.items() if tensor is not None}


def live_of(trainer) -> LiveTeacher:
    return LiveTeacher(trainer.teacher.model, trainer.teacher.bridge, trainer.teacher.needs)


@pytest.mark.parametrize("name", TERMS)
def test_what_is_read_is_what_the_teacher_says_in_batches_of_other_windows(tmp_path, name):
    trainer = trainer_at(tmp_path, name)
    cache = build_cache(trainer, precision="full", per_shard=3)
    assert cache.complete
    assert isinstance(trainer.teacher, CachedTeacher)
    windows = trainer.data.train
    for samples in ([0], [5, 1, 3], list(range(len(windows)))[::-1][:6]):
        batch = windows.collate(samples)
        read, told = flat(trainer.teacher.signal(batch)), flat(live_of(trainer).signal(batch))
        assert read.keys() == told.keys()
        for key, tensor in told.items():
            small = 1e-5 if key.endswith(("/cells", "/tail")) else 2e-4
            torch.testing.assert_close(read[key], tensor, atol=small, rtol=2e-4)


def one_by_one(window: int = 32, *, short: bool = False):
    """Batches of one window, so that the teacher's sums are the same for cache and run."""
    texts = pages(8, 500)
    if short:  # several of which would have room in one row
        texts = [text[: 20 + 15 * (n % 5)] for n, text in enumerate(pages(40, 100))] + texts
    return build_data(texts, pair(), held_out=0.25, window=window, batch_size=1, pack=False)


@pytest.mark.parametrize("short", [False, True])
def test_a_run_from_a_full_cache_is_the_live_run_bit_for_bit(tmp_path, short):
    live = trainer_at(tmp_path / "live", data=one_by_one(short=short))
    live.fit()
    cached = trainer_at(tmp_path / "cached", data=one_by_one(short=short))
    build_cache(cached, precision="full")
    cached.fit()
    assert_same_run(live, cached)


def test_a_run_from_a_half_cache_is_within_its_certificate(tmp_path):
    live = trainer_at(tmp_path / "live", data=one_by_one())
    live.fit()
    cached = trainer_at(tmp_path / "cached", data=one_by_one())
    cache = build_cache(cached)
    kl = cache.manifest["fidelity"]["read_back"]["KL in nats, bridge taught top 16"]
    assert 0 < kl < 1e-4
    cached.fit()
    for name in ("lm", "kd", "span", "feature"):
        ours, theirs = (
            [r["terms"][name]["value"] for r in measured(run.history) if r["kind"] == "train"] for run in (cached, live)
        )
        assert len(ours) == 6
        assert ours == pytest.approx(theirs, rel=5e-3, abs=5e-3)
        assert ours != theirs, "half precision is not full precision"


def test_a_resumed_run_reads_the_cache_again(tmp_path):
    whole = trainer_at(tmp_path / "whole", data=one_by_one())
    build_cache(whole)
    whole.fit()
    first = trainer_at(tmp_path / "parts", data=one_by_one())
    build_cache(first)
    first.fit(steps=3)
    second = trainer_at(tmp_path / "parts", data=one_by_one())
    assert build_cache(second).complete
    second.fit()
    assert_same_run(whole, second)


def names_of(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_a_build_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    whole = build_cache(trainer_at(tmp_path / "whole"), per_shard=2)
    write = Cache.write

    def dies(self, number, *arguments):
        if number == 2:
            (self.folder / ".shard-00002-1").mkdir()  # as a kill leaves it
            (self.folder / ".shard-00002-1" / "shard").write_bytes(b"half")
            raise SystemExit
        return write(self, number, *arguments)

    trainer = trainer_at(tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Cache, "write", dies)
        build_cache(trainer, per_shard=2)
    assert not isinstance(trainer.teacher, CachedTeacher)
    again = build_cache(trainer_at(tmp_path / "parts"), per_shard=2)
    assert len(whole.shards) > 3
    assert names_of(again) == names_of(whole), "the names hold hashes of the contents"


def test_a_session_that_is_nearly_over_leaves_whole_shards(tmp_path, capsys):
    now = [0.0]
    session = session_at(tmp_path / "run")
    session._clock, session._started = lambda: now[0], 0.0
    session.budget = 1000.0
    trainer = trainer_at(tmp_path / "run", session=session)
    signal = LiveTeacher.signal

    def slowly(self, batch):
        now[0] += 100.0
        return signal(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveTeacher, "signal", slowly)
        cache = build_cache(trainer, per_shard=2)
    assert not cache.complete
    assert cache.shards
    assert "the session's time is nearly over" in capsys.readouterr().out
    assert type(trainer.teacher) is LiveTeacher
    assert build_cache(trainer_at(tmp_path / "run")).complete


def test_a_damaged_shard_is_found_and_made_again(tmp_path, capsys):
    cache = build_cache(trainer_at(tmp_path), per_shard=3)
    before = names_of(cache)
    content = bytearray(cache.shards[1].read_bytes())
    content[-5] ^= 1
    cache.shards[1].write_bytes(content)
    assert names_of(build_cache(trainer_at(tmp_path), per_shard=3)) == before
    assert f"damaged, deleted and made again: {cache.shards[1].name}" in capsys.readouterr().out


def test_shards_of_an_attached_output_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    done = build_cache(trainer_at(tmp_path / "first"), per_shard=2)
    there = tmp_path / "input" / "notebooks" / "me" / "distil" / "kd_runs" / "run" / "cache"
    shutil.copytree(done.folder, there)
    lost = done.shards[1].name
    (there / lost).unlink()
    trainer = trainer_at(tmp_path / "second")
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        write = Cache.write
        patch.setattr(Cache, "write", lambda self, number, *more: asked.append(number) or write(self, number, *more))
        again = build_cache(trainer, per_shard=2)
    assert asked == [1]
    assert f"{len(done.shards) - 1} shards copied from {there}" in capsys.readouterr().out
    assert names_of(again) == names_of(done)
    assert Cache.open(again.folder).manifest["fidelity"] == done.manifest["fidelity"], "known without asking again"
    build_cache(trainer_at(tmp_path / "third", "bridge"), per_shard=2)
    assert f"{there} has another content (span_log_probs, states, routing) and is not used" in capsys.readouterr().out


def test_a_cache_of_something_else_is_refused_with_what_differs(tmp_path):
    build_cache(trainer_at(tmp_path / "run", "bridge"), tmp_path / "cache")
    others = {
        "readings": trainer_at(tmp_path / "terms", "all cells"),
        "text": trainer_at(tmp_path / "text", "bridge", data=small_data(count=6)),
        "states": trainer_at(tmp_path / "states", "bridge", "feature"),
        "more_experts": trainer_at(tmp_path / "experts", "bridge", more_experts=4),
    }
    for what, trainer in others.items():
        with pytest.raises(ValueError, match=rf"got another one \(.*{what}: .* there, .* here"):
            build_cache(trainer, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"precision: half there, full here\); .*, or pass precision='half'"):
        build_cache(trainer_at(tmp_path / "full", "bridge"), tmp_path / "cache", precision="full")


def test_what_cannot_be_kept_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(LiveTeacher, "signal", lambda *_: pytest.fail("asked the teacher"))
    trainer = make_trainer(tmp_path / "a", terms=[lm_term(), kd_term(), attention_term()])
    with pytest.raises(ValueError, match="got attention, which wants queries"):
        build_cache(trainer)
    with pytest.raises(ValueError, match="got one without"):
        build_cache(make_trainer(tmp_path / "b", terms=[lm_term()], model=None))
    with pytest.raises(ValueError, match="'half' or 'full', got 'u8'"):
        build_cache(trainer_at(tmp_path / "c"), precision="u8")
    with pytest.raises(ValueError, match="per_shard of at least 1"):
        build_cache(trainer_at(tmp_path / "d"), per_shard=0)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    trainer = trainer_at(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(
        ValueError, match=r"GB free in .*, got 0\.00; leave out what costs most.*Bytes per token: states"
    ):
        build_cache(trainer)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["LOCK"]


def test_other_text_and_other_questions_go_to_the_model_itself(tmp_path):
    trainer = trainer_at(tmp_path, "bridge")
    live = live_of(trainer)
    build_cache(trainer, precision="full")
    held_out = trainer.data.held_out.collate([0, 1])
    for name, tensor in flat(live.signal(held_out)).items():
        assert torch.equal(flat(trainer.teacher.signal(held_out))[name], tensor)
    other = Needs(teacher_attention=frozenset([1]))
    assert trainer.teacher.lacks(other) == ["attention of layer 1"]
    assert type(trainer.teacher.asked(other)) is LiveTeacher
    assert isinstance(trainer.teacher.asked(live.needs), CachedTeacher)


def test_an_evaluation_of_a_cached_run_is_that_of_a_live_one(tmp_path):
    reports = []
    for name in ("live", "cached"):
        trainer = trainer_at(tmp_path / name, data=one_by_one(), steps=2)
        if name == "cached":
            build_cache(trainer, precision="full")
        trainer.fit()
        rows = evaluate(trainer, limit=2).rows
        reports.append({who: row | {"tokens_per_second": None} for who, row in rows.items()})  # which no two runs share
    assert reports[0] == reports[1]
    assert reports[0]["teacher"]["bits_per_byte"] > 1


def test_states_beyond_float16_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    signal = LiveTeacher.signal

    def large(self, batch):
        found = signal(self, batch)
        for states in found.states.values():
            states[..., 0] = 1e5
        return found

    monkeypatch.setattr(LiveTeacher, "signal", large)
    with pytest.raises(ValueError, match=r"states/\d within the range of float16 \(65,504\), got 1e\+05; .*'full'"):
        build_cache(trainer_at(tmp_path / "half", "feature"))
    assert [path.name for path in (tmp_path / "half" / "cache").iterdir()] == ["LOCK"]
    assert build_cache(trainer_at(tmp_path / "full", "feature"), precision="full").complete


def test_only_leftovers_of_its_own_are_cleared_away(tmp_path):
    folder = tmp_path / "cache"
    for name in (".tmpdir", ".shard-00001-77", ".shard-of-mine"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half").touch()
    for name in (".tmp-my-notes", ".CACHE.json-77"):
        (folder / name).touch()
    cache = build_cache(trainer_at(tmp_path / "run", "bridge"), folder)
    assert {n for n in names_of(cache) if n.startswith(".")} == {".tmpdir", ".tmp-my-notes", ".shard-of-mine"}


def test_a_resting_teacher_is_woken_for_what_only_the_model_can_say(tmp_path):
    trainer = trainer_at(tmp_path, "bridge", steps=40)
    build_cache(trainer)
    awake = []

    class Woken(CachedTeacher):
        @contextlib.contextmanager
        def awake(self):
            awake.append(True)
            yield
            awake.pop()

    trainer.teacher.__class__ = Woken
    asleep = []
    model = trainer.teacher.model
    hook = model.model.register_forward_pre_hook(lambda *_: asleep.append("asleep") if not awake else None)
    try:
        assert run_preflight(trainer).ok
        trainer.fit(steps=2)
        evaluate(trainer, limit=2)
    finally:
        hook.remove()
    assert asleep == []


def test_the_report_says_size_and_truth(tmp_path):
    trainer = trainer_at(tmp_path, "bridge", "feature")
    cache = build_cache(trainer)
    said = repr(cache_report(cache.folder))
    assert "teacher cache" in said
    assert f"{len(trainer.data.train):,} of {len(trainer.data.train):,}, half precision" in said
    assert "stored against live: KL in nats, bridge taught top 16" in said
    row = next(line for line in said.splitlines() if line.startswith("bytes per student token"))
    measured = cache.size / cache.manifest["tokens"]
    assert math.isclose(float(row.split()[-1].replace(",", "")), measured, abs_tol=0.51)
    # K ids of 2 bytes and K + 1 numbers of 2, at almost every position
    assert cache.manifest["bytes_per_token"]["bridge taught top 16"] == pytest.approx(66, rel=0.1)
    assert repr(cache_report(tmp_path)) == said, "of the run's folder"
    with pytest.raises(ValueError, match=r"expected a cache with CACHE\.json"):
        cache_report(tmp_path / "nowhere")


def test_the_students_memory_is_not_touched_by_another_students_cache(tmp_path):
    """Two students of one teacher and one text may share a cache."""
    build_cache(trainer_at(tmp_path / "a", "bridge"), tmp_path / "cache")
    other = trainer_at(tmp_path / "b", "bridge", student=tiny_student(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveTeacher, "signal", lambda *_: pytest.fail("asked the teacher"))
        assert build_cache(other, tmp_path / "cache").complete


def test_preflight_and_probe_work_on_a_cached_run(tmp_path):
    trainer = trainer_at(tmp_path, "bridge", "feature", steps=40)
    before = run_preflight(trainer)
    build_cache(trainer)
    after = run_preflight(trainer)
    assert [(r.check, r.verdict) for r in after.rows if r.check not in TIMED] == [
        (r.check, r.verdict) for r in before.rows if r.check not in TIMED
    ]
    table = repr(build_probe(trainer).table)
    assert "feature" in table
    assert "kd" in table
