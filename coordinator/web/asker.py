"""Whether who asks may change something: told by the door, for pages that offer no button in vain."""

from __future__ import annotations

from contextvars import ContextVar

LOOKS_ONLY: ContextVar[bool] = ContextVar("hedgerow_looks_only", default=False)
"""Set by the door for a viewer's request. It only spares a reader buttons: the door refuses changes."""
