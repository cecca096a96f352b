"""Says the coordinator's commands about models until each device has answered; durable, safe to say twice.

An order is in the store before it is said and open until the device's card has its answer. A device that is
offline is told when it comes back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from coordinator.live import Live
from coordinator.roster import Roster
from coordinator.store.rollouts import Order, Verb
from coordinator.store.sql import Store
from foundation.messages import AgentCard, Command

logger = logging.getLogger(__name__)

AGAIN_S = 30.0
"""How soon a command is said again that a device which is here has not answered."""
Send = Callable[[str, bytes], Awaitable[None]]
"""Sends an agent a command."""


class Orders:
    """The open orders of one coordinator; all methods belong to the event loop's thread."""

    def __init__(
        self,
        store: Store,
        live: Live,
        roster: Roster,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._live, self._roster, self._send, self._clock = store, live, roster, send, clock
        self._open: dict[str, Order] = {}
        self._said: dict[str, tuple[str, float]] = {}
        """In which session of its agent, and when, an order was said last."""

    async def remember(self) -> None:
        """Load what is open."""
        found = await asyncio.to_thread(self._store.orders, only_open=True, limit=1_000_000)
        self._open = {order.id: order for order in found}
        self._said = {id: said for id, said in self._said.items() if id in self._open}

    async def add(self, wanted: Sequence[tuple[str, Verb, str]], *, reason: str, who: str) -> list[Order]:
        """Keep orders (agent, verb, model), say them to those who are here, and return them."""
        if not wanted:
            return []
        made = await asyncio.to_thread(self._store.add_orders, wanted, reason=reason, who=who)
        await self.remember()  # some may be withdrawn by these
        await self.say()
        return made

    async def withdraw(self, models: Sequence[str], verb: Verb) -> None:
        """Say the orders of a verb on these models no more."""
        await asyncio.to_thread(self._store.withdraw_orders, models, verb)
        await self.remember()

    async def say(self) -> None:
        """Say open orders to those who are here and have not heard them, or not answered for long."""
        for order in list(self._open.values()):
            entry = self._roster.entries.get(order.agent)
            if entry is None or not entry.online:
                self._said.pop(order.id, None)
                continue
            session, at = self._said.get(order.id, ("", 0.0))
            if order.id in self._said and session == entry.session and self._clock() - at < AGAIN_S:
                continue
            self._said[order.id] = (entry.session, self._clock())
            command = Command(
                verb=order.verb,
                id=order.id,
                model=order.model,
                reason=order.reason[:1000],
                by=order.who[:64],
            )
            await self._send(order.agent, command.body())

    async def heard(self, agent: str, card: AgentCard) -> None:
        """Take the answers on a card."""
        for done in card.models.done if card.models is not None else ():
            order = self._open.get(done.id)
            if order is None or order.agent != agent:
                continue
            await asyncio.to_thread(self._store.answer_order, order.id, done=done.done, said=done.said)
            self._open.pop(order.id, None)
            self._said.pop(order.id, None)
            how = "" if done.done else " refused"
            self._live.emit(
                "order_done" if done.done else "order_refused",
                f"{agent}: {order.verb}{how}: {done.said}",
                agent=agent,
                who=order.who,
                model=order.model,
            )
