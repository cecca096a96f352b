"""Who is here, what they are, and when they were last heard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from foundation.errors import RoundError
from foundation.messages import PROTOCOL, AgentCard
from foundation.spec import ModelSpec

STRIKES = 3
"""Answers that were none, after which an agent gets no more work."""
TWINS = 2
"""Comebacks of a session that another one had followed, which show two devices of one name."""
Answers = tuple[str, tuple[int, ...], tuple[str, ...]]


@dataclass
class Entry:
    """One agent as the coordinator sees it."""

    card: AgentCard | None = None
    online: bool = False
    session: str = ""
    earlier: list[str] = field(default_factory=list)
    """Sessions that another one has followed, the last 16."""
    returned: int = 0
    """How often one of them came back."""
    last_heard: float = 0.0
    malformed: int = 0
    """Letters and frames that could not be read, or did not fit."""
    outside: int = 0
    """Updates of the present run that were far from the others'."""
    set_aside: str | None = None
    """Why this agent gets no more work, if so."""


@dataclass
class Roster:
    """All agents of the federation, by name."""

    clock: Callable[[], float] = monotonic
    entries: dict[str, Entry] = field(default_factory=dict)

    def entry(self, agent: str) -> Entry:
        """Return what is known of an agent, made on first mention; its silence is counted from then."""
        if agent not in self.entries:
            self.entries[agent] = Entry(last_heard=self.clock())
        return self.entries[agent]

    def heard(self, agent: str) -> None:
        """Note that an agent was heard just now."""
        self.entry(agent).last_heard = self.clock()

    def begun(self, agent: str, session: str) -> bool:
        """Note the session of an agent that is online; returns, once, whether two devices have this name.

        Each process draws a session of its own. One that comes back again after another belongs to a device
        that was there all the time; once alone may be an old letter of the broker's.
        """
        entry = self.entry(agent)
        if session == entry.session:
            return False
        back = session in entry.earlier
        entry.returned += back
        entry.earlier = [one for one in (*entry.earlier, entry.session) if one != session][-16:]
        entry.session = session
        return back and entry.returned == TWINS

    def strike(self, agent: str, what: Literal["malformed", "outside"], reason: str) -> str | None:
        """Count a strike; returns why the agent is set aside, with the one that does it."""
        entry = self.entry(agent)
        setattr(entry, what, getattr(entry, what) + 1)
        if entry.malformed + entry.outside < STRIKES or entry.set_aside is not None:
            return None
        if entry.outside:
            counts = f"{entry.outside} far from the others, {entry.malformed} malformed"
            total = entry.outside + entry.malformed
            entry.set_aside = f"set aside after {total} bad answers ({counts}); the last: {reason}"
        else:
            entry.set_aside = f"set aside after {entry.malformed} malformed frames; the last: {reason}"
        return entry.set_aside

    def forgive(self) -> None:
        """Forget who was far from the others, as another run begins."""
        for entry in self.entries.values():
            if entry.outside and entry.malformed < STRIKES:
                entry.set_aside = None
            entry.outside = 0

    def silent_for(self, agent: str) -> float:
        """Seconds since an agent was last heard."""
        return self.clock() - self.entry(agent).last_heard

    def reason_against(
        self, agent: str, spec: ModelSpec | None, labels: tuple[str, ...], *, unequal: bool = False
    ) -> str | None:
        """Return why an agent cannot take part, or does not want to; `None` when it does.

        With `unequal`, models and data may differ from the run's.
        """
        reason = self._unfit(agent, spec, labels, unequal=unequal)
        card = self.entry(agent).card
        if reason is None and card is not None and card.unavailable is not None:
            return str(card.unavailable)
        return reason

    def resting(
        self, spec: ModelSpec | None = None, labels: tuple[str, ...] = (), *, unequal: bool = False
    ) -> list[str]:
        """Return who could take part and does not want to at present, sorted by name."""
        return [
            agent
            for agent, entry in sorted(self.entries.items())
            if entry.card is not None
            and entry.card.unavailable is not None
            and self._unfit(agent, spec, labels, unequal=unequal) is None
        ]

    def _unfit(
        self, agent: str, spec: ModelSpec | None, labels: tuple[str, ...], *, unequal: bool
    ) -> str | None:
        """Return why an agent cannot take part, even if it wants to."""
        entry = self.entry(agent)
        if entry.card is None:
            return "it has not introduced itself yet"
        if not entry.online:
            return "it is offline"
        if entry.set_aside:
            return entry.set_aside
        if entry.card.protocol != PROTOCOL:
            return (
                f"it speaks protocol {entry.card.protocol}, this coordinator {PROTOCOL}:"
                " install the same version on both"
            )
        if entry.card.input is None:
            return entry.card.problem or "it has no data"
        if spec is None:
            return None
        return _unsized(entry.card) if unequal else _unlike(entry.card, spec, labels)

    def present(
        self, spec: ModelSpec | None = None, labels: tuple[str, ...] = (), *, unequal: bool = False
    ) -> list[AgentCard]:
        """Return the cards of everyone who can take part, sorted by name."""
        return [
            entry.card
            for agent, entry in sorted(self.entries.items())
            if entry.card is not None and self.reason_against(agent, spec, labels, unequal=unequal) is None
        ]

    def agreed(self) -> Answers:
        """Return input, shape and labels that most present agents have; raises `RoundError` for none."""
        found = Counter(answers_of(card) for card in self.present())
        if not found:
            raise RoundError("no agent with usable data is online")
        # Ties go to the smaller description, so that the choice does not depend on who came first.
        return min(found, key=lambda answers: (-found[answers], repr(answers)))


def answers_of(card: AgentCard) -> Answers:
    """Return what must agree between the agents of a run."""
    return (card.input or "none", card.shape, card.labels)


def _unsized(card: AgentCard) -> str | None:
    return None if card.size else "it does not tell the size of its model: install a newer version on it"


def _unlike(card: AgentCard, spec: ModelSpec, labels: tuple[str, ...]) -> str | None:
    if answers_of(card) == (spec.input, spec.shape, labels):
        return None
    return (
        f"its data ({card.input} {card.shape}, {len(card.labels)} classes) is not"
        f" the run's ({spec.input} {spec.shape}, {len(labels)} classes)"
    )
