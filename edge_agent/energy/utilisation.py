"""The sensor of last resort: how busy the processor is, in the profile's power model.

It also holds the share of one process: agents that share a machine (a demo) must not each be charged
all of its joules.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

import psutil

from edge_agent.energy.clocks import Clocks, governor
from edge_agent.energy.gpu_load import GpuLoad, gpu_load
from edge_agent.energy.link import Link
from edge_agent.energy.power_mode import power_mode
from edge_agent.energy.sensor import EnergySensor
from foundation.energy import Kind, Scope, Stage
from foundation.profile import DeviceProfile, PowerModel

_WINDOW_S = 0.05
"""Shortest time to take a utilisation over: the kernel counts CPU time in steps of 10 ms."""

FLAGS = {"placeholder": ("placeholder_model",), "calibrated": ("calibrated",)}
"""What a reading says of the model that it was made with."""
LOOK_S = 5.0
"""How often it is looked whether the device is still as the model was chosen for."""

Seconds = Callable[[], float | None]
"""Cumulative CPU seconds; `None` for an error."""


class Utilisation:
    """Joules from CPU time: p_idle + (p_full - p_idle) * u ** exponent, u over the time since the last read.

    CPU time is a counter, so no sample is missed between two reads, however far apart they are. A calibrated
    model may also know what each clock draws, and the GPU: they are taken as they are at the read.
    """

    name: ClassVar[str] = "utilisation"

    def __init__(
        self,
        model: PowerModel,
        *,
        busy: Seconds | None = None,
        cores: int | None = None,
        root: Path = Path("/"),
    ) -> None:
        """Reckon with `model`; clock, GPU and power mode are looked for below `root`."""
        self.kind = Kind.MODELLED
        self.scope: Scope = model.scope
        self.cumulative = True
        self.idle_w: float | None = model.idle_w
        self.u_rel: float | None = model.relative_gross
        self.u_rel_net: float | None = model.relative_net
        self.offset_w = self.cross_w = self.delay_s = 0.0
        self.sampled_w: float | None = None
        self._always = tuple(dict.fromkeys((*FLAGS.get(model.basis, ()), *model.flags)))
        self.flags: tuple[str, ...] = self._always
        self._root, self._mode = root, power_mode(root)
        self._clocks = Clocks(root) if model.full_w_by_mhz else None
        self._gpu: GpuLoad | None = gpu_load(root) if model.gpu_full_w is not None else None
        self._link = Link(model.link[0], root) if model.link is not None else None
        self._link_base: tuple[float, float] | None = None
        self._looked_s: float | None = None
        self._mode_changed = False
        self.breaks = 0
        self._model = model
        self._busy = busy or machine_busy_seconds
        self._cores = cores or psutil.cpu_count() or 1
        self._sum_j = 0.0
        self._joules = 0.0
        self._base: tuple[float, float] | None = None

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return the sensor if the profile has a power model; CPU times are the running system's."""
        return cls(profile.model, root=root) if profile.model else None

    @property
    def outdated(self) -> bool:
        """Whether the power mode is another one than when this was made: another model may hold now."""
        return self._mode_changed

    def joules(self, now_s: float) -> float | None:
        """Return modelled joules since the first call; `None` if the CPU times cannot be read."""
        busy = self._busy()
        if busy is None:
            return None
        if self._looked_s is None or now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._look()
        mbit = self._link.mbit() if self._link else None
        if self._base is None:
            self._base, self._link_base = (now_s, busy), mbit
        then_s, before = self._base
        seconds = now_s - then_s
        if seconds > 0:
            mhz = self._clocks.mhz() if self._clocks else None
            gpu = self._gpu.share() if self._gpu else None
            watts = self._model.watts((busy - before) / (self._cores * seconds), mhz, gpu)
            self._joules = max(self._joules, self._sum_j + watts * seconds + self._link_j(mbit))
        if seconds >= _WINDOW_S:
            self._base, self._link_base = (now_s, busy), mbit
            self._sum_j = self._joules
        return self._joules

    def _link_j(self, mbit: tuple[float, float] | None) -> float:
        """Return the joules of the traffic since the base; none of an interface that began anew."""
        base = self._link_base
        if mbit is None or base is None or self._model.link is None:
            return 0.0
        _, up_j, down_j = self._model.link
        return up_j * max(0.0, mbit[0] - base[0]) + down_j * max(0.0, mbit[1] - base[1])

    def _look(self) -> None:
        """Look whether power mode and governor are still those that the model is of."""
        model, found = self._model, list(self._always)
        self._mode_changed = self._mode_changed or power_mode(self._root) != self._mode
        if self._mode_changed:
            found.append("power_mode_changed")
        now = governor(self._root) if model.governor else None
        if now is not None and now != model.governor:
            found.append("other_governor")
        if (self._clocks is not None and self._clocks.mhz() is None) or (
            model.gpu_full_w is not None and (self._gpu is None or self._gpu.share() is None)
        ):
            found.append("clock_or_gpu_unread")
        if self._link is not None and self._link.mbit() is None:
            found.append("link_unread")
        self.flags = tuple(found)


class ProcessShare:
    """Another sensor's joules, but only this process tree's part of them.

    The idle power is divided by the number of agents on the machine; what is above idle belongs to a
    process as its share of the busy CPU time. That is a model, so a measured sensor becomes mixed.
    """

    def __init__(
        self,
        sensor: EnergySensor,
        agents_on_host: int,
        *,
        busy: Seconds | None = None,
        own: Seconds | None = None,
        u_rel: float | None = None,
    ) -> None:
        """Wrap `sensor`; `u_rel` is the error bar to state instead of the sensor's own."""
        self.kind: Kind = Kind.MIXED if sensor.kind is Kind.MEASURED else sensor.kind
        self.scope: Scope = sensor.scope
        self.cumulative = sensor.cumulative
        self.u_rel: float | None = sensor.u_rel if u_rel is None else u_rel
        self.u_rel_net: float | None = self.u_rel
        self.offset_w, self.delay_s = sensor.offset_w / agents_on_host, sensor.delay_s
        self.cross_w = 0.0  # its error bar is a model's
        self.flags: tuple[str, ...] = (*sensor.flags, "process_share")
        self.name = sensor.name
        self._sensor = sensor
        self._agents = agents_on_host
        self._busy = busy or machine_busy_seconds
        self._own = own or ProcessTree().seconds
        self._sum_j = 0.0
        self._joules = 0.0
        self._base: tuple[float, float, float, float] | None = None

    @property
    def idle_w(self) -> float | None:
        """This agent's part of the idle power."""
        return None if self._sensor.idle_w is None else self._sensor.idle_w / self._agents

    @idle_w.setter
    def idle_w(self, watts: float | None) -> None:
        self._sensor.idle_w = None if watts is None else watts * self._agents

    @property
    def sampled_w(self) -> float | None:
        """`None`: a share of what was sampled is not a sample."""
        return None

    @property
    def breaks(self) -> int:
        """As many as the sensor's own."""
        return self._sensor.breaks

    @classmethod
    def probe(cls, profile: DeviceProfile, root: Path) -> Self | None:
        """Return `None`: this is no sensor of a profile, the meter puts it around one."""
        return None

    def joules(self, now_s: float) -> float | None:
        """Return this process tree's joules; `None` if the sensor, idle power or a CPU time is unknown."""
        total, busy, own = self._sensor.joules(now_s), self._busy(), self._own()
        if total is None or busy is None or own is None or self._sensor.idle_w is None:
            return None
        if self._base is None:
            self._base = now_s, total, busy, own
        then_s, total_before, busy_before, own_before = self._base
        seconds = now_s - then_s
        if seconds > 0:
            idle = self._sensor.idle_w * seconds
            above = max(0.0, total - total_before - idle)
            charged = idle / self._agents + above * _share(own - own_before, busy - busy_before)
            self._joules = max(self._joules, self._sum_j + charged)
        if seconds >= _WINDOW_S:
            self._base = now_s, total, busy, own
            self._sum_j = self._joules
        return self._joules


class CpuShare:
    """How busy the machine is, and which part of it is this process tree's, stage by stage."""

    def __init__(
        self, *, busy: Seconds | None = None, own: Seconds | None = None, cores: int | None = None
    ) -> None:
        self._busy = busy or machine_busy_seconds
        self._own = own or ProcessTree().seconds
        self._cores = cores or psutil.cpu_count() or 1
        self._last: tuple[float, float] | None = None
        self._stages: dict[Stage, tuple[float, float]] = {}

    def read(self, stage: Stage, elapsed: float) -> float | None:
        """Give the CPU time since the last call to `stage`; return the share of all cores that was busy."""
        busy, own = self._busy(), self._own()
        if busy is None or own is None:
            self._last = None
            return None
        last, self._last = self._last, (busy, own)
        if last is None:
            return None
        more_busy, more_own = max(0.0, busy - last[0]), max(0.0, own - last[1])
        before = self._stages.get(stage, (0.0, 0.0))
        self._stages[stage] = before[0] + more_busy, before[1] + more_own
        return more_busy / (self._cores * elapsed) if elapsed > 0 else None

    def of(self, stage: Stage) -> float | None:
        """Return this process tree's share of the busy CPU time in `stage`; `None` if that was not read."""
        times = self._stages.get(stage)
        return None if times is None else _share(times[1], times[0])

    def clear(self) -> None:
        """Begin anew, from the last read on."""
        self._stages.clear()


class ProcessTree:
    """CPU seconds of this process, its threads and its children, cheap enough to ask at every sample."""

    def __init__(self, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Look for new children every `every_s` seconds only: that costs more than a whole sample."""
        self._every_s = every_s
        self._clock = clock
        self._process = psutil.Process()
        self._children: list[psutil.Process] = []
        self._looked_s: float | None = None
        self._most = 0.0

    def seconds(self) -> float | None:
        """Return CPU seconds, never falling; a child that ended is counted by its parent from then on."""
        now = self._clock()
        if self._looked_s is None or now - self._looked_s >= self._every_s:
            self._looked_s = now
            self._children = _children(self._process)
        ended = os.times()
        used = time.process_time() + ended.children_user + ended.children_system
        used += sum(map(_cpu_seconds, self._children))
        self._most = max(self._most, used)
        return self._most


def machine_busy_seconds() -> float | None:
    """Return CPU seconds all cores spent working: not idle, not waiting for disks, not stolen by a host."""
    try:
        times = psutil.cpu_times()
    except (OSError, psutil.Error, ValueError):
        return None
    # guest time is part of user time already
    return float(sum(getattr(times, k, 0.0) for k in ("user", "nice", "system", "irq", "softirq")))


def _share(own: float, busy: float) -> float:
    # The kernel's busy time steps by 10 ms, a process's own does not: own can seem to be more than all.
    return max(0.0, own) / max(own, busy) if max(own, busy) > 0 else 0.0


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except (OSError, psutil.Error):
        return []


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (OSError, psutil.Error):  # it ended: its parent's reaped time has it
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


SENSOR = Utilisation
