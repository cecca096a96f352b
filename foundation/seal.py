"""Seals on letters: who wrote one, for which topic, and that it is not an old one come again.

    letter = "HGS" 1 | epoch | counter | HMAC-SHA256 | body          52 bytes more than the body

The HMAC (RFC 2104) is over magic, epoch, counter, topic and body, with a key that only one device and its
coordinator have, another one for each direction. A topic names federation, device and kind of letter, so a
letter of one device is worth nothing on the topic of another. Frames go in parts, each a letter; every part
carries the SHA-256 of its frame, and the frame's header run, round and device: so all of these are sealed.

`epoch` is new with every start of a program, `counter` counts its letters. The receiver keeps a window for
each topic, as IPsec does (RFC 4303, section 3.4.3): what is older than the window, or was seen in it, is
refused. Retained letters come again with every subscription, so there only older ones are.

The standard library is enough: a device needs no package for its seals.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from foundation.errors import NotSealed, Replayed, SealWrong
from foundation.frozen import Frozen

MAGIC = b"HGS\x01"
HEAD = struct.Struct("<4sQQ32s")
"""Magic with version, epoch, counter, HMAC."""
OVERHEAD = HEAD.size
KEY_BYTES = 32
WINDOW = 1024
"""Letters of one topic that may overtake each other."""
RETAINED = frozenset({"presence", "card"})
"""Last words of the topics whose letters come again."""
UP = ("card", "presence", "update", "received", "refusal", "telemetry", "clock", "renew")
"""Last words of the topics that a device writes and the coordinator reads."""
DOWN = ("assignment", "receipt", "command", "time", "certificate")
"""The other way round."""


@dataclass(frozen=True, slots=True, repr=False)
class SealKeys:
    """One device's keys: `up` seals what it writes, `down` what it reads; 32 bytes each."""

    up: bytes
    down: bytes

    def of(self, topic: str) -> bytes | None:
        """Return the key of an agent's topic, `None` for topics that are not sealed."""
        what = topic.rpartition("/")[2]
        return self.up if what in UP else self.down if what in DOWN else None


class Mark(Frozen):
    """How far a topic was read: the newest letter, and which of the 1,024 before it came."""

    epoch: int = Field(0, ge=0, lt=2**64)
    counter: int = Field(0, ge=0, lt=2**64)
    seen: int = Field(0, ge=0, lt=2**WINDOW)
    """Bit i: the letter `i` before the newest one was read."""


class Sealer:
    """Seals letters with counters that never come twice."""

    def __init__(self, epoch: int) -> None:
        """Count in `epoch`, which has to be larger than that of every Sealer before on the same keys."""
        self.epoch = epoch
        self._counter = 0

    def seal(self, topic: str, body: bytes, key: bytes) -> bytes:
        """Return the letter."""
        self._counter += 1
        mac = _mac(key, self.epoch, self._counter, topic, body)
        return HEAD.pack(MAGIC, self.epoch, self._counter, mac) + body


class Opener:
    """Opens letters and remembers which came, by topic."""

    def __init__(self, marks: Mapping[str, Mark] | None = None) -> None:
        """Go on from `marks`."""
        self._marks = dict(marks or {})

    def open(self, topic: str, letter: bytes, key: bytes) -> bytes:
        """Return the body; raises `NotSealed`, `SealWrong` or `Replayed`."""
        if len(letter) < OVERHEAD or letter[: len(MAGIC)] != MAGIC:
            raise NotSealed(f"the letter on {topic} has no seal, and this device's letters have one")
        _, epoch, counter, mac = HEAD.unpack_from(letter)
        body = letter[OVERHEAD:]
        if not hmac.compare_digest(mac, _mac(key, epoch, counter, topic, body)):
            raise SealWrong(f"the seal on {topic} is wrong: another key made it, or the letter was changed")
        mark = self._marks.get(topic, Mark())
        again = topic.rpartition("/")[2] in RETAINED
        self._marks[topic] = (_newest if again else _moved)(mark, topic, epoch, counter)
        return body

    def marks(self) -> dict[str, Mark]:
        """Return how far each topic was read, to go on from there after a restart."""
        return dict(self._marks)


def new_epoch(last: int) -> int:
    """Return an epoch after `last`: microseconds of the clock, or one more where the clock went back."""
    return max(last + 1, time.time_ns() // 1_000)


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """Return `length` bytes derived with HKDF-SHA256 (RFC 5869)."""
    mid = hmac.digest(salt or bytes(32), secret, "sha256")
    out, block, n = b"", b"", 0
    while len(out) < length:
        n += 1
        block = hmac.digest(mid, block + info + bytes([n]), "sha256")
        out += block
    return out[:length]


def _newest(mark: Mark, topic: str, epoch: int, counter: int) -> Mark:
    """Take what is not older. Within one epoch a last will was sealed first and comes last."""
    will = topic.endswith("/presence") and epoch == mark.epoch
    if (epoch, counter) < (mark.epoch, mark.counter) and not will:
        raise Replayed(f"the letter on {topic} is older than one that came before")
    return Mark(epoch=epoch, counter=max(counter, mark.counter if epoch == mark.epoch else 0))


def _moved(mark: Mark, topic: str, epoch: int, counter: int) -> Mark:
    if epoch > mark.epoch:
        return Mark(epoch=epoch, counter=counter)
    back = mark.counter - counter
    if epoch < mark.epoch or back > WINDOW or back == 0 or (back > 0 and mark.seen >> (back - 1) & 1):
        raise Replayed(f"the letter on {topic} came before")
    if back > 0:
        return mark.model_copy(update={"seen": mark.seen | 1 << (back - 1)})
    ahead = -back
    kept = 0 if ahead > WINDOW else (mark.seen << 1 | 1) << (ahead - 1)
    return Mark(epoch=epoch, counter=counter, seen=kept & (1 << WINDOW) - 1)


def _mac(key: bytes, epoch: int, counter: int, topic: str, body: bytes) -> bytes:
    name = topic.encode()
    head = struct.pack("<4sQQH", MAGIC, epoch, counter, len(name)) + name
    made = hmac.new(key, head, hashlib.sha256)
    made.update(body)
    return made.digest()
