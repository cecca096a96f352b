"""Radiated energy of the way up: p s / r, as papers on wireless federated learning count it.

    E = p s / r ,   r = b log2(1 + g p / (N0 b))        s  bits of the update     b  bandwidth

It is what leaves the antenna, 5 to 400 times less than what a radio draws. So it has a column of its own and
is in no sum of a device's joules.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from coordinator.channel import Radio, rate_bps
from coordinator.ledger.entries import Book, Turn
from coordinator.strategies.base import RoundContext, State, load_strategy
from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.messages import AgentCard, Json
from foundation.parameters import Parameters
from foundation.radio import RadioConstants
from foundation.spec import ModelSpec

if TYPE_CHECKING:
    from coordinator.strategies.adaptive_pruning import AdaptivePruning

LABEL = "radiated RF energy, modelled, not battery energy"
WIRELESS = "adaptive_pruning"
"""The strategy whose runs have a cell of their own."""


class Radiation(Frozen):
    """Radiated energy of all updates of a run."""

    label: str = LABEL
    kind: Literal["modelled-radiated"] = "modelled-radiated"
    how: str
    """Where power, distance and bandwidth are from."""
    radiated_j: float | None
    """`None` when that of an update is not known."""
    unknown: int
    """Updates for which it is not known."""


class Uplink(Protocol):
    """Says over which radio, and with which bandwidth, an update went up."""

    @property
    def how(self) -> str:
        """Where that is from, in words."""
        ...

    def radio(self, agent: str, round: int) -> tuple[Radio, float] | None:
        """Return radio and bandwidth in Hz; `None` when they are not known."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every device at one distance with one bandwidth: the constants of firmware_profiles/_radio.toml."""

    link: Radio
    bandwidth_hz: float

    @classmethod
    def at(cls, distance_km: float) -> Fixed:
        """Return the papers' radio at a distance; raises `SettingsError` for one that is not positive."""
        if not (math.isfinite(distance_km) and distance_km > 0):
            raise SettingsError(f"a radio at {distance_km} km cannot be: give a distance above 0 in km")
        constants = RadioConstants.load()
        value = {
            key: constants.value("fl_model", key) for key in ("tx_dbm", "noise_dbm_per_hz", "bandwidth_hz")
        }
        link = Radio(value["tx_dbm"], distance_km, value["noise_dbm_per_hz"])
        return cls(link, value["bandwidth_hz"])

    @property
    def how(self) -> str:
        """The constants in words."""
        link = self.link
        return f"{link.power_dbm:g} dBm at {link.distance_km:g} km, {self.bandwidth_hz / 1e6:g} MHz a device"

    def radio(self, agent: str, round: int) -> tuple[Radio, float] | None:
        """Return the same for all."""
        return self.link, self.bandwidth_hz


@dataclass(frozen=True, slots=True)
class Cell:
    """The simulated cell of a run: places from its seed, bandwidth as its rounds shared it out."""

    shares: Mapping[tuple[str, int], tuple[Radio, float]]
    """By agent and round; empty when the cell cannot be had again."""
    how: str

    def radio(self, agent: str, round: int) -> tuple[Radio, float] | None:
        """Return what this device had in this round."""
        return self.shares.get((agent, round))


def cell(book: Book) -> Cell | None:
    """Return the run's own cell; `None` for a run without one."""
    from coordinator.strategies.adaptive_pruning import AdaptivePruning

    if book.record.strategy != WIRELESS or book.spec is None:
        return None
    try:
        strategy = load_strategy(WIRELESS, _settings(book.record.settings_json))
    except SettingsError as error:
        return Cell({}, f"not known: {error}")
    assert isinstance(strategy, AdaptivePruning)
    if strategy.rates != "simulated":
        return None
    shares: dict[tuple[str, int], tuple[Radio, float]] = {}
    for row in book.rounds:
        cards = [card for agent in row.agents if (card := book.cards.get(agent)) is not None]
        if len(cards) == len(row.agents):  # a share depends on everybody
            shares |= _shares(strategy, _context(book, book.spec, row.round, cards))
    width = f"{strategy.bandwidth_hz / 1e6:g} MHz"
    return Cell(shares, f"the run's own cell: {strategy.power_dbm:g} dBm, {width} shared as its rounds did")


def _settings(text: str) -> Json:
    """Return the strategy's settings from what the engine keeps of a run."""
    try:
        told = json.loads(text)["settings"]["settings"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


def _context(book: Book, spec: ModelSpec, number: int, cards: Sequence[AgentCard]) -> RoundContext:
    record = book.record
    return RoundContext(
        run=record.run,
        round=number,
        rounds=record.rounds,
        present=cards,
        spec=spec,
        seed=record.seed,
        deadline_s=1.0,
        strategy=record.strategy,
    )


def _shares(strategy: AdaptivePruning, context: RoundContext) -> dict[tuple[str, int], tuple[Radio, float]]:
    """Allocate a round once more: places depend on seed and names, shares on who was there."""
    state = State(0, Parameters())
    for card in context.present:
        state = strategy.enroll(state, card, context.seed)
    allocation = strategy.allocation(state, context)
    return {
        (agent, context.round): (share.device.link, share.bandwidth)
        for agent, share in allocation.shares.items()
        if isinstance(share.device.link, Radio)
    }


def radiated_j(bits: float, link: Radio, bandwidth_hz: float) -> float:
    """Return the joules that leave the antenna while so many bits go up."""
    return link.power_w * bits / rate_bps(link, bandwidth_hz)


def with_radiated(turns: Sequence[Turn], uplink: Uplink) -> tuple[tuple[Turn, ...], Radiation]:
    """Return the turns with their radiated energy, and all of it together."""
    told = tuple(turn.model_copy(update={"radiated_j": _of(turn, uplink)}) for turn in turns)
    known = [turn.radiated_j for turn in told if turn.radiated_j is not None]
    return told, Radiation(
        how=uplink.how,
        radiated_j=math.fsum(known) if known and len(known) == len(told) else None,
        unknown=len(told) - len(known),
    )


def _of(turn: Turn, uplink: Uplink) -> float | None:
    found = uplink.radio(turn.agent, turn.round)
    if found is None or turn.up_bytes is None:
        return None
    return radiated_j(8 * turn.up_bytes, *found)
