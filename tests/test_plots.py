"""Figures and tables from histories of every kind, read from the artists rather than from pixels."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kd_kit.drawing import decimate, figure_png, label_ends, new_panel, stack, term_styles
from kd_kit.history import History
from kd_kit.plots import loss_figure, loss_table
from kd_kit.table import Table, plain, short

np = pytest.importorskip("numpy")

METAS = {
    "lm": {"unit": "nats/token", "healthy": [2, 6], "impossible_below": 0, "impossible_above": 11.8},
    "kd": {"unit": "nats/token", "healthy": [0.1, 3], "impossible_below": 0, "impossible_above": 10},
    "feature": {"unit": "1 - cos", "healthy": [0.1, 0.8], "impossible_below": 0, "impossible_above": 1.2},
}
NAMES = ("lm", "kd", "span", "feature", "layerwise", "relation", "attention", "contrastive", "router", "balance")


def build(curves: dict, *, steps=range(1, 11), metas=METAS, evaluations=(), references=(), **more) -> History:
    """``curves``: {name: function of the step giving the value}, every weight 0.5."""
    history = History()
    terms = {name: metas[name] for name in curves if name in metas}
    history.append({"kind": "run", "run_id": "demo", "total_steps": 400, "terms": terms})
    for name, bits in references:
        history.append({"kind": "reference", "name": name, "bits_per_byte": bits})
    for step in steps:
        values = {name: curve(step) for name, curve in curves.items()}
        terms = {
            name: {"value": v, "weight": 0.5, "contribution": None if v is None else 0.5 * v, "count": 64}
            for name, v in values.items()
        }
        total = sum(t["contribution"] or 0.0 for t in terms.values())
        record = {"kind": "train", "step": step, "total": total, "terms": terms, "lr": {"student": 3e-4}}
        history.append({**record, **more})
    for step, bits in evaluations:
        history.append({"kind": "eval", "step": step, "bits_per_byte": bits})
    return history


def measure(history: History, step: int, shares: dict, cosines: dict) -> None:
    """Put what a comparison of gradients says into the record of a step, as the trainer does."""
    record = next(r for r in history.records if r["kind"] == "train" and r["step"] == step)
    for name, share in shares.items():
        record["terms"][name] |= {"grad_norm": 1.0, "grad_share": share, "cosine": cosines.get(name)}
    record["gradients"] = {"at": "state after layer 1", "terms": list(shares), "cosines": []}


def a_plan(total: int = 400, now: int = 0, **shares) -> SimpleNamespace:
    """What plan_of gives, with shares that go from the first number to the second over the run."""
    steps = tuple(range(total))
    lines = {name: tuple(a + (b - a) * s / (total - 1) for s in steps) for name, (a, b) in shares.items()}
    rates = {"student": tuple(1e-3 * (total - s) / total for s in steps)}
    return SimpleNamespace(steps=steps, shares=lines, rates=rates, total=total, now=now)


def constant(value: float | None):
    return lambda step: value


def texts(figure) -> list[str]:
    found = [t.get_text() for t in figure.texts]
    for ax in figure.axes:
        found += [t.get_text() for t in ax.texts] + [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()]
    return [text for text in found if text]


def line(ax, label: str):
    return next(found for found in ax.lines if found.get_label() == label)


def png_size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def measured_once(share: float = 0.7) -> History:
    history = build({"lm": constant(4.0), "kd": constant(1.0)})
    measure(history, 1, {"lm": 1 - share, "kd": share}, {"kd": 0.2})
    return history


HISTORIES = {
    "empty": History(),
    "only declared": build({"lm": constant(3.0)}, steps=()),
    "only evaluated": build({}, steps=(), evaluations=[(0, 3.9)], references=[("teacher", 1.85)]),
    "one record": build({"lm": constant(4.0), "kd": constant(1.0)}, steps=[7], evaluations=[(7, 2.5)]),
    "step zero": build({"lm": constant(4.0)}, steps=[0], evaluations=[(0, 2.5)]),
    "many": build({name: constant(0.1 * i) for i, name in enumerate(NAMES)}, steps=range(1, 300)),
    "long": build({"lm": lambda s: 4 + math.sin(s)}, steps=range(1, 5000), evaluations=[(s, 2.0) for s in range(60)]),
    "never there": build({"lm": constant(None), "kd": constant(1.0)}),
    "sometimes there": build({"lm": lambda s: None if s % 3 else 2.0, "kd": constant(1.0)}),
    "nan at last": build({"lm": lambda s: math.nan if s > 5 else 2.0}, evaluations=[(1, 2.0), (5, math.nan)]),
    "nothing finite": build({"lm": constant(math.nan), "kd": constant(math.inf)}, evaluations=[(1, math.nan)]),
    "zero and negative": build({"kd": constant(0.0), "feature": constant(-0.5)}),
    "a spike": build({"kd": lambda s: 1e6 if s == 3 else 1.0}, steps=range(1, 200)),
    "undeclared": build({"mine": constant(1.0), "$x$ <b>": constant(2.0)}),
    "sick": build({"kd": constant(34.0), "feature": constant(170.0)}, steps=range(1, 100), grad_norm=math.nan),
    "bare": build({"lm": constant(4.0)}, lr=None, grad_norm=None, tail_mass=None, taught_share=0.93),
    "measured once": measured_once(),
    "no gradient": measured_once(math.nan),
    "all one level": build({"lm": constant(4.0)}, evaluations=[(1, 2.0), (2, 2.0)], references=[("teacher", 2.0)]),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_is_drawn(name):
    history = HISTORIES[name]
    figure = loss_figure(history, control=HISTORIES["only evaluated"])
    planned = loss_figure(history, plan=a_plan(lm=(1.0, 0.4), kd=(0.0, 0.6)), settings={"eval_windows": 8})
    assert png_size(figure_png(planned)) == (1000, 916)
    assert png_size(figure_png(figure)) == (1000, 916)
    assert str(loss_table(history))
    assert "<table>" in loss_table(history)._repr_html_()


def test_pixels_follow_dpi_and_the_figure_stays_as_it_was():
    figure = loss_figure(History())
    assert png_size(figure_png(figure, dpi=50)) == (500, 458)
    assert figure.get_dpi() == 100


def test_an_empty_history_says_so():
    found = texts(loss_figure(History()))
    assert "no steps yet" in found
    assert "no evaluation yet" in found
    assert str(loss_table(History())).startswith("no steps yet")


def test_each_term_has_its_band_in_its_colour():
    history = build({"lm": constant(4.0), "kd": constant(1.2), "feature": constant(0.4)}, steps=range(1, 100))
    ax = loss_figure(history).axes[0]
    assert ax.get_yscale() == "log"
    assert len(ax.yaxis.get_minorticklocs()) == 0
    from matplotlib.colors import to_hex

    to_data = ax.transData.inverted()
    bands = {to_hex(patch.get_facecolor()).upper(): patch.get_extents().transformed(to_data) for patch in ax.patches}
    assert len(bands) == 3
    for name, (colour, _) in term_styles(history.terms).items():
        low, high = METAS[name]["healthy"]
        band = bands[colour]
        assert band.y0 == pytest.approx(low)
        assert band.y1 == pytest.approx(high)
        bar = line(ax, f"healthy {name}").get_ydata()
        assert bar[0] == pytest.approx(low, rel=0.05)
        assert bar[1] == pytest.approx(high, rel=0.05)
        assert 0 < line(ax, f"healthy {name}").get_alpha() < 1
        assert line(ax, name).get_color() == colour


def test_labels_give_last_value_and_verdict():
    history = build({"lm": constant(4.0), "kd": constant(34.0), "feature": constant(0.05)})
    found = texts(loss_figure(history))
    for text in ("lm", "4.00", "healthy", "kd", "34.0", "impossible", "feature", "0.0500", "low"):
        assert text in found
    gone = texts(loss_figure(build({"lm": lambda s: 1.36 if s < 3 else None, "kd": constant(1.0)})))
    assert "(1.36)" in gone
    assert "absent" in gone


def test_contributions_stack_up_to_the_total():
    history = build({"lm": constant(4.0), "kd": constant(2.0)}, steps=range(1, 2001))
    figure = loss_figure(history)
    ax = figure.axes[1]
    tops = [path.vertices[:, 1].max() for fill in ax.collections for path in fill.get_paths()]
    assert sorted(tops) == pytest.approx([2.0, 3.0])
    assert line(ax, "total").get_ydata() == pytest.approx(3.0)
    assert {"67 %", "33 %", "total 3.00"} <= set(texts(figure))


def test_held_out_panel_has_student_control_and_teacher():
    history = build(
        {"lm": constant(4.0)}, evaluations=[(0, 3.9), (50, 2.8), (100, 2.4)], references=[("teacher", 1.85)]
    )
    control = build({}, steps=(), evaluations=[(0, 3.9), (50, 2.9), (100, 2.48)])
    figure = loss_figure(history, control=control, title="A title")
    ax = figure.axes[4]
    assert list(line(ax, "student").get_ydata()) == [3.9, 2.8, 2.4]
    assert list(line(ax, "control (LM only)").get_ydata()) == [3.9, 2.9, 2.48]
    assert line(ax, "control (LM only)").get_linestyle() == "--"
    assert set(line(ax, "teacher").get_ydata()) == {1.85}
    wanted = {
        "2.400",
        "2.480",
        "1.850",
        "student - control at step 100: -0.080",
        "A title",
        "bits per byte, lower is better",
    }
    assert wanted <= set(texts(figure))


def test_the_windows_of_an_evaluation_are_said():
    history = build({"lm": constant(4.0)}, evaluations=[(0, 3.9), (50, 2.8)])
    assert "on 64 evaluation windows" in texts(loss_figure(history, settings={"eval_windows": 64}))
    found = texts(loss_figure(history, control=history, settings={"eval_windows": 64}))
    assert "64 windows · student - control at step 50: +0.000" in found


def test_no_line_is_longer_than_1500_points_and_spikes_stay():
    spike = build({"kd": lambda s: 500.0 if s == 3333 else 1.0}, steps=range(1, 9001))
    figure = loss_figure(spike)
    assert all(len(found.get_xdata()) <= 1500 for ax in figure.axes for found in ax.lines)
    assert line(figure.axes[0], "kd, each step").get_ydata().max() == 500.0


@pytest.mark.parametrize("points", [0, 1, 2, 10, 99, 100, 101, 250, 1234, 10_000])
def test_decimate_keeps_ends_and_extremes(points):
    generator = np.random.default_rng(points)
    y = generator.normal(size=points)
    y[generator.random(points) < 0.1] = np.nan
    x = np.arange(points)
    thin_x, thin_y = decimate(x, y, limit=100)
    assert len(thin_x) == len(thin_y) <= 100
    assert (np.diff(thin_x) > 0).all()
    assert np.array_equal(thin_y, y[thin_x.astype(int)], equal_nan=True)
    if points > 1:
        assert (thin_x[0], thin_x[-1]) == (0, points - 1)
        assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (np.nanmin(y), np.nanmax(y))


def in_trouble() -> History:
    """Ten terms with gradients, a finding of every kind, and texts as long as they get."""
    history = build({name: constant(0.1 * i) for i, name in enumerate(NAMES)}, steps=range(1, 300))
    shares = dict.fromkeys(NAMES, 0.001) | {"lm": 0.992}
    measure(history, 299, shares, {name: -0.45 for name in NAMES if name != "lm"})
    for i in range(12):
        text = (
            f"{'it went quite wrong ' * 12}, since step 1,234. Likely: {'one does not know ' * 12}. Try: {'all ' * 60}"
        )
        history.append({"kind": "event", "step": 12_345, "what": "alarm", "text": text, "key": str(i)})
    history.append({"kind": "event", "step": 12_345, "what": "changed", "text": "one thing and another " * 20})
    return history


CROWDED = {
    **{name: (HISTORIES[name], {}) for name in ("many", "sick", "nan at last", "zero and negative", "measured once")},
    "in trouble": (in_trouble(), {"failure": "failed: RuntimeError: " + "out of memory " * 30, "title": "Run " * 50}),
    "planned": (
        in_trouble(),
        {
            "plan": a_plan(**dict.fromkeys(NAMES, (0.1, 0.1))),
            "footer": "1,234 pictures took 123.4 s, 12.3 % of the time",
        },
    ),
}


def drawn_ticks(ax) -> list:
    low, high = ax.get_ylim()
    return [tick for tick in ax.get_yticklabels() if low <= tick.get_position()[1] <= high]


@pytest.mark.parametrize("name", CROWDED)
def test_labels_do_not_overlap_and_stay_inside(name):
    history, more = CROWDED[name]
    figure = loss_figure(history, control=HISTORIES["only evaluated"], settings={"eval_windows": 1234}, **more)
    figure_png(figure)
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text()]
    for ax in figure.axes:
        boxes += [(t.get_text(), t.get_window_extent()) for t in ax.texts if t.get_text()]
        boxes += [(a.label.get_text(), a.label.get_window_extent()) for a in (ax.xaxis, ax.yaxis)]
        boxes += [(t.get_text(), t.get_window_extent()) for t in [*drawn_ticks(ax), ax._left_title]]
    boxes = [(text, box) for text, box in boxes if text]
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1000 and box.y1 <= 916, text
        for other, place in boxes[i + 1 :]:
            # boxes hold the room of ascenders and descenders: let those touch
            wide = min(box.x1, place.x1) - max(box.x0, place.x0)
            tall = min(box.y1, place.y1) - max(box.y0, place.y0)
            assert wide <= 1 or tall <= 4, (text, other)


def test_a_term_keeps_its_colour_and_no_two_look_alike():
    alone, together = term_styles(["kd"]), term_styles([*NAMES, "mine", "yours"])
    assert alone["kd"] == together["kd"]
    assert len(set(together.values())) == 12
    assert term_styles(["mine"]) == term_styles(["mine"])


def test_table_prints_aligned_and_escapes():
    table = Table("title", ("term", "value"), (("a<b>", "1.0"), ("c", "20.0")), words=("term",))
    assert str(table) == "title\nterm  value\na<b>    1.0\nc      20.0"
    assert "a&lt;b&gt;" in table._repr_html_()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.0, "0"), (4.0234, "4.02"), (34.0, "34.0"), (182.4, "182"), (999.7, "1,000"),
        (12_345, "12,300"), (123_456, "1.2e5"), (0.41249, "0.412"), (0.0571, "0.0571"), (3e-4, "3e-4"),
        (-0.5, "-0.500"), (9.999, "10.00"), (math.nan, "nan"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short(value) == text


def test_plain_numbers():
    values = (0.6, 0.0672, 3e-4, 1.5e-3, 0.0, 1.0, 1500.0, 1e6)
    assert [plain(v) for v in values] == ["0.6", "0.0672", "3e-4", "1.5e-3", "0", "1", "1,500", "1e6"]


def test_import_is_cheap_and_pyplot_stays_out():
    code = (
        "import sys, kd_kit.plots as plots, kd_kit.drawing as drawing; from kd_kit.history import History; "
        "assert 'matplotlib' not in sys.modules; drawing.figure_png(plots.loss_figure(History())); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def header(history: History, **more) -> list[str]:
    return [text.get_text() for text in loss_figure(history, **more).texts]


def test_the_header_says_where_the_run_is():
    history = build({"lm": constant(4.0)}, steps=range(1, 101), seconds_left=7800.0, seconds_to_finish=3900.0)
    found = header(history)
    assert "step 100 of 400 · 25%" in found
    assert "2 h 10 min left of the session, 1 h 05 min to finish" in found
    assert "No alarm stands." in found
    whole, done = loss_figure(history).artists
    assert done.get_width() == pytest.approx(0.25 * whole.get_width())


def test_the_header_has_the_newest_alarm_and_a_failure():
    history = build({"lm": constant(4.0)})
    for key in "ab":
        text = f"{key} went wrong, since step 3. Likely: a bug. Try: another seed"
        history.append({"kind": "event", "step": 9, "what": "alarm", "text": text, "key": key})
    history.append({"kind": "event", "step": 9, "what": "changed", "text": "weight of kd 0.3 -> 0.5"})
    found = header(history, failure="failed: ValueError: no", footer="3 pictures")
    assert {"2 alarms stand, the newest: b went wrong, since step 3.", "Likely: a bug.", "Try: another seed"} <= set(
        found
    )
    assert {"failed: ValueError: no", "changed at step 9: weight of kd 0.3 -> 0.5", "3 pictures"} <= set(found)


def test_a_stack_has_its_seams_and_bars_for_one_point():
    from matplotlib.figure import Figure

    ax = new_panel(Figure(), (0.1, 0.1, 0.4, 0.4), "")
    styles = term_styles(["lm", "kd"])
    edges = stack(ax, [1, 2], np.array([[1.0, 2.0], [3.0, 4.0]]), styles)
    assert edges.tolist() == [[0, 0], [1, 2], [4, 6]]
    assert stack(ax, [5], np.array([[1.0], [3.0]]), styles, faint=True).tolist() == [[0], [1], [4]]
    strong, faint = (next(c for c in ax.collections if c.get_label() == label) for label in ("kd", "kd, planned"))
    assert faint.get_alpha() < strong.get_alpha()
    [path] = faint.get_paths()
    assert (path.vertices[:, 0].min(), path.vertices[:, 0].max()) == (4, 6)


def test_columns_of_numbers_are_flush_right():
    from matplotlib.figure import Figure

    ax = new_panel(Figure(), (0.1, 0.1, 0.4, 0.4), "")
    rows = [("kd", "5 %", "0.31", "too weak"), ("contrastive", "12 %", "-0.4", "")]
    label_ends(ax, [(i, "red", "-", row) for i, row in enumerate(rows)], numbers=2, length=6)
    sides = {text.get_text(): text.get_ha() for text in ax.texts}
    assert [sides[text] for text in ("kd", "5 %", "0.31", "too weak")] == ["left", "right", "right", "left"]
    assert "contr…" in sides
    assert {t.get_text() for t in ax.texts if t.get_weight() == "bold"} == {"5 %", "0.31", "too weak"}


def test_the_picture_keeps_its_colours():
    """In 256 colours every line has its own: two terms that differ by colour alone must not become one."""
    from io import BytesIO

    from matplotlib.colors import to_rgb
    from PIL import Image

    plan = a_plan(**dict.fromkeys(NAMES, (0.1, 0.1)))
    image = np.asarray(Image.open(BytesIO(figure_png(loss_figure(History(), plan=plan)))).convert("RGB")).astype(int)
    for name, (colour, _) in term_styles(NAMES).items():
        wanted = np.array([round(255 * part) for part in to_rgb(colour)])
        assert np.abs(image - wanted).max(axis=-1).min() <= 3, name


def test_a_run_may_have_a_name_in_any_script():
    figure = loss_figure(build({"损失": constant(1.0)}), title="蒸馏 " * 40)
    assert png_size(figure_png(figure)) == (1000, 916)


def test_a_notebook_shows_a_figure_that_pyplot_does_not_know():
    from IPython.core.formatters import DisplayFormatter

    data, _ = DisplayFormatter().format(loss_figure(History()))
    assert data["image/png"].startswith(b"\x89PNG")
