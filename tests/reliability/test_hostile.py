"""A checkpoint may come from anyone: resuming runs none of its code and opens nothing outside the run's folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from campaign import nursery
from same_run import seal_anew

from kd_kit.checkpoint import find_checkpoint


class Evil:
    """What a pickle can do when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "run"
    nursery().run("train", folder, steps_now=4, save_minutes=60)
    return folder


def poison(folder, mark) -> None:
    """Every checkpoint after that of step 4 is an attack."""
    good, evil = find_checkpoint(folder)[0].path, pickle.dumps(Evil(mark))
    outside = folder.parent / "secret.safetensors"
    outside.write_bytes(evil)

    def attack(step: int):
        made = folder / "ckpt" / f"step-{step:08}"
        shutil.copytree(good, made)
        seal_anew(made, step=step)
        return made

    def files(made, **more):
        return json.loads((made / "MANIFEST.json").read_bytes())["files"] | more

    about = {"size": len(evil), "sha256": "0" * 64}
    for step, name in enumerate(["../../../secret.safetensors", str(outside), "evil.pt", "sub/evil.safetensors"], 10):
        made = attack(step)
        seal_anew(made, files=files(made, **{name: about}))
    for step, name in enumerate(["model.pt", "pytorch_model.bin", "optim.pkl"], 20):
        (attack(step) / name).write_bytes(evil)
    for step, name in enumerate(["model.safetensors", "state.json", "MANIFEST.json"], 30):
        made = attack(step)
        (made / name).unlink()
        (made / name).symlink_to(outside)
    for step, name in enumerate(["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"], 40):
        (attack(step) / name).write_bytes(evil)
    made = attack(50)
    (made / "rng.safetensors").unlink()
    os.mkfifo(made / "rng.safetensors")
    os.mkfifo(good / "evil.safetensors")  # beside the files and no part of them: harmless


def test_nothing_is_unpickled_started_or_opened_outside(template, tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "was here"
    shutil.copytree(template, folder)
    poison(folder, mark)
    child = nursery().run("resume_watched", folder)
    assert set(child.last("hook saw").split()) >= {"open", "pickle.find_class"}, "the hook sees nothing"
    assert json.loads(child.last("seen")) == []
    assert not mark.exists()
    assert int(child.last("resumed")) == 4
    words = [line.split()[0] for line in child.output().splitlines() if line.strip()]
    refused = {os.path.basename(word) for word in words if os.path.basename(word).startswith("step-")}
    attacks = [10, 11, 12, 13, 20, 21, 22, 30, 31, 32, 40, 41, 42, 43, 50]
    assert refused == {f"step-{step:08}" for step in attacks}, "each is named, and none is passed over in silence"
