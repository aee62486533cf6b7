"""The few shell verbs: ``python -m kd_kit notebook``, ``demo``, ``doctor``, ``kaggle``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kd_kit import doctor_verb, kaggle_verbs


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit status is 1 with a sentence on standard error when it fails."""
    parser = argparse.ArgumentParser(prog="kd_kit", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    notebook = verbs.add_parser("notebook", help="run a notebook top to bottom and keep the result")
    notebook.add_argument("path", type=Path)
    notebook.add_argument("--out", type=Path, required=True, help="where to write it, without suffix")

    demo = verbs.add_parser("demo", help="distilled against LM-only on the embedded pair, paired seeds")
    demo.add_argument("--seeds", type=int, default=1)
    demo.add_argument("--folder", type=Path, default=Path("kd_runs/demo"), help="where the runs are kept")
    demo.add_argument("--out", type=Path, help="write the figures as JSON")
    demo.add_argument("--steps", type=int)
    demo.add_argument("--kd-weight", type=float)
    demo.add_argument("--learning-rate", type=float)
    demo.add_argument("--terms", help="which, separated by commas: lm,kd")

    doctor_verb.add_arguments(verbs.add_parser("doctor", help="what this machine can do, and each problem's cure"))
    kaggle_verbs.add_arguments(verbs.add_parser("kaggle", help="build, push and go on with kernels on Kaggle"))

    given = parser.parse_args(arguments)
    try:
        if given.verb == "notebook":
            from kd_kit.notebook_run import run_notebook

            run_notebook(given.path, given.out)
        elif given.verb == "doctor":
            return doctor_verb.run(given)
        elif given.verb == "kaggle":
            return kaggle_verbs.run(given)
        else:
            from dataclasses import replace

            from kd_kit.demo import Recipe, run_demo, table, write

            if given.seeds < 1:
                raise ValueError(f"demo: expected at least one seed, got {given.seeds}")
            named = {"steps": given.steps, "kd_weight": given.kd_weight, "learning_rate": given.learning_rate}
            named["terms"] = None if given.terms is None else tuple(given.terms.split(","))
            recipe = replace(Recipe(), **{k: v for k, v in named.items() if v is not None})
            result = run_demo(given.seeds, given.folder, recipe)
            print(table(result))
            if given.out:
                write(result, given.out)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
