"""Updates whose arrays stay in the store: read when somebody looks, and few of them in memory at once.

A round of any size is so absorbed in bounded memory: what a round holds of an update is its header and its
masks, and its arrays are decoded again where they are needed. The last of them that were looked at, up to
`most_bytes`, stay decoded, so a small round never reads what it has just written. Whoever goes over a round
goes update by update, all names of one before the next; the other way round every name would be a reading.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from foundation.codec import update_from
from foundation.messages import Update
from foundation.parameters import Array, Parameters

SHELF_BYTES = 32 * 2**20
"""Decoded arrays that stay."""

Key: TypeAlias = tuple[str, int, str]
"""Run, round, agent."""


class Shelf:
    """Decoded arrays of updates, the least lately used let go of; may be used from any thread."""

    def __init__(self, frame: Callable[[str, int, str], bytes], most_bytes: int = SHELF_BYTES) -> None:
        """`frame(run, round, agent)` returns what the store has; raises `StoreError`."""
        self._frame, self._most_bytes = frame, most_bytes
        self._held: OrderedDict[Key, Parameters] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.peak_bytes = 0
        """The most that was held at once."""
        self.readings = 0
        """How often arrays were read again."""

    def put(self, update: Update) -> Update:
        """Return a stored update without its arrays in it; they are read again when somebody looks."""
        key = (update.run, update.round, update.agent)
        names = tuple(update.parameters)
        with self._lock:
            names = self._names.setdefault(names, names)  # one copy for all that are alike
            self._keep(key, update.parameters)
        return update.model_copy(update={"parameters": Parameters.over(_Shelved(self, key, names))})

    def take(self, run: str, round: int, agent: str) -> Update:
        """Return an update from the store, as `put` does. Raises `StoreError`, or as `update_from` does."""
        return self.put(update_from(self._frame(run, round, agent)))

    def arrays(self, key: Key) -> Parameters:
        """Return an update's arrays, from the store if they are not here any more."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        found = update_from(self._frame(*key)).parameters
        with self._lock:
            self.readings += 1
            self._keep(key, found)
        return found

    def clear(self) -> None:
        """Let go of everything; what is looked at later is read again."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _keep(self, key: Key, arrays: Parameters) -> None:
        before = self._held.pop(key, None)
        self._bytes += arrays.nbytes - (0 if before is None else before.nbytes)
        self._held[key] = arrays
        # One is always here, however large: it is looked at name by name.
        while self._bytes > self._most_bytes and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)


class _Shelved(Mapping[str, Array]):
    """The arrays of one update, on a shelf."""

    __slots__ = ("_key", "_names", "_shelf")

    def __init__(self, shelf: Shelf, key: Key, names: tuple[str, ...]) -> None:
        self._shelf, self._key, self._names = shelf, key, names

    def __getitem__(self, name: str) -> Array:
        return self._shelf.arrays(self._key)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names
