"""What stands between the student's hidden states and the teacher's: statistics, linear maps, mixtures of maps.

All of it runs in float32 whatever the models do, starts from the first text of the run, is saved with the run, and is
left out of the exported student.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_kit.losses import router_z, switch_balance


class Moments(nn.Module):
    """Mean and standard deviation of every channel, gathered once and then frozen.

    Residual streams have a few channels hundreds of times larger than all others: without this, a student that matches
    those few alone is as good as done by any cosine.

    Args:
        width: channels.

    Shapes:
        forward: [..., width] -> [..., width] float32 with mean 0 and variance 1 on the text it was gathered from
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.forget()

    def forget(self) -> None:
        """Start observing anew."""
        self.count = 0
        self._origin = self._sum = self._square = torch.zeros(len(self.mean), dtype=torch.float64)

    def forward(self, states: Tensor) -> Tensor:
        return (states.float() - self.mean) / self.deviation

    def observe(self, states: Tensor) -> None:
        """Take these [n, width] into account for :meth:`settle`."""
        if self.count == 0 and len(states):
            self._origin = states[0].detach().double().cpu()
        states = self.shifted(states)
        self.count += len(states)
        self._sum = self._sum + states.sum(0)
        self._square = self._square + (states**2).sum(0)

    def shifted(self, states: Tensor) -> Tensor:
        """[n, width] float64 on the CPU, counted from the first row observed.

        The variance of a channel that stands at 3,000 is the small difference of two large numbers otherwise.
        """
        return states.detach().double().cpu() - self._origin

    @property
    def shifted_mean(self) -> Tensor:
        """[width] float64, the mean of everything observed, counted likewise."""
        return self._sum / self.count

    def settle(self) -> None:
        """Freeze the statistics of everything observed.

        Raises:
            ValueError: fewer than two rows were observed, or some that are not finite.
        """
        if self.count < 2:
            raise ValueError(
                f"Moments: expected at least two aligned spans in the first batches of the run, got {self.count}; is "
                "this text that both tokenizers read?"
            )
        mean = self.shifted_mean
        if not (mean.isfinite().all() and self._square.isfinite().all()):
            raise ValueError(
                "Moments: expected finite hidden states in the first batches of the run, got NaN or infinity; load the "
                "model in a dtype that holds its range: build_teacher(..., dtype=torch.float32)"
            )
        deviation = (self._square / self.count - mean**2).clamp(min=0).sqrt()
        # a channel that never moves says nothing: it stays at 0 rather than being blown up
        moving = deviation[deviation > 0]
        floor = 1e-3 * moving.median() if len(moving) else 1.0
        self.mean.copy_(self._origin + mean)
        self.deviation.copy_(deviation.clamp(min=floor))


class Projector(nn.Module):
    """A linear map from the student's hidden states to the teacher's, both standardised; float32.

    Its start is the least-squares solution on the first spans of the run, so that it has nothing to learn that a
    linear map could know, and its loss is the student's own distance.

    Args:
        student_width: D. teacher_width: E.

    Attributes:
        ridge: of the least squares, beside a variance of 1 per channel. None for 0.1 * D / spans: with about as many
            spans as channels a map without it fits these spans and no others.

    Shapes:
        forward: [n, D] -> [n, E] float32, to be compared with ``teacher(states)``
    """

    ridge: float | None = None

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.student = Moments(student_width)
        self.teacher = Moments(teacher_width)
        self.map = nn.utils.skip_init(nn.Linear, student_width, teacher_width)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        self.forget()

    def forget(self) -> None:
        """Start observing anew, also in the two statistics."""
        self.student.forget()
        self.teacher.forget()
        self._within = self._across = torch.zeros((), dtype=torch.float64)

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return self.map(self.student(states))

    def observe(self, student: Tensor, teacher: Tensor) -> None:
        """Take states of the same spans into account for :meth:`settle`.

        Shapes:
            student: [n, D]. teacher: [n, E]
        """
        self.student.observe(student)
        self.teacher.observe(teacher)
        x, y = self.student.shifted(student), self.teacher.shifted(teacher)
        self._within = self._within + x.T @ x
        self._across = self._across + x.T @ y

    def settle(self) -> None:
        """Statistics and least-squares start from everything observed.

        Raises:
            ValueError: fewer than two spans were observed.
        """
        self.student.settle()
        self.teacher.settle()
        n, (x, y) = self.student.count, (self.student, self.teacher)
        mean_x, mean_y = x.shifted_mean, y.shifted_mean
        d_x, d_y = x.deviation.double().cpu(), y.deviation.double().cpu()
        within = (self._within / n - torch.outer(mean_x, mean_x)) / torch.outer(d_x, d_x)
        across = (self._across / n - torch.outer(mean_x, mean_y)) / torch.outer(d_x, d_y)
        ridge = 0.1 * len(within) / n if self.ridge is None else self.ridge
        within += ridge * torch.eye(len(within), dtype=torch.float64)
        with torch.no_grad():
            self.map.weight.copy_(torch.linalg.solve(within, across).T)
            self.map.bias.zero_()


class KnowledgeRouter(nn.Module):
    """A mixture of linear maps in the place of one: a gate sends every span to the best k of X maps.

    Args:
        student_width: D. teacher_width: E. experts: X. active: k.
        seed: of the gate's start. The maps start as one, the least-squares map; what they are sent makes them differ.

    Raises:
        ValueError: fewer than two experts, or ``active`` outside 1 .. ``experts``.

    Source: gating, balance and z-loss: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Fedus et al. 2021,
        section 2.2, https://arxiv.org/abs/2101.03961; Zoph et al. 2022, section 3.1, https://arxiv.org/abs/2202.08906
    """

    def __init__(self, student_width: int, teacher_width: int, *, experts: int = 4, active: int = 2, seed: int = 0):
        super().__init__()
        if experts < 2 or not 1 <= active <= experts:
            raise ValueError(
                f"KnowledgeRouter: expected at least 2 experts and 1 <= active <= experts, got {experts} experts and "
                f"{active} active"
            )
        self.active = active
        self.shared = Projector(student_width, teacher_width)
        generator = torch.Generator().manual_seed(seed)
        self.gate = nn.utils.skip_init(nn.Linear, student_width, experts, bias=False)
        self.maps = nn.Parameter(torch.zeros(experts, teacher_width, student_width))
        with torch.no_grad():
            self.gate.weight.normal_(std=student_width**-0.5, generator=generator)

    @property
    def teacher(self) -> Moments:
        return self.shared.teacher

    def forget(self) -> None:
        self.shared.forget()

    def observe(self, student: Tensor, teacher: Tensor) -> None:
        self.shared.observe(student, teacher)

    def settle(self) -> None:
        self.shared.settle()

    def forward(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mixture's guess and what the gate did.

        Shapes:
            states: [n, D]
            returns: [n, E] float32; {"balance": scalar, 1 balanced to X / k collapsed, 0 without any span; "z": [n]
                z-loss of every span; "load": [X], how often each expert was chosen}
        """
        with torch.autocast(states.device.type, enabled=False):
            x = self.shared.student(states)
            logits = self.gate(x.detach())  # the gate follows the student and does not pull at it
            probs = torch.softmax(logits, dim=-1)
            weight, chosen = probs.topk(self.active, dim=-1)
            if self.active > 1:  # one alone would always weigh 1, and the gate would learn nothing
                weight = weight / weight.sum(-1, keepdim=True)
            gates = torch.zeros_like(probs).scatter(-1, chosen, weight)
            # every span through every map, as a difference from the shared one: X is small
            guess = self.shared.map(x)
            for expert, matrix in enumerate(self.maps):
                guess = guess + gates[:, expert, None] * (x @ matrix.T)
        load = torch.zeros_like(probs).scatter(-1, chosen, 1.0).sum(0)
        balance = switch_balance(probs, chosen) if len(probs) else probs.sum()
        return guess, {"balance": balance, "z": router_z(logits), "load": load}
