"""Checkpoints under kills, full disks, flipped bits and hostile folders.

Started as a script, this file is the nursery: a process that imports torch once and forks a child for each order.
"""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from kd_kit import checkpoint, checkpoint_folder
from kd_kit.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    Refusal,
    find_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    refusal_table,
    remove_leftovers,
    save_checkpoint,
)

FILES = ["model.safetensors", "optim.safetensors", "rng.safetensors", "state.json", "MANIFEST.json"]


def content_of(step):
    """Groups and state that tell the step they belong to."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(40, 50, generator=generator)
    groups = {
        "model": {"embed": weight, "head": weight, "norm": torch.rand(7, generator=generator).bfloat16()},
        "optim": {"state.0.step": torch.tensor(float(step)), "state.0.exp_avg": weight * 2},
        "rng": {"torch": generator.get_state()},
    }
    return groups, {"step": step, "lr": 0.1 / (step + 1), "skipped": [1, 2], "best": None}


def save(run, step, **changes):
    groups, state = content_of(step)
    request = {"save_number": step, "groups": groups, "state": state, "run_id": "run-a", "best": False}
    return save_checkpoint(run, step=step, **(request | changes))


def assert_holds(info, step):
    """Every byte of it is that step's."""
    groups, state = load_checkpoint(info)
    expected_groups, expected_state = content_of(step)
    assert info.step == step and state == expected_state
    assert_same_groups(groups, expected_groups)


def assert_same_groups(groups, expected):
    assert {group: set(tensors) for group, tensors in groups.items()} == {g: set(t) for g, t in expected.items()}
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            loaded = groups[group][name]
            assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape, f"{group}/{name}"
            same = torch.equal(loaded.contiguous().view(-1).view(torch.uint8), bits(tensor))
            assert same, f"{group}/{name}"


def bits(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def names(run, prefix=""):
    return sorted(path.name for path in (run / "ckpt").iterdir() if path.name.startswith(prefix))


def steps(run):
    return sorted(inspect_checkpoint(path).step for path in (run / "ckpt").glob("step-*"))


def snapshot(run):
    return {path: path.read_bytes() for path in sorted((run / "ckpt").rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------- there and back


def test_everything_comes_back(tmp_path):
    written = save(tmp_path, 3, best=True)
    found, refusals = find_checkpoint(tmp_path, run_id="run-a")
    assert refusals == [] and found == written
    assert (found.step, found.save_number, found.run_id, found.best, found.verified) == (3, 3, "run-a", True, True)
    assert found.path == tmp_path / "ckpt" / "step-00000003"
    assert names(found.path.parent.parent) == ["step-00000003"]
    assert sorted(path.name for path in found.path.iterdir()) == sorted(FILES)
    assert_holds(found, 3)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path, dtype):
    values = (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 3).abs().to(dtype)
    tensors = {
        "whole": values,
        "no dimension": values[0, 0].clone(),
        "empty": values[:0].clone(),
        "empty too": values[:, :0].clone(),
        "transposed": values.t(),
        "part": values[1:3, ::2],
        "expanded": values[:1, :1].expand(5, 3),
        "ünïcode / and. dots": values.clone(),
    }
    groups = {"model": tensors, "aux": {}}
    info = save(tmp_path, 1, groups=groups, state={})
    assert_same_groups(load_checkpoint(info)[0], groups)


def test_numbers_that_are_not_finite_come_back_where_they_are_allowed(tmp_path):
    groups = {"rng": {"x": torch.tensor([float("nan"), float("inf"), -0.0])}}
    state = {"best": float("inf"), "last": float("nan"), "zero": -0.0}
    groups_back, state_back = load_checkpoint(save(tmp_path, 1, groups=groups, state=state))
    assert_same_groups(groups_back, groups)
    assert repr(state_back) == repr(state)


def test_tied_tensors_are_written_once_and_come_back_as_one(tmp_path):
    weight = torch.randn(100, 100)
    groups = {"model": {"embed": weight, "other": weight.clone(), "head": weight, "detached": weight.detach()}}
    info = save(tmp_path, 1, groups=groups)
    assert info.files["model.safetensors"].size < 2.2 * weight.nbytes
    loaded = load_checkpoint(info)[0]["model"]
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr() == loaded["detached"].data_ptr()
    assert loaded["embed"].data_ptr() != loaded["other"].data_ptr()
    assert_same_groups({"model": loaded}, groups)


def test_overlapping_views_come_back_with_their_own_values(tmp_path):
    flat = torch.arange(24.0)
    groups = {
        "model": {"flat": flat, "rows": flat.view(4, 6), "turned": flat.view(4, 6).t(), "tail": flat[20:]},
        "aux": {"flat": flat},
        "optim": {"as integers": flat.view(torch.int32)},
    }
    assert_same_groups(load_checkpoint(save(tmp_path, 1, groups=groups))[0], groups)


def test_lazy_conjugation_and_negation_are_part_of_the_value(tmp_path):
    z = torch.randn(5, dtype=torch.complex64)
    groups = {"model": {"z": z, "conjugate": z.conj(), "negative": z.conj().imag}}
    assert_same_groups(load_checkpoint(save(tmp_path, 1, groups=groups))[0], groups)


def test_parameters_of_a_model_can_be_passed_as_they_are(tmp_path):
    model = torch.nn.Linear(3, 2)
    groups = {"model": dict(model.named_parameters())}
    loaded = load_checkpoint(save(tmp_path, 1, groups=groups))[0]
    assert not loaded["model"]["weight"].requires_grad
    assert_same_groups(loaded, groups)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the process's memory map")
def test_loaded_tensors_do_not_keep_the_file_open(tmp_path):
    groups, _ = load_checkpoint(save(tmp_path, 1))
    assert groups and str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_nothing_but_safetensors_and_json_is_written(tmp_path):
    save(tmp_path, 1)
    assert {path.suffix for path in snapshot(tmp_path)} == {".safetensors", ".json"}


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in save(tmp_path, 1).path.iterdir()} == {mode}


@pytest.mark.parametrize(
    "state",
    [{1: 2}, {"a": (1, 2)}, {"a": {1: 2}}, {"a": torch.ones(2)}, {"a": {1, 2}}, {"a": torch.float32}, {"a": b"x"}],
    ids=str,
)
def test_a_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match=r"save_checkpoint: expected a state that JSON gives back equal"):
        save(tmp_path, 1, state=state)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"../model": {}}}, "group name"),
        ({"groups": {"Model": {}}}, "group name"),
        ({"groups": {"model": {"x": 3}}}, "got int '3' as model/x"),
        ({"groups": {"model": {"x": torch.empty(2, device="meta")}}}, "as model/x"),
        ({"groups": {"model": {"x": torch.eye(3).to_sparse()}}}, "as model/x"),
        ({"step": -1}, "step >= 0"),
        ({"keep": 0}, "keep >= 1"),
        ({"state": {"long": "x" * 2000}}, "at most 1000 bytes"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_written(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(checkpoint, "JSON_LIMIT", 1000)
    request = {"step": 1, "save_number": 1, "groups": {}, "state": {}, "run_id": "a"} | change
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, **request)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("group", ["model", "optim", "aux"])
def test_a_state_that_is_not_finite_is_refused_by_name(tmp_path, group, dtype, bad):
    save(tmp_path, 1)
    before = snapshot(tmp_path)
    broken = torch.zeros(3, 4, dtype=dtype)
    broken[1, 2] = bad
    groups = content_of(2)[0] | {group: {"fine": torch.ones(2), "layers.3.weight": broken}}
    with pytest.raises(ValueError, match=rf"got 1 of 12 NaN or infinite in {group}/layers\.3\.weight"):
        save(tmp_path, 2, groups=groups)
    assert snapshot(tmp_path) == before
    assert save(tmp_path, 2, groups=groups, check_finite=()).step == 2


def test_float8_is_checked_as_well(tmp_path):
    with pytest.raises(ValueError, match="1 of 2 NaN"):
        save(tmp_path, 1, groups={"model": {"x": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}})


def test_an_info_prints_what_one_wants_to_know(tmp_path):
    info = save(tmp_path, 12, run_id="<b>run</b>", best=True)
    text, page = repr(info), info._repr_html_()
    for fact in ["step-00000012", "best so far", info.written_at, "model.safetensors", "every file's sha256", "torch"]:
        assert fact in text
    assert info.versions["torch"] == torch.__version__ and "python" in info.versions
    assert "<b>run</b>" in text and "&lt;b&gt;run" in page and "<b>" not in page
    assert "sizes only" in repr(inspect_checkpoint(info.path, verify=False))
    assert info.size == sum((info.path / name).stat().st_size for name in info.files)


# ------------------------------------------------------------------------------------------- which one, which stay


def test_the_newest_two_steps_and_the_best_stay(tmp_path):
    kept = []
    for step in range(1, 8):
        save(tmp_path, step, best=step in (2, 5))
        kept.append(steps(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7]]
    assert names(tmp_path) == ["step-00000005", "step-00000006", "step-00000007"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_number_kept_is_the_callers(tmp_path, keep):
    for step in range(6):
        save(tmp_path, step, keep=keep)
    assert steps(tmp_path) == list(range(6))[-keep:]


def test_order_is_by_step_then_save_number_whatever_the_files_times_say(tmp_path):
    infos = [save(tmp_path, step, keep=9) for step in (9, 10, 11)]
    again = save(tmp_path, 11, save_number=12, keep=9)
    for age, info in enumerate([again, *reversed(infos[:2])]):
        for path in [info.path, *info.path.iterdir()]:
            os.utime(path, (2e9 + age * 1e6,) * 2)
    assert find_checkpoint(tmp_path)[0].save_number == 12
    save(tmp_path, 12, save_number=13)
    assert steps(tmp_path) == [11, 12]


def test_a_step_saved_again_replaces_the_older_save(tmp_path):
    save(tmp_path, 5)
    for number in (6, 7, 8):
        save(tmp_path, 5, save_number=number, state={"number": number})
        found, _ = find_checkpoint(tmp_path)
        assert found.save_number == number and load_checkpoint(found)[1] == {"number": number}
        assert len(names(tmp_path)) == 1


def test_a_step_saved_again_with_the_same_number_replaces_it_too(tmp_path):
    save(tmp_path, 5, state={"first": True})
    save(tmp_path, 5, state={"first": False})
    assert load_checkpoint(find_checkpoint(tmp_path)[0])[1] == {"first": False}
    assert len(names(tmp_path)) == 1


def test_the_best_stays_even_if_its_step_is_saved_again(tmp_path):
    save(tmp_path, 5, best=True)
    save(tmp_path, 5, save_number=6)
    assert len(names(tmp_path, "step-")) == 2
    save(tmp_path, 6, best=True, save_number=7)
    assert steps(tmp_path) == [5, 6]


@pytest.mark.parametrize("keep", [1, 2])
def test_at_no_moment_is_there_no_good_one(tmp_path, monkeypatch, keep):
    save(tmp_path, 1)

    def watched(function):
        def call(*args, **kwargs):
            good = [inspect_checkpoint(path) for path in (tmp_path / "ckpt").glob("step-*")]
            assert good
            result = function(*args, **kwargs)
            assert [inspect_checkpoint(path) for path in (tmp_path / "ckpt").glob("step-*")]
            calls.append(function.__name__)
            return result

        return call

    calls = []
    monkeypatch.setattr(os, "rename", watched(os.rename))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    for step, number in [(1, 2), (1, 3), (2, 4), (2, 5), (3, 6)]:
        save(tmp_path, step, save_number=number, keep=keep)
    assert calls.count("rename") >= 7 and "rmtree" in calls


def test_going_back_to_an_older_step_does_not_lose_the_new_save(tmp_path):
    save(tmp_path, 10), save(tmp_path, 11)
    save(tmp_path, 4, save_number=12)
    assert steps(tmp_path) == [4, 10, 11]


def test_another_runs_checkpoints_are_neither_taken_nor_deleted(tmp_path):
    save(tmp_path, 9, run_id="run-b")
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert steps(tmp_path) == [2, 3, 9]
    found, refusals = find_checkpoint(tmp_path, run_id="run-a")
    assert found.step == 3
    assert refusals == [Refusal(tmp_path / "ckpt/step-00000009", "expected run 'run-a', got 'run-b'")]
    assert find_checkpoint(tmp_path)[0].step == 9


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged.path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "not yours", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(RuntimeWarning, match="cannot delete an old one"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path)[0].step == 2
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_no_run_folder_is_no_checkpoint_and_no_error(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") == (None, [])
    assert remove_leftovers(tmp_path / "nowhere") == []
    assert refusal_table([]) == ""


def test_every_file_is_on_the_disk_before_its_name_is_and_the_manifest_comes_last(tmp_path, monkeypatch):
    if not Path("/proc/self/fd").exists():
        pytest.skip("asks the system which file a descriptor is")
    save(tmp_path, 1)
    events = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", path.name, sorted(p.name for p in path.parent.iterdir())))
        fsync(descriptor)

    def record_rename(source, target):
        events.append(("rename", Path(target).name, None))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(tmp_path, 2, keep=1)
    order = [(what, name) for what, name, _ in events]
    published = order.index(("rename", "step-00000002"))
    staged = [name for what, name in order[:published] if what == "fsync"]
    assert staged == [*FILES, f".tmp-00000002-{os.getpid()}"]
    assert all("MANIFEST.json" not in there for _, name, there in events if name in FILES[:-1])
    deleted = order.index(("rename", ".del-step-00000001"))
    assert published < order.index(("fsync", "ckpt")) < deleted


# ------------------------------------------------------------------------------------------------ processes that die


CHILDREN = {}


def child(function):
    CHILDREN[function.__name__] = function
    return function


@child
def save_steps(run, *numbers):
    for number in numbers:
        save(Path(run), number)


@child
def save_again(run, step, number):
    save(Path(run), step, save_number=number, keep=1)


@child
def save_forever(run, first):
    for step in range(first, 10**6):
        save(Path(run), step)
        with open(Path(run) / "done", "a") as file:
            file.write(f"{step}\n")


@child
def stop_inside_a_save(run):
    def stop(path):
        (Path(run) / "inside").touch()
        time.sleep(60)

    checkpoint.settle = stop
    save(Path(run), 7)


@child
def find_and_load_without_pickle(run):
    opened = []

    def audit(event, args):
        if event.startswith("pickle"):
            opened.append(event)
        if event == "open" and "decoy" in str(args[0]):
            opened.append(str(args[0]))

    import pickle

    sys.addaudithook(audit)
    pickle.loads(pickle.dumps(Path))
    assert opened == ["pickle.find_class"], "the hook does not work"
    opened.clear()
    info, refusals = find_checkpoint(run)
    groups, state = load_checkpoint(info)
    save(Path(run), 50)
    assert len(refusals) == 5 and groups and state and not opened, (refusals, opened)


class Nursery:
    """Forks children out of a process that has torch already: each costs milliseconds instead of seconds."""

    def __init__(self):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        environment.pop("KD_KIT_CRASH_AT", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, name, *args, crash_at=""):
        """The process id of a child that calls ``name(*args)``."""
        order = {"child": name, "args": [str(a) if isinstance(a, Path) else a for a in args], "crash_at": crash_at}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        """The exit code of the child started last."""
        return int(self.process.stdout.readline())

    def run(self, name, *args, crash_at=""):
        self.start(name, *args, crash_at=crash_at)
        return self.wait()


def tend_nursery():
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ["KD_KIT_CRASH_AT"] = order["crash_at"]
            try:
                CHILDREN[order["child"]](*order["args"])
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.process.kill()
    nursery.process.communicate()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


CRASH_POINTS = {
    # name: step found after it died while step 3 was saved over 1 and 2, and what lies about
    "after-model": (2, {".tmp-"}),
    "after-rng": (2, {".tmp-"}),
    "before-manifest": (2, {".tmp-"}),
    "before-rename": (2, {".tmp-"}),
    "after-rename": (3, set()),
    "during-cleanup": (3, {".del-"}),
}


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_save_that_dies_costs_at_most_itself(tmp_path, nursery, point):
    step, leftovers = CRASH_POINTS[point]
    save(tmp_path, 1), save(tmp_path, 2)
    assert nursery.run("save_steps", tmp_path, 3, crash_at=point) == 137
    assert {name[:5] for name in names(tmp_path, ".")} == leftovers
    found, refusals = find_checkpoint(tmp_path, run_id="run-a")
    assert refusals == []
    assert_holds(found, step)
    assert nursery.run("save_steps", tmp_path, 4) == 0
    assert names(tmp_path, ".") == []
    assert_holds(find_checkpoint(tmp_path)[0], 4)


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_the_only_checkpoint_survives_a_death_while_its_step_is_saved_again(tmp_path, nursery, point):
    save(tmp_path, 5)
    assert nursery.run("save_again", tmp_path, 5, 6, crash_at=point) == 137
    found, _ = find_checkpoint(tmp_path)
    assert found.save_number == (6 if CRASH_POINTS[point][0] == 3 else 5)
    assert_holds(found, 5)
    assert nursery.run("save_again", tmp_path, 5, 7) == 0
    assert len(names(tmp_path)) == 1 and find_checkpoint(tmp_path)[0].save_number == 7


def test_kills_at_any_moment_lose_nothing_that_was_saved(tmp_path, nursery):
    moments = random.Random(11)
    done = tmp_path / "done"
    done.touch()
    found_step, inside = 0, 0
    for _ in range(8):
        written = done.stat().st_size
        pid = nursery.start("save_forever", tmp_path, found_step + 1)
        wait_until(lambda size=written: done.stat().st_size > size)
        time.sleep(moments.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        inside += bool(names(tmp_path, "."))
        found, refusals = find_checkpoint(tmp_path, run_id="run-a")
        last_done = int(done.read_text().splitlines()[-1])
        assert refusals == [] and found.step in (last_done, last_done + 1)
        assert_holds(found, found.step)
        found_step = found.step
    assert inside, "no kill hit the inside of a save: the test shows nothing"
    assert nursery.run("save_steps", tmp_path, found_step + 1) == 0
    assert names(tmp_path, ".") == []


def test_the_staging_folder_of_a_living_process_is_left_alone(tmp_path, nursery):
    pid = nursery.start("stop_inside_a_save", tmp_path)
    wait_until((tmp_path / "inside").exists)
    staging = tmp_path / "ckpt" / f".tmp-00000007-{pid}"
    assert remove_leftovers(tmp_path) == [] and staging.exists()
    os.kill(pid, signal.SIGKILL)
    nursery.wait()
    assert remove_leftovers(tmp_path) == [staging] and not staging.exists()


# ---------------------------------------------------------------------------------------------- disks that are full


ERRORS = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "RuntimeError": RuntimeError("[enforce fail at inline_container.cc:603] unexpected pos 64 vs 0"),
    "SafetensorError": SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
}


def assert_failed_without_a_trace(run, before, error):
    assert snapshot(run) == before
    assert names(run) == ["step-00000001", "step-00000002"]
    assert "save_checkpoint: expected" in str(error) and "earlier checkpoints are untouched" in str(error)
    assert_holds(find_checkpoint(run)[0], 2)
    assert save(run, 3).step == 3


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("at", FILES)
def test_a_write_that_fails_leaves_the_earlier_ones_and_nothing_else(tmp_path, monkeypatch, at, kind):
    save(tmp_path, 1), save(tmp_path, 2)
    before = snapshot(tmp_path)
    settle = checkpoint.settle

    def fail(path):
        if path.name == at:
            path.write_bytes(path.read_bytes()[:10])
            raise ERRORS[kind]
        return settle(path)

    monkeypatch.setattr(checkpoint, "settle", fail)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 3)
    assert caught.value.errno == (errno.EIO if kind == "RuntimeError" else errno.ENOSPC)
    assert caught.value.__cause__ is ERRORS[kind]
    monkeypatch.undo()
    assert_failed_without_a_trace(tmp_path, before, caught.value)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_system_call_that_fails_leaves_the_earlier_ones_and_nothing_else(tmp_path, monkeypatch, call):
    save(tmp_path, 1), save(tmp_path, 2)
    before = snapshot(tmp_path)

    def fail(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 3)
    monkeypatch.undo()
    assert caught.value.errno == errno.EDQUOT
    assert_failed_without_a_trace(tmp_path, before, caught.value)


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 9, 100, 300, 500, 700, 1000, 2000, 4096, 5000, 7999, 8000, 8100, 8192])
def test_the_system_cutting_a_write_short_leaves_the_earlier_ones(tmp_path, limit):
    """A real failure below the libraries: the system refuses files longer than the limit."""
    save(tmp_path, 1), save(tmp_path, 2)
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(CheckpointError) as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            save(tmp_path, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert_failed_without_a_trace(tmp_path, before, caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, AssertionError])
def test_an_interrupt_leaves_no_staging_folder_and_goes_on_up(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(error):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    before = snapshot(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(checkpoint, "save_file", None)
    with pytest.raises(CheckpointError, match=r"bytes free .* got 1,000,000; nothing was written") as caught:
        save(tmp_path, 3)
    assert caught.value.errno == errno.ENOSPC and isinstance(caught.value, OSError)
    assert snapshot(tmp_path) == before


def test_the_forecast_is_enough_and_not_far_off(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "_forecast_space", lambda root, needed: asked.append(needed))
    info = save(tmp_path, 1)
    assert info.size <= asked[0] <= info.size + 200 * 6


def test_a_folder_that_cannot_be_written_is_told_so(tmp_path):
    (tmp_path / "ckpt").write_text("in the way")
    with pytest.raises(CheckpointError, match="make the folder writable") as caught:
        save(tmp_path, 1)
    assert caught.value.errno == errno.EEXIST


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_folder_without_permission_is_told_so(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "ckpt").chmod(0o555)
    try:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2)
        assert caught.value.errno == errno.EACCES and find_checkpoint(tmp_path)[0].step == 1
    finally:
        (tmp_path / "ckpt").chmod(0o755)


# ------------------------------------------------------------------------------------------------ damage and malice


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    run = tmp_path_factory.mktemp("template")
    save(run, 1), save(run, 2)
    return run


@pytest.fixture
def run(two_checkpoints, tmp_path):
    """A run with checkpoints of steps 1 and 2."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


def change(function):
    def damage(path):
        content = path.read_bytes()
        changed = function(content)
        assert changed != content
        path.write_bytes(changed)

    return damage


def flip(position):
    def flipped(content):
        index = min(int(position * len(content)), len(content) - 1)
        return content[:index] + bytes([content[index] ^ 0x10]) + content[index + 1 :]

    return change(flipped)


def become_a_link(path):
    elsewhere = path.parents[2] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "emptied": change(lambda content: b""),
    "cut in half": change(lambda content: content[: len(content) // 2]),
    "one byte short": change(lambda content: content[:-1]),
    "one byte more": change(lambda content: content + b"x"),
    "zeroed": change(lambda content: bytes(len(content))),
    "zeroed in part": change(lambda content: content[:20] + bytes(40) + content[60:]),
    "first byte flipped": flip(0),
    "a byte flipped in the middle": flip(0.5),
    "last byte flipped": flip(1),
    "garbage": change(lambda content: random.Random(3).randbytes(len(content))),
    "valid but other JSON": change(lambda content: b'{"step": 99}'),
    "deeply nested": change(lambda content: b"[" * 100_000),
    "missing": Path.unlink,
    "a link": become_a_link,
    "a folder": become_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_costs_one_checkpoint_and_is_named(run, name, damage):
    DAMAGE[damage](run / "ckpt/step-00000002" / name)
    with pytest.raises(DamagedCheckpoint, match=name):
        inspect_checkpoint(run / "ckpt/step-00000002")
    found, refusals = find_checkpoint(run, run_id="run-a")
    assert_holds(found, 1)
    [refusal] = refusals
    assert name in refusal.reason and "(now .bad-step-00000002)" in refusal.reason
    assert refusal_table(refusals).startswith("step-00000002  ")
    assert names(run) == [".bad-step-00000002", "step-00000001"]
    assert find_checkpoint(run) == (found, [])


def test_any_flipped_bit_of_the_manifest_is_noticed_or_harmless(run):
    info = inspect_checkpoint(run / "ckpt/step-00000002")
    path = info.path / "MANIFEST.json"
    content = path.read_bytes()
    chance = random.Random(4)
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1 << chance.randrange(8)]) + content[index + 1 :])
        with contextlib.suppress(CheckpointError):
            assert inspect_checkpoint(info.path, verify=False) == replace(info, verified=False)


def test_files_of_two_checkpoints_swapped_are_noticed(run):
    one, two = (run / f"ckpt/step-0000000{step}/model.safetensors" for step in (1, 2))
    one.rename(run / "kept"), two.rename(one), (run / "kept").rename(two)
    found, refusals = find_checkpoint(run)
    assert found is None and len(refusals) == 2
    assert all("model.safetensors: expected sha256" in reason for _, reason in refusals)


def test_two_files_of_one_checkpoint_swapped_are_noticed(run):
    folder = run / "ckpt/step-00000002"
    (folder / "model.safetensors").rename(folder / "x")
    (folder / "optim.safetensors").rename(folder / "model.safetensors")
    (folder / "x").rename(folder / "optim.safetensors")
    assert find_checkpoint(run)[0].step == 1


def test_damage_between_finding_and_loading_is_noticed(run):
    found, _ = find_checkpoint(run)
    flip(0.9)(found.path / "optim.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"optim\.safetensors: expected sha256"):
        load_checkpoint(found)


def test_a_folder_renamed_to_another_step_is_taken_for_what_it_holds(run):
    (run / "ckpt/step-00000001").rename(run / "ckpt/step-00000009")
    assert find_checkpoint(run)[0].step == 2


def test_where_nothing_may_be_renamed_the_refusal_is_enough(run, monkeypatch):
    (run / "ckpt/step-00000002/state.json").unlink()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    found, refusals = find_checkpoint(run)
    assert found.step == 1
    assert refusals[0].reason == ("state.json: expected a file, got none (left where it is: Read-only file system)")


def test_quarantine_never_overwrites(run):
    for number in (3, 4):
        (run / "ckpt/step-00000002/state.json").unlink()
        find_checkpoint(run)
        save(run, 2, save_number=number)
    assert names(run, ".bad") == [".bad-step-00000002", ".bad-step-00000002-2"]


def test_a_disk_that_cannot_be_read_is_no_reason_for_quarantine(run, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_folder.hashlib, "file_digest", fail)
    found, refusals = find_checkpoint(run)
    assert found is None and len(refusals) == 2 and "Input/output error" in refusals[0].reason
    assert names(run) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["model.pt", "evil.pkl", "pytorch_model.bin", "x.PTH", "a.pickle", "b.ckpt"])
def test_a_pickle_beside_the_files_is_refused_but_left_for_its_owner(run, name):
    (run / "ckpt/step-00000002" / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    found, refusals = find_checkpoint(run)
    assert found.step == 1 and refusals[0].reason.startswith(f"{name}: expected no file that could run code")
    (run / "ckpt/step-00000002" / name).unlink()
    assert find_checkpoint(run)[0].step == 2


def test_other_files_beside_are_ignored(run):
    (run / "ckpt/step-00000002/.DS_Store").write_bytes(b"x")
    (run / "ckpt/notes.txt").write_text("x")
    (run / "ckpt/step-new").mkdir()
    assert find_checkpoint(run)[0].step == 2


def test_a_link_in_place_of_a_checkpoint_is_refused(run, tmp_path):
    (run / "ckpt/step-00000002").rename(tmp_path / "elsewhere")
    (run / "ckpt/step-00000002").symlink_to(tmp_path / "elsewhere")
    (run / "ckpt/step-00000003").write_text("a file")
    found, refusals = find_checkpoint(run)
    assert found.step == 1 and len(refusals) == 2
    assert all("expected a folder, got a link or a file" in reason for _, reason in refusals)
    assert (tmp_path / "elsewhere").exists()


def reseal(folder, **changes):
    """What an attacker can do: any manifest, with a seal that fits."""
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    del manifest["seal"]
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value(manifest[key]) if callable(value) else value
    content = manifest | {"seal": checkpoint_folder.seal(manifest)}
    (folder / "MANIFEST.json").write_text(json.dumps(content))


def with_file(name):
    return lambda files: files | {name: {"size": 6, "sha256": "0" * 64}}


HOSTILE = {
    "path up": {"files": with_file("../../decoy.safetensors")},
    "path down": {"files": with_file("sub/decoy.safetensors")},
    "absolute path": {"files": with_file("/etc/decoy.safetensors")},
    "pickle": {"files": with_file("decoy.pt")},
    "manifest itself": {"files": with_file("MANIFEST.json")},
    "newline behind": {"files": with_file("decoy.safetensors\n")},
    "NUL": {"files": with_file("decoy\0.safetensors")},
    "no state": {"files": lambda files: {name: files[name] for name in FILES[:3]}},
    "files a list": {"files": []},
    "files missing": {"files": None},
    "file without hash": {"files": {"state.json": {"size": 3}}},
    "size as text": {"files": {"state.json": {"size": "3", "sha256": ""}}},
    "step as text": {"step": "2"},
    "step true": {"step": True},
    "step missing": {"step": None},
    "run a number": {"run_id": 3},
    "best a number": {"best": 1},
    "versions a list": {"versions": []},
    "version a number": {"versions": {"torch": 2}},
    "its own path": {"run_id": None, "path": lambda _: "/etc"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_sealed_manifest_is_not_believed_either(run, kind):
    (run / "decoy.safetensors").write_bytes(b"secret")
    changes = dict(HOSTILE[kind])
    if "path" in changes:
        manifest = json.loads((run / "ckpt/step-00000002/MANIFEST.json").read_bytes()) | {"path": ""}
        (run / "ckpt/step-00000002/MANIFEST.json").write_text(json.dumps(manifest))
    reseal(run / "ckpt/step-00000002", **changes)
    found, refusals = find_checkpoint(run)
    assert found.step == 1 and "MANIFEST.json: expected" in refusals[0].reason


def test_a_folder_that_is_no_checkpoint_is_told_so(run, tmp_path):
    for folder in (run, run / "ckpt"):
        with pytest.raises(CheckpointError, match=r"pass one of those within it: .*step-00000002"):
            inspect_checkpoint(folder)
    with pytest.raises(CheckpointError, match="there is none"):
        inspect_checkpoint(tmp_path / "nowhere")


def test_a_newer_format_is_refused_and_left_alone(run):
    reseal(run / "ckpt/step-00000002", format=checkpoint_folder.FORMAT + 1)
    found, refusals = find_checkpoint(run)
    assert found.step == 1 and f"expected format {checkpoint_folder.FORMAT}" in refusals[0].reason
    assert names(run) == ["step-00000001", "step-00000002"]


def rewrite(folder, name, content):
    (folder / name).write_bytes(content)
    stored = {"size": len(content), "sha256": checkpoint_folder.hashlib.sha256(content).hexdigest()}
    reseal(folder, files=lambda files: files | {name: stored})


@pytest.mark.parametrize("content", [b"", b"garbage!", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}"], ids=repr)
def test_a_group_that_is_no_group_is_an_error_of_its_own_kind(run, content):
    folder = run / "ckpt/step-00000002"
    rewrite(folder, "model.safetensors", content)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: expected named tensors"):
        load_checkpoint(inspect_checkpoint(folder))


@pytest.mark.parametrize("aliases", ['{"a": "gone"}', "[]", '{"a": []}', "{", "3"])
def test_aliases_that_lead_nowhere_are_an_error_of_their_own_kind(run, aliases):
    path = run / "model.safetensors"
    checkpoint.save_file({"x": torch.ones(2)}, path, metadata={"aliases": aliases})
    rewrite(run / "ckpt/step-00000002", "model.safetensors", path.read_bytes())
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: expected named tensors"):
        load_checkpoint(inspect_checkpoint(run / "ckpt/step-00000002"))


def test_json_beyond_the_limit_is_not_read(run, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "JSON_LIMIT", 20)
    monkeypatch.setattr(Path, "read_bytes", None)
    found, refusals = find_checkpoint(run)
    assert found is None and "MANIFEST.json: expected at most 20 bytes" in refusals[0].reason


def test_nothing_is_unpickled_and_nothing_outside_is_opened(run, nursery):
    """Several hostile folders, read in a process that watches every unpickling and every file that is opened."""
    for step, kind in zip(range(10, 14), ["path up", "absolute path", "pickle", "path down"], strict=True):
        save(run, step, keep=9)
        reseal(run / f"ckpt/step-000000{step}", **HOSTILE[kind])
    save(run, 20, keep=9)
    for name in ["decoy.safetensors", "ckpt/step-00000020/decoy.pkl", "ckpt/step-00000012/decoy.pt"]:
        (run / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert nursery.run("find_and_load_without_pickle", run) == 0


if __name__ == "__main__":
    tend_nursery()
