"""Who may ask: an API key, the names this machine may be called by, and pages of other origins."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from edge_agent.serving.answers import Refused
from foundation.errors import SettingsError
from foundation.hosts import names_loopback

SHORTEST_KEY, LONGEST_KEY = 16, 512
ADMIN = "/admin/"
"""Addresses that decide which model serves."""
OPEN = frozenset({"/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready"})
"""Answered without a key: whether it is alive, and the page, which without it says nothing of the model."""


class Guard:
    """Decides whether a request is answered. Without a key everybody who reaches the port may ask."""

    def __init__(
        self, key: str | None = None, *, loopback: bool = False, admin_key: str | None = None
    ) -> None:
        """Take the clients' key, and the one of whoever decides which model serves: not set, the same."""
        self._key = None if key is None else _digest(key.encode())
        self._admin_key = self._key if admin_key is None else _digest(admin_key.encode())
        self._loopback = loopback and key is None

    @property
    def keyed(self) -> bool:
        """Whether a key is asked for."""
        return self._key is not None

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request has the key, as `Authorization: Bearer` or `x-api-key`; true without a key."""
        return _has(headers, self._key)

    def check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Let a request through, or raise `Refused`: 401 without the key, 403 for a foreign page or name."""
        if self._loopback and not names_loopback(headers.get(b"host", b"")):
            # A foreign page can give this machine a name of its own, and would then be of the same origin.
            raise Refused(403, "this server answers on loopback only: call it 127.0.0.1 or localhost")
        if path in OPEN:
            return
        admin = path.startswith(ADMIN)
        key = self._admin_key if admin else self._key
        if not _has(headers, key):
            which = "the owner's key" if key is not self._key else "the key"
            raise Refused(
                401,
                f"send {which} of this server, as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                ("WWW-Authenticate", "Bearer"),
            )
        if admin and key is None and not self._loopback:
            raise Refused(
                403,
                "which model serves is not decided by the network without a key: --api-key-file asks for one",
            )
        if key is None and method == "POST" and _foreign(headers):
            raise Refused(403, "a page of another origin may not ask this server")


def _has(headers: dict[bytes, bytes], key: bytes | None) -> bool:
    """Whether a request has a key, by its digest; true where there is none."""
    if key is None:
        return True
    scheme, _, told = headers.get(b"authorization", b"").partition(b" ")
    given = told.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    return hmac.compare_digest(_digest(given), key)


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


def _foreign(headers: dict[bytes, bytes]) -> bool:
    origin = headers.get(b"origin")
    if origin is None:
        return False  # no browser, or a page of its own
    _, _, place = origin.partition(b"://")
    return place.lower() != headers.get(b"host", b"").lower()
