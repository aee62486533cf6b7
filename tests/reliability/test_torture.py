"""The campaigns' table, a few blows of those that run in this process, and what the long campaign ends with."""

from __future__ import annotations

import random

import pytest
import torture
from campaign import Counts, table
from memory_lack import ERRORS, PLACES, memory_campaign, random_lack
from not_finite import KINDS, finite_campaign, random_blow

from kd_kit import recovery
from kd_kit.fault_trace import Trace
from kd_kit.recovery import Recovery


def test_the_table_counts_and_notes():
    counts = [Counts("kills", tried=1200, lost=1, silent=2, notes=["seed 3, run 2: gone"]), Counts("clocks", tried=5)]
    head, kills, clocks, note = table(counts).splitlines()
    assert head.split() == ["campaign", "tried", "survived", "lost", "silent"]
    assert kills.split() == ["kills", "1,200", "1,197", "1", "2"]
    assert clocks.split() == ["clocks", "5", "5", "0", "0"]
    assert note == "kills: seed 3, run 2: gone"


@pytest.mark.parametrize(
    ("found", "status"),
    [({"tried": 9}, 0), ({"tried": 9, "lost": 1}, 1), ({"tried": 9, "silent": 1}, 1), ({"tried": 0}, 1)],
)
def test_it_fails_when_anything_was_lost_or_silent_or_nothing_was_tried(tmp_path, monkeypatch, capsys, found, status):
    asked = []

    def campaign(folder, seed, count, progress):
        asked.append((seed, count))
        print("what a run says")
        return Counts("made up", **found)

    monkeypatch.setattr(torture, "CAMPAIGNS", {"made": (campaign, 200, 20), "other": (campaign, 50, 5)})
    assert (
        torture.main(["--seed", "4", "--quick", "--only", "made", "--out", str(tmp_path / "new" / "table.txt")])
        == status
    )
    assert torture.main(["--seed", "5"]) == status
    assert asked == [(4, 20), (5, 200), (5, 50)]
    said = capsys.readouterr().out
    assert "seed 4" in said
    assert "what a run says" not in said
    written = (tmp_path / "new" / "table.txt").read_text()
    assert "made up" in written
    assert written in said


def test_a_campaign_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        torture.main(["--only", "kills,fires"])
    assert "expected campaigns out of" in capsys.readouterr().err


# --- numbers that are not finite


def test_blows_of_every_kind_and_length_are_drawn():
    blows = [random_blow(random.Random(f"1 {number}")) for number in range(100)]
    assert {blow.kind for blow in blows} == set(KINDS)
    assert {blow.steps for blow in blows} == {*range(1, 8), None}
    assert {str(blow.value) for blow in blows} == {"nan", "inf", "-inf"}
    assert sum(blow.resumed_after is not None for blow in blows) >= 15
    assert blows[7] == random_blow(random.Random("1 7")), "a number is always the same blow"


# a student's layer; a weight; the teacher's signal, six in a row; a part, in two sessions; a loss in every step
NUMBERS = [0, 9, 11, 14, 29]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_is_not_finite_is_told_of_and_changes_nothing_else(tmp_path, number):
    counts = finite_campaign(tmp_path, 1, 1, numbers=[number])
    assert (counts.survived, counts.lost, counts.silent) == (1, 0, 0), counts.notes


def test_the_campaign_sees_a_wrong_place_and_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "trace", lambda *a, **k: Trace("student", layer="student.model.norm"))
    counts = finite_campaign(tmp_path / "place", 1, 1, numbers=[0])
    assert (counts.lost, counts.silent) == (0, 1)
    assert "seed 1, number 0: step 11: expected ('student', 'student.model.layers.1.mlp.act_fn')" in counts.notes[0]
    monkeypatch.undo()
    monkeypatch.setattr("not_finite.IN_A_ROW", 4)
    counts = finite_campaign(tmp_path / "row", 1, 1, numbers=[11])
    assert (counts.lost, counts.silent) == (1, 0)
    assert "to be left out, got [[20, 30]]" in counts.notes[0]


# --- memory


def test_memory_lacks_in_every_place_and_way():
    lacks = [random_lack(random.Random(f"1 {number}"), number) for number in range(20)]
    assert {lack.place for lack in lacks} == set(PLACES)
    assert {lack.error for lack in lacks} == set(ERRORS)
    assert {lack.fits for lack in lacks} == {None, 1, 2, 3}


@pytest.mark.parametrize("number", [2, 3, 6])  # backward, the second of three micro-batches, the statistics
def test_a_lack_of_memory_is_told_of_and_changes_no_loss(tmp_path, number):
    counts = memory_campaign(tmp_path, 1, 1, numbers=[number])
    assert (counts.survived, counts.lost, counts.silent) == (1, 0, 0), counts.notes


def test_the_campaign_sees_a_window_that_got_lost(tmp_path, monkeypatch):
    pieces = Recovery._pieces

    def without_last(self, batches):
        found = pieces(self, batches)
        return found[: -1 if self.micro_batch < 4 else None]

    monkeypatch.setattr(Recovery, "_pieces", without_last)
    counts = memory_campaign(tmp_path, 1, 1, numbers=[3])
    assert (counts.lost, counts.silent) == (1, 0)
    assert "a loss is off by" in counts.notes[0]
