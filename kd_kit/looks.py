"""Looks into a run: what both models say, how their tokens meet, and whether their insides are alike.

Each is a function of a trainer at rest that returns a ``matplotlib`` Figure, 1000 pixels wide at 100 dpi; nothing is
shown and nothing of the trainer changes. ``window=`` is a number of ``trainer.data.train``.
"""

from kd_kit.layer_looks import attention, routing, similarity
from kd_kit.token_looks import alignment, distribution

__all__ = ["alignment", "attention", "distribution", "routing", "similarity"]
