"""A run folder belongs to one living process: the second is refused in words, the first does not notice."""

from __future__ import annotations

from campaign import nursery, uninterrupted
from same_run import differences, leftovers, newest_good, outcome


def test_the_second_process_is_refused_and_the_first_is_unharmed(tmp_path):
    first = nursery().start("train", tmp_path, rest_in="evaluating")
    first.wait_for("resting")
    before = newest_good(tmp_path)
    for session in range(3):
        second = nursery().start("train", tmp_path, session=session)
        assert second.wait() == 1
        said = second.last("failed")
        assert said.startswith(
            f"RunLocked: lock_run: expected {tmp_path} to be free, got the living process {first.pid}"
        )
        assert "shut its kernel down" in said
        assert not any(line.startswith(("running", "saving")) for line in second.told)
    assert newest_good(tmp_path) == before
    first.go_on()
    assert first.wait() == 0, first.output()
    assert first.last("stopped") == "finished"
    assert differences(outcome(tmp_path), uninterrupted()) == []
    assert leftovers(tmp_path) == []


def test_the_folder_of_a_killed_process_is_free_at_once(tmp_path):
    first = nursery().start("train", tmp_path, rest_in="saving")
    first.wait_for("resting")
    first.kill()
    second = nursery().start("train", tmp_path, session=1)
    first.wait()
    assert second.wait() == 0, second.output()
    assert differences(outcome(tmp_path), uninterrupted()) == []
    assert leftovers(tmp_path) == []


def test_of_two_that_start_together_one_trains(tmp_path):
    both = [nursery().start("train", tmp_path, session=0) for _ in range(2)]
    codes = [child.wait() for child in both]
    refused = [child for child, code in zip(both, codes, strict=True) if code]
    assert codes.count(0) >= 1
    assert [child.output() for child in refused if not child.last("failed").startswith("RunLocked: ")] == []
    assert differences(outcome(tmp_path), uninterrupted()) == []
    assert leftovers(tmp_path) == []
