"""`hedgerow simulate --engine ray`: the training of virtual devices, spread over a Ray cluster.

Coordinator, agents and vaults stay in the one process; what goes out is a task (model, work, seed) and what
comes back is its outcome, with the seconds and CPU seconds of its stages as measured where they were spent. A
device's data go into Ray's object store once. Work done away comes to the same bits as work done here, as
long as the processor is of the same kind.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType, TracebackType
from typing import Any, Self

from edge_agent.agent import CarryOut
from edge_agent.energy.meter import Meter
from edge_agent.samples import LocalData
from edge_agent.training.trainer import (
    Cancelled,
    Checkpoint,
    Hooks,
    Outcome,
    Progress,
    Task,
    carry_out,
    use_threads,
)
from foundation.energy import Stage
from foundation.errors import SettingsError, WorkRefused
from hedgerow.virtual import Clock, Desk

CONNECT_S = 10.0
POLL_S = 0.2
"""How often a waiting device looks whether its work was called off."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What one stage took where the work was done."""

    stage: Stage
    seconds: float
    cpu_s: float


@dataclass
class _Away:
    """The trainer's hooks where there is no meter and no vault: it adds up what the innermost stage took."""

    checkpoint: Checkpoint | None
    seconds: dict[Stage, float] = field(default_factory=dict)
    cpu_s: dict[Stage, float] = field(default_factory=dict)
    _stages: list[Stage] = field(default_factory=list)
    _then: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        self._turn()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._turn()
            self._stages.pop()

    def _turn(self) -> None:
        now = time.perf_counter(), time.thread_time()
        if self._stages:
            stage = self._stages[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now[0] - self._then[0]
            self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + now[1] - self._then[1]
        self._then = now

    def progress(self, progress: Progress) -> None:
        """Say nothing: whoever waits hears of the end."""

    def cancelled(self) -> bool:
        return False  # Ray interrupts the whole task

    def pause(self) -> float:
        return 0.0  # nothing is served there

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep nothing: a task that is lost is done again from its beginning, and ends at the same bits."""

    def load(self) -> Checkpoint | None:
        return self.checkpoint

    @property
    def spent(self) -> list[Spent]:
        return [Spent(stage, self.seconds[stage], self.cpu_s[stage]) for stage in self.seconds]


def work_away(
    wanted: str, task: dict[str, Any], data: LocalData, checkpoint: Checkpoint | None
) -> tuple[Outcome, list[Spent]]:
    """Do one device's work in a worker of the cluster; `task` holds the fields of a `Task` but its data.

    Raises as `carry_out`, and `WorkRefused` when another version than `wanted` is installed there.
    """
    if (found := version("hedgerow")) != wanted:
        raise WorkRefused(
            f"a node of the Ray cluster has hedgerow {found}, the simulation is of {wanted}: install the same"
            " on every node"
        )
    use_threads(1)
    hooks = _Away(checkpoint)
    outcome = carry_out(Task(data=data, **task), hooks)
    return outcome, hooks.spent


class RayCrew:
    """The workers of a Ray cluster, for as long as this is open.

    Without an address it starts a Ray of its own on this machine, with `workers` processes (default: one for
    each core), and ends it.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        """Raises `SettingsError` when Ray is not installed."""
        self._ray = _ray()
        self._address, self._wanted = address, workers
        self._opened = False
        self._work: Any = None
        self.workers = 0
        """Devices that train at once."""

    def __enter__(self) -> Self:
        """Connect; raises `SettingsError` when there is no cluster at the address."""
        if self._address is not None:
            _check_that_it_answers(self._address)
        if not self._ray.is_initialized():
            self._connect()
            self._opened = True
        self._work = self._ray.remote(num_cpus=1)(work_away)
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        self.workers = max(1, min(self._wanted or cores, cores))
        return self

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers that it was used
        local = {"num_cpus": self._wanted or os.cpu_count() or 1, "include_dashboard": False}
        try:
            self._ray.init(
                address=self._address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                **({} if self._address else local),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_ray(self._address, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened:
            self._ray.shutdown()

    def carry_out(self, data: LocalData, desk: Desk, clock: Clock, meter: Meter) -> CarryOut:
        """Return what does one device's work on the cluster, and charges its desk and meter for it."""
        there = self._ray.put(data)  # once, not with every task

        def away(task: Task, hooks: Hooks) -> Outcome:
            with clock.held():
                outcome, spent = self._result(task, there, hooks)
                for one in spent:
                    with meter.stage(one.stage):
                        clock.move(one.seconds)
                        desk.charge(one.cpu_s)
            hooks.progress(Progress(1.0, None, outcome.kept_units, outcome.metrics.get("accuracy_sent")))
            return outcome

        return away

    def _result(self, task: Task, data: Any, hooks: Hooks) -> tuple[Outcome, list[Spent]]:
        """Wait for the cluster's answer; raises what was raised there, `Cancelled` when called off here."""
        fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name != "data"}
        answer = self._work.remote(version("hedgerow"), fields, data, hooks.load())
        while not self._ray.wait([answer], timeout=POLL_S)[0]:
            if hooks.cancelled():
                self._ray.cancel(answer)
                raise Cancelled
        try:
            result: tuple[Outcome, list[Spent]] = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # as if it had been done here
        return result


def _check_that_it_answers(address: str) -> None:
    """Raise `SettingsError` when nobody listens at `[ray://]host:port`: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto": Ray knows where to look
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise _no_ray(address, error) from error


def _no_ray(address: str | None, error: Exception) -> SettingsError:
    where = f"at {address}" if address else "on this machine"
    reason = " ".join(str(error).split())
    return SettingsError(
        f"no Ray {where} ({reason}): `ray start --head` starts one and says its address; where it asks for a"
        " token, this command needs the same RAY_AUTH_MODE and RAY_AUTH_TOKEN"
    )


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise SettingsError("Ray is not installed here: pip install 'hedgerow[ray]'") from error
