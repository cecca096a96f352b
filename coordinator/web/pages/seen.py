"""Rounds as the pages show them; closed ones are read once, however many pages look."""

from __future__ import annotations

import threading
from collections import OrderedDict

from coordinator.store.sql import Store
from coordinator.web.models import RoundView, UpdateView

KEPT = 2_000
"""Rounds whose sums are kept in memory, a few kilobytes each."""


class SeenRounds:
    """Sums over the updates of rounds. All verbs may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], RoundView] = OrderedDict()

    def latest(self, run: str, limit: int) -> list[RoundView]:
        """Return the views of the last `limit` rounds of a run, in order."""
        counts = self._store.counts(run)
        views = []
        for record in self._store.latest_rounds(run, limit):
            key, count = (run, record.round), counts.get(record.round, 0)
            view = self._found(key, count)
            if view is None:
                updates = [UpdateView.of(update) for update in self._store.updates(run, record.round)]
                view = RoundView.of(record, updates)
                self._keep(key, view)
            views.append(view)
        return views

    def _found(self, key: tuple[str, int], updates: int) -> RoundView | None:
        # A late update may still come to a closed round.
        with self._lock:
            view = self._kept.get(key)
            return view if view is not None and view.updates == updates else None

    def _keep(self, key: tuple[str, int], view: RoundView) -> None:
        if view.state != "closed":
            return
        with self._lock:
            self._kept[key] = view
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
