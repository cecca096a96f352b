"""The rules of budgets: what is predicted, what is cut first, and that no reason is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.budgets import Case, Verdict, decide, number
from coordinator.easing import Ease, eased, epochs_of, fewest_epochs, gone_of, trimmed
from coordinator.settings import Budget, BudgetSettings
from coordinator.spending import NOTHING, Cost, Rates, Today, history_of, rates_of, today_of
from coordinator.store.records import EPOCH, UpdateRecord
from foundation.energy import EnergyReading, Kind, Scope, Stage
from foundation.errors import SettingsError
from foundation.parameters import EVERYTHING, Role
from foundation.settings import load
from foundation.work import ImportancePruning, LocalWork, Phase, ThreadLimit, ThresholdPruning

TOMORROW = 86_400.0
HEAD = frozenset({Role.HEAD})


def rates(joules: float | None = 5.0, seconds: float = 0.5, *, kept: float | None = None) -> Rates:
    kind = Kind.NONE if joules is None else Kind.MODELLED
    fixed = Cost(None if joules is None else 1.0, 0.1)
    return Rates(Cost(joules, seconds), fixed, NOTHING, kind, kept)


def case(budget: Budget, *, epochs: int = 4, known: Rates | None = None, **more: object) -> Case:
    fields: dict[str, object] = {
        "work": LocalWork(phases=(Phase(epochs=epochs),)),
        "examples": 48,
        "export": False,
        "rates": known or rates(),
        "today": Today({}),
        "tomorrow": TOMORROW,
    }
    return Case(budget=budget, **(fields | more))  # type: ignore[arg-type]


def test_without_a_budget_nothing_is_decided() -> None:
    assert decide(case(Budget())) == Verdict()
    assert decide(case(Budget(joules=1000, deadline_s=1000, joules_per_day=1000))) == Verdict()


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        (
            Budget(joules=25),
            Verdict(
                Ease(
                    epochs=2,
                    reason="2 of 4 local epochs: the whole round needs about 41 J (modelled),"
                    " the budget is 25 J a round",
                )
            ),
        ),
        (
            Budget(deadline_s=1.2),
            Verdict(
                Ease(
                    epochs=1,
                    reason="1 of 4 local epochs: the whole round takes about 4.1 s,"
                    " the budget is 1.2 s a round",
                )
            ),
        ),
        (
            Budget(joules=9),
            Verdict(skip="it needs about 11 J (modelled) for 1 of 4 local epochs, the budget is 9 J a round"),
        ),
        (
            Budget(deadline_s=0.9),
            Verdict(skip="it takes about 1.1 s for 1 of 4 local epochs, the budget is 0.9 s a round"),
        ),
        (
            Budget(joules_per_day=10),
            Verdict(skip="it needs about 11 J (modelled) for 1 of 4 local epochs, the budget is 10 J a day"),
        ),
    ],
)
def test_every_verdict_says_why(budget: Budget, verdict: Verdict) -> None:
    assert decide(case(budget)) == verdict


def test_what_is_left_of_the_day_eases_skips_and_ends_at_midnight() -> None:
    budget = Budget(joules_per_day=100)

    def after(**joules: float) -> Verdict:
        return decide(case(budget, today=Today({Kind(kind): j for kind, j in joules.items()})))

    ease = after(measured=70.0, modelled=5.0).ease
    assert ease is not None
    assert (ease.epochs, ease.reason.partition(", ")[2]) == (2, "25 of today's 100 J are left")
    skipped = after(measured=92.0)
    assert (skipped.until, skipped.ease) == (TOMORROW, None)
    assert skipped.skip is not None
    assert skipped.skip.endswith("8 of today's 100 J are left, until 00:00 UTC")
    spent = after(measured=70.0, mixed=30.0)
    assert spent.skip == "today's 100 J are spent (70.0 J measured, 30.0 J mixed), until 00:00 UTC"
    assert spent.until == TOMORROW


def test_a_device_without_history_is_asked_in_full_but_not_on_a_spent_day() -> None:
    nobody = replace(case(Budget(joules=1, joules_per_day=10)), rates=None)
    verdict = decide(nobody)
    assert (verdict.ease, verdict.skip) == (None, None)
    assert verdict.unknown is not None
    assert decide(replace(nobody, today=Today({Kind.MEASURED: 10.0}))).skip is not None


def test_unknown_joules_cannot_be_bounded_but_seconds_can() -> None:
    verdict = decide(case(Budget(joules=1, deadline_s=2.2), known=rates(None)))
    assert verdict.unknown == "its budget of joules cannot hold: nobody knows its joules"
    assert verdict.ease is not None
    assert verdict.ease.epochs == 2
    part = decide(case(Budget(joules_per_day=500), today=Today({}, unknown=3)))
    assert (
        part.unknown == "its budget of today holds in part: some of today's updates do not tell their joules"
    )
    export = replace(rates(), export=Cost(None, 1.0))
    half = decide(case(Budget(joules=1), known=export, export=True))
    assert half.unknown is not None, "the part that is known is no bound"


def test_an_evaluation_is_never_eased() -> None:
    rest = LocalWork(phases=(), train=False)
    assert decide(case(Budget(joules=2), work=rest)) == Verdict()
    assert decide(case(Budget(joules=0.5), work=rest)).skip == (
        "it needs about 1 J (modelled) for an evaluation, the budget is 0.5 J a round"
    )


phases = st.lists(
    st.builds(Phase, epochs=st.integers(0, 12), train=st.sampled_from([EVERYTHING, HEAD])),
    min_size=1,
    max_size=4,
).map(tuple)
caps = st.one_of(st.none(), st.floats(0.1, 500))


@given(
    phases=phases,
    joules=caps,
    seconds=caps,
    per_day=caps,
    spent=st.floats(0, 200),
    step=st.one_of(st.none(), st.floats(0.01, 20)),
    examples=st.integers(0, 300),
)
def test_what_is_asked_is_within_every_budget_and_no_less_than_one_epoch(
    phases: tuple[Phase, ...],
    joules: float | None,
    seconds: float | None,
    per_day: float | None,
    spent: float,
    step: float | None,
    examples: int,
) -> None:
    budget = Budget(joules=joules, deadline_s=seconds, joules_per_day=per_day)
    work = LocalWork(phases=phases)
    one = case(budget, known=rates(step), work=work, examples=examples, today=Today({Kind.MEASURED: spent}))
    verdict = decide(one)
    assert not (verdict.skip and verdict.ease)
    if verdict.skip is not None:
        assert verdict.skip
        return
    done = work if verdict.ease is None else eased(work, verdict.ease)
    assert fewest_epochs(work) <= epochs_of(done) <= epochs_of(work)
    assert all(p.epochs >= 1 for p, q in zip(done.phases, work.phases, strict=True) if q.epochs)
    cost = one.cost(epochs_of(done))
    assert seconds is None or cost.seconds <= seconds
    if cost.joules is not None:
        assert joules is None or cost.joules <= joules
        assert per_day is None or cost.joules <= per_day - spent


@given(phases=phases, small=st.floats(0.1, 400), more=st.floats(0, 200), target=st.floats(0.0, 0.8))
def test_a_larger_budget_never_asks_for_less(
    phases: tuple[Phase, ...], small: float, more: float, target: float
) -> None:
    work = LocalWork(phases=phases, terms=(ThresholdPruning(target=target),))

    def asked(joules: float) -> tuple[int, float]:
        known = rates(kept=0.8)
        verdict = decide(case(Budget(joules=joules), work=work, known=known, ffl_share=0.6))
        if verdict.skip is not None:
            return 0, 1.0
        done = work if verdict.ease is None else eased(work, verdict.ease)
        return epochs_of(done), gone_of(done) or 0.0

    poor, rich = asked(small), asked(small + more)
    assert rich[0] >= poor[0]
    assert rich[1] <= poor[1]


@given(phases=phases, epochs=st.integers(1, 60))
def test_trimming_takes_from_the_longest_and_leaves_the_order(phases: tuple[Phase, ...], epochs: int) -> None:
    left = trimmed(phases, epochs)
    assert [p.train for p in left] == [p.train for p in phases]
    assert sum(p.epochs for p in left) <= max(epochs, sum(p.epochs > 0 for p in phases))
    assert all(
        min(1, before.epochs) <= now.epochs <= before.epochs for now, before in zip(left, phases, strict=True)
    )
    assert trimmed(left, epochs) == left
    cut = [n.epochs for n, before in zip(left, phases, strict=True) if n.epochs < before.epochs]
    assert not cut or max(p.epochs for p in left) <= max(cut) + 1


def test_more_units_go_until_all_epochs_fit_but_not_under_the_floor() -> None:
    """f = 0.5, dense: 40 J of steps and 1 J beside; 31 J pay for 30 J of steps, so half of the units."""
    work = LocalWork(phases=(Phase(epochs=4),), terms=(ThresholdPruning(target=0.2),))

    def gone(budget: float, kept: float = 1.0, step: float = 5.0, **more: object) -> float | None:
        known = rates(step, kept=kept)
        found = decide(case(Budget(joules=budget), work=work, known=known, ffl_share=0.5, **more)).ease
        return None if found is None else found.gone

    assert gone(31) == pytest.approx(0.5)
    assert gone(31, kept=0.5, step=5.0 * 0.75) == pytest.approx(0.5), "what went stays gone"
    assert gone(40) is None, "the strategy's own share is enough"
    assert gone(25) == pytest.approx(0.8)
    assert gone(22) == pytest.approx(0.9)
    assert gone(22, density_floor=0.3) == pytest.approx(0.7)
    unpruned = decide(case(Budget(joules=31), known=rates(kept=1.0), ffl_share=0.5)).ease
    assert unpruned is not None
    assert unpruned.gone is None
    left = Today({Kind.MEASURED: 69.0})
    day = decide(
        case(Budget(joules_per_day=100), work=work, known=rates(kept=1.0), ffl_share=0.5, today=left)
    )
    assert day.ease is not None
    assert day.ease.gone is None, "what is left of a day changes with the hour"


def test_easing_reaches_both_kinds_of_pruning() -> None:
    ease = Ease(epochs=2, gone=0.7, reason="")
    threshold = eased(LocalWork(phases=(Phase(epochs=5),), terms=(ThresholdPruning(target=0.9),)), ease)
    assert threshold.pruning().target == 0.9, "never back"
    term = ImportancePruning(ratio=0.4, epochs=3)
    measured = eased(LocalWork(phases=(Phase(train=HEAD), Phase(epochs=3)), terms=(term,)), ease)
    assert [p.epochs for p in measured.phases] == [1, 1]
    assert (measured.importance().ratio, measured.importance().epochs) == (0.7, 1)


# --- history ---------------------------------------------------------------------------------------


def record(
    number: int, ledger: dict[Stage, EnergyReading] | None, steps: float = 10, **summary: object
) -> UpdateRecord:
    told = {stage: r.model_dump(mode="json") for stage, r in (ledger or {}).items()}
    summary = {"metrics": {"steps": steps}, "ledger": told} | summary
    return UpdateRecord("r", number, "a", EPOCH, summary, None, 0)


def reading(
    joules: float | None, seconds: float, kind: Kind = Kind.MEASURED, scope: Scope = Scope.BOARD_DC
) -> EnergyReading:
    if joules is None:
        return EnergyReading(seconds=seconds)
    return EnergyReading(joules=joules, seconds=seconds, kind=kind, scope=scope)


def trained(joules: float | None, **more: object) -> dict[Stage, EnergyReading]:
    return {
        Stage.TRAIN: reading(joules, 2.0, **more),  # type: ignore[arg-type]
        Stage.SEND: reading(None if joules is None else 1.0, 0.5, **more),  # type: ignore[arg-type]
        Stage.WAIT: reading(1e6, 1e4),
    }


def test_rates_are_medians_of_the_last_rounds_of_training() -> None:
    resting = record(9, trained(5.0), steps=0)
    past = [resting, *(record(8 - i, trained(j)) for i, j in enumerate((20.0, 400.0, 40.0, 1e5)))]
    found = rates_of(past, 0)
    assert found is not None
    assert found.step == Cost(4.0, 0.2)
    assert found.fixed == Cost(1.0, 0.5)
    assert found.of(10) == Cost(41.0, 2.5)
    assert (found.kind, found.kept) == (Kind.MEASURED, None)
    assert rates_of([resting], 0) is None
    assert rates_of([], 0) is None


def test_kinds_and_scopes_of_history_are_not_mixed_up() -> None:
    modelled = record(3, trained(20.0, kind=Kind.MODELLED))
    assert rates_of([modelled, record(2, trained(30.0))], 0).kind is Kind.MIXED
    wall = record(2, trained(900.0, scope=Scope.WALL_AC))
    found = rates_of([modelled, wall], 0)
    assert (found.kind, found.step.joules) == (Kind.MODELLED, 2.0)
    unknown = rates_of([record(3, trained(None)), record(2, trained(20.0))], 0)
    assert (unknown.kind, unknown.step.joules) == (Kind.NONE, None)
    assert unknown.step.seconds == pytest.approx(0.2)
    two = trained(20.0) | {Stage.PRUNE: reading(1.0, 0.1, scope=Scope.RAIL)}
    assert rates_of([record(1, two)], 0).step.joules is None, "scopes are never added"


def test_an_export_counts_only_in_rounds_that_export() -> None:
    exported = trained(20.0) | {Stage.EXPORT: reading(7.0, 3.0)}
    found = rates_of([record(2, trained(20.0)), record(1, exported)], 0)
    assert found.of(10).joules == 21.0
    assert found.of(10, export=True).joules == 28.0


def test_the_share_of_units_is_that_between_arrival_and_leaving() -> None:
    told = record(1, trained(20.0), kept_units=[4, 4], metrics={"steps": 10, "kept_sent": 16})
    assert rates_of([told], 32).kept == pytest.approx(12 / 32)


def test_today_is_split_by_kind_and_knows_what_it_does_not_know() -> None:
    today = today_of(
        [
            record(1, trained(20.0)),
            record(2, trained(30.0, kind=Kind.MODELLED)),
            record(3, trained(None)),
            record(4, {}),
        ]
    )
    assert today == Today({Kind.MEASURED: 21.0, Kind.MODELLED: 31.0}, unknown=1)
    assert today.sum == 52.0


# --- threads ---------------------------------------------------------------------------------------


def told(threads: int, own: int = 4) -> dict[str, object]:
    return {"state": {"threads": threads, "own_threads": own}}


def test_history_is_kept_apart_by_threads() -> None:
    past = [
        record(4, trained(20.0), **told(2)),
        record(3, trained(40.0), **told(4)),
        record(2, trained(22.0), **told(2)),
        record(1, trained(10.0, kind=Kind.MODELLED), **told(1)),
    ]
    found = history_of(past, 0)
    assert (found.threads, found.own) == (4, 4)
    assert found.rates is not None
    assert found.rates.step.joules == 4.0
    assert {n: r.step.joules for n, r in found.fewer.items()} == {2: pytest.approx(2.1)}, (
        "a model is no meter"
    )
    one = history_of(past[:1], 0)
    assert (one.threads, one.own, dict(one.fewer)) == (2, 4, {}), "the others are forgotten"
    silent = history_of([record(1, trained(20.0)), record(2, trained(9.0), state={"x": 1})], 0)
    assert silent.rates == rates_of([record(1, trained(20.0)), record(2, trained(9.0))], 0)
    assert silent.threads is None


def four(budget: Budget, fewer: dict[int, Rates] | None = None, **more: object) -> Verdict:
    fields: dict[str, object] = {"threads": 4, "own_threads": 4, "fewer": fewer or {}}
    return decide(case(budget, **(fields | more)))  # type: ignore[arg-type]


def test_threads_are_lowered_where_history_shows_that_more_epochs_fit_so() -> None:
    ease = four(Budget(joules=25), {2: rates(2.5, 0.7)}).ease
    assert ease == Ease(
        threads=2,
        reason="2 of 4 threads: with 4 the whole round needs about 41 J (modelled),"
        " the budget is 25 J a round",
    )
    both = four(Budget(joules=25), {2: rates(4.0, 0.7)}).ease
    assert both is not None
    assert (both.threads, both.epochs) == (2, 3)
    assert "3 of 4 local epochs: the whole round needs about 33 J" in both.reason
    least = four(Budget(joules=25), {1: rates(2.5, 2.0), 2: rates(2.9, 0.7)}).ease
    assert least is not None
    assert least.threads == 2, "no fewer than bring something"


def test_threads_stay_where_fewer_bring_nothing_or_all_fits() -> None:
    assert four(Budget(joules=1000), {2: rates(2.5)}) == Verdict()
    dear = four(Budget(joules=25), {2: rates(6.0, 0.7)}).ease
    assert dear is not None
    assert (dear.threads, dear.epochs) == (None, 2)
    late = four(Budget(joules=25, deadline_s=5.0), {2: rates(2.5, 4.0)}).ease
    assert late is not None
    assert (late.threads, late.epochs) == (None, 2), "cheaper, but not in time"


def test_fewer_threads_are_asked_before_nobody_is() -> None:
    assert four(Budget(joules=9)).skip is not None
    ease = four(Budget(joules=9), {2: rates(1.5)}).ease
    assert ease is not None
    assert (ease.threads, ease.epochs) == (2, 2)


def test_what_fewer_threads_cost_is_tried_once_where_joules_are_short_and_there_is_time() -> None:
    trial = four(Budget(joules=25)).ease
    assert trial is not None
    assert (trial.threads, trial.epochs) == (2, 2)
    assert trial.reason.startswith("2 of 4 threads: to learn what that saves")
    for other in (
        four(Budget(deadline_s=1.2)),  # not joules
        four(Budget(joules=25, deadline_s=2.2)),  # half the threads may take twice as long
        four(Budget(joules=25), threads=1, own_threads=1),
        four(Budget(joules=25), threads=None, own_threads=None),  # it does not know the term
    ):
        assert other.ease is not None
        assert other.ease.threads is None
    forgotten = four(Budget(joules=60), threads=2).ease
    assert forgotten is not None
    assert forgotten.threads == 2, "what all of them cost is no longer known"
    assert four(Budget(joules=90), threads=2).ease is None, "it would fit at twice the joules"


@given(joules=st.floats(5, 60), few=st.floats(0.5, 8), seconds=caps)
def test_with_threads_as_well_what_is_asked_is_within_every_budget(
    joules: float, few: float, seconds: float | None
) -> None:
    fewer, all_of_it = rates(few, 1.1), rates()
    budget = Budget(joules=joules, deadline_s=seconds)
    verdict = four(budget, {2: fewer})
    if verdict.skip is not None:
        return
    done = case(budget).work if verdict.ease is None else eased(case(budget).work, verdict.ease)
    asked = done.thread_limit()
    cost = case(budget, known=all_of_it if asked is None else fewer).cost(epochs_of(done))
    assert cost.joules is not None
    assert cost.joules <= joules
    assert seconds is None or cost.seconds <= seconds


def test_an_eased_work_asks_for_the_threads_by_a_term_of_its_own() -> None:
    work = eased(LocalWork(terms=(ThresholdPruning(),)), Ease(threads=2, reason=""))
    assert work.thread_limit() == ThreadLimit(most=2)
    assert work.pruning() is not None
    assert "threads" in work.needs()
    assert "threads" not in eased(LocalWork(), Ease(epochs=1, reason="")).needs()


# --- settings --------------------------------------------------------------------------------------


def test_a_device_s_own_budget_counts_before_its_profile_s_and_everybody_s(tmp_path: Path) -> None:
    file = tmp_path / "coordinator.toml"
    file.write_text(
        "joules = 50\ndeadline_s = 60\n"
        "[profiles.raspberry-pi-5]\njoules = 20\njoules_per_day = 900\n"
        '[devices."pi.garden"]\njoules = 10\n'
    )
    settings, _ = load(BudgetSettings, file)
    assert settings.of("pi.garden", "raspberry-pi-5") == Budget(joules=10, deadline_s=60, joules_per_day=900)
    assert settings.of("other", "raspberry-pi-5") == Budget(joules=20, deadline_s=60, joules_per_day=900)
    assert settings.of("other", "other") == Budget(joules=50, deadline_s=60)
    file.write_text("[devices.pi]\njoule = 10\n")
    with pytest.raises(SettingsError, match="joule"):
        load(BudgetSettings, file)


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (99.94, "99.9"), (1234.4, "1234"), (12.0, "12")])
def test_numbers_have_no_exponents(value: float, text: str) -> None:
    assert number(value) == text
