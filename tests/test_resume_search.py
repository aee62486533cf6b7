"""Where a run is gone on from, whatever lies about and whenever the process dies that brings it.

Started as a script, this file is a process that imports torch once and forks a child for each order.
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kd_kit import adoption, checkpoint, checkpoint_folder, manifest_walk
from kd_kit.checkpoint import CheckpointError, find_checkpoint, inspect_checkpoint, load_checkpoint, save_checkpoint
from kd_kit.history import History
from kd_kit.resume_search import find_run

CONFIG = {"seed": 1, "terms": ["lm", "kd"], "start": "f00", "steps": 100, "rates": "cosine"}
EVALUATIONS = [[1, 3.5], [2, 3.25]]


def check(config):
    if config.get("seed") != CONFIG["seed"] or config.get("terms") != CONFIG["terms"]:
        raise ValueError("expected the configuration of the run, got another one: the seed changed")


def search(folder, name="run", *, inputs=(), **more):
    return find_run(folder, name, check, inputs=inputs, **more)


def save(run, step, *, number=None, run_id="a", name="run", config=CONFIG, bare=True, keep=9):
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(step))
    state = {"step": step, "evaluations": EVALUATIONS}
    if bare:
        state["run"] = {"name": name, "config": config}
    groups = {"model": {"w": weight}, "optim": {"m": weight * 2}}
    number = step if number is None else number
    return save_checkpoint(run, step=step, save_number=number, groups=groups, state=state, run_id=run_id, keep=keep)


def weights(path, step):
    save_file({"w": torch.full((3,), float(step))}, path, metadata={"step": str(step), "bits_per_byte": "2.5"})


def make_run(folder, *steps, run_id="a", name="run", config=CONFIG, **how):
    """A run folder as a trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        save(folder, step, run_id=run_id, name=name, config=config, **how)
    (folder / "RUN.json").write_text(json.dumps({"run_id": run_id, "name": name, "config": config}))
    history = History(folder / "metrics.jsonl")
    history.append({"kind": "run", "run_id": run_id, "total_steps": 100, "terms": {}})
    for step in range(1, max(steps, default=0) + 1):
        history.append({"kind": "train", "step": step, "total": float("nan"), "terms": {}})
    weights(folder / "initial.safetensors", 0)
    weights(folder / "best.safetensors", max(steps, default=0))
    return folder


def snapshot(*folders):
    """Every byte, name, date and link below."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[path] = (content, os.readlink(path) if path.is_symlink() else "", path.lstat().st_mtime_ns)
    return found


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def run_json(folder):
    return json.loads((folder / "RUN.json").read_text())


def assert_adopted(folder, step, source=None, *, run_id="a", name="run", number=None):
    """It is all there, and nothing but what was looked for."""
    found, refusals = find_checkpoint(folder, run_id=run_id)
    assert refusals == [] and (found.step, found.save_number) == (step, step if number is None else number)
    assert load_checkpoint(found)[1]["step"] == step
    assert run_json(folder) == {"run_id": run_id, "name": name, "config": CONFIG}
    assert [path.name for path in (folder / "ckpt").iterdir() if path.name.startswith(".")] == []
    if source is not None:
        for file in ("metrics.jsonl", "initial.safetensors", "best.safetensors"):
            assert (folder / file).read_bytes() == (source / file).read_bytes(), file


@pytest.fixture
def work(tmp_path):
    """The run folder of a new session: not there yet."""
    return tmp_path / "working" / "kd_runs" / "run"


@pytest.fixture
def kaggle(tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------------------------------- what is taken


def test_nothing_anywhere_is_a_new_run_and_nothing_is_written(work, tmp_path):
    found = search(work, inputs=[tmp_path / "missing"])
    assert (found.origin, found.path, found.step, found.run_id) == ("new", None, 0, None)
    assert found.refusals == [] and found.adopted_from is None and found.stopped_looking is None
    assert not work.exists()
    assert repr(found) == "nothing to go on from was found"


def test_the_run_folder_alone_is_not_hashed(work, monkeypatch):
    make_run(work, 3, 7)
    before = snapshot(work)
    monkeypatch.setattr(checkpoint_folder.hashlib, "file_digest", None)
    found = search(work)
    assert (found.origin, found.step, found.run_id) == ("run folder", 7, "a")
    assert found.path == work / "ckpt/step-00000007" and found.adopted_from is None
    assert snapshot(work) == before


def test_older_ones_elsewhere_do_not_replace_a_good_one_here(work, kaggle):
    make_run(work, 7), make_run(kaggle / "last", 3, 5)
    before = snapshot(work, kaggle)
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step, found.refusals) == ("run folder", 7, [])
    assert snapshot(work, kaggle) == before


LAYOUTS = {
    "a notebook's output": "notebooks/owner/slug/kd_runs/run",
    "an older mount": "slug/kd_runs/run",
    "a data set of the run folder": "my-run",
    "the input itself": "",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_below_the_input_is_brought_with_all_that_belongs_to_it(work, kaggle, layout):
    source = make_run(kaggle / LAYOUTS[layout], 3, 12)
    before = snapshot(kaggle)
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step, found.run_id) == ("input", 12, "a")
    assert found.path == work / "ckpt/step-00000012" and found.adopted_from == str(source / "ckpt/step-00000012")
    assert_adopted(work, 12, source)
    assert snapshot(kaggle) == before
    again = search(work, inputs=[kaggle])
    assert (again.origin, again.step, again.path) == ("run folder", 12, found.path)


@pytest.mark.parametrize("keep_run", [True, False])
def test_names_and_dates_decide_nothing(work, kaggle, keep_run):
    make_run(kaggle / "z-newest", 10), make_run(kaggle / "a-oldest", 9)
    (kaggle / "z-newest/ckpt/step-00000010").rename(kaggle / "z-newest/ckpt/step-00000001")
    (kaggle / "a-oldest/ckpt/step-00000009").rename(kaggle / "a-oldest/ckpt/step-99999999")
    again = save(kaggle / "m" / "x", 10, number=11)
    if not keep_run:
        again.path.rename(kaggle / "some-data-set")
    for age, path in enumerate([again.path, kaggle / "z-newest/ckpt/step-00000001", kaggle / "a-oldest"]):
        for file in [path, *path.rglob("*")] if path.exists() else []:
            os.utime(file, (1e9 + age * 1e8,) * 2)
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step) == ("input", 10)
    assert inspect_checkpoint(found.path).save_number == 11


def test_the_step_counts_before_the_number_of_the_save(work, kaggle):
    make_run(kaggle / "x", 9), make_run(kaggle / "went back", 4, number=99)
    assert search(work, inputs=[kaggle]).step == 9


@pytest.mark.parametrize("bare", ["ckpt", "alone", "renamed"])
def test_a_bare_checkpoint_brings_the_run_that_its_state_names(work, kaggle, bare):
    info = save(kaggle / "made", 12)
    if bare == "alone":
        shutil.copytree(info.path, kaggle / "dataset" / "step-00000012")
        shutil.rmtree(kaggle / "made")
    if bare == "renamed":
        info.path.rename(kaggle / "my checkpoint")
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step, found.run_id) == ("input", 12, "a")
    assert_adopted(work, 12)
    history = History(work / "metrics.jsonl")
    assert history.evaluations() == ([1, 2], [3.5, 3.25])
    [event] = history.events
    assert (event["step"], event["what"]) == (12, "resumed") and "only the evaluations are kept" in event["text"]
    assert not (work / "initial.safetensors").exists() and not (work / "best.safetensors").exists()


def test_evaluations_that_are_none_are_left_out(work, kaggle):
    bad = [[1, 2.0], "x", [1], [True, 2.0], [3, "nan"], [4, float("inf")], None, [5, 2]]
    state = {"evaluations": bad, "run": {"name": "run", "config": CONFIG}, "step": 5}
    save_checkpoint(kaggle, step=5, save_number=1, groups={}, state=state, run_id="a")
    search(work, inputs=[kaggle])
    assert History(work / "metrics.jsonl").evaluations() == ([1, 4, 5], [2.0, float("inf"), 2])


def test_of_two_that_are_equally_new_the_nearer_one_is_taken(work, tmp_path):
    runs = [make_run(folder, 5) for folder in (work, tmp_path / "given", tmp_path / "input")]
    place = Mirror(tmp_path / "mirror", 5)
    for origin, source in zip(["run folder", "given", "input", "mirror"], [*runs, None], strict=True):
        given = tmp_path / "given" if (tmp_path / "given").exists() else None
        target = work if origin == "run folder" else tmp_path / f"new-{origin}"
        found = search(target, inputs=[tmp_path / "input"], given=given, place=place)
        assert found.origin == origin
        if source is not None:
            shutil.rmtree(source)
    assert place.downloads == ["step-00000005"]


# ---------------------------------------------------------------------------------------------- a path that is given


@pytest.mark.parametrize("part", ["ckpt/step-00000009", "ckpt", "", "..", "../.."])
def test_a_path_may_lead_to_the_run_or_into_it_or_above_it(work, tmp_path, part):
    source = make_run(tmp_path / "elsewhere" / "there" / "old", 4, 9, name="another name")
    before = snapshot(source)
    found = search(work, given=Path(os.path.normpath(source / part)))
    assert (found.origin, found.step) == ("given", 9)
    assert_adopted(work, 9, source)
    assert snapshot(source) == before


def test_a_link_that_is_given_is_followed(work, tmp_path):
    source = make_run(tmp_path / "there", 4)
    (tmp_path / "link").symlink_to(source)
    assert search(work, given=tmp_path / "link").step == 4
    assert_adopted(work, 4, source)


def test_a_path_that_does_not_exist_is_told(work, tmp_path):
    (tmp_path / "file").write_text("x")
    for given in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ValueError, match="find_run: expected a folder with a checkpoint"):
            search(work, given=given)
    assert not work.exists()


def test_a_path_without_anything_usable_is_never_a_new_run(work, kaggle, tmp_path):
    make_run(kaggle / "good", 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="find_run: expected a checkpoint in"):
        search(work, given=tmp_path / "empty", inputs=[kaggle])
    bad = make_run(tmp_path / "bad", 8, 9)
    flip(bad / "ckpt/step-00000008/MANIFEST.json"), flip(bad / "ckpt/step-00000009/model.safetensors")
    before = snapshot(bad)
    with pytest.raises(CheckpointError) as caught:
        search(work, given=bad, inputs=[kaggle])
    text = str(caught.value)
    assert f"{bad}/ckpt/step-00000008  MANIFEST.json" in text and "model.safetensors: expected" in text
    assert "step 9, save 9" in text
    assert snapshot(bad) == before and find_checkpoint(work) == (None, [])


def test_who_gives_a_path_has_chosen_the_run(work, kaggle, tmp_path):
    make_run(kaggle / "further", 50, run_id="b"), make_run(kaggle / "same", 12)
    make_run(tmp_path / "given", 9)
    found = search(work, given=tmp_path / "given", inputs=[kaggle])
    assert (found.origin, found.step, found.run_id) == ("input", 12, "a")
    assert [refusal.reason for refusal in found.refusals] == [
        f"step 50, save 50: expected a run that is in {tmp_path / 'given'}, got 'b'"
    ]


def test_a_given_path_does_not_bring_another_run_into_a_folder_that_holds_one(work, tmp_path):
    make_run(work, 3), make_run(tmp_path / "given", 9, run_id="b")
    before = snapshot(work)
    with pytest.raises(CheckpointError, match=r"expected run 'a', whose checkpoints are in .*, got 'b'"):
        search(work, given=tmp_path / "given")
    assert snapshot(work) == before


@pytest.mark.parametrize("part", ["", "ckpt", ".."])
def test_the_run_folder_itself_may_be_given(work, part):
    make_run(work, 3, 4)
    found = search(work, given=Path(os.path.normpath(work / part)))
    assert (found.origin, found.step) == ("run folder", 4)


def test_a_control_is_not_taken_for_the_run_beside_which_it_was_trained(work, tmp_path):
    source = make_run(tmp_path / "old", 5, name="old")
    make_run(source / "control", 90, run_id="c", name="old/control")
    found = search(work, given=source)
    assert found.step == 5 and "trained beside another" in found.refusals[0].reason
    other = search(tmp_path / "new" / "control", "new/control", given=source)
    assert (other.step, other.run_id) == (90, "c")


# ---------------------------------------------------------------------------------------------- what is refused


def assert_refused(found, *words):
    assert (found.origin, found.path) == ("new", None)
    [refusal] = found.refusals
    for word in words:
        assert word in refusal.reason
        assert str(refusal.path) in repr(found) and refusal.reason in repr(found)


def test_another_runs_are_refused_in_words(work, kaggle):
    make_run(kaggle / "x", 5, name="other")
    assert_refused(search(work, inputs=[kaggle]), "step 5, save 5: expected run 'run', got 'other'; give its path")


def test_another_configuration_is_refused_in_words(work, kaggle):
    make_run(kaggle / "x", 5, config=CONFIG | {"seed": 2})
    assert_refused(search(work, inputs=[kaggle]), "step 5, save 5: ", "the seed changed")


def test_a_run_without_a_name_is_taken_by_its_path_only(work, kaggle):
    make_run(kaggle / "x", 5, bare=False)
    (kaggle / "x/RUN.json").write_text(json.dumps({"run_id": "a", "config": CONFIG}))
    assert_refused(search(work, inputs=[kaggle]), "got one without a name")
    assert search(work, given=kaggle / "x").step == 5
    assert run_json(work)["name"] == "run"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"run_id": "a"}', b'{"run_id": 3, "config": {}}'])
def test_without_a_lineage_nothing_is_taken(work, kaggle, content):
    make_run(kaggle / "x", 5, bare=False)
    (kaggle / "x/RUN.json").unlink()
    if content is not None:
        (kaggle / "x/RUN.json").write_bytes(content)
    assert_refused(search(work, inputs=[kaggle]), "in RUN.json or in its state")


def test_a_state_is_not_believed_before_its_hash_is_compared(work, kaggle):
    info = save(kaggle, 5, config=CONFIG | {"seed": 2})
    state = (info.path / "state.json").read_text()
    (info.path / "state.json").write_text(state.replace('"seed": 2', '"seed": 1'))
    found = search(work, inputs=[kaggle])
    assert_refused(found, "state.json: expected sha256")
    assert not work.exists() and "set seed" not in repr(info)


def test_another_runs_json_above_a_checkpoint_is_not_its_lineage(work, kaggle):
    make_run(kaggle / "x", 5)
    stolen = run_json(kaggle / "x") | {"run_id": "b", "config": CONFIG | {"seed": 2}}
    (kaggle / "x/RUN.json").write_text(json.dumps(stolen))
    assert search(work, inputs=[kaggle]).step == 5
    assert_adopted(work, 5)
    assert History(work / "metrics.jsonl").evaluations() == ([1, 2], [3.5, 3.25])


def test_another_run_does_not_come_to_checkpoints_that_are_here(work, kaggle):
    make_run(work, 3), make_run(kaggle / "x", 5, run_id="b")
    before = snapshot(work)
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step) == ("run folder", 3)
    assert "expected run 'a', whose checkpoints are in" in found.refusals[0].reason
    assert snapshot(work) == before


def test_nor_where_those_that_are_here_are_damaged(work, kaggle):
    make_run(work, 3), make_run(kaggle / "x", 5, run_id="b")
    (work / "ckpt/step-00000003/state.json").unlink()
    found = search(work, inputs=[kaggle])
    assert (found.origin, len(found.refusals)) == ("new", 2)
    assert run_json(work)["run_id"] == "a"
    assert search(work, inputs=[kaggle]).origin == "new"


DAMAGE = {
    "flipped": lambda folder: flip(folder / "optim.safetensors"),
    "short": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
    "no manifest's seal": lambda folder: flip(folder / "MANIFEST.json"),
    "no file": lambda folder: (folder / "model.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "flipped state": lambda folder: flip(folder / "state.json"),
    "a link": lambda folder: link_away(folder / "model.safetensors"),
    "a linked manifest": lambda folder: link_away(folder / "MANIFEST.json"),
    "a pipe": lambda folder: pipe(folder / "model.safetensors"),
    "a pickle beside": lambda folder: (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR."),
    "another format": lambda folder: reseal(folder, format=checkpoint_folder.FORMAT + 1),
    "a path out": lambda folder: reseal(folder, files={"state.json": [3, "0"], "../../x.safetensors": [3, "0"]}),
}


def link_away(path):
    away = path.parents[3] / f"away-{path.name}"
    path.rename(away)
    path.symlink_to(away)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def reseal(folder, **changes):
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    if "files" in changes:
        changes["files"] = {name: {"size": size, "sha256": sha} for name, (size, sha) in changes["files"].items()}
    del manifest["seal"]
    manifest |= changes
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {"seal": checkpoint_folder.seal(manifest)}))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("bare", [True, False])
def test_damage_elsewhere_costs_one_checkpoint_and_changes_nothing_there(work, kaggle, damage, bare):
    source = make_run(kaggle / "x", 3, 5)
    if bare:
        (source / "RUN.json").unlink()
    DAMAGE[damage](source / "ckpt/step-00000005")
    before = snapshot(kaggle)
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step) == ("input", 3)
    [refusal] = found.refusals
    assert refusal.path == source / "ckpt/step-00000005" and "expected" in refusal.reason
    assert_adopted(work, 3, None if bare else source)
    assert snapshot(kaggle) == before


def test_a_copy_that_is_good_stands_in_for_one_that_is_not(work, kaggle):
    make_run(kaggle / "a", 5), make_run(kaggle / "b", 5)
    flip(kaggle / "a/ckpt/step-00000005/model.safetensors")
    found = search(work, inputs=[kaggle])
    assert found.adopted_from == str(kaggle / "b/ckpt/step-00000005")
    assert_adopted(work, 5, kaggle / "b")


def test_an_older_one_here_and_one_elsewhere_are_compared_after_the_newest_here_proved_damaged(work, kaggle):
    make_run(work, 3, 9), make_run(kaggle / "x", 3, 5)
    flip(work / "ckpt/step-00000009/model.safetensors")
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.step) == ("input", 5)
    assert "(now .bad-step-00000009)" in found.refusals[0].reason
    make_run(work, 8)
    flip(kaggle / "x/ckpt/step-00000005/model.safetensors")
    flip(work / "ckpt/step-00000005/model.safetensors")
    flip(work / "ckpt/step-00000008/model.safetensors")
    assert (search(work, inputs=[kaggle]).origin, search(work, inputs=[kaggle]).step) == ("run folder", 3)


def test_a_source_that_changes_while_it_is_copied_is_noticed(work, kaggle, monkeypatch):
    source = make_run(kaggle / "x", 3, 5)
    taken = adoption._bring

    def changing(path, target, **how):
        if path.name == "optim.safetensors" and "step-00000005" in str(path):
            flip(path)
        return taken(path, target, **how)

    monkeypatch.setattr(adoption, "_bring", changing)
    found = search(work, inputs=[kaggle])
    assert found.step == 3 and "optim.safetensors: expected" in found.refusals[0].reason
    assert_adopted(work, 3, source)


def test_a_disk_that_cannot_be_read_costs_that_source_only(work, kaggle, monkeypatch):
    make_run(kaggle / "x", 3, 5)
    opened = os.open

    def failing(path, *args, **kwargs):
        if "step-00000005/model" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    found = search(work, inputs=[kaggle])
    assert found.step == 3 and "Input/output error" in found.refusals[0].reason


# ---------------------------------------------------------------------------------------------- how far it looks


def test_links_below_are_not_followed_and_the_top_may_be_one(work, kaggle, tmp_path):
    make_run(tmp_path / "outside", 9), make_run(kaggle / "x", 3)
    (kaggle / "link").symlink_to(tmp_path / "outside")
    (kaggle / "x/round").symlink_to(kaggle)
    (tmp_path / "top").symlink_to(kaggle)
    found = search(work, inputs=[tmp_path / "top"])
    assert found.step == 3 and found.refusals == []


@pytest.mark.parametrize("also", [(), ("RUN.json",)])
def test_links_in_place_of_the_files_beside_are_not_followed(work, kaggle, tmp_path, also):
    source = make_run(kaggle / "x", 3)
    outside = make_run(tmp_path / "outside", 9)
    for name in ("metrics.jsonl", "initial.safetensors", "best.safetensors", *also):
        (source / name).unlink()
        (source / name).symlink_to(outside / name)
    found = search(work, inputs=[kaggle])
    assert found.step == 3
    refused = [] if also else [source / name for name in ("metrics.jsonl", "initial.safetensors", "best.safetensors")]
    assert [path for path, reason in found.refusals if "expected a plain file" in reason] == refused
    assert_adopted(work, 3)
    assert {path.name for path in work.iterdir()} == {"RUN.json", "metrics.jsonl", "ckpt"}
    assert History(work / "metrics.jsonl").rows() == []


@pytest.mark.parametrize("top", ["ckpt", "ckpt/step-00000003"])
def test_nothing_above_an_input_is_opened(work, kaggle, top):
    source = make_run(kaggle / "x", 3)
    assert search(work, inputs=[source / top]).step == 3
    assert_adopted(work, 3)
    assert not (work / "best.safetensors").exists() and History(work / "metrics.jsonl").rows() == []


def test_a_file_that_becomes_a_link_after_it_was_looked_at_is_not_followed(work, kaggle, monkeypatch):
    source = make_run(kaggle / "x", 3)
    link_away(source / "metrics.jsonl")
    monkeypatch.setattr(adoption, "_plain_size", lambda path: path.stat().st_size)
    found = search(work, inputs=[kaggle])
    assert found.step == 3 and found.refusals[0].path == source / "metrics.jsonl"
    assert History(work / "metrics.jsonl").rows() == []


def test_what_lies_too_deep_is_not_found_and_that_is_said(work, kaggle):
    info = save(kaggle / "made", 9)
    deep = kaggle.joinpath(*"1234567")
    deep.mkdir(parents=True)
    shutil.move(info.path, deep / "8")
    assert search(work, inputs=[kaggle]).step == 9
    (deep / "8" / "9").mkdir()
    shutil.rmtree(work)
    shutil.move(deep / "8", deep / "x")
    (deep / "8").mkdir()
    shutil.move(deep / "x", deep / "8" / "step")
    found = search(work, inputs=[kaggle])
    assert found.origin == "new" and found.stopped_looking == f"8 folders below {kaggle}"
    assert f"not everything was looked at: the search stopped 8 folders below {kaggle}" in repr(found)


def test_a_crowd_of_files_hides_nothing_beside_it(work, kaggle, monkeypatch):
    monkeypatch.setattr(manifest_walk, "ENTRIES_OF_ONE", 30)
    (kaggle / "a-pictures").mkdir()
    for i in range(100):
        (kaggle / f"a-pictures/{i}").mkdir()
    make_run(kaggle / "z/kd_runs/run", 9)
    found = search(work, inputs=[kaggle])
    assert found.step == 9 and found.stopped_looking == f"after 30 entries of {kaggle / 'a-pictures'}"


def test_the_number_of_entries_is_bounded_for_all_inputs_together(work, kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_walk, "ENTRIES", 40)
    for i in range(30):
        (kaggle / f"{i:03}").mkdir()
    (tmp_path / "second").mkdir()
    for i in range(30):
        (tmp_path / f"second/{i:03}").mkdir()
    listed = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    found = search(work, inputs=[kaggle, tmp_path / "second"])
    assert found.origin == "new" and found.stopped_looking == f"after 40 entries, in {tmp_path / 'second'}"
    assert len(listed) <= 40


def test_folders_that_were_never_finished_and_foreign_manifests_are_no_candidates(work, kaggle):
    source = make_run(kaggle / "x", 3, 5, 6, 7)
    for step, prefix in [(5, ".tmp-"), (6, ".bad-"), (7, ".del-")]:
        path = source / f"ckpt/step-0000000{step}"
        path.rename(path.with_name(f"{prefix}{path.name}"))
    (kaggle / "browser").mkdir()
    (kaggle / "browser/MANIFEST.json").write_text('{"name": "an extension"}')
    found = search(work, inputs=[kaggle])
    assert found.step == 3 and [refusal.path for refusal in found.refusals] == [kaggle / "browser"]


def test_a_folder_that_cannot_be_listed_is_told(work, kaggle, monkeypatch):
    (kaggle / "closed").mkdir()
    make_run(kaggle / "x", 3)
    scan = os.scandir

    def failing(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    found = search(work, inputs=[kaggle])
    assert found.step == 3 and found.refusals[0].path == kaggle / "closed"


def test_a_table_of_any_length_stays_readable(work, kaggle):
    for i in range(70):
        (kaggle / f"{i}").mkdir()
        (kaggle / f"{i}/MANIFEST.json").write_text("{}")
    found = search(work, inputs=[kaggle])
    assert len(found.refusals) == 70 and len(repr(found).splitlines()) == 52 and "and 20 more" in repr(found)


# ---------------------------------------------------------------------------------------------- what is brought


def test_into_an_older_run_of_the_same_id_comes_what_is_new(work, kaggle):
    make_run(work, 3)
    start, config = (work / "initial.safetensors").read_bytes(), (work / "RUN.json").read_bytes()
    source = make_run(kaggle / "x", 5, config=CONFIG | {"steps": 200})
    weights(source / "initial.safetensors", 77)
    search(work, inputs=[kaggle])
    assert (work / "initial.safetensors").read_bytes() == start and (work / "RUN.json").read_bytes() == config
    for name in ("metrics.jsonl", "best.safetensors"):
        assert (work / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in (work / "ckpt").iterdir()} == {"step-00000003", "step-00000005"}


def test_a_bare_checkpoint_leaves_the_curve_that_is_here(work, kaggle):
    make_run(work, 3)
    save(kaggle, 5)
    before = snapshot(work)
    search(work, inputs=[kaggle])
    after = snapshot(work)
    for name in ("metrics.jsonl", "RUN.json", "initial.safetensors", "best.safetensors"):
        assert after[work / name] == before[work / name]
    assert find_checkpoint(work)[0].step == 5


def test_a_run_that_was_made_a_minute_ago_makes_place(work, kaggle):
    make_run(work, run_id="b", config=CONFIG | {"seed": 2})
    weights(work / "best.safetensors", 1)
    source = make_run(kaggle / "x", 5)
    (source / "best.safetensors").unlink()
    assert search(work, inputs=[kaggle]).step == 5
    assert run_json(work)["run_id"] == "a" and not (work / "best.safetensors").exists()
    for name in ("metrics.jsonl", "initial.safetensors"):
        assert (work / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("missing", ["metrics.jsonl", "initial.safetensors", "best.safetensors"])
def test_a_file_that_is_missing_beside_it_is_no_obstacle(work, kaggle, missing):
    source = make_run(kaggle / "x", 5)
    (source / missing).unlink()
    found = search(work, inputs=[kaggle])
    assert found.step == 5 and found.refusals == []
    assert_adopted(work, 5)
    assert (work / missing).exists() == (missing == "metrics.jsonl")


TORN = {
    "in its last line": (lambda lines: b"\n".join([*lines, b'{"kind": "tra']), 0),
    "in the middle": (lambda lines: b"\n".join([lines[0], b'{"kind": "tra', b"\xff\0", *lines[1:], b""]), 2),
    "of other records": (lambda lines: b"\n".join([*lines, b"3", b'{"kind": "x"}', b"[" * 90_000, b""]), 3),
    "empty": (lambda lines: b"", 0),
}


@pytest.mark.parametrize("kind", TORN)
def test_torn_metrics_are_brought_as_far_as_they_can_be_read(work, kaggle, kind):
    source = make_run(kaggle / "x", 5)
    tear, bad = TORN[kind]
    lines = (source / "metrics.jsonl").read_bytes().splitlines()
    (source / "metrics.jsonl").write_bytes(tear(lines))
    found = search(work, inputs=[kaggle])
    history = History.load(work / "metrics.jsonl")
    assert len(history.rows()) == (0 if kind == "empty" else 5)
    assert [event["text"] for event in history.events] == (
        [f"{bad} lines of metrics.jsonl cannot be read and are left out"] if bad else []
    )
    assert len(found.refusals) == bool(bad)


@pytest.mark.parametrize("name", ["initial.safetensors", "best.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 9, None])
def test_weights_that_are_torn_stay_behind_and_that_is_said(work, kaggle, name, content):
    source = make_run(kaggle / "x", 5)
    whole = (source / name).read_bytes()
    (source / name).write_bytes(whole[:-1] if content is None else content)
    found = search(work, inputs=[kaggle])
    assert found.step == 5 and not (work / name).exists()
    assert found.refusals[0].path == source / name and "stays behind" in found.refusals[0].reason
    assert_adopted(work, 5)


def test_best_weights_that_do_not_say_of_which_step_they_are_stay_behind(work, kaggle):
    source = make_run(kaggle / "x", 5)
    save_file({"w": torch.ones(3)}, source / "best.safetensors", metadata={"step": "soon"})
    assert search(work, inputs=[kaggle]).step == 5
    assert not (work / "best.safetensors").exists()


def test_the_control_comes_with_the_run(work, kaggle):
    source = make_run(kaggle / "x", 5)
    make_run(source / "control", 2, 4, 6, run_id="c", name="run/control")
    flip(source / "ckpt/../control/ckpt/step-00000006/model.safetensors")
    before = snapshot(kaggle)
    found = search(work, inputs=[kaggle])
    assert found.step == 5 and "the control's checkpoint stays behind" in found.refusals[-1].reason
    assert_adopted(work, 5, source)
    assert_adopted(work / "control", 4, source / "control", run_id="c", name="run/control")
    assert snapshot(kaggle) == before


def test_a_control_is_not_followed_out_of_the_run(work, kaggle, tmp_path):
    source = make_run(kaggle / "x", 5)
    outside = make_run(tmp_path / "outside", 6, run_id="c", name="run/control")
    (source / "control").mkdir()
    (source / "control/RUN.json").write_bytes((outside / "RUN.json").read_bytes())
    (source / "control/ckpt").symlink_to(outside / "ckpt")
    search(work, inputs=[kaggle])
    assert_adopted(work, 5, source)
    assert not (work / "control").exists()


def test_a_plan_of_somebody_elses_making_leads_nowhere(work, kaggle):
    for i, plan in enumerate(["", "{}", "[]", '{"step": "../../x", "remove": []}', '{"step": 1, "remove": 3}']):
        (work / f"ckpt/.tmp-adopt-{i}").mkdir(parents=True)
        (work / f"ckpt/.tmp-adopt-{i}/PLAN.json").write_text(plan)
    (work / "notes.txt").write_text("mine")
    (work / "ckpt/.tmp-adopt-9").mkdir()
    (work / "ckpt/.tmp-adopt-9/PLAN.json").write_text('{"step": 1, "remove": ["../run/notes.txt", "notes.txt"]}')
    assert search(work, inputs=[kaggle]).origin == "new"
    assert (work / "notes.txt").read_text() == "mine"
    assert list((work / "ckpt").iterdir()) == []


def test_a_control_that_is_here_is_replaced_by_none_but_a_newer_one_of_its_own(work, kaggle):
    make_run(work, 3), make_run(work / "control", 4, run_id="c", name="run/control")
    source = make_run(kaggle / "x", 5)
    make_run(source / "control", 6, run_id="d", name="run/control")
    search(work, inputs=[kaggle])
    assert_adopted(work / "control", 4, run_id="c", name="run/control")
    shutil.rmtree(work / "ckpt/step-00000005"), shutil.rmtree(source / "control")
    make_run(source / "control", 7, run_id="c", name="run/control")
    search(work, inputs=[kaggle])
    assert_adopted(work / "control", 7, run_id="c", name="run/control")
    shutil.rmtree(work / "ckpt/step-00000005")
    save(work / "control", 8, run_id="c", name="run/control")
    search(work, inputs=[kaggle])
    assert sorted(path.name for path in (work / "control/ckpt").iterdir()) == [
        f"step-0000000{step}" for step in (4, 7, 8)
    ]
    assert find_checkpoint(work / "control")[0].step == 8 and find_checkpoint(work)[0].step == 5


def test_too_little_room_is_told_before_anything_is_written(work, kaggle, monkeypatch):
    make_run(kaggle / "x", 5)
    usage = shutil.disk_usage(kaggle)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"bytes free for .* got 1,000; nothing was written") as caught:
        search(work, inputs=[kaggle])
    assert caught.value.errno == errno.ENOSPC
    assert list(work.rglob("*")) == [work / "ckpt"]


def test_the_forecast_counts_what_is_brought(work, kaggle, monkeypatch):
    source = make_run(kaggle / "x", 5)
    make_run(source / "control", 6, run_id="c", name="run/control")
    asked = []
    usage = shutil.disk_usage(kaggle)
    monkeypatch.setattr(adoption, "_SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(CheckpointError) as caught:
        search(work, inputs=[kaggle])
    asked = int(str(caught.value).split("expected ")[2].split(" bytes")[0].replace(",", ""))
    monkeypatch.undo()
    search(work, inputs=[kaggle])
    brought = sum(path.stat().st_size for path in work.rglob("*") if path.name not in ("RUN.json", "MANIFEST.json"))
    folders = sum(path.stat().st_size for path in work.rglob("*") if path.is_dir())
    metrics = sum(path.stat().st_size for path in work.rglob("metrics.jsonl"))
    assert asked == brought - folders + metrics


def test_a_disk_that_fills_up_all_the_same_leaves_the_folder_as_it_was(work, kaggle, monkeypatch):
    make_run(work, 3), make_run(kaggle / "x", 5)
    before = snapshot(work)
    sync = os.fsync

    def full(descriptor):
        sync(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="make room") as caught:
        search(work, inputs=[kaggle])
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert {path: value[:2] for path, value in snapshot(work).items()} == {p: v[:2] for p, v in before.items()}
    assert search(work, inputs=[kaggle]).step == 5


# ---------------------------------------------------------------------------------------------- without its RUN.json


def test_a_run_folder_that_lost_its_run_json_gets_it_from_its_newest_checkpoint(work):
    make_run(work, 3, 5)
    (work / "RUN.json").unlink()
    metrics = (work / "metrics.jsonl").read_bytes()
    found = search(work)
    assert (found.origin, found.step) == ("run folder", 5)
    assert_adopted(work, 5)
    assert (work / "metrics.jsonl").read_bytes() == metrics


def test_a_run_folder_that_knows_nothing_of_itself_takes_its_twin(work, kaggle):
    make_run(work, 5, bare=False), make_run(kaggle / "x", 5)
    (work / "RUN.json").write_text("torn")
    found = search(work, inputs=[kaggle])
    assert (found.origin, found.path.name) == ("input", "step-00000005-2")
    assert "in RUN.json or in its state" in found.refusals[0].reason
    assert_adopted(work, 5, kaggle / "x")


def test_a_run_folder_of_another_configuration_is_refused_and_stays_as_it_is(work):
    make_run(work, 5, config=CONFIG | {"seed": 2})
    before = snapshot(work)
    found = search(work)
    assert found.origin == "new" and "the seed changed" in found.refusals[0].reason
    assert snapshot(work) == before


# ---------------------------------------------------------------------------------------------- the mirror

Remote = namedtuple("Remote", "name step save_number run_id")


class Mirror:
    """A place for copies that is a folder here."""

    address = "hf://someone/copies"

    def __init__(self, folder, *steps, **how):
        self.run = make_run(folder, *steps, **how)
        self.asked, self.downloads, self.refused = 0, [], []

    def newest(self):
        self.asked += 1
        infos = [inspect_checkpoint(path, verify=False) for path in (self.run / "ckpt").iterdir()]
        remotes = [Remote(info.path.name, info.step, info.save_number, info.run_id) for info in infos]
        return sorted(remotes, key=lambda remote: remote.step, reverse=True)

    def download(self, remote, into):
        self.downloads.append(remote.name)
        shutil.copytree(self.run / "ckpt" / remote.name, into / "ckpt" / remote.name)
        for name in ("RUN.json", "metrics.jsonl", "initial.safetensors", "best.safetensors"):
            shutil.copy(self.run / name, into / name)


def test_a_mirror_is_asked_once_and_fetched_from_only_if_it_wins(work, tmp_path):
    make_run(work, 5)
    place = Mirror(tmp_path / "m", 3, 4)
    assert search(work, place=place).origin == "run folder"
    assert (place.asked, place.downloads) == (1, [])
    save(place.run, 8)
    found = search(work, place=place)
    assert (found.origin, found.step, found.adopted_from) == ("mirror", 8, "hf://someone/copies: step-00000008")
    assert (place.asked, place.downloads) == (2, ["step-00000008"])
    assert_adopted(work, 8)


def test_a_new_machine_goes_on_from_the_mirror(work, tmp_path):
    place = Mirror(tmp_path / "m", 3, 4)
    assert search(work, place=place).step == 4
    assert_adopted(work, 4, place.run)


def test_a_mirror_that_cannot_be_reached_is_told_and_no_obstacle(work, kaggle, tmp_path):
    make_run(kaggle / "x", 3)
    place = Mirror(tmp_path / "m", 9)
    place.newest = lambda: (_ for _ in ()).throw(OSError("no route to host"))
    found = search(work, inputs=[kaggle], place=place)
    assert (found.origin, found.step) == ("input", 3)
    assert found.refusals[0] == ("hf://someone/copies", "the mirror cannot be asked: no route to host")
    assert "hf://someone/copies  the mirror cannot be asked" in repr(found)


@pytest.mark.parametrize("how", ["flipped", "unreachable", "nothing", "another one", "no lineage"])
def test_a_copy_that_turns_out_bad_gives_way_to_the_next_one(work, kaggle, tmp_path, how):
    make_run(kaggle / "x", 3)
    place = Mirror(tmp_path / "m", 8, 9)
    download = place.download

    def bad(remote, into):
        if remote.step != 9:
            return download(remote, into)
        if how == "unreachable":
            raise OSError("connection reset")
        if how == "nothing":
            return None
        download(remote, into)
        path = into / "ckpt" / remote.name
        if how == "flipped":
            flip(path / "model.safetensors")
        if how == "another one":
            shutil.rmtree(path)
            save(into, 8)
        if how == "no lineage":
            (into / "RUN.json").unlink()
            flip(path / "state.json")

    place.download = bad
    found = search(work, inputs=[kaggle], place=place)
    assert (found.origin, found.step) == ("mirror", 8)
    assert found.refusals[0].path == "hf://someone/copies: step-00000009" and "step 9, save 9: " in repr(found)
    assert_adopted(work, 8, place.run)


def test_a_mirror_of_another_run_is_fetched_from_once_at_most(work, tmp_path):
    place = Mirror(tmp_path / "m", 7, 8, 9, name="other")
    found = search(work, place=place)
    assert found.origin == "new" and place.downloads == ["step-00000009"] and len(found.refusals) == 3
    assert all("expected run 'run', got 'other'" in refusal.reason for refusal in found.refusals)
    assert list((work / "ckpt").iterdir()) == []


def test_a_mirror_of_another_run_id_is_not_fetched_from(work, tmp_path):
    make_run(work, 3)
    place = Mirror(tmp_path / "m", 9, run_id="b")
    assert search(work, place=place).step == 3 and place.downloads == []


def test_a_disk_that_is_full_while_the_mirror_is_fetched_is_no_new_run(work, tmp_path):
    place = Mirror(tmp_path / "m", 9)

    def full(remote, into):
        raise CheckpointError(errno.ENOSPC, "no room")

    place.download = full
    with pytest.raises(CheckpointError, match="make room") as caught:
        search(work, place=place)
    assert caught.value.errno == errno.ENOSPC and list((work / "ckpt").iterdir()) == []


# ---------------------------------------------------------------------------------------------- processes that die

CHILDREN = {}


def child(function):
    CHILDREN[function.__name__] = function
    return function


@child
def search_there(folder, top):
    search(Path(folder), inputs=[Path(top)])


@child
def search_the_mirror(folder, top):
    place = Mirror.__new__(Mirror)
    place.run, place.asked, place.downloads = Path(top), 0, []
    search(Path(folder), place=place)


@child
def search_watched(folder, top):
    seen = []

    def audit(event, args):
        if event.startswith("pickle"):
            seen.append(event)
        if event == "open" and "outside" in str(args[0]):
            seen.append(str(args[0]))

    import pickle

    sys.addaudithook(audit)
    pickle.loads(pickle.dumps(Path))
    open(Path(top).parent / "outside" / "probe").close()
    assert len(seen) == 2, "the hook does not work"
    seen.clear()
    found = search(Path(folder), inputs=[Path(top)])
    assert found.step == 3 and len(found.refusals) >= 5 and not seen, (found, seen)


class Nursery:
    """Forks children out of a process that has torch already: each costs milliseconds instead of seconds."""

    def __init__(self):
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, name, *args, crash_at=""):
        """The exit code of a child that calls ``name(*args)``."""
        print(json.dumps([name, [str(a) for a in args], crash_at]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


def tend_nursery():
    for line in sys.stdin:
        name, args, crash_at = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ["KD_KIT_CRASH_AT"] = crash_at
            try:
                CHILDREN[name](*args)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.kill()
    nursery.process.communicate()


BEFORE = ["adopt-copying", "adopt-staged"]
AFTER = [
    *("adopt-checkpoint", "adopt-removed", "adopt-metrics.jsonl", "adopt-initial.safetensors"),
    *("adopt-best.safetensors", "adopt-control", "adopt-before-run", "adopt-after-run"),
]
DEATHS = [
    (here, point)
    for here in ("nothing", "fresh", "older")
    for point in BEFORE + AFTER
    if (here, point) != ("older", "adopt-before-run")  # its RUN.json stays
]


def fill(work, here):
    """The run folder as it is before; "older" has no initial.safetensors, so that every point is passed."""
    if here == "fresh":
        make_run(work, run_id="b", config=CONFIG | {"seed": 2})
        weights(work / "best.safetensors", 1)
    if here == "older":
        make_run(work, 3)
        (work / "initial.safetensors").unlink()


@pytest.mark.parametrize(("here", "point"), DEATHS)
def test_a_death_while_it_is_brought_costs_nothing(work, kaggle, nursery, here, point):
    fill(work, here)
    source = make_run(kaggle / "x", 5)
    make_run(source / "control", 4, run_id="c", name="run/control")
    there = snapshot(kaggle)
    before = {path: value[0] for path, value in snapshot(work).items() if path.is_file()}
    assert nursery.run("search_there", work, kaggle, crash_at=point) == 137
    if point in BEFORE:
        now = {path: value[0] for path, value in snapshot(work).items() if path.is_file() and ".tmp-" not in str(path)}
        assert now == before
    found = search(work, inputs=[kaggle])
    assert (found.step, found.refusals) == (5, [])
    assert found.origin == ("input" if point in BEFORE else "run folder")
    assert_adopted(work, 5, source)
    assert_adopted(work / "control", 4, source / "control", run_id="c", name="run/control")
    assert snapshot(kaggle) == there


@pytest.mark.parametrize(("here", "point"), DEATHS)
def test_a_death_while_it_is_brought_leaves_no_half_run_when_the_source_is_gone(work, kaggle, nursery, here, point):
    fill(work, here)
    source = make_run(kaggle / "x", 5)
    make_run(source / "control", 4, run_id="c", name="run/control")
    before = {path: value[0] for path, value in snapshot(work).items() if path.is_file()}
    assert nursery.run("search_there", work, kaggle, crash_at=point) == 137
    shutil.move(kaggle, work.parent / "away")
    found = search(work, inputs=[kaggle])
    if point in AFTER:
        assert (found.origin, found.step) == ("run folder", 5)
        assert_adopted(work, 5, work.parent / "away" / "x")
        assert_adopted(work / "control", 4, run_id="c", name="run/control")
    else:
        assert (found.origin, found.step) == (("run folder", 3) if here == "older" else ("new", 0))
        assert {path: value[0] for path, value in snapshot(work).items() if path.is_file()} == before


@pytest.mark.parametrize("point", [*BEFORE, "adopt-checkpoint", "adopt-before-run", "adopt-after-run"])
def test_a_death_while_the_mirror_is_brought_costs_nothing(work, tmp_path, nursery, point):
    place = Mirror(tmp_path / "m", 5)
    assert nursery.run("search_the_mirror", work, place.run, crash_at=point) == 137
    found = search(work, place=place)
    assert found.origin == ("mirror" if point in BEFORE else "run folder")
    assert_adopted(work, 5, place.run)


def test_what_the_run_writes_after_it_was_brought_is_not_removed(work, kaggle, monkeypatch):
    source = make_run(kaggle / "x", 5)
    (source / "best.safetensors").unlink()
    monkeypatch.setattr(adoption.shutil, "rmtree", lambda *_, **__: None)
    search(work, inputs=[kaggle])
    monkeypatch.undo()
    weights(work / "best.safetensors", 6)
    assert search(work).step == 5
    assert (work / "best.safetensors").exists()


def test_another_process_that_is_at_it_is_left_alone(work, kaggle):
    make_run(kaggle / "x", 5)
    staging = work / "ckpt/.tmp-adopt-1"
    staging.mkdir(parents=True)
    with checkpoint.held(staging):
        assert search(work, inputs=[kaggle]).step == 5
        assert staging.exists()
    search(work)
    assert not staging.exists()


def test_nothing_is_unpickled_and_nothing_outside_is_opened(work, kaggle, tmp_path, nursery):
    outside = make_run(tmp_path / "outside", 20)
    (outside / "probe").touch()
    for i, damage in enumerate(["a pickle beside", "a path out", "another format", "flipped", "a pipe"]):
        source = make_run(kaggle / f"{i}", 10 + i)
        DAMAGE[damage](source / f"ckpt/step-000000{10 + i}")
    good = make_run(kaggle / "good", 3)
    (good / "best.safetensors").unlink()
    (good / "best.safetensors").symlink_to(outside / "best.safetensors")
    linked = make_run(kaggle / "linked", 30)
    (linked / "ckpt/step-00000030/model.safetensors").unlink()
    (linked / "ckpt/step-00000030/model.safetensors").symlink_to(outside / "ckpt/step-00000020/model.safetensors")
    (kaggle / "link").symlink_to(outside)
    before = snapshot(kaggle)
    assert nursery.run("search_watched", work, kaggle) == 0
    assert_adopted(work, 3)
    assert snapshot(kaggle) == before


def test_any_flipped_byte_of_what_is_brought_is_noticed_or_harmless(work, kaggle):
    source = make_run(kaggle / "x", 5)
    chance = random.Random(5)
    for i, path in enumerate(sorted((source / "ckpt/step-00000005").iterdir()) * 4):
        whole = path.read_bytes()
        flip(path, chance.random())
        target = work.with_name(f"run-{i}")
        found = search(target, inputs=[kaggle])
        if found.path is not None:  # a bit that changes no value, such as one of white space in the manifest
            assert path.name == "MANIFEST.json" and inspect_checkpoint(found.path).run_id == "a"
        path.write_bytes(whole)
    assert search(work, inputs=[kaggle]).step == 5


# ---------------------------------------------------------------------------------------------- reading one


def test_any_checkpoint_can_be_read_and_says_of_which_run_it_is(tmp_path):
    config = CONFIG | {"student": {"w": [3, 4]}, "teacher": "<b>\nbig" + "x" * 100, "data": "0123"}
    info = inspect_checkpoint(save(tmp_path, 5, config=config, name="my run").path)
    text, page = repr(info), info._repr_html_()
    for fact in ["my run (a)", "set seed", "set rates", "cosine", '["lm", "kd"]', "<b>?bigxxx"]:
        assert fact in text
    assert "0123" not in text and "set student" not in text and "<b>" not in page
    assert max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize("run", [3, None, {}, {"name": 3, "config": 4}, {"name": "\u0000", "config": {"a": None}}])
def test_a_checkpoint_with_a_strange_state_is_printed_all_the_same(tmp_path, run):
    info = save_checkpoint(tmp_path, step=1, save_number=1, groups={}, state={"run": run}, run_id="a")
    assert "verified" in repr(info) and "\0" not in repr(info)
    flip(info.path / "state.json")
    assert "set " not in repr(info) and "verified" in repr(replace(info, files={}))


if __name__ == "__main__":
    tend_nursery()
