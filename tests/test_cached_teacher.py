"""A teacher that reads: what it reads ahead, what it refuses before a run, and what damage looks like."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from helpers import TOY_STUDENT, TOY_TEACHER, tiny_student, toy_data, toy_pair
from test_caching import flat, live_of, one_by_one, trainer_at

from kd_kit import build_cache, feature_term, kd_term, lm_term, router_term, span_term
from kd_kit.cache import Cache, ids_type
from kd_kit.cached_teacher import CachedTeacher
from kd_kit.trainer_builder import change_terms


def readers(monkeypatch) -> list[str]:
    """Names of the threads that read from caches, from here on."""
    names, read = [], CachedTeacher._read

    def noted(self, host):
        names.append(threading.current_thread().name)
        return read(self, host)

    monkeypatch.setattr(CachedTeacher, "_read", noted)
    return names


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_find_what_another_thread_has_read(tmp_path, monkeypatch, workers):
    trainer = trainer_at(tmp_path, "bridge", "span", steps=4, workers=workers)
    build_cache(trainer)
    trainer.settle()
    names = readers(monkeypatch)
    trainer.fit()
    assert names == ["kd_kit batches"] * 4
    gc.collect()
    assert trainer.teacher._read_ahead == {}, "gone with their batches"


def test_batches_that_are_taken_in_pieces_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    trainer = trainer_at(tmp_path, "bridge", steps=2)
    build_cache(trainer)
    trainer.micro_batch = 1
    names = readers(monkeypatch)
    trainer.fit()
    assert names == ["MainThread"] * 4


def test_what_was_read_ahead_is_of_its_batch_alone(tmp_path):
    trainer = trainer_at(tmp_path, "bridge", "span", "feature", "router")
    build_cache(trainer)
    teacher, windows = trainer.teacher, trainer.data.train
    one, same, other = windows.collate([0, 1]), windows.collate([0, 1]), windows.collate([2, 3])
    teacher.read_ahead(one)
    ahead, asked = flat(teacher.signal(one, one)), flat(teacher.signal(same, same))
    assert ahead.keys() == asked.keys()
    for name in asked:
        assert ahead[name].dtype == torch.float32
        assert torch.equal(ahead[name], asked[name]), name
    assert not torch.equal(teacher.signal(other, other).span_log_probs, ahead["span_log_probs"])
    assert teacher._read(replace(one, teacher_ids=one.teacher_ids + 1)) is None, "another text of the same lengths"
    held_out = trainer.data.held_out.collate([0, 1])  # windows of the same numbers, and other text
    teacher.read_ahead(held_out)
    for name, tensor in flat(live_of(trainer).signal(held_out)).items():
        assert torch.equal(flat(teacher.signal(held_out, held_out))[name], tensor)


def test_a_shard_that_is_damaged_under_a_run_is_said_as_when_nothing_is_read_ahead(tmp_path):
    trainer = trainer_at(tmp_path, "bridge", data=one_by_one())
    cache = build_cache(trainer, per_shard=4)
    trainer.fit(steps=1)
    for path in cache.shards.values():
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[: len(whole) // 2])
    trainer.teacher.cache = Cache.open(cache.folder)
    with pytest.raises(ValueError, match=r"^Cache: expected a whole shard, got shard-0000\d-.*finds damaged ones"):
        trainer.fit()
    assert "kd_kit batches" not in [thread.name for thread in threading.enumerate() if _ends(thread)]
    assert build_cache(trainer).complete
    assert trainer.fit() == "finished"


def _ends(thread) -> bool:
    """Whether a thread still lives a moment later."""
    if thread.name == "kd_kit batches":
        thread.join(5)
    return thread.is_alive()


def test_a_missing_shard_is_said_by_name(tmp_path):
    trainer = trainer_at(tmp_path, "bridge")
    cache = build_cache(trainer, per_shard=2)
    cache.shards[0].unlink()
    opened = Cache.open(cache.folder)
    assert opened.missing == [0]
    with pytest.raises(ValueError, match="expected shard 0 of"):
        opened.fetch("bridge taught top 16/ids", "taught", [0])
    with pytest.raises(
        ValueError, match=r"^Trainer.fit: expected all \d+ shards in .*, got 1 missing, shard 0 first; "
    ):
        trainer.fit()
    assert trainer.step == 0


LACKING = {
    "kd, which wants the reading 'bridge taught top 32'": lambda: [kd_term(0.5, top_k=32)],
    "feature, which wants hidden states of layer": lambda: [kd_term(0.5, top_k=16), feature_term()],
    "span, which wants span likelihoods; router, which wants routing of layer": lambda: [span_term(), router_term()],
}


@pytest.mark.parametrize("what", LACKING)
def test_terms_that_the_cache_lacks_are_named_before_any_step(tmp_path, monkeypatch, what):
    trainer = trainer_at(tmp_path, "bridge")
    build_cache(trainer)
    before = trainer.terms, trainer.teacher
    terms = [lm_term(0.5), *LACKING[what]()]
    with pytest.raises(ValueError, match=rf"^change_terms: expected terms that the cache in .* can serve, got {what}"):
        change_terms(trainer, terms)
    assert (trainer.terms, trainer.teacher) == before
    # a trainer with these terms and that teacher, however it came about
    other = trainer_at(tmp_path / "other", "bridge")
    other.teacher, other.terms = trainer.teacher, tuple(t.bound(setup_of(trainer)) for t in terms)
    monkeypatch.setattr("kd_kit.trainer.take_gradients", lambda *_, **__: pytest.fail("took a step"))
    with pytest.raises(ValueError, match=rf"^Trainer.fit: expected terms that the cache in .*, got {what}"):
        other.fit()
    # and a new run that wants to use the same folder
    with pytest.raises(ValueError, match=rf"^build_cache: .*; not there for {what}"):
        build_cache(new_run(tmp_path / "new", terms), trainer.teacher.cache.folder)


def setup_of(trainer):
    from kd_kit.terms import Setup

    return Setup(trainer.student, trainer.teacher.model, trainer.data.pair)


def new_run(folder, terms):
    from helpers import make_trainer, small_data

    return make_trainer(folder, terms=terms, data=small_data())


def test_a_change_that_the_cache_can_serve_is_made(tmp_path):
    trainer = trainer_at(tmp_path, "bridge", "feature")
    build_cache(trainer)
    assert change_terms(trainer, [lm_term(0.5), kd_term(0.9, top_k=16), feature_term()])
    assert isinstance(trainer.teacher, CachedTeacher)
    assert trainer.fit() == "finished"


def test_ids_are_as_narrow_as_the_vocabulary_allows():
    assert [ids_type(size) for size in (49_152, 2**16, 2**16 + 1, 151_936)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.parametrize(("size", "stored"), [(2**16, torch.int16), (2**16 + 64, torch.int32)])
def test_the_last_ids_of_a_large_vocabulary_come_back(tmp_path, size, stored):
    """Every token that is taught has one of the highest ids."""
    start, *tokens = TOY_STUDENT
    fill = [b"\xff" + n.to_bytes(4, "big") for n in range(size - len(TOY_STUDENT))]
    pair = toy_pair(TOY_TEACHER, (start, *fill, *tokens))
    trainer = trainer_at(
        tmp_path,
        "bridge",
        data=toy_data(pair),
        model=tiny_student(3, vocab_size=len(TOY_TEACHER)).eval().requires_grad_(False),
        student=tiny_student(vocab_size=size),
        steps=1,
    )
    live = live_of(trainer)
    cache = build_cache(trainer, precision="full")
    assert cache._shard(0)["bridge taught top 16/ids"].dtype == stored
    batch = trainer.data.train.collate([0])
    (read,), (told,) = trainer.teacher.signal(batch).cells.values(), live.signal(batch).cells.values()
    assert read.ids.dtype == torch.int64
    assert torch.equal(read.ids[:, 0], told.ids[:, 0])
    assert (read.ids[:, 0] >= size - len(TOY_STUDENT)).all()
    assert trainer.fit() == "finished"
