"""kd_kit/run_config.py: what a run folder accepts when a run goes on."""

from __future__ import annotations

import json
import re

import pytest
from helpers import make_trainer, pages, pair, part_term, small_data, teacher, tiny_student

from kd_kit import (
    attention_term,
    build_data,
    contrastive_term,
    feature_term,
    kd_term,
    layerwise_term,
    lm_term,
    relation_term,
    router_term,
    span_term,
)
from kd_kit.losses import reverse_kl
from kd_kit.run_config import check_run, run_config


@pytest.fixture
def run(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=2)
    trainer.fit()
    return tmp_path / "run"


def other_text():
    data = small_data()
    return build_data(
        ["Another text altogether, with words. " * 9] * 3, data.pair, window=32, batch_size=2, held_out=0.4
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "the seed (0 -> 1)"),
        ({"accumulation": 2}, "the number of batches per step (1 -> 2)"),
        ({"data": other_text}, "the text or the held-out text"),
        ({"data": lambda: small_data(batch_size=3)}, "the batch size (2 -> 3)"),
        ({"data": lambda: small_data(window=24)}, "the window (32 -> 24)"),
        ({"terms": lambda: [lm_term()]}, "the loss terms"),
        ({"terms": lambda: [lm_term(), kd_term(), part_term()]}, "the loss terms"),
        ({"student": lambda: tiny_student(num_hidden_layers=1)}, "the student's shapes"),
        (
            {"terms": lambda: [lm_term(0.1), kd_term(0.9, method="projector")]},
            "the layers, experts or method of a term with trained parts",
        ),
        ({"more_experts": 4}, "the teacher"),
        ({"seed": 1, "accumulation": 2}, "the seed (0 -> 1), the number of batches per step (1 -> 2)"),
    ],
)
def test_a_run_that_would_not_be_the_same_is_refused(run, changes, said):
    before = (run / "RUN.json").read_text()
    with pytest.raises(
        ValueError, match=rf"^build_trainer: .*got another one: .*{re.escape(said)} changed; .*build_session\(run="
    ):
        make_trainer(run, **{k: v() if callable(v) else v for k, v in changes.items()})
    assert (run / "RUN.json").read_text() == before


def test_other_layers_of_a_trained_part_are_refused(tmp_path):
    """Its statistics and its map, found in the checkpoint, would be those of the layers before."""

    def with_layers(layers):
        return make_trainer(tmp_path / "run", terms=[lm_term(), feature_term(0.5, layers=layers)])

    with_layers({2: 4}).fit(steps=1)
    with pytest.raises(ValueError, match="got another one: the layers, experts or method of a term with trained parts"):
        with_layers({1: 4})
    with_layers({2: 4})


def test_what_may_change_is_said(run, capsys):
    trainer = make_trainer(run, steps=4, learning_rate=3e-3, terms=[lm_term(0.2), kd_term(0.8, top_k=8)])
    said = capsys.readouterr().out
    assert "run: goes on with " in said
    for note in (
        "steps 2 -> 4",
        "learning_rate 0.01 -> 0.003",
        "lm.weight 0.1 -> 0.2",
        "kd.weight 0.9 -> 0.8",
    ):
        assert note in said
    assert trainer.fit() == "finished"
    assert trainer.step == 4
    assert trainer.history.total_steps == 4
    assert trainer.history.last("train")["lr"]["student"] <= 3e-3
    assert trainer.history.last("train")["terms"]["lm"]["weight"] == pytest.approx(0.2)


def test_what_shapes_a_term_is_said_when_it_changes(run, capsys):
    terms = [lm_term(0.1), kd_term(0.9, top_k=5, temperature=2.0, inside=False, divergence=reverse_kl)]
    make_trainer(run, steps=2, terms=terms)
    said = capsys.readouterr().out
    for note in ("top_k 8 -> 5", "temperature 1 -> 2", "inside True -> False", "divergence forward_kl -> reverse_kl"):
        assert f"kd.{note}" in said
    make_trainer(run, steps=2, terms=[lm_term(0.1), kd_term(0.9, top_k=8, method="strict")])
    assert "kd.method bridge -> strict" in capsys.readouterr().out


def test_a_changed_weight_decay_takes_effect(run):
    trainer = make_trainer(run, steps=4, weight_decay=0.33)
    trainer.resume()
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.33, 0.0]


def test_the_same_configuration_says_nothing(run, capsys):
    make_trainer(run, steps=2)
    assert "goes on with" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{torn",
        b"[]",
        b"3",
        b"{}",
        b'{"run_id": "a"}',
        b'{"config": {}}',
        b'{"config": 3, "run_id": "a"}',
        b"\xff",
    ],
)
def test_a_run_file_that_cannot_be_read_is_made_again_from_the_checkpoint(run, content):
    before = json.loads((run / "RUN.json").read_text())
    (run / "RUN.json").write_bytes(content)
    trainer = make_trainer(run, steps=2)
    assert trainer.resume() and trainer.step == 2
    assert json.loads((run / "RUN.json").read_text()) == before
    (run / "RUN.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^build_trainer: expected a RUN\.json that can be read, got .*RUN\.json"):
        check_run(run, run_config(trainer))


def test_checkpoints_without_their_run_file_say_themselves_whose_they_are(run):
    before = json.loads((run / "RUN.json").read_text())
    (run / "RUN.json").unlink()
    trainer = make_trainer(run, steps=2)
    assert trainer.run_id == before["run_id"] and trainer.resume()
    assert json.loads((run / "RUN.json").read_text()) == before
    (run / "RUN.json").unlink()
    with pytest.raises(ValueError, match=r"^build_trainer: expected a run folder with its RUN\.json"):
        check_run(run, run_config(trainer))


def test_an_empty_folder_is_a_new_run(tmp_path):
    (tmp_path / "run" / "ckpt").mkdir(parents=True)
    trainer = make_trainer(tmp_path / "run")
    assert check_run(tmp_path / "run", run_config(trainer)) == trainer.run_id


def test_the_configuration_is_plain_json(tmp_path):
    own = [feature_term(experts=3, layers={2: 4}), router_term(layers={1: 2}), relation_term(), contrastive_term()]
    terms = [lm_term(), part_term(), kd_term(method="projector"), span_term(), *own, attention_term(), layerwise_term()]
    trainer = make_trainer(tmp_path / "run", terms=terms, model=teacher())
    config = run_config(trainer)
    assert config["feature.layers"] == {"2": 4}
    assert config["feature.experts"] == 3
    assert config["kd.method"] == "projector"
    assert json.loads(json.dumps(config)) == config
    stored = json.loads((tmp_path / "run" / "RUN.json").read_text())
    assert stored == {"run_id": trainer.run_id, "name": "run", "config": config}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_change_is_said_once(run, capsys):
    make_trainer(run, steps=4).fit()
    assert "goes on with steps 2 -> 4" in capsys.readouterr().out
    make_trainer(run, steps=4)
    assert "goes on with" not in capsys.readouterr().out


def test_other_held_out_text_is_another_run(tmp_path):
    def with_held_out(text: str):
        return build_data(pages(4), pair(), held_out=[text], window=32, batch_size=2)

    make_trainer(tmp_path / "run", data=with_held_out("What is measured, and on which words.")).fit(steps=1)
    with pytest.raises(ValueError, match="the held-out text"):
        make_trainer(tmp_path / "run", data=with_held_out("What is measured, and on other words."))


def test_a_run_of_which_nothing_was_saved_makes_place_for_another_configuration(tmp_path, capsys):
    """Somebody changed a cell and ran it again."""
    first = make_trainer(tmp_path / "run", terms=[lm_term(), kd_term(top_k=8)])
    other = make_trainer(tmp_path / "run", terms=[lm_term()], seed=3)
    assert "run: nothing was saved here yet, so the run starts anew" in capsys.readouterr().out
    assert other.run_id != first.run_id
    assert other.fit() == "finished"
    assert other.history.series("kd") == ([], [])
    with pytest.raises(ValueError, match="got another one: the loss terms changed"):
        make_trainer(tmp_path / "run", terms=[lm_term(), kd_term(top_k=8)], seed=3)


def test_another_start_is_said_and_not_used(run, capsys):
    first = (run / "initial.safetensors").read_bytes()
    trainer = make_trainer(run, student=tiny_student(seed=5), steps=4)
    assert "the weights of the one given now (another seed, or another model) are not used" in capsys.readouterr().out
    trainer.fit()
    assert (run / "initial.safetensors").read_bytes() == first
    make_trainer(run, steps=4)
    assert "are not used" not in capsys.readouterr().out
