"""Expert knowledge: which experts of a mixture the teacher would send a span through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_kit.losses import routing_kl
from kd_kit.parts import LayerMap, Part, given_layers, pairs_of, plain_layers, student_ends
from kd_kit.projectors import Moments
from kd_kit.ranges import RANGES
from kd_kit.readings import Needs
from kd_kit.reduce import masked_sum
from kd_kit.routing import Routing, find_routing, of_layer
from kd_kit.terms import LossTerm, Setup, StudentOutput
from kd_kit.types import DistillBatch, LossValue, TeacherSignal


class RoutingHead(nn.Module):
    """Guesses the teacher's distribution over experts from a student state; float32.

    Starts from the mean distribution on the first spans of the run, whatever the state.

    Shapes:
        forward: [n, D] -> [n, X] logits
    """

    def __init__(self, student_width: int, experts: int):
        super().__init__()
        self.student = Moments(student_width)
        self.map = nn.utils.skip_init(nn.Linear, student_width, experts)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)
        self.forget()

    def forget(self) -> None:
        """Start observing anew."""
        self.student.forget()
        self._sum = torch.zeros(self.map.out_features, dtype=torch.float64)

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return self.map(self.student(states))

    def observe(self, states: Tensor, routing: Tensor) -> None:
        self.student.observe(states)
        self._sum = self._sum + routing.detach().double().cpu().sum(0)

    def settle(self) -> None:
        self.student.settle()
        mean = self._sum / self._sum.sum()
        with torch.no_grad():
            self.map.bias.copy_(mean.clamp(min=1e-6).log())


class RouterPart(Part):
    """KL(teacher's routing || the student's guess of it) / ln X, the mean over layers."""

    group = "routers"

    def __init__(self, pairs: tuple[tuple[int, int], ...], student_width: int, routing: Routing):
        super().__init__()
        self.pairs = pairs
        self.active = [of_layer(routing.active, routing, theirs) for _, theirs in pairs]
        self.heads = nn.ModuleList(
            RoutingHead(student_width, of_layer(routing.experts, routing, theirs)) for _, theirs in pairs
        )

    def observe(self, output, signal, batch) -> None:
        for (ours, theirs), head in zip(self.pairs, self.heads, strict=True):
            head.observe(student_ends(output, ours, batch), signal.routing[theirs])

    def forward(self, output: StudentOutput, signal: TeacherSignal, batch: DistillBatch) -> LossValue:
        values, loads = [], []
        for (ours, theirs), head, active in zip(self.pairs, self.heads, self.active, strict=True):
            routing = signal.routing[theirs]
            values.append(routing_kl(head(student_ends(output, ours, batch)), routing))
            chosen = routing.topk(active, dim=-1).indices
            loads.append(torch.zeros_like(routing).scatter(-1, chosen, 1.0).sum(0) / active)
        values = torch.stack(values)
        found = masked_sum(values.mean(0))
        extras = {"by_layer": values.sum(1)}
        if len({len(load) for load in loads}) == 1:
            extras["teacher_load"] = torch.stack(loads)
        return LossValue(found.sum, found.count, extras)


def router_term(
    weight: float = 0.3,
    *,
    layers: LayerMap | None = None,
    taps: int = 2,
    scores: str | None = None,
    name: str = "router",
) -> LossTerm:
    """Does the student's state tell which experts the teacher would use? KL over experts / ln X, in nats per ln X.

    A small head on a student layer predicts the router's distribution at the mapped teacher layer, at the ends of
    spans; it is left out of the export. A label carries at most log2 X bits, so this is a hint and no more.

    Args:
        layers: {student layer: teacher layer with a router}, counted from 1; if left out, ``taps`` proportional
            pairs, each moved to the nearest teacher layer that has a router.
        scores: what the teacher's routers make of their logits, for a family that :func:`kd_kit.routing.find_routing`
            does not list.
        name: of the term, where a run has several of this kind.

    Raises:
        ValueError: when the trainer is built: a teacher without routers, or layers that have none.

    Source: routing as a target of distillation, https://arxiv.org/abs/2502.12947
    """

    layers = given_layers("router_term", layers)

    def build(setup: Setup) -> dict:
        routing = find_routing(setup.teacher, scores=scores)
        pairs = pairs_of(setup, layers, taps)
        if layers is None:
            near = {min(routing.layers, key=lambda n, at=theirs: abs(n - at)): ours for ours, theirs in pairs}
            pairs = tuple((ours, theirs) for theirs, ours in near.items())  # one router, one student layer: the later
        missing = [theirs for _, theirs in pairs if theirs not in routing.layers]
        if missing:
            raise ValueError(
                f"router_term: expected teacher layers with a router, got {', '.join(map(str, missing))}; pass "
                f"layers={{student layer: one of {', '.join(map(str, routing.layers))}}}"
            )
        width = setup.student.config.get_text_config().hidden_size
        return {
            "value": RouterPart(pairs, width, routing),
            "needs": Needs(
                student_states=frozenset(ours for ours, _ in pairs),
                routing=frozenset(theirs for _, theirs in pairs),
                routing_scores=scores,
            ),
        }

    return LossTerm(
        name=name,
        weight=weight,
        **RANGES["router"],
        build=build,
        over="spans",
        settings={"layers": plain_layers(layers), "taps": taps, "scores": scores},
    )
