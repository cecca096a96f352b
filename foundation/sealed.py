"""A Transport that seals what it publishes and opens what it reads, where a keyring has keys."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol, Self

from foundation.errors import SealBroken
from foundation.seal import OVERHEAD, Opener, Sealer
from foundation.transport import Bounded, Letter, Transport

logger = logging.getLogger(__name__)


class Keyring(Protocol):
    """Whose letters are sealed, and with which keys."""

    def key_to_write(self, topic: str) -> bytes | None:
        """Return the key for a letter that is published, `None` where it goes unsealed."""
        ...

    def key_to_read(self, topic: str) -> bytes | None:
        """Return the key for a letter that came, `None` where it needs no seal.

        Raises `SealBroken` where no letter on this topic is taken at all.
        """
        ...


class SealedTransport:
    """Another transport's letters with seals; what has a broken one is counted, told, and not handed on."""

    def __init__(
        self,
        inner: Transport,
        keyring: Keyring,
        sealer: Sealer,
        opener: Opener,
        *,
        tell: Callable[[str, SealBroken], None] | None = None,
    ) -> None:
        """Go over `inner`; `tell` hears the topic and the reason of each letter that is not taken."""
        self._inner, self._keyring = inner, keyring
        self._sealer, self.opener = sealer, opener
        self._tell = tell or _log
        self.refused: Counter[str] = Counter()
        """Letters not taken, by the name of the reason."""

    @property
    def max_body_bytes(self) -> int:
        """Largest body that still fits with its seal; a transport beneath without a bound has none here."""
        inner = self._inner
        return inner.max_body_bytes - OVERHEAD if isinstance(inner, Bounded) else sys.maxsize

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, trace)

    async def publish(self, topic: str, body: bytes, *, retain: bool = False, qos: int = 1) -> None:
        """Publish, sealed where the keyring says so; raises as the transport beneath does."""
        key = self._keyring.key_to_write(topic)
        # Nothing retained takes the retained letter away; a seal would put another in its place.
        if key is not None and (body or not retain):
            body = self._sealer.seal(topic, body, key)
        await self._inner.publish(topic, body, retain=retain, qos=qos)

    async def subscribe(self, *patterns: str) -> AsyncIterator[Letter]:
        """Subscribe; letters whose seal is broken are left out."""
        return _Opened(await self._inner.subscribe(*patterns), self._opened)

    def _opened(self, letter: Letter) -> Letter | None:
        try:
            key = self._keyring.key_to_read(letter.topic)
            if key is None:
                return letter
            return Letter(letter.topic, self.opener.open(letter.topic, letter.body, key), letter.retained)
        except SealBroken as error:
            self.refused[type(error).__name__] += 1
            self._tell(letter.topic, error)
            return None


class _Opened:
    """An iterator over the letters whose seals are whole."""

    def __init__(self, letters: AsyncIterator[Letter], opened: Callable[[Letter], Letter | None]) -> None:
        self._letters, self._opened = letters, opened

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Letter:
        while True:
            letter = self._opened(await anext(self._letters))
            if letter is not None:
                return letter

    async def aclose(self) -> None:
        """Give the subscription up."""
        close = getattr(self._letters, "aclose", None)
        if close is not None:
            await close()


def _log(topic: str, error: SealBroken) -> None:
    logger.warning("letter not taken", extra={"topic": topic, "reason": str(error)})
