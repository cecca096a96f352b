"""Virtual devices trained by a Ray of two workers come to the same bits as those trained in this process."""

from __future__ import annotations

import importlib.util
import io
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coordinator.store.sql import Store
from edge_agent.energy.meter import Meter
from edge_agent.training.trainer import Cancelled, Checkpoint, Progress, Task
from foundation.energy import Kind, Stage
from foundation.errors import SettingsError, WorkRefused
from foundation.parameters import Parameters
from foundation.profile import DeviceProfile
from foundation.spec import initial_parameters
from foundation.work import LocalWork, Phase
from hedgerow.simulate import Simulation, simulate, simulation_of, where_of
from hedgerow.simulate_ray import RayCrew
from hedgerow.simulate_report import SimulationReport, Watch
from hedgerow.virtual import RUN, Clock, Desk, Where
from tests.conftest import require_service
from tests.toys import SPEC, toy_data

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def crew() -> Iterator[RayCrew]:
    require_service(importlib.util.find_spec("ray") is not None, "ray (pip install 'hedgerow[ray]')")
    with RayCrew(workers=2) as open_crew:
        yield open_crew


def small(**changes: Any) -> Simulation:
    fields: dict[str, Any] = {
        "devices": 4,
        "rounds": 2,
        "partition": "dirichlet:0.5",
        "limit": 320,
        "settings": {"epochs": 3, "warm_up": 0, "every": 1, "threshold_rate": 0.2, "learning_rate": 1e-2},
        "model": {"width": 16, "heads": 2, "ffl_ratio": 2},
        "profile": "raspberry-pi-4b",
    }
    return simulation_of(**(fields | changes))


def figures(report: SimulationReport) -> list[tuple[Any, ...]]:
    """Everything that must not depend on where it was computed."""
    return [(d.round, d.agent, d.examples, d.accuracy_sent, d.accuracy, d.kept_units) for d in report.devices]


def last_state(folder: Path) -> bytes:
    with Store.open(folder / "coordinator") as store:
        latest = store.latest_state(RUN)
        assert latest is not None
        return latest[1]


def test_ray_comes_to_the_same_bits_and_tells_what_it_took(crew: RayCrew, tmp_path: Path) -> None:
    here = simulate(small(), tmp_path / "here", workers=2)
    there = simulate(small(), tmp_path / "there", where=Where(engine="ray"))
    assert figures(there) == figures(here)
    assert last_state(tmp_path / "there") == last_state(tmp_path / "here")
    assert not there.refusals
    for d in there.devices:
        assert d.energy.kind is Kind.MODELLED
        assert {Stage.TRAIN, Stage.PRUNE, Stage.EVALUATE} <= d.stages.keys()
        assert d.train_s > 0
        assert d.cpu_s
        joules = [d.stages[stage].joules for stage in (Stage.TRAIN, Stage.EVALUATE)]
        assert all(joule is not None and joule > 0 for joule in joules)


def test_what_was_begun_here_is_ended_by_ray_at_the_same_bits(crew: RayCrew, tmp_path: Path) -> None:
    class Interrupting(Watch):
        def _show(self) -> None:
            if self._round == 1 and self._updates == 2:
                raise KeyboardInterrupt

    whole = simulate(small(), tmp_path / "whole", workers=2)
    with pytest.raises(KeyboardInterrupt):
        simulate(small(), tmp_path / "cut", watch=Interrupting(Console(file=io.StringIO()), 2, 4))
    assert figures(simulate(small(), tmp_path / "cut", where=Where(engine="ray"))) == figures(whole)
    assert last_state(tmp_path / "cut") == last_state(tmp_path / "whole")


class Here:
    """The trainer's hooks of a device that waits."""

    def __init__(self, *, called_off: bool = False) -> None:
        self.off, self.heard = called_off, [0.0]

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        yield

    def progress(self, progress: Progress) -> None:
        self.heard.append(progress.fraction)

    def cancelled(self) -> bool:
        return self.off

    def save(self, checkpoint: Checkpoint) -> None:
        raise AssertionError("work done away leaves no checkpoint here")

    def load(self) -> Checkpoint | None:
        return None


def task(**changes: Any) -> Task:
    start = initial_parameters(SPEC, 0)
    fields: dict[str, Any] = {
        "spec": SPEC,
        "work": LocalWork(phases=(Phase(epochs=2),)),
        "start": start,
        "sent": start,
        "data": toy_data(0),
        "seed": 1,
    }
    return Task(**(fields | changes))


def away(crew: RayCrew, work: Task, hooks: Here) -> Any:
    profile = DeviceProfile.load("unknown-linux")
    with ThreadPoolExecutor(1) as pool:
        desk, clock = Desk(pool), Clock()
        with Meter(profile, [], clock=clock, threaded=False) as meter:
            outcome = desk.submit(crew.carry_out(work.data, desk, clock, meter), work, hooks).result()
            return outcome, meter.take()


def test_what_goes_wrong_there_is_raised_here_in_the_same_words(crew: RayCrew) -> None:
    bad = Parameters((name, array * float("nan")) for name, array in task().start.items())
    with pytest.raises(WorkRefused, match="loss became nan") as caught:
        away(crew, task(start=bad), Here())
    assert type(caught.value) is WorkRefused


def test_work_that_is_called_off_ends(crew: RayCrew) -> None:
    long = LocalWork(phases=(Phase(epochs=1000),))
    with pytest.raises(Cancelled):
        away(crew, task(work=long), Here(called_off=True))


def test_an_outcome_comes_with_the_seconds_of_its_stages(crew: RayCrew) -> None:
    hooks = Here()
    outcome, ledger = away(crew, task(), hooks)
    assert 0 <= outcome.metrics["accuracy"] <= 1
    assert hooks.heard[-1] == 1.0
    assert ledger[Stage.TRAIN].seconds > 0
    assert ledger[Stage.EVALUATE].seconds > 0


def test_a_cluster_that_does_not_answer_is_said(crew: RayCrew) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(SettingsError, match=f"no Ray at ray://127.0.0.1:{port} .*ray start --head"):
        RayCrew(f"ray://127.0.0.1:{port}").__enter__()


def test_an_engine_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(SettingsError, match=r"pip install 'hedgerow\[ray\]'"):
        RayCrew()
    with pytest.raises(SettingsError, match="--engine ray"):
        where_of("process", ray_address="auto")
    with pytest.raises(SettingsError, match="did you mean 'ray'"):
        where_of("rai")
