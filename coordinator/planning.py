"""What a run was decided to be, and what its next round asks of whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

from coordinator.easing import Ease, eased
from coordinator.settings import RunSettings
from coordinator.store.records import RunRecord
from coordinator.strategies.base import RoundContext, State, Strategy
from foundation.frozen import Frozen
from foundation.messages import AgentCard, Assignment
from foundation.spec import ModelSpec


class Course(Frozen):
    """What a run was decided to be when it started; kept in the store."""

    settings: RunSettings
    spec: ModelSpec
    labels: tuple[str, ...]


def context_of(course: Course, cards: Sequence[AgentCard], number: int) -> RoundContext:
    """Return what a strategy may know of a round of this run."""
    run = course.settings
    return RoundContext(
        run=run.name,
        round=number,
        rounds=run.rounds,
        present=cards,
        spec=course.spec,
        seed=run.seed,
        deadline_s=run.deadline_s,
        strategy=run.strategy,
        export=run.exports(number),
    )


def comparable(records: Sequence[RunRecord], run: str) -> list[str]:
    """Return this run, and those before it whose steps cost the same: same model, strategy and batches.

    A run whose settings this version cannot read is none of them.
    """

    def steps(record: RunRecord) -> tuple[str, str, object] | None:
        try:
            settings = Course.model_validate_json(record.settings_json).settings
        except ValidationError:
            return None
        return record.spec_json, record.strategy, settings.settings.get("batch_size")

    mine = next((steps(record) for record in records if record.run == run), None)
    return [r.run for r in records if r.run == run or (mine is not None and steps(r) == mine)]


def planned(
    strategy: Strategy,
    state: State,
    context: RoundContext,
    eases: Mapping[str, Ease] | None = None,
) -> tuple[list[Assignment], dict[str, str]]:
    """Return the assignments of those who can do them, and the reason of everybody who is left out.

    Those who can afford less are asked for less, as `eases` says.
    """
    left_out = dict(strategy.excluded(state, context))
    abilities = {card.agent: card.terms for card in context.present}
    assignments = []
    for assignment in strategy.plan(state, context):
        unknown = sorted(assignment.work.needs() - abilities[assignment.agent])
        if unknown:
            what = ", ".join(unknown)
            left_out[assignment.agent] = f"it does not know {what}: install a newer version on that device"
        else:
            ease = (eases or {}).get(assignment.agent)
            work = assignment.work if ease is None else eased(assignment.work, ease)
            assignments.append(assignment if ease is None else assignment.model_copy(update={"work": work}))
    return assignments, left_out
