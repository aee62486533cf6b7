"""The panel: its controls move the probe, its answer stands in the cell, and what goes wrong is said."""

from __future__ import annotations

import pytest
from helpers import make_trainer, small_data

import kd_kit as kd
from kd_kit import probe_panel
from kd_kit.kd_terms import kd_term
from kd_kit.probe_panel import build_probe
from kd_kit.terms import lm_term


class Handle:
    def __init__(self, bundle):
        self.bundles = [bundle]

    def update(self, bundle, *, raw):
        assert raw
        self.bundles.append(bundle)


@pytest.fixture
def cell(monkeypatch):
    """What a notebook's cell would show: widgets, and bundles with a handle."""
    import IPython.display

    shown = []

    def display(thing, *, raw=False, display_id=False):
        shown.append(Handle(thing) if display_id else thing)
        return shown[-1] if display_id else None

    def show_widget(widget, twin):
        assert "while the notebook is live" in twin, "what a reader of the saved file sees in its place"
        shown.append(widget)

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(probe_panel, "show_widget", show_widget)
    monkeypatch.setattr(probe_panel, "in_notebook", lambda: True)
    yield shown
    for widget in [w for w in shown if not isinstance(w, Handle)]:
        widget.close()


def run(folder, terms=None, **more):
    terms = terms or [lm_term(0.3), kd_term(0.7, top_k=8), kd.feature_term(), kd.layerwise_term()]
    return make_trainer(folder, terms=terms, data=small_data(window=64, size=900), **more)


def text(widget) -> str:
    return widget.value


def test_the_panel_stands_in_the_cell_also_without_a_kernel(tmp_path, cell):
    probe = build_probe(run(tmp_path / "run"))
    probe._ipython_display_()
    box, handle, below = cell
    (bundle,) = handle.bundles
    assert bundle["text/plain"] == str(probe.table())
    assert "<table>" in bundle["text/html"]
    assert "data:image/png;base64," in bundle["text/html"]
    assert {"temperature", "top_k", "method", "divergence", "layers", "projector", "batch"} <= probe.controls.keys()
    assert {f"weight {n}" for n in ("lm", "kd", "feature", "layerwise")} <= probe.controls.keys()
    for name in ("Use these", "Scales", "As the run has it"):
        assert probe.controls[name].tooltip == name
    for name in ("temperature", "top_k", "batch", "weight kd", "window"):
        assert probe.controls[name].continuous_update is False
    assert box in probe_panel._below(box)
    assert probe.controls["look"] in probe_panel._below(below)


def test_every_control_moves_its_setting_and_the_answer(tmp_path, cell):
    probe = build_probe(run(tmp_path / "run"))
    probe.show()
    handle = cell[1]
    moves = (
        ("temperature", 2.0, "temperature", 2.0),
        ("top_k", "16", "top_k", 16),
        ("top_k", "all", "top_k", None),
        ("divergence", "reverse_kl", "divergence", "reverse_kl"),
        ("method", "strict", "method", "strict"),
        ("layers", "last only", "layers", "last only"),
        ("projector", "random", "projector", "random"),
        ("batch", 2, "batch", 2),
    )
    for number, (control, value, setting, now) in enumerate(moves, 2):
        probe.controls[control].value = value
        assert getattr(probe.settings, setting) == now
        assert len(handle.bundles) == number, "one answer for one move"
        assert text(probe.controls["said"]).count("color:inherit") == 1
    probe.controls["weight kd"].value = 0.4
    assert dict(probe.settings.weights)["kd"] == 0.4
    assert handle.bundles[-1]["text/plain"] == str(probe.table())
    assert "temperature 1 -&gt; 2" in handle.bundles[-1]["text/html"]


def test_what_is_typed_moves_the_controls(tmp_path, cell):
    probe = build_probe(run(tmp_path / "run"))
    probe.show()
    probe.set(temperature=4.0, top_k=None, kd=0.3, layers={1: 1, 2: 4})
    at = {name: probe.controls[name].value for name in ("temperature", "top_k", "weight kd", "layers")}
    assert at == {"temperature": 4.0, "top_k": "all", "weight kd": 0.3, "layers": "by hand"}
    assert len(cell[1].bundles) == 2
    probe.controls["As the run has it"].click()
    assert probe.controls["temperature"].value == 1.0
    assert probe.controls["layers"].value == "run"
    assert "all settings as the run has them" in cell[1].bundles[-1]["text/plain"]
    probe.controls["layers"].value = "by hand"
    assert "is typed" in text(probe.controls["said"])
    assert probe.controls["layers"].value == "run"


def test_what_goes_wrong_is_said_in_red_and_the_controls_go_back(tmp_path, cell, monkeypatch):
    probe = build_probe(run(tmp_path / "run"))
    probe.show()
    probe.set(temperature=2.0)
    probe.controls["method"].value = "uld"
    assert "#B00020" in text(probe.controls["said"])
    assert "a distance of its own" in text(probe.controls["said"])
    assert probe.controls["method"].value == probe.settings.method == "bridge"
    monkeypatch.setattr(probe_panel.Probe, "table", lambda self: 1 / 0)
    probe.controls["temperature"].value = 4.0
    assert "ZeroDivisionError" in text(probe.controls["said"])
    assert probe.settings.temperature == probe.controls["temperature"].value == 2.0


def test_use_these_and_scales(tmp_path, cell):
    trainer = run(tmp_path / "run")
    probe = build_probe(trainer)
    probe.show()
    probe.controls["temperature"].value = 2.0
    probe.controls["weight kd"].value = 0.5
    probe.controls["Use these"].click()
    assert "From step 1 on" in text(probe.controls["said"])
    now = next(t for t in trainer.terms if t.name == "kd")
    assert (now.settings["temperature"], now.weight) == (2.0, 0.5)
    assert "all settings as the run has them" in cell[1].bundles[-1]["text/plain"]
    probe.controls["Scales"].click()
    assert "No term scales" in text(probe.controls["said"])
    assert "half length" in text(probe.controls["report"])


def test_looks_are_drawn_and_a_token_can_be_clicked(tmp_path, cell):
    from kd_kit.token_text import readable, window_tokens

    trainer = run(tmp_path / "run")
    probe = build_probe(trainer)
    probe.show()
    probe.controls["look"].value = "tokens"
    buttons, pictures = probe.controls["tokens"].children, probe.controls["pictures"].children
    assert len(pictures) == 2
    assert bytes(pictures[0].value[:4]) == b"\x89PNG"
    tokens = window_tokens(trainer.data.train, 0)
    assert [b.description for b in buttons[:5]] == [readable(t) for t in tokens.student.texts[1:6]]
    buttons[4].click()
    chosen = [b.tooltip for b in probe.controls["tokens"].children if b.button_style]
    assert chosen == [buttons[4].tooltip] == ["position 4"]
    assert probe.controls["pictures"].children[1].value != pictures[1].value
    probe.controls["start"].value = 40
    assert probe.controls["tokens"].children[0].tooltip != "position 0"
    for look in ("similarity", "attention", "routing"):
        probe.controls["look"].value = look
        assert "#B00020" not in text(probe.controls["said"])
        (picture,) = probe.controls["pictures"].children
        assert bytes(picture.value[:4]) == b"\x89PNG"
        assert not probe.controls["tokens"].children
    probe.controls["window"].value = 1
    probe.controls["look"].value = "none"
    assert not probe.controls["pictures"].children


def test_a_new_panel_closes_the_one_before(tmp_path, cell):
    import ipywidgets

    trainer = run(tmp_path / "run")
    first, second = build_probe(trainer), build_probe(trainer)
    first.show()
    box = cell[0]
    widgets = [*probe_panel._below(box), *probe_panel._below(cell[2])]
    second.show()
    assert len(widgets) > 20
    assert all(w.comm is None for w in widgets), "closed"
    assert first.controls == {}
    assert isinstance(cell[3], ipywidgets.VBox)
    first.set(temperature=2.0)
    assert len(cell[1].bundles) == 1, "what is closed no longer writes"
    second.show()
    assert len(cell) == 9
    second.controls["temperature"].value = 2.0
    assert second.settings.temperature == 2.0


def test_controls_are_those_that_the_run_has_a_use_for(tmp_path, cell):
    probe = build_probe(run(tmp_path / "run", [lm_term(1.0)], model=None))
    probe.show()
    none = {"temperature", "top_k", "method", "divergence", "layers", "projector"}
    assert not none & probe.controls.keys()
    assert "weight lm" in probe.controls
    assert probe.controls["look"].options == ("none", "tokens")
    probe.controls["look"].value = "tokens"
    assert len(probe.controls["pictures"].children) == 1
    odd = run(tmp_path / "odd", [lm_term(3.0), kd_term(0.7, top_k=9, temperature=11.0)])
    probe = build_probe(odd)
    probe.show()
    assert probe.controls["top_k"].value == "9"
    assert probe.controls["temperature"].value == pytest.approx(11.0)
    assert probe.controls["weight lm"].max == 6.0
    probe.set(top_k=100, temperature=0.25, lm=9.0, batch=3)
    at = {name: probe.controls[name].value for name in ("top_k", "temperature", "weight lm", "batch")}
    assert at == {"top_k": "100", "temperature": 0.25, "weight lm": 9.0, "batch": 3}
    assert probe.controls["top_k"].options[7:9] == ("64", "100")
    assert probe.controls["top_k"].options[-1] == "all"


def test_outside_a_notebook_it_prints(tmp_path, capsys):
    probe = build_probe(run(tmp_path / "run", [lm_term(), kd_term(top_k=8)]))
    capsys.readouterr()
    probe.show()
    out = capsys.readouterr().out
    assert str(probe.table()) in out
    assert out.count("need a notebook") == 1
    with pytest.raises(ValueError, match="from 0 to 5"):
        build_probe(probe.trainer, position=6)
    with pytest.raises(ValueError, match="at least one window"):
        build_probe(probe.trainer, windows=0)
