"""The recipe of an earlier training run, as far as it can be run: its losses as terms of one's own.

Logits: the teacher's probabilities at temperature 4, times its embedding matrix, through a random linear map that
learns with the student, times the student's embedding matrix; then a divergence over the 256 largest entries of that,
renormalised on both sides. Hidden states: the plain squared error behind a random linear map, under a curriculum
that stands at 0.0672 of the weight from half time on. Weight of the logits 0.7 throughout, of the text 0.3.

Left out: the attention maps' squared error, since the models have other tokens and no cell of one map means a cell of
the other, and the load balance of the student, which has no experts. Kinder than the original: positions are matched
by bytes, and the loss on the text is certain to be there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kd_kit as kd
from kd_kit.head import LogitRows, head_of
from kd_kit.parts import pairs_of, states_needed, student_ends, widths_of
from kd_kit.reduce import masked_sum
from kd_kit.terms import Setup, StudentOutput

TEMPERATURE, KEPT = 4.0, 256
HALF_TIME = 0.0672


class _Probabilities(nn.Module):
    """The divergence at aligned rows, [n], from the teacher's probabilities multiplied through both embeddings."""

    group = "projectors"

    def __init__(self, setup: Setup):
        super().__init__()
        student, teacher = widths_of(setup)
        self.map = _random_map(teacher, student, seed=0)
        self._teacher = (head_of(setup.teacher), setup.teacher.get_input_embeddings().weight.detach())

    def forward(self, rows: LogitRows) -> Tensor:
        head, embedding = self._teacher
        given = rows.given["row_states"]
        states = torch.where(given.there.unsqueeze(-1), given.states.detach().float(), 0.0)
        mixed = torch.softmax(head.logits(states) / TEMPERATURE, dim=-1) @ embedding.float()
        taught = rows.head.logits(self.map(mixed)) / TEMPERATURE
        kept = taught.topk(min(KEPT, taught.shape[-1]), dim=-1)
        theirs = torch.log_softmax(kept.values, dim=-1)
        ours = torch.log_softmax(rows.logits.gather(-1, kept.indices) / TEMPERATURE, dim=-1)
        value = TEMPERATURE**2 * (theirs.exp() * (theirs - ours)).sum(-1)
        return torch.where(given.there, value, torch.zeros_like(value))


class _SquaredError(nn.Module):
    """Mean over channels of the squared error between the teacher's last state and a map of the student's."""

    group = "projectors"

    def __init__(self, setup: Setup):
        super().__init__()
        ((self._ours, self._theirs),) = pairs_of(setup, None, 1)[-1:]
        self.map = _random_map(*widths_of(setup), seed=1)

    def forward(self, output: StudentOutput, signal, batch) -> kd.LossValue:
        guess = self.map(student_ends(output, self._ours, batch).float())
        return masked_sum(((guess - signal.states[self._theirs].float()) ** 2).mean(-1))


def _random_map(width: int, to: int, *, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, to)


def earlier_terms() -> list[kd.LossTerm]:
    """Its terms, for :func:`kd_kit.build_trainer` with :func:`earlier_schedule`."""

    def logits(setup: Setup) -> dict:
        return {"rows": _Probabilities(setup), "over": "aligned", "needs": kd.Needs(row_states=True)}

    def states(setup: Setup) -> dict:
        return {"value": _SquaredError(setup), "needs": states_needed(pairs_of(setup, None, 1)[-1:])}

    wide = {"healthy": (0.0, 500.0), "source": "an earlier run's values"}
    return [
        kd.lm_term(0.3),
        kd.LossTerm(name="earlier_kd", weight=0.7, unit="nats x T^2", build=logits, **wide),
        kd.LossTerm(name="earlier_feature", weight=HALF_TIME, unit="mean square", build=states, **wide),
    ]


def earlier_schedule() -> kd.Schedule:
    """The hidden states come in slowly, until half time."""
    return kd.piecewise(earlier_feature=[(0.0, 0.0), (0.5, 1.0)])
