"""The insides of both models side by side: which layers are alike, what relates to what, where tokens are routed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_kit.drawing import BLUE, GREY, INK, LARGE, NORMAL, SMALL, VERMILION, clip, new_figure, term_styles
from kd_kit.head import body_of
from kd_kit.losses import common_heads, relation_kl, relations
from kd_kit.module import DistillModule
from kd_kit.passes import as_in_evaluation
from kd_kit.readings import Needs
from kd_kit.routing import NoExperts, RoutingTap, count_chosen, find_routing, of_layer
from kd_kit.taps import attention_widths, check_layer_map, layers_of
from kd_kit.term_changes import has_layers, pairs_used
from kd_kit.token_looks import checked_window
from kd_kit.token_text import drawable, readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# --- similarity


def debiased_cka(ours: Tensor, theirs: Tensor) -> Tensor:
    """Linear CKA of two sets of states of the same spans: 1 where one is the other turned and scaled, 0 at random.

    Without the bias of the plain estimate, which calls any two wide sets of few spans alike.

    Shapes:
        ours: [n, D]. theirs: [n, E], of the same n >= 4 spans
        returns: scalar float64

    Source: Kornblith et al. 2019, section 3, https://arxiv.org/abs/1905.00414; the unbiased estimate of HSIC: Song et
        al. 2012, equation 5; in CKA: Nguyen et al. 2020, section 2, https://arxiv.org/abs/2010.15327
    """
    n = len(ours)
    grams = []
    for states in (ours, theirs):
        states = states.double()
        gram = states @ states.T
        grams.append(gram.fill_diagonal_(0.0))

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        cross = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)
        return cross / (n * (n - 3))

    k, m = grams
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).clamp(min=1e-30).sqrt()


def standardised(states: Tensor) -> Tensor:
    """[n, width] float64, every channel with mean 0 and deviation 1; one that hardly moves stays small."""
    states = states.double()
    deviation = states.std(0)
    moving = deviation[deviation > 0]
    floor = 1e-3 * moving.median() if len(moving) else 1.0
    return (states - states.mean(0)) / deviation.clamp(min=floor)


def similarity(trainer, window: int = 0, windows: int = 4) -> Figure:
    """How alike every layer of the student is to every layer of the teacher, with the run's pairs of layers.

    Linear CKA of the hidden states at the ends of common spans, every channel standardised as the hidden terms do it.
    It tells whether a layer map makes sense: pairs should lie where the two are alike, rising together.

    Args:
        window: number of the first training window. windows: how many are read from there on.

    Raises:
        ValueError: a window that is not there, too few spans; a run that trains, or has no teacher.
    """
    checked_window("similarity", trainer, window)
    if not isinstance(windows, numbers.Integral) or windows < 1:
        raise ValueError(f"looks.similarity: expected at least one window, got windows={windows!r}")
    numbers_of = range(window, min(window + windows, len(trainer.data.train)))
    student, teacher = trainer.student, trainer.teacher.model
    depths = len(layers_of(student)), len(layers_of(teacher))
    every = [frozenset(range(1, depth + 1)) for depth in depths]
    module = DistillModule(student, [])
    module.needs = Needs(student_states=every[0])
    batch = trainer.data.train.collate(list(numbers_of)).to(trainer.session.device)
    if len(batch.span_rows) < 4:
        raise ValueError(
            f"looks.similarity: expected at least 4 spans, got {len(batch.span_rows)} in {len(numbers_of)} windows; "
            "raise windows="
        )
    with as_in_evaluation(trainer), torch.no_grad():
        output = module.output(batch)
        states = trainer.teacher.asked(Needs(teacher_states=every[1])).signal(batch).states
    ends = batch.span_rows[:, 0]
    ours = [standardised(output.states[n].flatten(0, 1)[ends].cpu()) for n in sorted(every[0])]
    theirs = [standardised(states[n].cpu()) for n in sorted(every[1])]
    grid = torch.tensor([[float(debiased_cka(a, b)) for b in theirs] for a in ours])

    figure = new_figure(10, min(7.2, max(3.4, 1.5 + 0.34 * depths[0])))
    height = figure.bbox.height / 100
    title = "Which layers are alike? Linear CKA at the ends of common spans"
    figure.text(0.012, 1 - 0.26 / height, title, size=LARGE, weight="bold", color=INK)
    said = (
        f"{len(ends):,} spans of windows {numbers_of[0]} to {numbers_of[-1]}; 1: the same but for a turn, 0: unrelated"
    )
    figure.text(0.012, 1 - 0.52 / height, said, size=NORMAL, color=GREY)
    ax = figure.add_axes((0.075, 0.55 / height, 0.60, 1 - 1.25 / height))
    image = ax.imshow(
        grid.numpy(), cmap="cividis", vmin=0, vmax=max(0.2, float(grid.max())), aspect="auto", origin="lower"
    )
    size = SMALL if max(depths) <= 14 else None
    if size:
        for i, line in enumerate(grid.tolist()):
            for j, value in enumerate(line):
                colour = "white" if value < 0.6 * float(grid.max()) else INK
                ax.text(j, i - 0.26, f"{value:.2f}", ha="center", va="center", size=SMALL, color=colour)
    _draw_pairs(ax, trainer)
    for axis, depth, who in ((ax.xaxis, depths[1], "teacher"), (ax.yaxis, depths[0], "student")):
        step = max(1, math.ceil(depth / 16))
        axis.set_ticks(range(0, depth, step), [str(n + 1) for n in range(0, depth, step)])
        axis.set_label_text(f"{who} layer", size=SMALL, color=INK)
    ax.tick_params(labelsize=SMALL, colors=INK)
    side = figure.add_axes((0.70, 0.55 / height, 0.018, 1 - 1.25 / height))
    figure.colorbar(image, cax=side)
    side.tick_params(labelsize=SMALL, colors=INK)
    side.set_title("CKA", size=SMALL, color=INK)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.775, 1 - 0.62 / height), fontsize=SMALL,
                      frameon=False, title="pairs of the run", title_fontsize=SMALL, alignment="left")  # fmt: skip
    return figure


def _draw_pairs(ax, trainer) -> None:
    """A mark for every pair of layers of every term, side by side where several terms share one."""
    terms = [t for t in trainer.terms if has_layers(t)]
    styles, markers = term_styles([t.name for t in terms]), "osD^vP"
    placed: dict[tuple[int, int], int] = {}
    for term, marker in zip(terms, markers * 2, strict=False):
        pairs = list(pairs_used(term).items())
        for number, pair in enumerate(pairs):
            column = placed[pair] = placed.get(pair, -1) + 1
            x, y = pair[1] - 1 + 0.14 * (column % 6) - 0.36, pair[0] - 1 + 0.2
            label = None if number else clip(f"{term.name}: " + ", ".join(f"{o} ← {t}" for o, t in pairs), 26)
            colour = styles[term.name][0]
            ax.plot([x], [y], ls="", marker=marker, ms=8, mfc=colour, mec="white", mew=1.2, label=label)


# --- attention


def attention(
    trainer, window: int = 0, layers: Mapping[int, int] | None = None, start: int = 0, spans: int = 16
) -> Figure:
    """What every span relates to in the student and in the teacher, as the attention term sees it.

    Rows are the ends of common spans, columns the spans before and their own; a row's shares sum to 100 %. Beside them
    how far the two are apart in every row, KL(teacher || student) over the log of the row's length. Means over the
    relation heads and over the kinds of relation (queries, keys, values) of the run's attention term.

    Args:
        window: number of a training window.
        layers: {student layer: teacher layer}, one pair; the run's, or last to last, if left out.
        start: the first span to show, from 0. spans: how many.

    Raises:
        ValueError: a window, span or layer that is not there; a run that trains, or has no teacher.
    """
    tokens = checked_window("attention", trainer, window)
    student, teacher = trainer.student, trainer.teacher.model
    term = next((t for t in trainer.terms if t.name == "attention" and has_layers(t)), None)
    depths = len(layers_of(student)), len(layers_of(teacher))
    pairs = layers if layers is not None else pairs_used(term) if term is not None else {depths[0]: depths[1]}
    pairs = check_layer_map(pairs, *depths)
    if len(pairs) != 1:
        raise ValueError(f"looks.attention: expected one pair of layers, got {len(pairs)}; see similarity for all")
    (ours, theirs), batch = pairs[0], tokens.batch.to(trainer.session.device)
    numbers_of = batch.spans_of()[1]
    whole = all(isinstance(x, numbers.Integral) for x in (start, spans))
    if not whole or not 0 <= start < max(len(numbers_of), 1) or not 2 <= spans <= 32:
        raise ValueError(
            f"looks.attention: expected start= from span 0 to {len(numbers_of) - 1} and 2 to 32 spans, got "
            f"start={start!r}, spans={spans!r}"
        )
    shown = numbers_of[start : start + spans].unsqueeze(0)  # [1, R]
    kinds = tuple(term.settings["relation"]) if term is not None else ("q", "k", "v")
    most = term.settings["heads"] if term is not None else 8
    module = DistillModule(student, [])
    module.needs = Needs(student_attention=frozenset([ours]))
    with as_in_evaluation(trainer), torch.no_grad():
        held = module.output(batch).attention[ours]
        said = trainer.teacher.asked(Needs(teacher_attention=frozenset([theirs]))).signal(batch).attention[theirs]
        widths = attention_widths(student, ours), attention_widths(teacher, theirs)
        grids, apart = [0.0, 0.0], 0.0
        for kind in kinds:
            heads = common_heads(*(w[kind] for w in widths), most=most)
            both = [
                relations(states[kind], heads=heads, rows=shown, boundaries=boundaries)
                for states, boundaries in ((held, batch.span_student), (said, batch.span_teacher))
            ]
            apart = apart + relation_kl(*both, shown)[0].cpu() / len(kinds)
            grids = [g + r[0].exp().mean(0).cpu() / len(kinds) for g, r in zip(grids, both, strict=True)]
    first = int(shown[0, 0])
    # cell c + 1 is span c; whatever lies before the first shown span is one column
    cells = [int(n) + 1 for n in shown[0]]
    grids = [torch.cat([g[:, : first + 1].sum(1, keepdim=True), g[:, cells]], dim=1) * 100 for g in grids]
    texts = _span_texts(tokens, shown[0].tolist())
    title = f"What relates to what: student layer {ours}, teacher layer {theirs}"
    said = f"window {window}, spans {first} to {int(shown[0, -1])}"
    return _attention_figure(grids, apart.tolist(), texts, title, said)


def _span_texts(tokens, numbers_of: list[int]) -> list[str]:
    bounds = tokens.batch.span_student[0].tolist()
    return [drawable(readable(b"".join(tokens.student.texts[bounds[n] + 1 : bounds[n + 1] + 1]))) for n in numbers_of]


def _attention_figure(grids, apart, texts, title, said) -> Figure:
    n = len(texts)
    height = 1.75 + 0.24 * n
    figure = new_figure(10, height)
    figure.text(0.012, 1 - 0.26 / height, title, size=LARGE, weight="bold", color=INK)
    figure.text(0.012, 1 - 0.5 / height, f"{said}; colour: share of a row, %", size=NORMAL, color=GREY)
    bottom, tall = 0.95 / height, 1 - 1.72 / height
    top = max(float(g[:, 1:].max()) for g in grids)
    names = ["before", *(clip(t, 9) for t in texts)]
    mono = {"family": "DejaVu Sans Mono"}
    for number, (grid, who) in enumerate(zip(grids, ("student", "teacher"), strict=True)):
        ax = figure.add_axes((0.105 + 0.335 * number, bottom, 0.315, tall))
        masked = grid.clone()
        masked[:, 0] = math.nan  # all the text before is no span: its share is written
        for row in range(n):
            masked[row, row + 2 :] = math.nan  # what comes after the row
        image = ax.imshow(masked.numpy(), cmap="cividis", vmin=0, vmax=top, aspect="auto")
        for row in range(n):
            ax.text(0, row, f"{float(grid[row, 0]):.0f}", ha="center", va="center", size=SMALL - 1.5, color=GREY)
        ax.set_title(who, loc="left", size=NORMAL, weight="bold", color=INK, pad=4)
        ax.set_xticks(range(n + 1), names, rotation=90, **mono)
        ax.set_yticks(range(n), names[1:] if number == 0 else [""] * n, **mono)
        ax.tick_params(labelsize=SMALL - 1, colors=INK, length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    side = figure.add_axes((0.765, bottom, 0.012, tall))
    figure.colorbar(image, cax=side).ax.tick_params(labelsize=SMALL, colors=INK)
    side.set_title("%", size=SMALL, color=INK)
    ax = figure.add_axes((0.835, bottom, 0.145, tall))
    ax.barh(range(n), apart, 0.7, color=VERMILION, lw=0)
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_yticks([])
    ax.set_xlim(0, 1.1 * max(apart) or 1)
    ax.tick_params(labelsize=SMALL, colors=INK)
    ax.set_title("apart", loc="left", size=NORMAL, weight="bold", color=INK, pad=4)
    ax.set_xlabel("KL / ln row", size=SMALL, color=INK)
    for name in ("top", "right"):
        ax.spines[name].set_visible(False)
    return figure


# --- routing


def routing(trainer, window: int = 0, start: int = 0, tokens: int = 32, scores: str | None = None) -> Figure:
    """Where a mixture-of-experts teacher sends each of its tokens, and how evenly it uses its experts.

    Above, for every layer with a router and every teacher token, the expert that it finds best and how sure it is.
    Below, how often each expert is chosen over the whole window, relative to an even share.

    Args:
        window: number of a training window. start: the first teacher token to show. tokens: how many.
        scores: what the routers make of their logits, for a family that is not listed, see :func:`router_term`.

    Raises:
        ValueError: a dense teacher; a window or token that is not there; a run that trains, or has no teacher.
    """
    read = checked_window("routing", trainer, window)
    model = trainer.teacher.model
    term = next((t for t in trainer.terms if t.name == "router" and has_layers(t)), None)
    scores = scores or (term.settings["scores"] if term is not None else None)
    try:
        found = find_routing(model, scores=scores)
    except NoExperts:
        raise ValueError(
            f"looks.routing: expected a mixture-of-experts teacher, got {type(model).__name__}, which is dense and "
            "routes nothing"
        ) from None
    there = len(read.teacher.ids)
    whole = all(isinstance(x, numbers.Integral) for x in (start, tokens))
    if not whole or not 0 <= start < there or not 1 <= tokens <= 48:
        raise ValueError(
            f"looks.routing: expected start= from token 0 to {there - 1} and 1 to 48 tokens, got start={start!r}, "
            f"tokens={tokens!r}"
        )
    with torch.no_grad(), RoutingTap(model, found.layers, scores=scores) as tap:
        body_of(model)(input_ids=read.batch.teacher_ids.to(trainer.teacher.device), use_cache=False)
    probabilities = {layer: p[0].cpu() for layer, p in tap.probabilities.items()}
    part = slice(start, min(start + tokens, there))
    texts = [clip(drawable(readable(t)) or "(start)", 9) for t in read.teacher.texts[part]]

    layers, n = found.layers, len(texts)
    height = 2.6 + (0.28 + 0.24) * len(layers)
    figure = new_figure(10, height)
    figure.text(0.012, 1 - 0.26 / height, "Where the teacher sends its tokens", size=LARGE, weight="bold", color=INK)
    said = f"window {window}, teacher tokens {part.start} to {part.stop - 1}; {found.active} of {found.experts} experts"
    figure.text(0.012, 1 - 0.5 / height, f"{said} per token", size=NORMAL, color=GREY)
    tall = 0.28 * len(layers)
    ax = figure.add_axes((0.075, 1 - (0.85 + tall) / height, 0.84, tall / height))
    best = [probabilities[layer][part].max(-1) for layer in layers]
    image = ax.imshow(torch.stack([b.values for b in best]).numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for i, one in enumerate(best):
        for j, (p, expert) in enumerate(zip(one.values.tolist(), one.indices.tolist(), strict=True)):
            ax.text(j, i, str(expert), ha="center", va="center", size=SMALL - 1, color=INK if p > 0.6 else "white")
    ax.set_title("Best expert (number) and its probability (colour)", loc="left", size=NORMAL, weight="bold", pad=4)
    ax.set_xticks(range(n), texts, rotation=90, family="DejaVu Sans Mono")
    _layer_axis(ax, layers)
    _bar(figure, image, (0.935, 1 - (0.85 + tall) / height, 0.014, tall / height))

    low = 0.24 * len(layers)
    ax = figure.add_axes((0.075, 0.5 / height, 0.84, low / height))
    most = max(p.shape[-1] for p in probabilities.values())
    load = torch.full((len(layers), most), math.nan)
    for i, layer in enumerate(layers):
        counts = count_chosen(probabilities[layer].unsqueeze(0), of_layer(found.active, found, layer))
        load[i, : len(counts)] = counts / counts.sum() * len(counts)
    high = max(2.0, float(load[~load.isnan()].max()))
    image = ax.imshow(load.numpy(), cmap="cividis", vmin=0, vmax=high, aspect="auto")
    if most <= 16:
        for i, line in enumerate(load.tolist()):
            for j, value in enumerate(line):
                if value == value:
                    colour = INK if value > 0.6 * high else "white"
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", size=SMALL, color=colour)
    title = "Load of each expert, 1: an even share, 0: never chosen"
    ax.set_title(title, loc="left", size=NORMAL, weight="bold", pad=4)
    step = max(1, math.ceil(most / 24))
    ax.set_xticks(range(0, most, step))
    ax.set_xlabel("expert", size=SMALL, color=INK)
    _layer_axis(ax, layers)
    _bar(figure, image, (0.935, 0.5 / height, 0.014, low / height))
    return figure


def _layer_axis(ax, layers) -> None:
    ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    ax.set_ylabel("layer", size=SMALL, color=INK)
    ax.tick_params(labelsize=SMALL, colors=INK, length=0)
    for spine in ax.spines.values():
        spine.set_color(BLUE)
        spine.set_visible(False)


def _bar(figure, image, box) -> None:
    side = figure.add_axes(box)
    figure.colorbar(image, cax=side).ax.tick_params(labelsize=SMALL - 1, colors=INK)
