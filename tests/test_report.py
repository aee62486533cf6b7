"""kd_kit/report.py and report_plot.py: the table, the figure and the file of an evaluation."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

from PIL import Image

from kd_kit.report import Report


def row(bits: float, **figures) -> dict:
    whole = {"bits_per_byte": bits, "perplexity_per_word": 1234.5, "perplexity": 2.0, "top1": 0.25, "top5": 0.5}
    return whole | {"kl": 1.5, "ece": 0.125, "parameters": 1e6, "megabytes": 4.0, "tokens_per_second": 9876.5} | figures


NOBODY = {"top1": None, "top5": None, "kl": None}
BINS = [[0.1, 0.2, 50], [0.5, 0.4, 60], [0.9, 1.0, 3]]


def whole(**changes) -> Report:
    rows = {"before": row(3.0), "LM-only control": row(2.0), "distilled": row(1.8), "teacher": row(1.5, **NOBODY)}
    about = {"control_step": 7, "words": 4321, "machine": "2 CPU threads", "reliability": dict.fromkeys(rows, BINS)}
    return Report(rows, 20_000, 7, **about | changes)


def lines_of(ax) -> dict:
    return {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}


def test_the_table_has_every_figure_and_says_how_it_was_measured():
    said = repr(whole())
    for part in (
        "bits per byte", "perplexity per word", "1,230", "25.0%", "50.0%", "1.500", "ECE", "0.125", "1,000,000",
        "4.0", "tokens/s", "9,87", "4,321 words of that text, counted by white space", "on 2 CPU threads",
    ):  # fmt: skip
        assert part in said, part
    teacher = next(line for line in said.splitlines() if line.startswith("teacher"))
    assert teacher.split()[3:6] == ["-", "-", "-"], "it is not compared with itself"


def test_a_report_of_few_figures_has_few_columns():
    old = Report({"distilled": {"bits_per_byte": 1.0}, "teacher": {"bits_per_byte": 0.5}}, 20_000, 7)
    assert old.table.columns == ("", "bits per byte")
    assert "tokens/s" not in repr(old)
    assert [t.get_text() for ax in old.figure().axes[1:] for t in ax.texts] == ["not measured", "not measured"]


def test_the_figure_draws_what_the_table_says():
    bits, agreement, reliability = whole().figure().axes
    assert {bar.get_label(): bar.patches[0].get_width() for bar in bits.containers} == {
        "before": 3.0, "LM-only control": 2.0, "distilled": 1.8, "teacher": 1.5
    }  # fmt: skip
    assert [t.get_text() for t in bits.texts] == ["3.000", "2.000", "1.800", "1.500"]
    assert [bar.get_label() for bar in agreement.containers] == [
        f"{name}, {key}" for name in ("before", "LM-only control", "distilled") for key in ("top1", "top5")
    ]
    drawn = lines_of(reliability)
    assert drawn["distilled  0.125"] == [[0.1, 0.2], [0.5, 0.4]], "a bin of three positions says nothing"
    assert len(drawn) == 5


def test_no_label_leaves_the_figure_or_lies_on_another():
    figure = whole().figure()
    figure.canvas.draw()
    renderer, panels = figure.canvas.get_renderer(), figure.axes
    texts = [text for ax in panels for text in (*ax.texts, *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label)]
    texts += [ax.title for ax in panels] + [ax._left_title for ax in panels] + panels[2].get_legend().get_texts()
    boxes = {t.get_text(): t.get_window_extent(renderer) for t in texts if t.get_text()}
    for name, box in boxes.items():
        assert box.x0 >= 0, name
        assert box.x1 <= 1000, name
        assert 0 <= box.y0 < box.y1 <= 300, name
    titles = [boxes[ax.get_title(loc="left")] for ax in panels]
    assert all(left.x1 + 8 < right.x0 for left, right in itertools.pairwise(titles))


def test_a_figure_that_is_not_finite_is_drawn_and_comes_back_from_json():
    rows = {"distilled": row(math.inf, perplexity_per_word=math.inf), "teacher": row(1.0, **NOBODY)}
    broken = replace(whole(), rows=rows, control_step=None, reliability=dict.fromkeys(rows, BINS))
    assert [t.get_text() for t in broken.figure().axes[0].texts] == ["inf", "1.000"]
    assert json.loads(broken.to_json())["rows"]["distilled"]["bits_per_byte"] == "inf"
    assert Report.from_json(broken.to_json()) == broken
    assert Report.from_json(whole().to_json()) == whole()


def test_a_notebook_shows_the_table_and_the_figure(tmp_path):
    page = whole()._repr_html_()
    assert page.count("<table") == 1
    assert page.count('src="data:image/png;base64,') == 1
    whole().figure().savefig(tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        assert image.size == (1000, 300)
