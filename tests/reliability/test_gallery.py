"""Every kind of damage to a real run's newest checkpoint costs that checkpoint, in words, and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from campaign import nursery, uninterrupted
from helpers import weights_of
from same_run import begin, build_run, differences, leftovers, outcome, seal_anew

from kd_kit import checkpoint_folder
from kd_kit.checkpoint import CheckpointError, inspect_checkpoint, load_checkpoint

OLDER, NEWER = 7, 9
GROUPS = ["model.safetensors", "aux.safetensors", "optim.safetensors", "rng.safetensors"]
JSONS = ["state.json", "MANIFEST.json"]


# ------------------------------------------------------------------------------------------------- what can go wrong


def change(function):
    """Damage that gives a file another content."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        changed = function(content)
        assert changed != content
        path.write_bytes(changed)

    return damage


def cut(share: float):
    return change(lambda content: content[: int(share * len(content))])


def flip(share: float):
    def flipped(content: bytes) -> bytes:
        at = min(int(share * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    return change(flipped)


def swap_with_the_older(path: Path) -> None:
    other = path.parent.parent / f"step-{OLDER:08}" / path.name
    content = path.read_bytes()
    assert content != other.read_bytes()
    path.write_bytes(other.read_bytes())


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_link(path: Path) -> None:
    elsewhere = path.parents[2] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def become_a_pipe(path: Path) -> None:
    """Whoever opened it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def become_huge(path: Path) -> None:
    """Longer than any JSON that is read, and takes no room on the disk."""
    os.truncate(path, checkpoint_folder.JSON_LIMIT + 1)


FILES_DAMAGED = {
    "cut at the head": cut(0.01),
    "cut in the middle": cut(0.5),
    "one byte short": change(lambda content: content[:-1]),
    "one byte more": change(lambda content: content + b"x"),
    "flipped at the head": flip(0),
    "flipped in the middle": flip(0.5),
    "flipped at the tail": flip(1),
    "zeroed": change(lambda content: bytes(len(content))),
    "empty": change(lambda content: b""),
    "garbage": change(lambda content: random.Random(3).randbytes(len(content))),
    "of the older one": swap_with_the_older,
    "missing": Path.unlink,
    "a folder": become_a_folder,
    "a link": become_a_link,
    "a pipe": become_a_pipe,
}
JSONS_DAMAGED = {
    "deeply nested": change(lambda content: b"[" * 200_000),
    "a long number": change(lambda content: b'{"step": ' + b"9" * 1_000_000 + b"}"),
    "other JSON": change(lambda content: b'{"step": 99}'),
    "a list": change(lambda content: b"[" + content + b"]"),
    "not UTF-8": change(lambda content: content[:40] + b"\xff\xfe" + content[42:]),
    "huge": become_huge,
}


def of_another_run(folder: Path) -> None:
    seal_anew(folder, run_id="another")


def of_another_format(folder: Path) -> None:
    seal_anew(folder, format=checkpoint_folder.FORMAT + 1)


def with_a_file_outside(folder: Path) -> None:
    files = json.loads((folder / "MANIFEST.json").read_bytes())["files"]
    seal_anew(folder, files=files | {"../../RUN.json": {"size": 6, "sha256": "0" * 64}})


def without_files(folder: Path) -> None:
    seal_anew(folder, files={})


def as_a_later_step(folder: Path) -> None:
    """The manifest alone is believed, so an edited one that was not sealed anew must not be."""
    path = folder / "MANIFEST.json"
    path.write_text(path.read_text().replace(f'"step": {NEWER}', '"step": 99'))


def beside_a_pickle(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def a_link_itself(folder: Path) -> None:
    elsewhere = folder.parents[1] / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def a_file_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def models_swapped(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "kept")
    (folder / "optim.safetensors").rename(folder / "model.safetensors")
    (folder / "kept").rename(folder / "optim.safetensors")


FOLDERS_DAMAGED = {
    function.__name__: (function, said)
    for function, said in [
        (of_another_run, "expected run"),
        (of_another_format, "expected format"),
        (with_a_file_outside, "MANIFEST.json: expected"),
        (without_files, "MANIFEST.json: expected"),
        (as_a_later_step, "MANIFEST.json: expected the content that was sealed"),
        (beside_a_pickle, "model.pt: expected no file that could run code"),
        (emptied, "MANIFEST.json: expected a file, got none"),
        (a_link_itself, "expected a folder, got a link or a file"),
        (a_file_itself, "expected a folder, got a link or a file"),
        (models_swapped, "model.safetensors: expected"),
    ]
}

GALLERY = {}
for _name in [*GROUPS, *JSONS]:
    for _what, _damage in (FILES_DAMAGED | (JSONS_DAMAGED if _name in JSONS else {})).items():
        GALLERY[f"{_name} {_what}"] = (lambda folder, name=_name, damage=_damage: damage(folder / name), _name)
GALLERY |= FOLDERS_DAMAGED
del GALLERY["MANIFEST.json of the older one"]  # says itself that it is older: see below
FINISHED = {f"{name} {what}" for name in ("model.safetensors", "state.json") for what in ("missing", "zeroed")}
FINISHED |= {"MANIFEST.json cut in the middle", "optim.safetensors flipped in the middle", "rng.safetensors empty"}
FINISHED |= {"aux.safetensors of the older one", *FOLDERS_DAMAGED}
"""Of these the run is trained to its end."""


# ---------------------------------------------------------------------------------------------------- what comes of it


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run with checkpoints of the steps OLDER and NEWER."""
    folder = tmp_path_factory.mktemp("template") / "run"
    nursery().run("train", folder, steps_now=OLDER, save_minutes=60)
    nursery().run("train", folder, steps_now=NEWER - OLDER, save_minutes=60)
    wanted = {f"step-{OLDER:08}", f"step-{NEWER:08}"}
    for path in (folder / "ckpt").iterdir():  # one more where an evaluation was the best and saves are quick
        if path.name not in wanted:
            shutil.rmtree(path)
    assert {path.name for path in (folder / "ckpt").iterdir()} == wanted
    return folder


@pytest.fixture
def run(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "run"))


def test_the_gallery_is_large():
    assert len(GALLERY) >= 60
    assert GALLERY.keys() >= FINISHED


@pytest.mark.parametrize("case", GALLERY)
def test_a_damaged_checkpoint_costs_itself_and_is_named(run, case, capsys):
    damage, said = GALLERY[case]
    damage(run / "ckpt" / f"step-{NEWER:08}")
    begin(1001)
    trainer = build_run(run, again=True)
    assert trainer.resume()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"step-{NEWER:08}  " in line]
    assert said in line
    assert trainer.step == OLDER
    groups, _ = load_checkpoint(inspect_checkpoint(run / "ckpt" / f"step-{OLDER:08}"))
    held = weights_of(trainer)
    for name, parameter in trainer.student.named_parameters():
        assert (groups["model"][name] == held[f"student.{name}"]).all(), name
        assert parameter.detach().equal(groups["model"][name])
    steps = [r["step"] for r in trainer.history.records if r["kind"] == "train"]
    assert steps == list(range(1, OLDER + 1)), "what came after is forgotten"
    if case in FINISHED:
        assert trainer.fit() == "finished"
        assert differences(outcome(run), uninterrupted()) == []


def test_two_files_that_fit_each_other_but_not_the_manifest(run, capsys):
    """A checkpoint whose files are all those of the older one would silently be the older one."""
    newer, older = (run / "ckpt" / f"step-{step:08}" for step in (NEWER, OLDER))
    for path in older.iterdir():
        if path.name != "MANIFEST.json":
            shutil.copy(path, newer / path.name)
    trainer = build_run(run, again=True)
    assert trainer.resume()
    assert trainer.step == OLDER
    assert f"step-{NEWER:08}  " in capsys.readouterr().out


def test_with_the_manifest_of_the_older_one_it_is_no_newer(run):
    swap_with_the_older(run / "ckpt" / f"step-{NEWER:08}" / "MANIFEST.json")
    trainer = build_run(run, again=True)
    assert trainer.fit() == "finished"
    assert differences(outcome(run), uninterrupted()) == []


def test_a_copy_under_a_later_name_is_taken_for_what_it_holds(run):
    shutil.copytree(run / "ckpt" / f"step-{OLDER:08}", run / "ckpt" / "step-00000099")
    trainer = build_run(run, again=True)
    trainer.resume()
    assert trainer.step == NEWER


def test_with_every_checkpoint_damaged_the_run_does_not_start_anew(run):
    for path in (run / "ckpt").iterdir():
        cut(0.5)(path / "optim.safetensors")
    trainer = build_run(run, again=True)
    for _ in range(2):  # nor when it is asked again
        with pytest.raises(CheckpointError, match="expected a usable checkpoint"):
            trainer.fit()
    assert (run / "metrics.jsonl").stat().st_size > 0


def test_the_times_of_files_say_nothing(run):
    for age, path in enumerate(sorted(run.rglob("*"), reverse=True)):
        os.utime(path, (2e9 - 1e6 * age,) * 2, follow_symlinks=False)
    os.utime(run / "ckpt" / f"step-{OLDER:08}", (4e9, 4e9))
    trainer = build_run(run, again=True)
    trainer.resume()
    assert trainer.step == NEWER
    assert leftovers(run) == []
