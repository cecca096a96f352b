"""What is sent back: an answer, or a refusal with its status; always JSON where something went wrong."""

from __future__ import annotations

from typing import NamedTuple

from pydantic_core import to_json

from foundation.errors import DataError, ExportError, FrameTooLarge, WireError


class Answer(NamedTuple):
    """One HTTP answer."""

    body: bytes
    kind: str = "application/json"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):  # noqa: N818 - named for what happened, as in the house's tree
    """A request is not served; `status` says of which kind the reason is, the message what it is."""

    def __init__(self, status: int, reason: str, *headers: tuple[str, str]) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


def busy(reason: str) -> Refused:
    """Return a refusal that asks to come again: 503 with `Retry-After`."""
    return Refused(503, f"{reason}; try again in a second", ("Retry-After", "1"))


def as_json(value: object, status: int = 200) -> Answer:
    """Return a value as JSON."""
    return Answer(to_json(value), status=status)


def refusal(error: Exception) -> Answer | None:
    """Return `{"error": ...}` for what is refused on purpose; `None` for a fault of the server."""
    if isinstance(error, Refused):
        return as_json({"error": str(error)}, error.status)._replace(headers=error.headers)
    for kind, status in ((FrameTooLarge, 413), (WireError, 400), (DataError, 400), (ExportError, 409)):
        if isinstance(error, kind):
            return as_json({"error": str(error)}, status)
    return None
