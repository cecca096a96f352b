"""The model repository's verbs: load what is there or what is sent, unload, load again."""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path

from pydantic import BaseModel, ValidationError

from edge_agent.serving.admission import load
from edge_agent.serving.answers import Refused
from export.folder import MANIFEST, MODEL, PROBE, accept
from export.sign import SIGNATURE, parse
from foundation.errors import WireError

NEEDED = (MODEL, MANIFEST, PROBE)
_FILE = "file:"


class _Load(BaseModel):
    parameters: dict[str, object] = {}


def files_of(body: bytes) -> dict[str, bytes]:
    """Return the files of a load request by name, empty where it sends none.

    They come in base64 as `file:1/model.onnx`, `file:1/manifest.json`, `file:1/probe.npz`, and with a
    signature `file:1/signature.json`; folders in front are left out. Raises `WireError` for anything else.
    """
    try:
        parameters = _Load.model_validate_json(body or b"{}").parameters
    except ValidationError as error:
        message = error.errors(include_input=False, include_url=False)[0]["msg"]
        raise WireError(f"the load request is malformed: {message}") from error
    files = {
        key[len(_FILE) :].rpartition("/")[2]: _decoded(key, value)
        for key, value in parameters.items()
        if key.startswith(_FILE)
    }
    if files and (wrong := sorted(({*files} ^ {*NEEDED}) - {SIGNATURE})):
        raise WireError(
            f"an artifact is {', '.join(NEEDED)} and, if signed, {SIGNATURE}, each sent as `file:1/NAME`;"
            f" wrong is {wrong[0][:64]!r}"
        )
    return files


def install(root: Path, files: dict[str, bytes]) -> Path:
    """Prove an artifact that was sent, then make it current below `root`; returns its folder.

    Where the device has keys, one of them must have signed it, and the signature stays with it; where it
    has none, a signature is kept for whoever can check it. Raises `ExportError` when it does not prove
    itself, and `Refused` (409) where `root` is one artifact and not a folder of them; then nothing has
    changed.
    """
    if (root / MANIFEST).is_file():
        raise Refused(409, "this server serves one artifact, not a folder of them: nothing can be added")
    if SIGNATURE in files:
        parse(files[SIGNATURE])
    with tempfile.TemporaryDirectory(dir=root, prefix=".incoming-") as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        sha256 = load(Path(staging)).manifest.sha256
    return accept(root, sha256, files)


def _decoded(key: str, value: object) -> bytes:
    try:
        return base64.b64decode(value if isinstance(value, str) else "?", validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"{key[:64]!r} is not base64") from error
