"""What a simulation says while it runs, and what it found (the tables are in simulate_tables.py)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Self

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from coordinator.live import Event, Listener
from coordinator.roster import STRIKES
from coordinator.store.quarantine import Case
from coordinator.store.records import UpdateRecord
from coordinator.store.sql import Store
from foundation.artifact import Manifest
from foundation.energy import EnergyReading, Kind, Stage, split_by_kind, total
from foundation.frozen import Frozen
from foundation.messages import Json
from foundation.spec import ModelSpec

LATE_TURNS = 5
"""Rounds of a late joiner that are told apart."""


class DeviceRound(Frozen):
    """One device in one round."""

    round: int
    agent: str
    examples: int
    accuracy_sent: float
    """Of the model as it was sent, on the device's own test part."""
    accuracy: float
    """After local training."""
    kept_units: tuple[int, ...]
    """FFL units kept, by block."""
    down_bytes: int
    up_bytes: int
    train_s: float
    """Wall time of training, pruning and evaluating."""
    energy: EnergyReading
    """Of all stages of the round; the part of the receiving and sending that is not the work's is small."""
    stages: dict[Stage, EnergyReading] = Field(default_factory=dict)
    """The same by stage."""
    cpu_s: float | None = None
    """CPU seconds of training and pruning, of the thread that did it; `None` when the device did not tell."""
    validation_sent: float | None = None
    validation: float | None = None
    """Accuracy on the validation part, as sent and after local training: what settings are chosen by."""
    down_role_bytes: dict[str, int] = Field(default_factory=dict)
    up_role_bytes: dict[str, int] = Field(default_factory=dict)
    """Payload before compression, by role (`coordinator.report.role_bytes`)."""


class RoundResult(Frozen):
    """One round: unweighted means over its devices, the worst of them, and sums."""

    round: int
    devices: int
    seconds: float | None
    accuracy_sent: float
    accuracy_sent_worst: float
    accuracy_sent_worst_tenth: float = math.nan
    """Mean over the worst tenth of the devices, at least one."""
    accuracy_sent_deviation: float = math.nan
    """Standard deviation over the devices."""
    accuracy: float
    accuracy_worst: float
    accuracy_worst_tenth: float = math.nan
    accuracy_deviation: float = math.nan
    units_gone: float
    """Share of all FFL units, over devices and blocks, that are physically gone."""
    down_bytes: int
    up_bytes: int
    train_s: float
    joules: dict[Kind, float]


class LateTurn(Frozen):
    """Devices that joined late, in the first, second, ... round that asked them; means over devices."""

    turn: int
    rounds: tuple[int, ...]
    devices: int
    accuracy_sent: float
    accuracy: float
    others_sent: float | None
    """Of everybody else in the same rounds."""
    others: float | None


class Quarantined(Frozen):
    """One device's updates that were not merged, of one cause."""

    agent: str
    cause: str
    """`malformed` or `outside` (`coordinator.store.quarantine.Case`)."""
    rounds: tuple[int, ...]
    """In which it happened; without those whose number could not be read."""
    updates: int
    reason: str
    """Of the last one."""
    set_aside: bool
    """Whether the device was asked no more: it had `coordinator.roster.STRIKES` of them, of any cause."""


class SimulationReport(Frozen):
    """The whole simulation."""

    simulation: Json
    spec: ModelSpec
    seconds: float
    """Of this call, which may have done some of the rounds only."""
    rounds: tuple[RoundResult, ...]
    devices: tuple[DeviceRound, ...]
    """Every device in every round that asked it, by round and name."""
    refusals: tuple[str, ...]
    """What devices would not do, with their reasons."""
    quarantined: tuple[Quarantined, ...] = ()
    """Updates that the coordinator did not merge; of very many the oldest are not kept."""
    artifacts: tuple[Manifest, ...]
    late: tuple[LateTurn, ...] = ()
    """Late joiners in their first rounds."""

    @property
    def last(self) -> RoundResult:
        """The last round."""
        return self.rounds[-1]


def gather(
    store: Store,
    run: str,
    simulation: Json,
    seconds: float,
    *,
    late: Collection[str] = (),
    hidden: Mapping[str, int] | None = None,
) -> SimulationReport:
    """Read a finished run from its store.

    `late` names those who joined late; `hidden` has the FFL units of one dense block of agents whose model is
    not the run's.
    """
    record = store.run(run)
    spec = ModelSpec.model_validate_json(record.spec_json)
    devices = [_device_round(update) for update in store.history(run)]
    units = {d.agent: (hidden or {}).get(d.agent, spec.hidden) for d in devices}
    rounds = [
        _round_result(row.round, row.seconds, [d for d in devices if d.round == row.round], units)
        for row in store.rounds(run)
    ]
    return SimulationReport(
        simulation=simulation,
        spec=spec,
        seconds=seconds,
        rounds=tuple(rounds),
        devices=tuple(devices),
        refusals=tuple(f"round {r.round}, {r.agent}: {r.reason}" for r in store.refusals(run)),
        quarantined=tuple(_quarantined(store.quarantine.cases(run))),
        artifacts=tuple(sorted(store.artifacts(run), key=lambda m: m.agent)),
        late=tuple(_late_turns(devices, late)),
    )


def _quarantined(cases: Sequence[Case]) -> Iterator[Quarantined]:
    """Bring together what one device's updates were refused for; `cases` has the newest first."""
    for agent, cause in sorted({(case.agent, case.cause) for case in cases}):
        mine = [case for case in cases if (case.agent, case.cause) == (agent, cause)]
        yield Quarantined(
            agent=agent,
            cause=cause,
            rounds=tuple(sorted({case.round for case in mine if case.round is not None})),
            updates=len(mine),
            reason=mine[0].reason,
            set_aside=sum(case.agent == agent for case in cases) >= STRIKES,
        )


def _device_round(record: UpdateRecord) -> DeviceRound:
    summary = record.summary
    metrics = summary["metrics"]
    ledger = {
        Stage(stage): EnergyReading.model_validate(reading) for stage, reading in summary["ledger"].items()
    }
    worked = (Stage.TRAIN, Stage.PRUNE, Stage.EVALUATE)
    return DeviceRound(
        round=record.round,
        agent=record.agent,
        examples=summary["examples"],
        accuracy_sent=metrics["accuracy_sent"],
        accuracy=metrics["accuracy"],
        kept_units=tuple(summary["kept_units"]),
        down_bytes=summary["received_bytes"],
        up_bytes=summary["wire_bytes"],
        train_s=sum(ledger[stage].seconds for stage in worked if stage in ledger),
        energy=total(ledger.values()),
        stages=ledger,
        cpu_s=metrics.get("cpu_s"),
        validation_sent=metrics.get("validation_sent"),
        validation=metrics.get("validation"),
        down_role_bytes=summary.get("down_role_bytes", {}),
        up_role_bytes=summary.get("up_role_bytes", {}),
    )


def _round_result(
    number: int, seconds: float | None, devices: Sequence[DeviceRound], hidden: Mapping[str, int]
) -> RoundResult:
    kept = sum(sum(d.kept_units) for d in devices)
    dense = sum(len(d.kept_units) * hidden[d.agent] for d in devices)
    sent, after = ([getattr(d, name) for d in devices] for name in ("accuracy_sent", "accuracy"))
    return RoundResult(
        round=number,
        devices=len(devices),
        seconds=seconds,
        accuracy_sent=statistics.fmean(sent),
        accuracy_sent_worst=min(sent),
        accuracy_sent_worst_tenth=worst_tenth(sent),
        accuracy_sent_deviation=statistics.pstdev(sent),
        accuracy=statistics.fmean(after),
        accuracy_worst=min(after),
        accuracy_worst_tenth=worst_tenth(after),
        accuracy_deviation=statistics.pstdev(after),
        units_gone=1 - kept / dense,
        down_bytes=sum(d.down_bytes for d in devices),
        up_bytes=sum(d.up_bytes for d in devices),
        train_s=sum(d.train_s for d in devices),
        joules=split_by_kind(d.energy for d in devices),
    )


def worst_tenth(values: Sequence[float]) -> float:
    """Return the mean of the lowest tenth of the values, of at least one."""
    return statistics.fmean(sorted(values)[: math.ceil(len(values) / 10)])


def _late_turns(devices: Sequence[DeviceRound], late: Collection[str]) -> Iterator[LateTurn]:
    turns: dict[int, list[DeviceRound]] = {}
    for agent in sorted(late):
        own = sorted((d for d in devices if d.agent == agent), key=lambda d: d.round)
        for turn, one in enumerate(own[:LATE_TURNS], 1):
            turns.setdefault(turn, []).append(one)
    for turn, these in sorted(turns.items()):
        rounds = sorted({d.round for d in these})
        others = [d for d in devices if d.round in rounds and d.agent not in late]
        yield LateTurn(
            turn=turn,
            rounds=tuple(rounds),
            devices=len(these),
            accuracy_sent=statistics.fmean(d.accuracy_sent for d in these),
            accuracy=statistics.fmean(d.accuracy for d in these),
            others_sent=statistics.fmean(d.accuracy_sent for d in others) if others else None,
            others=statistics.fmean(d.accuracy for d in others) if others else None,
        )


# --- while it runs -------------------------------------------------------------------------------


class Watch:
    """Shows a simulation while it runs: a bar on a terminal, a line for each round in a pipe."""

    def __init__(self, console: Console, rounds: int, asked: int | Sequence[int]) -> None:
        """Write to `console`; `asked` is how many devices every round asks, or each of them."""
        self._console, self._rounds = console, rounds
        each = [asked] * rounds if isinstance(asked, int) else list(asked)
        self._before = [0, *accumulate(each)]
        """Updates of all rounds before one, by its number - 1."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[eta]}  {task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=self._before[-1], eta="", figures="")
        self._began: tuple[float, int] | None = None
        self._round, self._updates, self._figures = 0, 0, ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        """Say what is being done before the first round."""
        self._progress.update(self._task, description=what)

    def tell(self, text: str) -> None:
        """Print something that stays to be read."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    async def follow(self, listener: Listener, hidden: int) -> None:
        """Show what the coordinator's event bus tells, until it ends; a block has `hidden` units."""
        self.say("waiting for the devices")
        async for event in listener:
            self._heard(event, hidden)

    def _heard(self, event: Event, hidden: int) -> None:
        if event.kind == "update" and event.round is not None:
            if event.round != self._round:
                self._round, self._updates = event.round, 0
            self._updates += 1
        elif event.kind == "round_closed" and event.round is not None:
            self._round, self._updates = event.round, self._asked(event.round)
            self._figures = figures(event.data["metrics"], hidden)
            line = f"round {event.round:>{len(str(self._rounds))}}/{self._rounds}  {self._figures}"
            seconds = f"{event.data['metrics']['seconds']:.1f} s"
            self._console.print(f"{line}  {seconds}  {self._eta()}", highlight=False, soft_wrap=True)
        elif event.kind in ("refusal", "problem"):
            self._console.print(event.text, style="yellow", markup=False, highlight=False, soft_wrap=True)
        self._show()

    def _asked(self, number: int) -> int:
        return self._before[number] - self._before[number - 1]

    @property
    def _done(self) -> int:
        if not self._round:
            return 0
        return self._before[self._round - 1] + min(self._updates, self._asked(self._round))

    def _show(self) -> None:
        if self._began is None and self._done:
            self._began = time.monotonic(), self._done
        self._progress.update(
            self._task,
            completed=self._done,
            description=f"round {max(1, self._round)}/{self._rounds}",
            eta=self._eta(),
            figures=self._figures,
        )

    def _eta(self) -> str:
        """Return the time left at the pace since the first update was heard."""
        if self._began is None or self._done <= self._began[1]:
            return "ETA –"
        pace = (time.monotonic() - self._began[0]) / (self._done - self._began[1])
        return f"ETA {pace * (self._before[-1] - self._done):.0f} s"


def figures(metrics: Json, hidden: int) -> str:
    """Return accuracy and units of a round in one phrase; without `hidden`, where models differ, no units."""
    text = f"accuracy {metrics['accuracy_sent']:.3f} sent, {metrics['accuracy']:.3f} after"
    return f"{text}, units kept {metrics['kept_units'] / hidden:.0%}" if hidden else text
