"""What can be said of an update without the model: bounds, sender, round, and whether it is waited for."""

from __future__ import annotations

from coordinator.pace import late_reason
from coordinator.planning import Course
from coordinator.store.records import RoundRecord
from coordinator.store.sql import Store
from foundation.codec import update_from
from foundation.errors import FrameMismatch, WorkRefused
from foundation.messages import Update

MAX_ROUNDS = 100_000
"""The bound of `RunSettings.rounds`."""


def checked(store: Store, agent: str, frame: bytes) -> Update | None:
    """Return an agent's update that the coordinator may want; `None` for one that it has.

    Raises `WireError` for what is no answer to anything, and `WorkRefused`, which is nobody's fault, for one
    that comes too late. Names and shapes of arrays are checked by the coordinator, which knows what it asked.
    """
    update = update_from(frame)
    if update.agent != agent:
        raise FrameMismatch(f"an update of {update.agent!r} came on the topic of {agent!r}")
    # The bound first: a number of any size fits into JSON, but not into the store.
    fits = 1 <= update.round <= MAX_ROUNDS
    record = store.round_record(update.run, update.round) if fits else None
    if record is None:
        raise FrameMismatch(f"round {update.round} of run {update.run!r} was never opened")
    if any(one.agent == agent for one in store.updates(update.run, update.round)):
        return None
    if agent not in record.agents:
        raise FrameMismatch(f"agent {agent!r} was not asked in round {update.round}")
    _check_wanted(store, record)
    return update


def _check_wanted(store: Store, record: RoundRecord) -> None:
    run = store.run(record.run)
    if run.state not in ("waiting", "running"):
        raise WorkRefused(f"run {record.run!r} is not in progress")
    if record.state == "open":
        return
    newest = store.latest_rounds(record.run, 1)[-1].round
    settings = Course.model_validate_json(run.settings_json).settings
    late = late_reason(settings, max(1, newest - record.round))
    if late is not None:
        raise WorkRefused(f"round {record.round} is closed{late}")
