"""The store's verbs about models under control: orders to devices, and rollouts in rings."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from coordinator.store import schema
from foundation.artifact import Manifest

Verb: TypeAlias = Literal["release", "pin", "unpin", "rollback"]
OrderState: TypeAlias = Literal["open", "done", "refused", "withdrawn"]
RolloutState: TypeAlias = Literal["open", "done", "stopped", "superseded"]
MemberState: TypeAlias = Literal["waiting", "released", "serving", "refused", "rolled_back", "pinned"]


@dataclass(frozen=True, slots=True)
class Order:
    """One command about a device's models, and what came of it. Times are UTC seconds."""

    id: str
    agent: str
    verb: Verb
    model: str
    """SHA-256; empty for `unpin`."""
    reason: str
    who: str
    at: float
    state: OrderState = "open"
    said: str = ""
    """The device's words."""
    answered: float | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """How far the models of one exporting round are let go."""

    run: str
    round: int
    state: RolloutState
    ring: int
    """Rings that are let go are those up to this one, from 0."""
    reason: str
    """Why it was stopped."""
    began: float
    changed: float
    """When the ring was let go, or the rollout ended."""


@dataclass(frozen=True, slots=True)
class Member:
    """One device in a rollout."""

    run: str
    round: int
    agent: str
    ring: int
    state: MemberState
    model: str | None
    """SHA-256 of the new model; `None` until the device tells it."""
    before: str | None
    """SHA-256 of the model that served when the new one was let go."""
    since: float
    """When it came to this state."""
    reason: str = ""


class Transactions(Protocol):
    """What these verbs ask of the store."""

    _clock: Callable[[], float]

    def _reading(self) -> AbstractContextManager[Connection]: ...

    def _writing(self) -> AbstractContextManager[Connection]: ...


class RolloutVerbs:
    """A part of `coordinator.store.sql.Store`; all verbs may be called from any thread."""

    def add_orders(
        self: Transactions, wanted: Sequence[tuple[str, Verb, str]], *, reason: str, who: str
    ) -> list[Order]:
        """Keep orders (agent, verb, model) and their entries in the audit, all or none.

        What was open for the same agent and is undone by a new one is withdrawn: pin and unpin by each
        other, letting go of a model by rolling it back.
        """
        now = self._clock()
        made = [Order(secrets.token_hex(8), a, v, m, reason, who, now) for a, v, m in wanted]
        with self._writing() as connection:
            for order in made:
                connection.execute(_undone_by(order, now))
                connection.execute(sa.insert(schema.orders).values(**asdict(order)))
                told = " ".join(filter(None, (order.model[:12], reason)))
                values = {"at": now, "who": who, "what": f"model {order.verb}", "of": order.agent}
                connection.execute(sa.insert(schema.audit).values(**values, detail=told))
        return made

    def orders(
        self: Transactions,
        *,
        agent: str | None = None,
        ids: Sequence[str] | None = None,
        only_open: bool = False,
        limit: int = 1000,
    ) -> list[Order]:
        """Return orders, the newest `limit` of them, oldest first."""
        table = schema.orders
        query = sa.select(table).order_by(table.c.at.desc(), table.c.id).limit(limit)
        if agent is not None:
            query = query.where(table.c.agent == agent)
        if ids is not None:
            query = query.where(table.c.id.in_(list(ids)))
        if only_open:
            query = query.where(table.c.state == "open")
        with self._reading() as connection:
            return [Order(**row._mapping) for row in reversed(connection.execute(query).all())]

    def answer_order(self: Transactions, id: str, *, done: bool, said: str) -> bool:
        """Keep what a device said to an order; False where it was answered already."""
        table, state = schema.orders, "done" if done else "refused"
        change = sa.update(table).where(table.c.id == id, table.c.state == "open")
        with self._writing() as connection:
            values = {"state": state, "said": said, "answered": self._clock()}
            return bool(connection.execute(change.values(**values)).rowcount)

    def withdraw_orders(self: Transactions, models: Sequence[str], verb: Verb) -> None:
        """Say the open orders of a verb on these models no more."""
        table = schema.orders
        where = (table.c.state == "open") & (table.c.verb == verb) & table.c.model.in_(list(models))
        with self._writing() as connection:
            connection.execute(
                sa.update(table).where(where).values(state="withdrawn", answered=self._clock())
            )

    def manifests(self: Transactions, models: Sequence[str]) -> dict[str, Manifest]:
        """Return what is known of models, by their SHA-256."""
        table = schema.artifacts
        query = sa.select(table.c.sha256, table.c.manifest_json).where(table.c.sha256.in_(list(models)))
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return {row.sha256: Manifest.model_validate_json(row.manifest_json) for row in rows}

    def begin_rollout(self: Transactions, run: str, round: int, rings: Sequence[Sequence[str]]) -> bool:
        """Begin a rollout, its first ring let go, and end the one before it; False if it is there already."""
        table, now = schema.rollouts, self._clock()
        with self._writing() as connection:
            if connection.execute(sa.select(table).filter_by(run=run, round=round)).first() is not None:
                return False
            over = sa.update(table).where(table.c.state == "open")
            connection.execute(
                over.values(state="superseded", changed=now, reason=f"by round {round} of {run}")
            )
            first = Rollout(run, round, "open", 0, "", now, now)
            connection.execute(sa.insert(table).values(**asdict(first)))
            for number, agents in enumerate(rings):
                for agent in agents:
                    member = Member(run, round, agent, number, "waiting", None, None, now)
                    connection.execute(sa.insert(schema.rollout_members).values(**asdict(member)))
        return True

    def rollouts(self: Transactions, limit: int = 20) -> list[Rollout]:
        """Return the newest rollouts, newest first."""
        table = schema.rollouts
        query = sa.select(table).order_by(table.c.began.desc(), table.c.round.desc()).limit(limit)
        with self._reading() as connection:
            return [Rollout(**row._mapping) for row in connection.execute(query)]

    def change_rollout(self: Transactions, rollout: Rollout) -> bool:
        """Keep how far a rollout is, unless it has ended meanwhile; returns whether it was kept."""
        table = schema.rollouts
        where = (table.c.run == rollout.run) & (table.c.round == rollout.round) & (table.c.state == "open")
        values = {"state": rollout.state, "ring": rollout.ring, "reason": rollout.reason}
        with self._writing() as connection:
            change = sa.update(table).where(where).values(**values, changed=rollout.changed)
            return bool(connection.execute(change).rowcount)

    def members(self: Transactions, run: str, round: int) -> list[Member]:
        """Return the devices of a rollout, ring by ring."""
        table = schema.rollout_members
        query = sa.select(table).filter_by(run=run, round=round).order_by(table.c.ring, table.c.agent)
        with self._reading() as connection:
            return [Member(**row._mapping) for row in connection.execute(query)]

    def change_member(self: Transactions, member: Member) -> None:
        """Keep how a device stands in a rollout."""
        table, values = schema.rollout_members, asdict(member)
        key = {name: values.pop(name) for name in ("run", "round", "agent")}
        with self._writing() as connection:
            connection.execute(sa.update(table).filter_by(**key).values(**values))


def _undone_by(order: Order, now: float) -> sa.Update:
    """Return the change that withdraws what a new order undoes."""
    table = schema.orders
    if order.verb in ("pin", "unpin"):
        same = sa.and_(table.c.verb.in_(["pin", "unpin"]))
    else:
        same = sa.and_(table.c.model == order.model, table.c.verb.in_(["release", "rollback"]))
    where = sa.and_(table.c.agent == order.agent, table.c.state == "open", same)
    return sa.update(table).where(where).values(state="withdrawn", answered=now)
