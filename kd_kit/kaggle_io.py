"""Everything between a clone of the project and a kernel on Kaggle: build, check, push, ask, fetch, go on, plan.

``python -m kd_kit kaggle`` has the same as shell verbs.

Example:
    >>> build("distill-p100", "ada")             # build/kaggle/distill-p100
    >>> print(push("distill-p100"))              # starts a session
    >>> print(status("distill-p100"))
    >>> print(plan(fetch("distill-p100")))       # sessions that it still needs
    >>> push("distill-p100")                     # goes on where the last one stopped
"""

from kd_kit.kaggle_client import KaggleError, KernelStatus, Pushed
from kd_kit.kernel_build import build
from kd_kit.kernel_metadata import kernel_metadata, validate
from kd_kit.kernel_plan import RunPlan, plan
from kd_kit.kernel_push import fetch, push, resume, status

__all__ = [
    "KaggleError",
    "KernelStatus",
    "Pushed",
    "RunPlan",
    "build",
    "fetch",
    "kernel_metadata",
    "plan",
    "push",
    "resume",
    "status",
    "validate",
]
