"""Artifacts on disk: written so that a kill at any instant leaves a valid one, read without trust.

    artifacts/
      current   -> <sha256>        the newest; a link, replaced atomically
      previous  -> <sha256>        what was current before
      serving   -> <sha256>        what answers, where a server follows the folder; also: good (the last
                                   good one), fallback (the one before that), pinned (its owner's choice),
                                   ordered (the coordinator's)
      <sha256>/                    named after the bytes of model.onnx
        model.onnx  manifest.json  probe.npz  signature.json (where there is a key: export/sign.py)

An artifact is written to a hidden folder, flushed to the disk, and renamed into place; only then does
`current` move. Neither onnx nor onnxruntime is needed here.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from export import form, metadata
from export.sign import (
    LARGEST_SIGNATURE_BYTES,
    MOST_SIGNATURES,
    SIGNATURE,
    Key,
    Keys,
    Signature,
    Signatures,
    fits,
    parse,
    sign,
    verify,
)
from foundation.artifact import Manifest, Probe
from foundation.durable import sync_folder
from foundation.errors import ExportError, SignatureError
from foundation.parameters import Array

MODEL, MANIFEST, PROBE = "model.onnx", "manifest.json", "probe.npz"
CURRENT, PREVIOUS = "current", "previous"

# Bounds for reading: far above any model of this family, far below a board's memory.
LARGEST_FILE_BYTES: Mapping[str, int] = {
    MODEL: 256 << 20,
    MANIFEST: 8 << 20,
    PROBE: 64 << 20,
    SIGNATURE: LARGEST_SIGNATURE_BYTES,
}

_INCOMING = ".incoming-"
_SHA256 = re.compile(r"[0-9a-f]{64}")

SERVING, GOOD, FALLBACK, PINNED, ORDERED = "serving", "good", "fallback", "pinned", "ordered"
LINKS = (CURRENT, PREVIOUS, SERVING, GOOD, FALLBACK, PINNED, ORDERED)
"""Names of links; what one of them names is not removed."""


def probe_bytes(probe: Probe) -> bytes:
    """Return a probe as an npz file: `inputs` and `logits`, the same bytes for the same values."""
    buffer = io.BytesIO()
    np.savez(buffer, inputs=np.asarray(probe.inputs), logits=np.asarray(probe.logits, np.float32))
    return buffer.getvalue()


def publish(root: Path, manifest: Manifest, model: bytes, probe: bytes, key: Key | None = None) -> Path:
    """Write an artifact below `root`, make it current, and return its folder.

    With a key it is signed in the name of the manifest's agent.

    What was current stays as `previous`; older ones are removed, and so is what a killed writer left
    behind. Writers exclude each other by a lock; readers need none. Raises `ExportError` when the disk
    refuses, and then `current` is what it was.
    """
    files = {MODEL: model, MANIFEST: manifest.model_dump_json(indent=1).encode(), PROBE: probe}

    def signed(target: Path) -> Mapping[str, bytes]:
        return files if key is None else {SIGNATURE: _signatures(files, key, manifest.agent, target), **files}

    return _published(root, manifest.sha256, signed)


def accept(root: Path, sha256: str, files: Mapping[str, bytes]) -> Path:
    """Write an artifact that was made elsewhere as `publish` does, byte by byte as it came.

    It is the caller's to have checked it: the files are its own by name, with `signature.json` or without.
    """

    def signature_first(target: Path) -> Mapping[str, bytes]:
        if SIGNATURE not in files:
            return files
        rest = {name: content for name, content in files.items() if name != SIGNATURE}
        return {SIGNATURE: _with_those_before(files[SIGNATURE], target), **rest}

    return _published(root, sha256, signature_first)


def _with_those_before(content: bytes, target: Path) -> bytes:
    """Return `signature.json` with the signatures of the same model that is there, for a kill in between."""
    there: tuple[Signature, ...] = ()
    with suppress(FileNotFoundError, SignatureError):  # damaged ones help nobody
        there = parse((target / SIGNATURE).read_bytes())
    both = tuple(dict.fromkeys((*parse(content), *there)))
    return Signatures(signatures=both[:MOST_SIGNATURES]).model_dump_json(indent=1).encode()


def _published(root: Path, sha256: str, files: Callable[[Path], Mapping[str, bytes]]) -> Path:
    """Write what `files` says for the artifact's folder, make it current, and return the folder."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_writer(root):
            _sweep(root)
            target = root / sha256
            _place(root, target, files(target))
            _point(root, target.name)
            _sweep(root)
    except OSError as error:
        raise ExportError(f"the artifact could not be written below {root}: {error}") from error
    return target


def resolve(folder: Path, link: str = CURRENT) -> Path:
    """Return the folder of the artifact that a link names, or `folder` itself where it is an artifact.

    Raises `ExportError` when there is neither.
    """
    if (folder / link).is_symlink():
        return (folder / link).resolve()
    if (folder / MANIFEST).is_file():
        return folder.resolve()
    raise ExportError(f"there is no artifact in {folder}: neither {link} nor {MANIFEST}")


def load_artifact(
    folder: Path, keys: Keys | None = None, *, agent: str | None = None
) -> tuple[Manifest, bytes, Probe]:
    """Read one artifact's folder and return what was hashed: manifest, model bytes and probe.

    With `keys`, one of them must have signed it; with `agent`, it must be that agent's own.

    Raises `ExportError` when a file is missing, too large or unreadable, when model.onnx is not the file
    that the manifest names, when the manifest says other things than the model itself, or when probe.npz
    is not the probe that the model was proven with; `SignatureError` for a signature that is missing,
    of nobody known, or wrong; `FormRefused` for another agent's model and for one that is not
    self-contained, of standard operators and of the manifest's opset. The answers are proven by
    `export.proof.prove`.
    """
    files = read_files(folder)
    if keys is not None:
        verify(files, keys)
    try:
        manifest = Manifest.model_validate_json(files[MANIFEST])
    except ValidationError as error:
        problem = error.errors()[0]
        raise ExportError(
            f"{folder / MANIFEST} is not a manifest: {problem['loc']}: {problem['msg']}"
        ) from error
    _check_hashes(folder, manifest, files[MODEL], files[PROBE])
    form.check(manifest, files[MODEL], agent=agent)
    return manifest, files[MODEL], _parse_probe(folder, manifest, files[PROBE])


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of an artifact's files by name; without `signature.json` where there is none.

    Raises `ExportError` when a file is missing, too large or unreadable.
    """
    # The signature comes last: a manifest that is replaced meanwhile has its signature there before it.
    names = [MODEL, MANIFEST, PROBE, *([SIGNATURE] if (folder / SIGNATURE).exists() else [])]
    return {name: _read(folder, name) for name in names}


def _signatures(files: Mapping[str, bytes], key: Key, signer: str, target: Path) -> bytes:
    """Return `signature.json` for new files.

    Where the same model is written again, perhaps measured anew, the signature that fits what is there stays
    beside the new one, so that a kill between two files leaves a signed artifact.
    """
    before: tuple[Signature, ...] = ()
    if (target / SIGNATURE).exists():
        there = read_files(target)
        before = tuple(s for s in parse(there[SIGNATURE]) if fits(s, there, key))[:1]
    signatures = Signatures(signatures=(sign(files, key, signer), *before))
    return signatures.model_dump_json(indent=1).encode()


def linked(root: Path, link: str) -> str | None:
    """Return the SHA-256 of the artifact that a link names, if there is such a link and such an artifact."""
    name = _linked(root / link)
    return name if name is not None and (root / name / MANIFEST).is_file() else None


def update(
    root: Path, name: str, change: Callable[[bytes], bytes], links: Mapping[str, str | None] | None = None
) -> None:
    """Replace a small file below `root` by what `change` makes of its bytes, then move links, in order.

    A link to `None` is removed; one to an artifact that is gone stays what it was. Each step is whole or
    not there at all; writers exclude each other. Raises `ExportError` when the disk refuses.
    """
    path = root / name
    try:
        with _only_writer(root):
            before = path.read_bytes() if path.exists() else b""
            after = change(before)
            if after != before:
                beside = root / f"{_INCOMING}{name}"
                beside.unlink(missing_ok=True)
                _write(beside, after)
                beside.replace(path)
            for link, target in (links or {}).items():
                if target is None:
                    (root / link).unlink(missing_ok=True)
                elif (root / target / MANIFEST).is_file() and _linked(root / link) != target:
                    _link(root, link, target)
            sync_folder(root)
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error}") from error


def _check_hashes(folder: Path, manifest: Manifest, model: bytes, probe: bytes) -> None:
    digest = hashlib.sha256(model).hexdigest()
    if digest != manifest.sha256:
        raise ExportError(
            f"{folder / MODEL} is not the model of its manifest: "
            f"sha256 {digest[:12]}… of {len(model)} bytes, not {manifest.sha256[:12]}… of {manifest.bytes}"
        )
    if _SHA256.fullmatch(folder.name) and folder.name != digest:
        raise ExportError(f"the folder {folder} is named after another model than {digest[:12]}…")
    stored = metadata.read(model)
    if different := metadata.disagreements(manifest, stored):
        raise ExportError(f"{folder / MANIFEST} and the model disagree about {', '.join(different)}")
    if hashlib.sha256(probe).hexdigest() != stored.get(metadata.PROBE_SHA256):
        raise ExportError(f"{folder / PROBE} is not the probe that this model was proven with")


def _parse_probe(folder: Path, manifest: Manifest, content: bytes) -> Probe:
    # The hash has vouched for these bytes, so what fails here was written wrongly.
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            inputs, logits = arrays["inputs"], arrays["logits"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ExportError(f"{folder / PROBE} is not a probe: {error}") from error
    if inputs.shape[1:] != manifest.shape and manifest.input != "text":
        raise ExportError(f"{folder / PROBE} has samples of shape {inputs.shape[1:]}, not {manifest.shape}")
    return Probe(_frozen(inputs), _frozen(logits))


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _read(folder: Path, name: str) -> bytes:
    limit = LARGEST_FILE_BYTES[name]
    try:
        with (folder / name).open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ExportError(f"{folder / name} cannot be read: {error}") from error
    if len(content) > limit:
        raise ExportError(f"{folder / name} is larger than {limit} bytes")
    return content


@contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when its owner dies, however it dies."""
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _place(root: Path, target: Path, files: Mapping[str, bytes]) -> None:
    incoming = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=root))
    incoming.chmod(0o755)
    for name, content in files.items():
        _write(incoming / name, content)
    sync_folder(incoming)
    if target.is_dir():
        # The same model again, perhaps measured anew: each file is whole before it takes its place.
        for name in files:
            (incoming / name).replace(target / name)
        sync_folder(target)
    else:
        incoming.rename(target)
    sync_folder(root)


def _point(root: Path, name: str) -> None:
    """Make `name` current, and what was current the previous one."""
    before = _linked(root / CURRENT)
    if before == name:
        return
    if before is not None:
        _link(root, PREVIOUS, before)
    _link(root, CURRENT, name)
    sync_folder(root)


def _link(root: Path, link: str, name: str) -> None:
    fresh = root / f"{_INCOMING}{link}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(root / link)


def _linked(link: Path) -> str | None:
    return str(link.readlink()) if link.is_symlink() else None


def _sweep(root: Path) -> None:
    """Remove artifacts that no link names, and what a killed writer left behind."""
    kept = {_linked(root / link) for link in LINKS}
    for path in root.iterdir():
        if path.name.startswith(_INCOMING) or (_SHA256.fullmatch(path.name) and path.name not in kept):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
