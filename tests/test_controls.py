"""kd_kit/controls.py: wishes from any thread, taken once each."""

from __future__ import annotations

import threading

from kd_kit.controls import Controls


def test_wishes_are_taken_once_and_in_order():
    controls = Controls()
    for what in ("save", "evaluate", "save"):
        controls.want(what)
    assert controls.take() == ["save", "evaluate"]
    assert controls.take() == []


def test_the_first_reason_to_stop_counts():
    controls = Controls()
    assert controls.stop_reason is None
    controls.stop("enough")
    controls.stop("more than enough")
    assert controls.stop_reason == "enough"
    controls.clear()
    assert controls.stop_reason is None


def test_clear_forgets_everything():
    controls = Controls()
    controls.pause()
    controls.want("save")
    controls.clear()
    assert not controls.paused
    assert controls.take() == []


def rests(controls) -> threading.Thread:
    thread = threading.Thread(target=controls.rest, args=(60,), daemon=True)
    thread.start()
    return thread


def test_a_rest_ends_when_something_is_wanted():
    for wish in (lambda c: c.go_on(), lambda c: c.stop("enough"), lambda c: c.want("save")):
        controls = Controls()
        controls.pause()
        thread = rests(controls)
        wish(controls)
        thread.join(30)
        assert not thread.is_alive()


def test_a_rest_lasts_while_nothing_is_wanted():
    controls = Controls()
    controls.pause()
    thread = rests(controls)
    thread.join(0.3)
    assert thread.is_alive()
    controls.go_on()
    thread.join(30)
    assert not thread.is_alive()
