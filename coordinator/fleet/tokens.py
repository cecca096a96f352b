"""Tokens for people and programs that use the page and the API; the store keeps their SHA-256 alone."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import sqlalchemy as sa
from sqlalchemy.engine import Row

from coordinator.store import schema
from coordinator.store.sql import Store
from foundation.errors import SettingsError
from foundation.topics import checked_name

Role = Literal["viewer", "operator"]
PREFIX = "hgt_"
LOOK_S = 1.0
"""How long what was looked up is believed: so soon is a token that was taken back worth nothing."""


@dataclass(frozen=True, slots=True)
class ApiToken:
    """One token: whose, and what it may do."""

    name: str
    role: Role
    created: float
    expires: float | None
    """UTC seconds; `None` never."""


class ApiTokens:
    """Makes, finds and takes back tokens."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._known: dict[str, tuple[float, ApiToken | None]] = {}

    def make(self, name: str, role: Role, *, expires_s: float | None) -> str:
        """Return a new token, which nobody can be told again. Raises `SettingsError` for a name in use."""
        checked_name(name, "token")
        token, now = PREFIX + secrets.token_urlsafe(32), self._clock()
        expires = None if expires_s is None else now + expires_s
        row = {"name": name, "role": role, "sha256": _digest(token), "created": now, "expires": expires}
        table = schema.api_tokens
        with self._store.transaction(writes=True) as connection:
            if connection.execute(sa.select(table).filter_by(name=name)).first() is not None:
                raise SettingsError(
                    f"there is a token {name!r} already: take it back first, or choose a name"
                )
            connection.execute(sa.insert(table).values(**row))
        return token

    def take_back(self, name: str) -> None:
        """Make a token worthless; raises `SettingsError` where there is none of that name."""
        table = schema.api_tokens
        with self._store.transaction(writes=True) as connection:
            if not connection.execute(sa.delete(table).where(table.c.name == name)).rowcount:
                raise SettingsError(f"there is no token {name!r}: `hedgerow coordinator tokens` lists them")

    def all(self) -> list[ApiToken]:
        """Return all tokens, by name."""
        with self._store.transaction() as connection:
            found = connection.execute(sa.select(schema.api_tokens).order_by(schema.api_tokens.c.name))
            return [_token(row) for row in found]

    def find(self, text: str) -> ApiToken | None:
        """Return what a token may do, `None` for one that is unknown, taken back or past its time."""
        if not text.startswith(PREFIX) or len(text) > 200:
            return None
        # Looked up by digest: how long that takes says nothing about the token.
        digest, now = _digest(text), self._clock()
        looked, token = self._known.get(digest, (float("-inf"), None))
        if not 0 <= now - looked < LOOK_S:
            with self._store.transaction() as connection:
                row = connection.execute(sa.select(schema.api_tokens).filter_by(sha256=digest)).first()
            token = None if row is None else _token(row)
            if len(self._known) > 1_000:
                self._known.clear()
            self._known[digest] = (now, token)
        good = token is not None and (token.expires is None or token.expires > now)
        return token if good else None


def _token(row: Row[tuple[object, ...]]) -> ApiToken:
    return ApiToken(row.name, cast(Role, row.role), row.created, row.expires)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
