"""The probe with handles: sliders, menus and buttons in a notebook, and the answer beside them.

The table and the picture are one output of the cell, replaced whenever a control moves, so that they stand in the saved
file too; the controls are widgets and live only as long as the kernel. Every control calls a method that can be typed.
"""

from __future__ import annotations

import base64
import html
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kd_kit import looks
from kd_kit.dashboard import in_notebook
from kd_kit.drawing import figure_png
from kd_kit.kd_terms import METHODS
from kd_kit.panel import show_widget, widgets_wanted
from kd_kit.probe import Probe
from kd_kit.probe_settings import PROJECTORS
from kd_kit.scales import ScaleReport
from kd_kit.table import Table
from kd_kit.term_changes import DIVERGENCES, has_layers, projectors_of
from kd_kit.token_text import readable, window_tokens

_OPEN: weakref.WeakValueDictionary[str, ProbePanel] = weakref.WeakValueDictionary()  # shown ones, by run folder
_EXCERPT = 60  # bytes of text whose tokens are buttons


class ProbePanel(Probe):
    """A :class:`kd_kit.probe.Probe` that shows itself in a notebook, with a control for each of its settings.

    As the last expression of a cell it appears there; :meth:`show` puts it into the cell that runs. Outside a notebook
    it prints its table. A new panel of the same run closes the controls of the one before.
    """

    def __init__(self, trainer, *, position: int = 0, windows: int = 4):
        super().__init__(trainer, position=position, windows=windows)
        self.controls: dict[str, object] = {}  # by name; filled when it is shown
        self._handle = None
        self._boxes: tuple = ()  # above and below the answer
        self._moving = False  # the panel itself sets its controls

    def show(self) -> None:
        """Put the panel into the cell that runs."""
        if not in_notebook():
            print(self.table())
            print("kd_kit: the probe's controls need a notebook; here probe.set(temperature=2.0) and the like do it")
            return
        from IPython.display import display

        key = str(self.trainer.session.folder)
        before = _OPEN.get(key)
        if before is not None:
            before.close()
        _OPEN[key] = self
        bundle = self._bundle()
        if widgets_wanted():
            self._boxes = self._built()
            show_widget(self._boxes[0], "Controls of the probe: they are there while the notebook is live.")
        self._handle = display(bundle, raw=True, display_id=True)
        if self._boxes:
            show_widget(self._boxes[1], "Scales and looks: they are there while the notebook is live.")

    def close(self) -> None:
        """Take the controls away and give the kept passes up; the last table and picture stay where they are."""
        for box in self._boxes:
            for widget in _below(box):
                widget.close()
        self._boxes, self._handle = (), None
        self.controls = {}
        self._forget()
        self._stamp = None

    def set(self, **settings) -> Table:
        """As :meth:`Probe.set`; a panel that is shown follows."""
        table = super().set(**settings)
        self._follow()
        return table

    set.__doc__ = f"{set.__doc__}\n\n{Probe.set.__doc__}"

    def use(self) -> str:
        """As :meth:`Probe.use`; a panel that is shown follows."""
        said = super().use()
        self._follow()
        return said

    def _ipython_display_(self) -> None:
        self.show()

    # --- what is shown ------------------------------------------------------------------------------------------

    def _bundle(self) -> dict[str, str]:
        """The table and the picture as one output."""
        table = self.table()
        image = base64.b64encode(figure_png(self.figure())).decode("ascii")
        picture = f'<img alt="shares and cosines of the terms" src="data:image/png;base64,{image}" width="1000">'
        below = replace(table, title="")._repr_html_()  # the picture has the title
        return {"text/html": f"<div>{picture}{below}</div>", "text/plain": str(table)}

    def _follow(self) -> None:
        """Put the settings into the controls, and the answer into the cell."""
        if self._handle is None:
            return
        self._place()
        self._handle.update(self._bundle(), raw=True)

    def _place(self) -> None:
        """Put the controls where the settings are."""
        self._moving = True
        try:
            for name, value in self._positions().items():
                if name in self.controls:
                    _put(self.controls[name], value)
        finally:
            self._moving = False

    def _positions(self) -> dict[str, object]:
        """{control: where it stands} for the settings."""
        now = self.settings
        found = {name: getattr(now, name) for name in ("temperature", "divergence", "method", "projector", "batch")}
        found["top_k"] = "all" if now.top_k is None else str(now.top_k)
        found["layers"] = now.layers if isinstance(now.layers, str) else "by hand"
        return found | {f"weight {name}": weight for name, weight in now.weights}

    def _say(self, text: str, *, wrong: bool = False) -> None:
        colour = "#B00020" if wrong else "inherit"
        self.controls["said"].value = f'<span style="color:{colour};white-space:pre-line">{html.escape(text)}</span>'

    def _try(self, action: Callable[[], str | None]) -> None:
        """Do what a control asks; what goes wrong is said in the panel, and the controls go back."""
        if self._moving:
            return
        try:
            self._say(action() or "")
        except Exception as error:  # a callback has no cell that could show it
            self._say(
                f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error), wrong=True
            )
            self._place()

    # --- controls -----------------------------------------------------------------------------------------------

    def _built(self):
        import ipywidgets as w

        about = {"style": {"description_width": "90px"}, "layout": w.Layout(width="320px")}
        slide = {"continuous_update": False, **about}
        now, at = self.settings, self._positions()
        made: dict[str, object] = {}
        if self.kd is not None:
            made["temperature"] = w.FloatLogSlider(
                value=1.0, base=2, min=-1, max=3, step=0.25, description="temperature", **slide
            )
            sizes = _sizes(self.trainer.data.pair.student_vocab.size)
            made["top_k"] = w.SelectionSlider(options=sizes, value="all", description="top k", **slide)
            methods, divergences = list(METHODS), list(dict.fromkeys([now.divergence, *DIVERGENCES]))
            made["method"] = w.Dropdown(options=methods, value=now.method, description="method", **about)
            made["divergence"] = w.Dropdown(
                options=divergences, value=now.divergence, description="divergence", **about
            )
        if any(has_layers(t) for t in self.trainer.terms):
            names = ["run", *self.layer_maps, "by hand"]
            made["layers"] = w.Dropdown(options=names, value=at["layers"], description="layer map", **about)
        if any(projectors_of(t) for t in self.trainer.terms):
            made["projector"] = w.ToggleButtons(
                options=PROJECTORS,
                value=now.projector,
                description="projector",
                tooltips=["maps as the run has them", "least squares to the student as it is", "know nothing"],
                style={"description_width": "90px", "button_width": "72px"},
            )
        made["batch"] = w.IntSlider(value=now.batch, min=0, max=max(self.batches - 1, 0), description="batch", **slide)
        for name, weight in now.weights:
            top = max(2.0, 2 * weight)
            made[f"weight {name}"] = w.FloatSlider(
                value=weight, min=0.0, max=top, step=0.01, readout_format=".2f", description=f"{name}", **slide
            )
        for name, control in made.items():
            _put(control, at[name])
            control.observe(partial(self._moved, name), names="value")
        use = w.Button(description="Use these", tooltip="Use these", button_style="primary")
        use.on_click(lambda _: self._try(self.use))
        scales = w.Button(description="Scales", tooltip="Scales")
        scales.on_click(lambda _: self._try(self._show_scales))
        again = w.Button(description="As the run has it", tooltip="As the run has it")
        again.on_click(lambda _: self._try(self._back))
        made |= {"Use these": use, "Scales": scales, "As the run has it": again}
        made["said"], made["report"] = w.HTML(), w.HTML()
        self.controls = made
        weights = [made[f"weight {name}"] for name, _ in now.weights]
        others = [c for n, c in made.items() if n in ("temperature", "top_k", "divergence", "method")]
        rest = [made[n] for n in ("layers", "projector", "batch") if n in made]
        left = w.VBox([*_part(w, "kd term", others), *_part(w, "layers and text", rest)])
        right = w.VBox(_part(w, "weights", weights))
        above = w.VBox([w.HBox([left, right]), w.HBox([use, again, scales]), made["said"]])
        return above, w.VBox([made["report"], self._built_looks(w)])

    def _moved(self, name: str, change: dict) -> None:
        """A control has another value."""
        value = change["new"]
        if name == "layers" and value == "by hand":
            return self._try(self._refuse_by_hand)
        if name.startswith("weight "):
            return self._try(lambda: self._ask(weights={name.removeprefix("weight "): value}))
        if name == "top_k":
            value = None if value == "all" else int(value)
        return self._try(lambda: self._ask(**{name: value}))

    def _ask(self, **settings) -> None:
        self.set(**settings)

    def _refuse_by_hand(self) -> None:
        if isinstance(self.settings.layers, str):
            raise ValueError("a map by hand is typed: probe.set(layers={student layer: teacher layer})")

    def _back(self) -> str:
        """All settings as the run has them."""
        self._refresh()
        self.settings = replace(self._own_settings(), batch=self.settings.batch)
        self._follow()
        return "All settings are as the run has them."

    def _show_scales(self) -> str:
        report: ScaleReport = self.scales()
        self.controls["report"].value = report._repr_html_()
        return "No term scales with what it should not." if report.ok else "Some terms scale with what they should not."

    # --- looks --------------------------------------------------------------------------------------------------

    def _built_looks(self, w):
        """A menu of pictures, drawn when one is chosen."""
        windows = len(self.trainer.data.train)
        slide = {"continuous_update": False, "style": {"description_width": "60px"}, "layout": w.Layout(width="300px")}
        names = ["none", "tokens", *(n for n in ("similarity", "attention", "routing") if self.trainer.teacher)]
        menu = w.Dropdown(options=names, value="none", description="look", style={"description_width": "60px"})
        window = w.IntSlider(value=0, min=0, max=windows - 1, description="window", **slide)
        start = w.IntSlider(value=0, min=0, max=1, step=20, description="byte", **slide)
        tokens, pictures = w.HBox(layout=w.Layout(flex_flow="row wrap")), w.VBox()
        self.controls |= {"look": menu, "window": window, "start": start, "tokens": tokens, "pictures": pictures}
        for control in (menu, window, start):
            control.observe(lambda _: self._try(self._look), names="value")
        return w.VBox([w.HTML("<b>looks</b>"), w.HBox([menu, window, start]), tokens, pictures])

    def _look(self, position: int | None = None) -> None:
        """Draw what the menu says; for tokens at a position of the text, the first of the excerpt if none is named."""
        import ipywidgets as w

        kind, window = self.controls["look"].value, self.controls["window"].value
        pictures, buttons = [], []
        if kind == "tokens":
            tokens = window_tokens(self.trainer.data.train, window)
            self._moving = True
            try:
                self.controls["start"].max = max(tokens.bytes - 1, 1)
            finally:
                self._moving = False
            start = min(self.controls["start"].value, tokens.bytes - 1)
            side = tokens.student
            shown = [i for i in range(1, len(side.ids)) if side.ends[i] > start and side.starts[i] < start + _EXCERPT]
            position = shown[0] - 1 if position is None and shown else position
            for i in shown:
                button = w.Button(
                    description=readable(side.texts[i]),
                    tooltip=f"position {i - 1}",
                    layout=w.Layout(width="auto", min_width="28px", padding="0 4px", margin="1px"),
                    button_style="info" if i - 1 == position else "",
                )
                button.on_click(lambda _, at=i - 1: self._try(lambda: self._look(at)))
                buttons.append(button)
            pictures.append(looks.alignment(self.trainer, window, start, _EXCERPT, position))
            if self.trainer.teacher is not None and position is not None:
                pictures.append(looks.distribution(self.trainer, position, window))
        elif kind != "none":
            pictures.append(getattr(looks, kind)(self.trainer, window))
        for old in (*self.controls["tokens"].children, *self.controls["pictures"].children):
            old.close()
        self.controls["tokens"].children = buttons
        images = [w.Image(value=figure_png(p), format="png", layout=w.Layout(max_width="1000px")) for p in pictures]
        self.controls["pictures"].children = images


def _part(w, text: str, controls: list) -> list:
    """Controls below their heading; nothing for none."""
    return [w.HTML(f"<b>{text}</b>"), *controls] if controls else []


def _sizes(vocabulary: int) -> list[str]:
    """Powers of two up to the vocabulary, and all cells."""
    return [*(str(2**n) for n in range((vocabulary - 1).bit_length())), "all"]


def _put(control, value) -> None:
    """Set a control, making room where its scale ends before the value, or has no such stop."""
    if hasattr(control, "options"):
        if value not in control.options:
            # numbers stay in order, what is no number comes last
            order = sorted([*control.options, value], key=lambda v: (not v.isdecimal(), int(v) if v.isdecimal() else 0))
            control.options = order
    else:
        place = math.log(value, control.base) if hasattr(control, "base") else value
        control.min, control.max = min(control.min, place), max(control.max, place)
    control.value = value


def _below(box) -> list:
    """A widget and all that is in it."""
    found = [box]
    for child in getattr(box, "children", ()):
        found += _below(child)
    return found


def build_probe(trainer, *, position: int = 0, windows: int = 4) -> ProbePanel:
    """One batch of a run under the microscope: how large every loss is, what it contributes, whether it fights others.

    As the last expression of a cell it is a panel with a control for temperature, cells, method, divergence, layers,
    projector, batch and weights; the same can be typed: ``probe.set(temperature=2.0, kd=0.5)``, ``probe.table()``,
    ``probe.rows``, ``probe.figure()``, ``probe.scales()``. Nothing of the trainer changes until ``probe.use()``.

    Args:
        trainer: from :func:`build_trainer`, at rest, at any step.
        position: number of the batch in the order of the run. windows: of it, at most; more are slower to look at.

    Raises:
        ValueError: a batch that the run has not; a run that trains in the background, or whose folder holds steps that
            are not loaded; one of several processes.
    """
    trainer.processes.refuse_several("build_probe")
    return ProbePanel(trainer, position=position, windows=windows)
