"""The API pages: ``make docs``, or ``python tests/docs/build.py --out build/api`` with pdoc installed.

All public names of kd_kit with their docstrings, and the modules whose objects they return.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

MODULES = (
    "kd_kit",  # with losses and looks, which are public
    "kd_kit.alarms",
    "kd_kit.cache_fidelity",
    "kd_kit.calibration",
    "kd_kit.callbacks",
    "kd_kit.caching",
    "kd_kit.checkpoint",
    "kd_kit.checkup",
    "kd_kit.data",
    "kd_kit.evaluation",
    "kd_kit.experts",
    "kd_kit.exporting",
    "kd_kit.fault",
    "kd_kit.head",
    "kd_kit.history",
    "kd_kit.inside",
    "kd_kit.keeping",
    "kd_kit.learning_rate",
    "kd_kit.likelihood",
    "kd_kit.lm_eval_tasks",
    "kd_kit.model_card",
    "kd_kit.offline",
    "!kd_kit[.]offline[.].*",  # how it was made
    "kd_kit.pair",
    "kd_kit.preflight",
    "kd_kit.probe",
    "kd_kit.pruning",
    "kd_kit.readings",
    "kd_kit.report",
    "kd_kit.retokenise",
    "kd_kit.rows",
    "kd_kit.sample",
    "kd_kit.session",
    "kd_kit.stages",
    "kd_kit.steering",
    "kd_kit.summary",
    "kd_kit.table",
    "kd_kit.teacher",
    "kd_kit.terms",
    "kd_kit.text_files",
    "kd_kit.together",
    "kd_kit.tokenised",
    "kd_kit.trainer",
    "kd_kit.types",
    "kd_kit.verification",
    "kd_kit.vocab",
    "kd_kit.vocabulary_audit",
    "kd_kit.words",
)

_LISTS = re.compile(r"^( *)(Args|Attributes|Shapes|Raises):\n((?:\1 +.*\n|\n)*)", re.MULTILINE)
_NEXT = re.compile(r"(?<=\. )(?=[a-z_]+(?:, [a-z_]+)*: )")


def one_a_line(docstring: str) -> str:
    """The docstring with every argument, attribute and shape on a line of its own.

    Short ones share a line in the sources ("first: this. second: that."), which a page would run together. A sentence
    begins with a capital letter, so a lower-case name with a colon after a full stop is the next one.
    """

    def apart(section: re.Match) -> str:
        spaces, name, body = section.groups()
        lines = []
        for line in body.splitlines():
            entry = re.match(rf"{spaces}    \S", line)
            first, *others = _NEXT.split(line) if entry or line.strip() else [line]
            lines += [first.rstrip(), *(f"{spaces}    {other.rstrip()}" for other in others)]
        return f"{spaces}{name}:\n" + "\n".join(lines) + "\n"

    return _LISTS.sub(apart, docstring + "\n").removesuffix("\n")


def build(out: Path, modules: tuple[str, ...] = MODULES) -> Path:
    """Write the pages into ``out`` and return the first of them."""
    import pdoc
    import pdoc.docstrings
    import pdoc.render

    import kd_kit

    plain, words = pdoc.docstrings.google, kd_kit.__doc__
    others = ", ".join(f"`{name}`" for name in modules if name != "kd_kit" and not name.startswith("!"))
    kd_kit.__doc__ = f"{words}\n\nBelow are the names of ``import kd_kit as kd``. What they return lives in {others}."
    pdoc.docstrings.GOOGLE_LIST_SECTIONS.append("Shapes")
    pdoc.docstrings.google = lambda docstring: plain(one_a_line(docstring))
    try:
        pdoc.render.configure(docformat="google", footer_text=f"kd_kit {kd_kit.__version__}")
        pdoc.pdoc(*modules, output_directory=out)
    finally:
        kd_kit.__doc__ = words
        pdoc.docstrings.google = plain
        pdoc.docstrings.GOOGLE_LIST_SECTIONS.remove("Shapes")
        pdoc.docstrings.convert.cache_clear()
    return out / "index.html"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/api"))
    print(build(parser.parse_args().out))
