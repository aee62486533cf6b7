"""How many sessions a run still needs, and how to go on with it: what its user wants to know at both ends of one."""

from __future__ import annotations

import math

from kd_kit.kaggle_place import on_kaggle
from kd_kit.session import Session
from kd_kit.table import span


def sessions_needed(to_go: float, left: float, later: float) -> float:
    """Sessions until a run is finished, this one included; infinity if they have no time for training.

    Args:
        to_go: seconds of work. left: that this session has for it. later: that every further one has.
    """
    if to_go <= left:
        return 1
    return 1 + math.ceil((to_go - max(left, 0)) / later) if later > 0 else math.inf


def forecast(session: Session, *, to_go: float, reserve: float, lead: float) -> str:
    """Whether the rest of a run fits into this session, and how many it takes if not.

    Args:
        to_go: seconds of training, evaluation and saving that are left.
        reserve: seconds at the end of a session that are kept for saving.
        lead: seconds that a session takes before its first step.
    """
    text = f"about {span(to_go)} to go"
    if session.budget is None:
        return text
    left = session.remaining() - reserve
    count = sessions_needed(to_go, left, session.budget - lead - reserve)
    if count == 1:
        return f"{text}, this session has {span(left)} for it"
    if math.isinf(count):
        return (
            f"{text}, but a session of {span(session.budget)} has no time for training: {span(lead)} go by "
            f"before the first step and {span(reserve)} are kept for saving; give it more hours="
        )
    return (
        f"{text}, this session has {span(max(left, 0))} for it: {count:.0f} sessions of {span(session.budget)}, this "
        "one included"
    )


def how_to_go_on(session: Session) -> str:
    """What to do for a run that is not at its end, in words."""
    text = f"to go on: run the notebook again, with the same build_session(run={session.name!r})"
    if on_kaggle():
        text += (
            "; in a new version with this version's output as its input (Add Input, Your Work), where the run is "
            "found by itself"
        )
    if session.mirror is not None:
        text += f"; in an empty folder it is found in {session.mirror}"
    return text
