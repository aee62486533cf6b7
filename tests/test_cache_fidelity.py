"""The certificate: figures by K against distributions written out, and what is read back against what was stored."""

from __future__ import annotations

import math

import pytest
import torch
from test_caching import trainer_at

from kd_kit import build_cache, cache_report
from kd_kit.cache_fidelity import by_k


def distributions(seed: int = 0, rows: int = 7, size: int = 50, homeless: float = 0.1) -> torch.Tensor:
    """[rows, size + 1], the last column is mass that no token has."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(3 * torch.randn(rows, size, generator=generator), dim=-1)
    return torch.cat([probs * (1 - homeless), torch.full((rows, 1), homeless)], dim=-1)


def written_out(row: torch.Tensor, k: int, to: torch.dtype) -> float:
    """KL(teacher || cache of K cells) of one distribution, token by token, in double."""
    row = row.double().tolist()
    *tokens, homeless = row
    order = sorted(range(len(tokens)), key=lambda v: -tokens[v])
    rest = sum(tokens[v] for v in order[k:])
    logs = torch.tensor([math.log(tokens[v]) for v in order[:k]] + [math.log(rest + homeless)]).to(to).double()
    stored = (logs - logs.logsumexp(0)).exp().tolist()
    told = dict(zip(order, stored[:k], strict=False))
    for v in order[k:]:
        told[v] = stored[-1] * rest / (rest + homeless) / (len(tokens) - k)
    told["homeless"] = stored[-1] * homeless / (rest + homeless)
    pairs = [(p, told[v]) for v, p in enumerate(tokens)] + [(homeless, told["homeless"])]
    return sum(p * math.log(p / q) for p, q in pairs if p > 0)


def test_left_open_and_rounding_add_up_to_the_kl_of_the_whole_distributions():
    whole, ks = distributions(), [8, 16, 49]
    found = by_k(whole, ks)
    assert found.shape == (7, 3, 4)
    for row in range(len(whole)):
        for line, k in enumerate(ks):
            tail, left_open, half, full = found[row, line].tolist()
            kept = whole[row, :-1].topk(k).values.sum()
            assert tail == pytest.approx(1 - float(kept), abs=1e-6)
            assert left_open + half == pytest.approx(written_out(whole[row], k, torch.half), abs=1e-6)
            assert left_open + full == pytest.approx(written_out(whole[row], k, torch.float), abs=1e-6)
            assert half > 1e-9 > full
    assert (found[:, :-1, 1] > found[:, 1:, 1]).all(), "fewer cells leave more open"


def test_nothing_is_left_open_by_an_even_tail_or_where_every_token_has_a_cell():
    even = torch.full((1, 51), 0.01)
    even[0, :8] = torch.tensor([0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03])
    even /= even.sum()
    assert float(by_k(even, [8])[0, 0, 1]) == pytest.approx(0, abs=1e-6)
    assert float(by_k(distributions(homeless=0.2), [50])[:, 0, 1].abs().max()) == 0
    assert float(by_k(distributions(homeless=0.2), [50])[0, 0, 0]) == pytest.approx(0.2)


def test_a_certificate_names_all_that_is_stored(tmp_path):
    cache = build_cache(trainer_at(tmp_path, "bridge", "span", "feature", "router"))
    said = cache.manifest["fidelity"]
    assert [what.rstrip("0123456789") for what in said["read_back"]] == [
        "KL in nats, bridge taught top ",
        "mean |difference| in nats, span log-probabilities",
        "1 - cos, states of layer ",
        *["KL in nats, routing of layer "] * (len(said["read_back"]) - 3),
    ]
    assert all(0 < value < 1e-2 for value in said["read_back"].values())
    lines = said["by_k"]["bridge taught top 16"]
    assert [line["k"] for line in lines] == [8, 16]
    # what 16 stored cells were rounded by is what was found when they were read back
    assert lines[-1]["half"] == pytest.approx(said["read_back"]["KL in nats, bridge taught top 16"], rel=0.05)
    shown = repr(cache_report(tmp_path))
    assert "bridge taught top 16: KL in nats between the teacher and a cache of K cells" in shown
    assert [line.split()[0] for line in shown.splitlines()[-2:]] == ["8", "16"]
    assert "left open by the tail" in cache_report(tmp_path)._repr_html_()


@pytest.mark.parametrize("name", ["strict", "uld", "projector", "all cells", "sampled"])
def test_every_reading_has_a_certificate(tmp_path, name):
    cache = build_cache(trainer_at(tmp_path, name), precision="full")
    said = cache.manifest["fidelity"]
    assert all(value < 1e-8 for value in said["read_back"].values()), "only sums in batches of other sizes differ"
    assert len(said["read_back"]) == 1
    assert bool(said["by_k"]) == (name not in ("projector", "sampled")), "draws have no order, states no cells"
    for lines in said["by_k"].values():
        assert lines[-1]["open"] < lines[0]["open"]
