"""In which range every term lies: one table, which the terms, the README and ``tests/benchmarks/ranges.py`` share.

``healthy`` is where a value lies in a run that learns; ``impossible_below`` and ``impossible_above`` are bounds beyond
which it is a bug and not bad luck; ``floor`` is the value of a perfect student, None where that is not one number.
``source`` says where the range comes from, figures marked "here" being those of ``tests/benchmarks/ranges.py`` on the
embedded pair, whose student starts from nothing.
"""

from __future__ import annotations

RANGES: dict[str, dict] = {
    "lm": {
        "unit": "nats/token",
        "healthy": (1.0, 6.0),
        "impossible_below": 0.0,
        "impossible_above": 13.5,
        "source": "2-6 for pretrained students; ln V (7.6 for 2,048 tokens, 12.5 for 262,144) at a uniform guess; "
        "here 7.7 at the start, 3.4 after 300 steps",
    },
    "kd": {
        "unit": "nats/token",
        "healthy": (0.05, 3.0),
        "impossible_below": 0.0,
        "impossible_above": 13.5,
        "floor": 0.0,
        "source": "0.5-3 at the start for pretrained students, up to 8 for untrained ones; 0.1-3 later; here 4.5, 0.57",
    },
    "span": {
        "unit": "nats/span",
        "healthy": (0.0, 2.0),
        "impossible_below": 0.0,
        "floor": 0.0,
        "source": "0-1 at the start, 0-0.5 later for pretrained students; here 7.2, 0.68",
    },
    "feature": {
        "unit": "1 - cos",
        "healthy": (0.05, 0.9),
        "impossible_below": 0.0,
        "impossible_above": 2.0,
        "floor": 0.0,
        "source": "0 is one direction, 1 none in common; the start is least squares; here 0.76, 0.26",
    },
    "layerwise": {
        "unit": "1 - cos",
        "healthy": (0.05, 0.9),
        "impossible_below": 0.0,
        "impossible_above": 2.0,
        "floor": 0.0,
        "source": "as feature; here 0.66, 0.19",
    },
    "relation": {
        "unit": "mse of cosines",
        "healthy": (0.0, 0.2),
        "impossible_below": 0.0,
        "impossible_above": 4.0,
        "floor": 0.0,
        "source": "0.02-0.3 at the start, 0.01-0.2 later; here 0.054, 0.014",
    },
    "attention": {
        "unit": "KL / ln row",
        "healthy": (0.002, 0.6),
        "impossible_below": 0.0,
        "impossible_above": 20.0,
        "floor": 0.0,
        "source": "0.52 between SmolLM2-135M and an untrained student; narrow models relate every token to all others "
        "alike, so here 0.046, 0.035",
    },
    "contrastive": {
        "unit": "/ ln candidates",
        "healthy": (0.02, 0.9),
        "impossible_below": 0.0,
        "impossible_above": 4.0,
        "source": "1 at random; the start is least squares; here 0.75, 0.15",
    },
    "router": {
        "unit": "KL / ln X",
        "healthy": (0.0, 0.3),
        "impossible_below": 0.0,
        "impossible_above": 5.0,
        "source": "1 is a uniform guess about a teacher that is certain; here 0.10, 0.027; 0.002 for "
        "SmolLM2-135M upcycled, whose routers were drawn at random",
    },
}
"""By the name of the term."""

# ways of the KD term that are not a divergence in nats over the teacher's cells
RANGES["kd sampled"] = RANGES["kd"] | {"impossible_below": -1.0, "floor": None}  # an estimate may fall a little below
RANGES["kd uld"] = {
    "unit": "L1 of sorted",
    "healthy": (0.05, 1.5),
    "impossible_below": 0.0,
    "impossible_above": 2.0,
    "floor": 0.0,
    "source": "two distributions that share no mass are 2 apart",
}
