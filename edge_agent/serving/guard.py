"""Who may ask: an API key, the names this machine may be called by, and pages of other origins."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from edge_agent.serving.answers import Refused
from foundation.errors import SettingsError

SHORTEST_KEY, LONGEST_KEY = 16, 512
OPEN = frozenset({"/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready"})
"""Answered without a key: whether it is alive, and the page, which without it says nothing of the model."""


class Guard:
    """Decides whether a request is answered. Without a key everybody who reaches the port may ask."""

    def __init__(self, key: str | None = None, *, loopback: bool = False) -> None:
        self._key = None if key is None else _digest(key.encode())
        self._loopback = loopback and key is None

    @property
    def keyed(self) -> bool:
        """Whether a key is asked for."""
        return self._key is not None

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request has the key, as `Authorization: Bearer` or `x-api-key`; true without a key."""
        if self._key is None:
            return True
        scheme, _, told = headers.get(b"authorization", b"").partition(b" ")
        given = told.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(_digest(given), self._key)

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Let a request through, or raise `Refused`: 401 without the key, 403 for a foreign page or name."""
        if self._loopback and not _names_loopback(headers.get(b"host", b"")):
            # A foreign page can give this machine a name of its own, and would then be of the same origin.
            raise Refused(403, "this server answers on loopback only: call it 127.0.0.1 or localhost")
        if path in OPEN:
            return
        if not self.knows(headers):
            raise Refused(
                401,
                "send the key of this server, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                ("WWW-Authenticate", "Bearer"),
            )
        if not self.keyed and method == "POST" and _foreign(headers):
            raise Refused(403, "a page of another origin may not ask this server")


def read_key(path: Path) -> str:
    """Return the key in a file, without the space around it. Raises `SettingsError` for none that is good."""
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the key file {path} cannot be read: {error}") from error
    if not SHORTEST_KEY <= len(key) <= LONGEST_KEY or not key.isprintable() or " " in key:
        raise SettingsError(
            f"{path} has to hold one key of {SHORTEST_KEY} to {LONGEST_KEY} characters; make one:"
            f" python3 -c 'import secrets; print(secrets.token_urlsafe())' > {path.name}"
        )
    return key


def _digest(key: bytes) -> bytes:
    """Return 32 bytes, so that comparing tells nothing of a key's length either."""
    return hashlib.sha256(key).digest()


def _names_loopback(host: bytes) -> bool:
    try:
        name = urlsplit(f"//{host.decode('ascii')}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _foreign(headers: dict[bytes, bytes]) -> bool:
    origin = headers.get(b"origin")
    if origin is None:
        return False  # no browser, or a page of its own
    _, _, place = origin.partition(b"://")
    return place.lower() != headers.get(b"host", b"").lower()
