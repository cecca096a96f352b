"""The coordinator's own secret, and all that follows from it: its public key, invitations, passwords.

`fleet.key` in the coordinator's folder is the one file to keep and to keep secret. A device's seal keys come
from it and the device's public key, its broker password from it and a salt in the store; so broker files can
be written again at any time, and the store holds no secret.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

from coordinator.fleet.records import Device, Invite
from foundation.durable import SECRET, write_first
from foundation.errors import SettingsError
from foundation.joining import SECRET_BYTES, Shared, Token, public_of, shared
from foundation.seal import hkdf

FILE = "fleet.key"
_BYTES = 32


@dataclass(frozen=True, slots=True, repr=False)
class FleetSecret:
    """32 random bytes: an X25519 key, and the root of the derived ones."""

    secret: bytes
    federation: str

    @classmethod
    def load(cls, folder: Path, federation: str) -> FleetSecret:
        """Read `fleet.key`, or make it, readable by its owner alone. Raises `SettingsError`."""
        path = folder / FILE
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_first(path, secrets.token_bytes(_BYTES), mode=SECRET)
            content = path.read_bytes()
            mode = path.stat().st_mode
        except OSError as error:
            raise SettingsError(f"the fleet's key {path} cannot be used: {error}") from error
        if len(content) != _BYTES:
            raise SettingsError(f"{path} is not a key of {_BYTES} bytes: put back the file you have kept")
        if mode & 0o077:
            raise SettingsError(f"{path} can be read by others than its owner: chmod 600 {path}")
        return cls(content, federation)

    @property
    def public(self) -> bytes:
        """X25519."""
        return public_of(self.secret)

    def token(self, invite: Invite, pin: bytes | None) -> Token:
        """Return what an invitation is handed over as."""
        return Token(self.federation, invite.invite, self.invite_secret(invite.invite), pin)

    def invite_secret(self, invite: str) -> bytes:
        """Return an invitation's secret, 16 bytes."""
        return self._derived("invite", invite, SECRET_BYTES)

    def password(self, device: Device) -> str:
        """Return a device's broker password."""
        return self._derived("broker password", f"{device.agent}\0{device.salt}", 16).hex()

    def own_password(self) -> str:
        """Return the coordinator's broker password."""
        return self._derived("broker password of the coordinator", "", 16).hex()

    def shared(self, agent: str, public: bytes) -> Shared:
        """Return the keys of one device; raises `JoinRefused` for a public key that is none."""
        return shared(
            self.secret,
            public,
            federation=self.federation,
            name=agent,
            device=public,
            coordinator=self.public,
        )

    def _derived(self, what: str, of: str, length: int) -> bytes:
        salt = hmac.digest(b"hedgerow fleet 1", self.federation.encode(), "sha256")
        return hkdf(self.secret, salt, f"{what}\0{of}".encode(), length)
