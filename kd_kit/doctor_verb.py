"""``python -m kd_kit doctor``: the first cell's report in a shell, and the repair of torch before it is imported."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--asked", help="the card that was asked for, as P100 or 'T4 x2': says what changes")
    parser.add_argument(
        "--fix-torch", action="store_true", help="install a torch with kernels for the card, if this one has none"
    )


def run(given: argparse.Namespace) -> int:
    """The exit status: 0 where a run can begin (or torch has the card's kernels), 1 with the reason printed."""
    if given.fix_torch:
        from kd_kit.torch_fix import fix_torch

        return fix_torch()
    from kd_kit.checkup import doctor

    return 0 if doctor(asked=given.asked, stop=False).ok else 1
