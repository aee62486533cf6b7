"""The mission at its full shape, with random weights: a Huihui-MoE-1B teacher in float16, a SmolLM-135M student.

Real tokenizers, all nine terms, one step of two short windows on the CPU, evaluation outside autocast, a save, and
a new trainer that goes on from it. What such a run needs on a card of 16 GB is reckoned, not run.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import assets
import pytest

from kd_kit.memory import CARD

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("layers", "experts", "active", "parameters"),
    [(24, 3, 1, 1.0e9), (28, 8, 2, 2.5e9)],
    ids=["24 layers, 3 experts top-1", "28 layers, 8 experts top-2"],
)
def test_a_step_at_the_full_shape(layers, experts, active, parameters, tmp_path):
    for name in ("qwen3", "smollm2"):
        try:
            assets.tokenizer(name)
        except assets.Unreachable as error:
            pytest.skip(str(error))
    script = Path(__file__).parent / "shape_run.py"
    done = subprocess.run(
        [sys.executable, str(script), str(layers), str(experts), str(active), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert found["teacher's parameters"] == pytest.approx(parameters, rel=0.1)
    assert found["student's parameters"] == 134_515_008
    assert (found["step"], found["same"]) == (1, True)  # the new trainer stands where the first one stopped
    assert len(found["values"]) == 9 and all(math.isfinite(value) for value in found["values"].values())
    assert all(math.isfinite(bits) for bits in found["bits per byte"].values())
    assert found["taken"] < 1.25 * found["estimate"]  # checked by what the process took, here in float32
    assert found["on a card"] < CARD
