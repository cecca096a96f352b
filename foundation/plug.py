"""Smart plugs as meters: what Tasmota and Shelly publish over MQTT, turned into watts and joules at the wall.

For calibrating and for whole rounds, not for short stages: a plug of this class sees one pulse for about
twelve joules and speaks every second at best. Its messages carry no useful clock, so the time of their
arrival counts. A plug can switch the device off: nothing here publishes but Tasmota's question for readings.

    Tasmota          tele/PLUG/SENSOR, and stat/PLUG/STATUS8 as the answer to `8` on cmnd/PLUG/Status
    Shelly, Gen 1    shellies/ID/relay/N/power (W) and .../energy (watt-minutes)
    Shelly, Gen 2+   PREFIX/status/switch:N, and partial changes on PREFIX/events/rpc
"""

from __future__ import annotations

import asyncio
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from foundation.errors import SettingsError
from foundation.transport import Transport

ASK_S = 1.0
"""Tasmota measures once a second."""
PULSE_J = 12.0
"""A plug of the usual kind sees a pulse every twelve joules, whatever decimals it writes."""
STALE_PERIODS = 3
MOST_W = 1e5
"""No plug carries more: such a number is an error."""
MOST_J = 1e15
"""No plug has counted more."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One message's figures; `None` for what it did not say."""

    time_s: float
    watts: float | None
    joules: float | None
    """The plug's own total."""


class Plug(ABC):
    """One plug's state, from its messages in the order in which they came."""

    kind: ClassVar[str]
    period_s: ClassVar[float] = 10.0
    """How often it speaks by itself, at the latest."""

    def __init__(self, name: str, channel: int = 0) -> None:
        self.name, self.channel = name, channel
        self.last: Reading | None = None
        self.breaks = 0
        """How often the plug's total went backwards: it was reset, and what was lost is unknown."""
        self.step_j: float | None = None
        """Smallest step of its total, from the decimals that it writes; `None` before it has told one."""
        self.step_w: float | None = None
        """The same of its watts."""
        self._told: object = None

    @property
    @abstractmethod
    def topics(self) -> tuple[str, ...]:
        """Topics to subscribe to."""

    @property
    def question(self) -> tuple[str, bytes] | None:
        """Topic and payload that ask for a reading now; `None` for a plug that speaks by itself."""
        return None

    @property
    def silent_s(self) -> float:
        """A plug that said nothing for longer is silent: what happened meanwhile is not known."""
        return STALE_PERIODS * self.period_s

    @property
    def own_clock(self) -> str | None:
        """What its own clock said in its last message, as a person may compare it; nothing rests on it."""
        return None if self._told is None else str(self._told)

    @abstractmethod
    def _told_by(self, topic: str, payload: bytes) -> tuple[object, float | None, float | None] | None:
        """Return what tells a new message from a repeated one, watts, and joules; `None` if it is not one."""

    def take(self, topic: str, payload: bytes, now_s: float, *, retained: bool = False) -> Reading | None:
        """Return what a message says; `None` for a retained, repeated, foreign or broken one."""
        if retained:
            return None  # nobody knows how old it is
        try:
            found = self._told_by(topic, payload)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return None
        if found is None or (found[0] is not None and found[0] == self._told):
            return None
        self._told, watts, joules = found
        if watts is None and joules is None:
            return None
        before = self.last
        if before is not None and joules is not None and before.joules is not None and joules < before.joules:
            self.breaks += 1
        self.last = Reading(now_s, watts, joules)
        return self.last

    def _total(self, value: Any, unit_j: float) -> float | None:
        """Return a total in joules, and note the finest step that it was ever written with."""
        number = _number(value)
        if number is None or number > MOST_J / unit_j:
            return None
        step = unit_j * 10.0 ** -len(str(value).strip().partition(".")[2])
        self.step_j = step if self.step_j is None else min(step, self.step_j)
        return number * unit_j

    def _power(self, value: Any) -> float | None:
        """Return watts, and note the finest step that they were ever written with."""
        number = _number(value)
        if number is None or number > MOST_W:
            return None
        step = 10.0 ** -len(str(value).strip().partition(".")[2])
        self.step_w = step if self.step_w is None else min(step, self.step_w)
        return number

    def watts(self, now_s: float) -> float | None:
        """Return the last reading's watts; `None` once the plug has been silent for three periods."""
        if self.last is None or now_s - self.last.time_s > STALE_PERIODS * self.period_s:
            return None
        return self.last.watts


class Tasmota(Plug):
    """Any plug with the Tasmota firmware."""

    kind = "tasmota"

    @property
    def topics(self) -> tuple[str, ...]:
        """Its periodic telemetry, and the answer to the question."""
        return f"tele/{self.name}/SENSOR", f"stat/{self.name}/STATUS8", f"stat/{self.name}/STATUS10"

    @property
    def question(self) -> tuple[str, bytes] | None:
        """Ask for `Status 8`, the sensors; it changes nothing."""
        return f"cmnd/{self.name}/Status", b"8"

    def _told_by(self, topic: str, payload: bytes) -> tuple[object, float | None, float | None] | None:
        if topic not in self.topics:
            return None
        message = json.loads(payload)
        message = message.get("StatusSNS", message)
        energy = message["ENERGY"]
        total = self._total(self._of(energy.get("Total")), 3.6e6)
        return message.get("Time"), self._power(self._of(energy.get("Power"))), total

    def _of(self, value: Any) -> Any:
        """Return this channel's value of a plug that has several."""
        return value[self.channel] if isinstance(value, list) else value


class Shelly1(Plug):
    """The first generation: a topic for each number."""

    kind = "shelly1"
    period_s = 30.0

    def __init__(self, name: str, channel: int = 0) -> None:
        super().__init__(name, channel)
        self._joules: float | None = None

    @property
    def topics(self) -> tuple[str, ...]:
        """Power and energy of one relay."""
        relay = f"shellies/{self.name}/relay/{self.channel}"
        return f"{relay}/power", f"{relay}/energy"

    def _told_by(self, topic: str, payload: bytes) -> tuple[object, float | None, float | None] | None:
        power, energy = self.topics
        if topic == energy:
            self._joules = self._total(payload.decode(), 60.0)
            return None, self.last.watts if self.last else None, self._joules
        return (None, self._power(payload.decode()), self._joules) if topic == power else None


class Shelly2(Plug):
    """The second generation and later: whole states, and events that say what changed."""

    kind = "shelly2"

    @property
    def silent_s(self) -> float:
        """Where nothing changes it speaks once a minute, of its energy."""
        return 90.0

    def __init__(self, name: str, channel: int = 0) -> None:
        super().__init__(name, channel)
        self._state: dict[str, Any] = {}

    @property
    def topics(self) -> tuple[str, ...]:
        """The switch's state, and events of the whole plug."""
        return f"{self.name}/status/switch:{self.channel}", f"{self.name}/events/rpc"

    def _told_by(self, topic: str, payload: bytes) -> tuple[object, float | None, float | None] | None:
        whole, events = self.topics
        if topic not in (whole, events):
            return None
        message = json.loads(payload)
        changed: Mapping[str, Any] = message
        if topic == events:
            if message.get("method") != "NotifyStatus":
                return None
            changed = message["params"].get(f"switch:{self.channel}", {})
        if "apower" not in changed and "aenergy" not in changed:
            return None
        self._state = {**self._state, **changed}
        energy = self._state.get("aenergy") or {}
        total = self._total(energy.get("total"), 3600.0)
        stamp = message["params"].get("ts") if topic == events else None
        return stamp, self._power(self._state.get("apower")), total


async def keep_asking(plug: Plug, transport: Transport) -> None:
    """Ask a plug for its readings once a second, for ever; return at once from one that is not asked."""
    question = plug.question
    while question is not None:
        await transport.publish(*question, qos=0)
        await asyncio.sleep(ASK_S)


PLUGS: dict[str, type[Plug]] = {plug.kind: plug for plug in (Tasmota, Shelly1, Shelly2)}


def plug_of(text: str) -> Plug:
    """Return the plug of `mqtt:tasmota/PLUG`, `shelly:PREFIX` (Gen 2 and later) or `shelly1:ID`.

    `#N` after it names a channel. Raises `SettingsError` that shows how one is named.
    """
    scheme, mark, rest = text.partition(":")
    if scheme == "mqtt":
        scheme, mark, rest = rest.partition("/")
    name, _, channel = rest.partition("#")
    kind = PLUGS.get("shelly2" if scheme == "shelly" else scheme)
    bad = any(sign in name for sign in "+#$\0") or not name or (channel and not channel.isdigit())
    if kind is None or not mark or bad:
        raise SettingsError(
            f"{text!r} is no smart plug: write mqtt:tasmota/PLUG, shelly:PREFIX (Gen 2 and later) or"
            " shelly1:ID, and #1 after it for the second channel"
        )
    return kind(name, int(channel or 0))


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) and number >= 0 else None
