"""The campaigns' table, and what the long campaign ends with."""

from __future__ import annotations

import pytest
import torture
from campaign import Counts, table


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
