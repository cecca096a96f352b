"""Everything that reads bytes of somebody else, as functions of bytes: what `bench/fuzz.py` and its test run.

A target returns, or raises one of its refusals; whatever else leaves it is a finding. So is a false answer
where a target knows the right one: a seal that opens twice, settings that do not load again.
"""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from coordinator.settings import CoordinatorSettings  # noqa: E402
from edge_agent.serving.answering import read as read_question  # noqa: E402
from edge_agent.settings import AgentSettings  # noqa: E402
from export import form, metadata, sign  # noqa: E402
from export.folder import MANIFEST, MODEL, PROBE, load_artifact  # noqa: E402
from foundation import codec, joining, settings  # noqa: E402
from foundation import messages as m  # noqa: E402
from foundation.artifact import Manifest  # noqa: E402
from foundation.errors import (  # noqa: E402
    ExportError,
    FrameCorrupt,
    JoinRefused,
    SealBroken,
    SettingsError,
    WireError,
)
from foundation.mqtt import MqttSettings  # noqa: E402
from foundation.parameters import Parameters  # noqa: E402
from foundation.seal import HEAD, MAGIC, Mark, Opener, Sealer  # noqa: E402
from foundation.transfer import RECEIPT_BYTES, Part, _receipt  # noqa: E402
from foundation.transport import Letter  # noqa: E402

LIMITS = codec.Limits(frame_bytes=1 << 20, header_bytes=1 << 16, arrays=64)
"""Small, so that what is allocated beyond them is seen."""
KEY = bytes(range(32))
TOPIC = "hedgerow/v1/test/agents/d0/update"
HERE = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""Where files are written again and again, where there is memory for that."""


@dataclass(frozen=True)
class Target:
    """One decoder: `of` reads bytes, `refusals` are what it may raise, `seeds` are inputs to begin with."""

    of: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], Iterator[bytes]]

    def __call__(self, data: bytes) -> bool:
        """Read; whether it was taken and not refused."""
        try:
            self.of(data)
        except self.refusals:
            return False
        return True


# --- frames ----------------------------------------------------------------------------------------


def _frame(data: bytes) -> None:
    """Read a frame as it came, and as the body of one: no mutation gets through zstd."""
    with contextlib.suppress(WireError):
        _decoded(data)
    _decoded(codec._wrapped(data))


def _decoded(frame: bytes) -> None:
    found = codec.decode(frame, LIMITS)
    values = sum(array.nbytes for array in found.parameters.values())
    assert values <= LIMITS.frame_bytes, f"{values} bytes came out of a frame"
    assert all(np.isfinite(array).all() for array in found.parameters.values())
    with contextlib.suppress(WireError):
        codec.assignment_from(frame, LIMITS)
    codec.update_from(frame, LIMITS)


def _update() -> m.Update:
    arrays = {
        "blocks.0.ffl.up.weight": np.ones((4, 3), np.float32),
        "head.bias": np.arange(3, dtype=np.float32),
    }
    masks = {"blocks.0.ffl": np.array([True, False, True, True])}
    return m.Update(run="r", round=1, agent="d0", parameters=Parameters(arrays), masks=masks, examples=3)


def _frames() -> Iterator[bytes]:
    for encoding in ("float32", "float16", "int8"):
        frame = codec.frame_of(_update(), encoding)
        yield frame
        yield codec._unwrapped(frame, LIMITS)


# --- letters ---------------------------------------------------------------------------------------


def _json_of(*kinds: type[Any]) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        taken = 0
        for kind in kinds:
            with contextlib.suppress(ValidationError):
                found = kind.model_validate_json(data)
                again = kind.model_validate_json(found.model_dump_json())
                assert again == found, f"{found!r} does not come back"
                str(found)
                taken += 1
        if not taken:
            raise WireError("none of them")
        return taken

    return read


def _letters(data: bytes) -> None:
    """Read a body as each of the letters that come over MQTT."""
    taken = 0
    readers: tuple[Callable[[bytes], object], ...] = (
        Part.of,
        _part_with_its_sum,
        _receipt,
        m.command_of,
        lambda body: joining.read_request(body, KEY[:16]),
        lambda body: joining.read_grant(body, KEY[:16]),
        lambda body: joining.Token.of(body.decode("utf-8", "replace")),
        lambda body: read_question(Letter(TOPIC, body, False), 4096),
        _vouched,
    )
    for read in readers:
        with contextlib.suppress(WireError, JoinRefused, SettingsError, ValueError):
            read(data)
            taken += 1
    if not taken:
        raise WireError("none of them")


def _part_with_its_sum(data: bytes) -> Part:
    """Read a part whose checksum is made right, which mutations are not."""
    from foundation.transfer import PART_HEADER, _checksum

    if len(data) < PART_HEADER.size:
        raise FrameCorrupt("short")
    head, rest = data[: PART_HEADER.size - 4], data[PART_HEADER.size :]
    found = Part.of(head + struct.pack("<I", _checksum(head + bytes(4), rest)) + rest)
    assert len(found.payload) <= len(data)
    return found


def _vouched(data: bytes) -> object:
    """Read what somebody with the token's secret says, whatever it is."""
    body = data.decode("utf-8", "replace")
    mac = joining._mac("Request", body, KEY[:16]).hex()
    letter = joining.Vouched.model_construct(body=body, mac=mac).model_dump_json().encode()
    return joining.read_request(letter, KEY[:16])


def _letter_seeds() -> Iterator[bytes]:
    yield Part(bytes(32), 1, 0, 2, 9, b"12345", ask=True).letter()
    yield json.dumps({"digest": "0" * 64, "attempt": 1, "state": "parts", "missing": [[1, 2]]}).encode()
    yield m.Command(id="a1", verb="unpin").model_dump_json().encode()
    yield joining.vouched(joining.Request(name="d0", public="0" * 64), KEY[:16])
    yield joining.Token("green", "0" * 16, KEY[:16], KEY).text().encode()
    yield json.dumps({"id": "q", "inputs": [[1.0, 2.0]]}).encode()
    yield b"[" * min(20_000, RECEIPT_BYTES - 1)


# --- seals -----------------------------------------------------------------------------------------


def _seal(data: bytes) -> None:
    """Open a letter as it came; then letters of ours in an order that the bytes choose: none opens twice."""
    script = [data[i : i + 3] for i in range(0, min(len(data), 600), 3)]
    opener, came = Opener(), set()
    for word in script:
        epoch, counter = 1 + (word[0] & 3), int.from_bytes(word[1:], "little")
        sealer = Sealer(epoch)
        sealer._counter = counter
        letter = sealer.seal(TOPIC, word, KEY)
        try:
            body = opener.open(TOPIC, letter, KEY)
        except SealBroken:
            continue
        assert body == word
        assert (epoch, counter) not in came, f"letter {counter} of epoch {epoch} was opened twice"
        came.add((epoch, counter))
    for mark in opener.marks().values():
        assert Mark.model_validate_json(mark.model_dump_json()) == mark
    Opener().open(TOPIC, data, KEY)


def _seal_seeds() -> Iterator[bytes]:
    yield Sealer(1).seal(TOPIC, b"body", KEY)
    yield MAGIC + bytes(HEAD.size)
    yield bytes((1, 1, 0, 1, 3, 0, 1, 2, 0, 1, 3, 0, 2, 1, 0))


# --- settings --------------------------------------------------------------------------------------


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="hedgerow-fuzz-", dir=HERE))


def _settings(data: bytes) -> None:
    file = _folder() / "agent.toml"
    file.write_bytes(data)
    lines = data.decode("utf-8", "replace").replace("\0", "").splitlines()[:20]
    taken = 0
    for model in (AgentSettings, CoordinatorSettings):
        with contextlib.suppress(SettingsError):
            found, origins = settings.load(model, file)  # type: ignore[type-var]
            assert isinstance(settings.show(found, origins), str)
            taken += 1
        with contextlib.suppress(SettingsError):
            settings.load(model, None, overrides=lines)  # type: ignore[type-var]
    with contextlib.suppress(SettingsError):
        MqttSettings.from_url(lines[0] if lines else "")
    if not taken:
        raise SettingsError("neither")


def _settings_seeds() -> Iterator[bytes]:
    yield b'agent = "d0"\nvault = "v"\n[mqtt]\nhost = "h"\nport = 1\n[data]\nkind = "npz"\npath = "a.npz"\n'
    yield b'federation = "green"\n[run]\nstrategy = "fedavg"\nrounds = 2\nmodel.width = 8\n[http]\nport = 1\n'
    yield b"mqtts://user:p%40ss@broker.local:8883\nmqtt.port=1883\nrollout.rings=[0.5, 1.0]\n"
    yield b"[enrolment]\nenabled = true\n[wall.plugs]\nd0 = 'mqtt:tasmota/p'\n[[a]]\nb = 1979-05-27\n"


# --- artifacts -------------------------------------------------------------------------------------


def _artifact(data: bytes) -> None:
    """Read a manifest, a signature, a model, a probe, and a folder that has been put together of them."""
    taken = 0
    with contextlib.suppress(ValidationError):
        manifest = Manifest.model_validate_json(data)
        assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
        taken += 1
    with contextlib.suppress(ExportError):
        sign.parse(data)
        taken += 1
    with contextlib.suppress(ExportError):
        metadata.read(data)
        taken += 1
    with contextlib.suppress(ExportError):
        form.check(_manifest(), data)
        taken += 1
    for name in (MANIFEST, MODEL, PROBE):
        with contextlib.suppress(ExportError):
            load_artifact(_artifact_folder(name, data))
            taken += 1
    if not taken:
        raise ExportError("none of them")


@cache
def _manifest() -> Manifest:
    return Manifest.model_validate_json(_artifact_files()[MANIFEST])


@cache
def _artifact_files() -> dict[str, bytes]:
    from tests.artifacts import family

    base = family(_folder() / "made").base
    target = base.publish(_folder() / "whole")
    return {name: (target / name).read_bytes() for name in (MANIFEST, MODEL, PROBE)}


def _artifact_folder(changed: str, data: bytes) -> Path:
    """Return a folder with one file changed, and the manifest's hashes right all the same."""
    import hashlib

    folder = _folder() / changed
    files = {**_artifact_files(), changed: data}
    if changed != MANIFEST:
        told = json.loads(files[MANIFEST])
        for file, key in ((MODEL, "sha256"), (PROBE, "probe_sha256")):
            told[key] = hashlib.sha256(files[file]).hexdigest()
        told["bytes"] = len(files[MODEL])
        files[MANIFEST] = json.dumps(told).encode()
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if not path.exists() or name in (changed, MANIFEST):
            path.write_bytes(content)
    return folder


def _artifact_seeds() -> Iterator[bytes]:
    yield from _artifact_files().values()
    yield b'{"signatures": [{"signer": "d0", "key": "00", "algorithm": "ed25519", "value": "00"}]}'


# --- all -------------------------------------------------------------------------------------------


def _card_seeds() -> Iterator[bytes]:
    card = m.AgentCard(agent="d0", version="1", profile="pi", examples=3, input="image", shape=(1, 8, 8))
    yield card.model_dump_json().encode()
    yield m.Presence(state="online").model_dump_json().encode()
    yield b'{"agent": "d0", "version": "1", "profile": "pi", "examples": 1e400}'


def _refusal_seeds() -> Iterator[bytes]:
    yield m.Refusal(run="r", round=1, agent="d0", reason="no").model_dump_json().encode()
    yield b'{"agent": "d0", "stage": "train", "progress": 0.5, "kept_units": [3]}'
    yield m.ClockQuestion(id=1).model_dump_json().encode()


TARGETS: dict[str, Target] = {
    "frame": Target(_frame, (WireError,), _frames),
    "card": Target(_json_of(m.AgentCard, m.Presence), (WireError,), _card_seeds),
    "refusal": Target(
        _json_of(m.Refusal, m.Telemetry, m.ClockQuestion, m.ClockAnswer), (WireError,), _refusal_seeds
    ),
    "settings": Target(_settings, (SettingsError,), _settings_seeds),
    "artifact": Target(_artifact, (ExportError,), _artifact_seeds),
    "seal": Target(_seal, (SealBroken,), _seal_seeds),
    "letters": Target(_letters, (WireError,), _letter_seeds),
}
