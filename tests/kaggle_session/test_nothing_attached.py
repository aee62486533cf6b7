"""Without internet and without inputs: the notebook ends before anything long begins and says what is missing."""

from __future__ import annotations

import pytest
from kernels import LITTLE
from machine import run_session


@pytest.fixture(scope="module")
def stopped(new_account, tmp_path_factory):
    account = new_account()
    account.build("distill-p100", LITTLE)
    sent = account.push("distill-p100")
    return run_session(tmp_path_factory.mktemp("nothing") / "machine", sent.notebook, hub="unreachable")


def test_it_stops_and_names_all_three(stopped):
    assert stopped.code != 0
    (said,) = [o for o in stopped.cell("find_sources(\n").outputs if o.output_type == "error"]
    assert said.ename == "ValueError"
    assert "got 3 of them not to be had" in said.evalue
    for name in ("huihui-ai/Huihui-MoE-1B-A0.6B", "HuggingFaceTB/SmolLM-135M", "HuggingFaceFW/fineweb-edu"):
        assert name in said.evalue
    for cure in ("switch the internet on", "Add Input", "OFFLINE_FALLBACK = True"):
        assert cure in said.evalue


def test_it_does_so_before_anything_long(stopped):
    asked = stopped.notebook.cells.index(stopped.cell("find_sources(\n"))
    ran = [cell.source for cell in stopped.notebook.cells[:asked] if cell.cell_type == "code"]
    assert not any(word in source for source in ran for word in ("build_session", "build_teacher", "build_data"))
    assert all(cell.get("execution_count") is None for cell in stopped.notebook.cells[asked + 1 :])
    assert list(stopped.working.iterdir()) == []


def test_the_log_ends_with_the_sentence(stopped):
    end = "\n".join(stopped.log.splitlines()[-8:])
    assert "expected a teacher, a student and a text" in end
    assert "OFFLINE_FALLBACK = True" in end
