"""onnxruntime's optimized form of a proven model, kept on this device so that a start is shorter.

Opening a model optimizes its graph, each time anew: about a third of the opening. What comes out depends on
this onnxruntime and this processor and has operators of its own, so it is no artifact and goes nowhere. It is
`artifacts/<sha256>.optimized`: a line of JSON, then onnxruntime's bytes. The line binds it to the model's
SHA-256 and to what it was made for, and the device's key seals it, where there is one. Whatever is not as
it was written is not opened; what is opened proves itself with the artifact's own probe, as the model itself
does. A form that cannot be used costs nothing but the time that it would have saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias

from pydantic import Field, ValidationError

from export.folder import LARGEST_FILE_BYTES, MODEL, update
from export.proof import open_session
from export.runtime import ort
from export.sign import DEVICE_KEY, DeviceKey, Keys
from foundation.errors import ExportError
from foundation.frozen import Frozen
from foundation.memory import give_back

logger = logging.getLogger(__name__)

Choice: TypeAlias = Literal["auto", "on", "off"]

ENDING = ".optimized"
PAYS = 0.8
"""Share of the model's own time to open that reading and opening the form may take, or it is not used:
less is not worth a second file."""
_OPENINGS = 3
_SEALED = b"hedgerow optimized form 1\n"
_LONGEST_HEAD = 4096
_NOBODYS = DeviceKey(bytes(32))
"""Where artifacts are not signed: tells damage, not who wrote it."""


class Head(Frozen):
    """The first line of a kept form."""

    schema_version: Literal[1] = 1
    model: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the model that it is a form of."""
    made_for: dict[str, str]
    form: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the bytes that follow; `None` where the form does not pay, and none do."""
    model_ms: float | None = Field(None, ge=0)
    """CPU time to open the model, which is in memory; `None` where it was not measured."""
    form_ms: float | None = Field(None, ge=0)
    """The same for the form, with reading and hashing its file."""
    seal: str = Field("", pattern=r"^([0-9a-f]{64})?$")

    def sealed(self, key: DeviceKey) -> Head:
        """Return it with the seal of a key."""
        return self.model_copy(update={"seal": key.sign(self._message()).hex()})

    def is_sealed(self, key: DeviceKey) -> bool:
        """Whether the key sealed it as it is."""
        return key.right(self._message(), bytes.fromhex(self.seal))

    def _message(self) -> bytes:
        said = self.model_dump(mode="json", exclude={"seal"})
        return _SEALED + json.dumps(said, sort_keys=True).encode()


class Forms:
    """The kept forms of one folder of artifacts."""

    def __init__(self, root: Path, choice: Choice = "auto") -> None:
        self._root, self._choice = root, choice

    def open(self, sha256: str) -> ort.InferenceSession | None:
        """Open the form of a model that was checked; `None` where there is none that can be used.

        Who opens it proves it, and says `drop` where it does not prove itself.
        """
        if self._choice == "off" or (key := self._key()) is None:
            return None
        try:
            found = self._read(sha256, key)
            return None if found is None or not found[1] else open_session(found[1], optimized=True)
        except (ExportError, OSError) as error:
            logger.warning("the optimized form of %s is not used: %s", sha256[:12], error)
            self.drop(sha256)
            return None

    def drop(self, sha256: str) -> None:
        """Remove a form."""
        try:
            self._path(sha256).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the optimized form of %s cannot be removed: %s", sha256[:12], error)

    def keep(self, sha256: str, model: bytes, prove: Callable[[ort.InferenceSession], object]) -> Head | None:
        """Make, prove, time and keep the form of a model that was checked; returns its first line.

        With `auto` it is timed against the model itself, and kept if it pays; that it does not is kept too.
        Nothing is done where that is known already, and where there is no key to seal it with (`None`).
        Raises `ExportError` when the form does not prove itself, or the disk refuses.
        """
        key = self._key()
        if self._choice == "off" or key is None:
            return None
        try:
            if (known := self._read(sha256, key)) is not None:
                return known[0]
        except (ExportError, OSError) as error:
            logger.info("the optimized form of %s is made anew: %s", sha256[:12], error)
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "form.onnx"
            open_session(model, write=written)
            form = written.read_bytes()
            prove(open_session(form, optimized=True))
            model_ms, form_ms = _timed(model, written) if self._choice == "auto" else (None, None)
        pays = model_ms is None or form_ms is None or form_ms <= PAYS * model_ms
        head = Head(
            model=sha256,
            made_for=made_for(),
            form=hashlib.sha256(form).hexdigest() if pays else None,
            model_ms=model_ms,
            form_ms=form_ms,
        ).sealed(key)
        line = head.model_dump_json().encode() + b"\n"
        update(self._root, self._path(sha256).name, lambda _: line + (form if pays else b""))
        self._sweep()
        give_back()
        logger.info(
            "optimized form of %s: pays=%s model_ms=%s form_ms=%s", sha256[:12], pays, model_ms, form_ms
        )
        return head

    def _path(self, sha256: str) -> Path:
        return self._root / f"{sha256}{ENDING}"

    def _key(self) -> DeviceKey | None:
        """Return what forms are sealed with; `None` where artifacts are signed by others alone."""
        own = self._root.resolve().parent / DEVICE_KEY
        if own.exists():
            return DeviceKey.load(own)
        return None if Keys.beside(self._root) else _NOBODYS

    def _read(self, sha256: str, key: DeviceKey) -> tuple[Head, bytes] | None:
        """Return a form that is whole, of this model and made for this device; `None` for none."""
        most = LARGEST_FILE_BYTES[MODEL]
        try:
            with self._path(sha256).open("rb") as file:
                line = file.readline(_LONGEST_HEAD)
                form = file.read(most + 1)
        except FileNotFoundError:
            return None
        head = _parsed(line)
        if head is None or not head.is_sealed(key):
            raise ExportError("it is damaged, or was not written here")
        if head.model != sha256 or head.made_for != made_for():
            raise ExportError("it was made for another model, onnxruntime or processor")
        if (head.form is None) != (not form) or (form and hashlib.sha256(form).hexdigest() != head.form):
            raise ExportError("its bytes are damaged")
        return head, form

    def _sweep(self) -> None:
        """Remove the forms of artifacts that are gone."""
        for path in self._root.glob(f"*{ENDING}"):
            if not (self._root / path.name.removesuffix(ENDING)).is_dir():
                path.unlink(missing_ok=True)


def made_for() -> dict[str, str]:
    """Return what a form depends on beside its model."""
    return {
        "onnxruntime": ort.__version__,
        "provider": "CPUExecutionProvider",
        "machine": platform.machine(),
        "processor": _processor(),
    }


@cache
def _processor() -> str:
    """Return a hash of what the processor is and can, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    return hashlib.sha256("\n".join(sorted(set(_features(lines)))).encode()).hexdigest()[:16]


def _features(lines: list[str]) -> Iterator[str]:
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("model name", "flags", "features", "cpu part", "cpu implementer"):
            yield f"{name.strip()}:{' '.join(sorted(value.split()))}"


def _parsed(line: bytes) -> Head | None:
    try:
        return Head.model_validate_json(line)
    except ValidationError:
        return None


def _timed(model: bytes, form: Path) -> tuple[float, float]:
    """Return the CPU milliseconds of opening the model, and of reading and opening the form: medians."""

    def kept() -> None:
        content = form.read_bytes()
        hashlib.sha256(content)
        open_session(content, optimized=True)

    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(_OPENINGS):
        for times, opening in ((spent[0], lambda: open_session(model)), (spent[1], kept)):
            begin = time.thread_time()
            opening()
            times.append(1e3 * (time.thread_time() - begin))
    return median(spent[0]), median(spent[1])
