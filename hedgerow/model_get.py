"""`hedgerow model get`: a device's model from the coordinator, checked before it takes its place."""

from __future__ import annotations

import base64
import json
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

from export.folder import MODEL, accept, load_artifact
from export.sign import SIGNATURE
from foundation.artifact import Manifest
from foundation.durable import write_whole
from foundation.errors import SettingsError
from hedgerow.client import Client, NoAnswer
from hedgerow.exits import done
from hedgerow.files import check_writable

LONGEST_S = 330.0
"""The coordinator may take 300 s to make it."""
NAMES = frozenset({MODEL, "manifest.json", "probe.npz", SIGNATURE})


def get(client: Client, run: str, device: str, output: Path, *, as_json: bool) -> int:
    """Fetch it to a file that ends in .onnx, or as an artifact below a folder; return the exit code."""
    return done("hedgerow model get", lambda: _get(client, run, device, output, as_json))


def _get(client: Client, run: str, device: str, output: Path, as_json: bool) -> None:
    alone = output.suffix == ".onnx"
    if alone:
        check_writable(output)
    elif output.is_file():
        raise SettingsError(
            f"{output} is a file: give -o a folder for the artifact, or a name ending in .onnx"
        )
    sys.stderr.write(f"the coordinator makes the model of {device} and proves it; this takes some seconds\n")
    path = "/".join(urllib.parse.quote(part, safe="") for part in ("runs", run, "devices", device, "export"))
    files = _files(client.ask(path, {}, timeout_s=LONGEST_S))
    with tempfile.TemporaryDirectory(prefix="hedgerow-get-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        manifest, model, _ = load_artifact(Path(folder), agent=device)
    where = output if alone else accept(output, manifest.sha256, files)
    if alone:
        try:
            write_whole(output, model)
        except OSError as error:
            raise SettingsError(
                f"{output} cannot be written ({error.strerror}): name another file"
            ) from error
    print(_told(manifest, where, as_json))


def _files(told: Any) -> dict[str, bytes]:
    """Return the files of an answer; raises `NoAnswer` where it has others, or none."""
    try:
        files = {str(name): base64.b64decode(text, validate=True) for name, text in told["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise NoAnswer("the coordinator answered with no files of a model") from error
    if not files.keys() <= NAMES or MODEL not in files:
        raise NoAnswer("the coordinator answered with other files than those of a model")
    return files


def _told(manifest: Manifest, where: Path, as_json: bool) -> str:
    if as_json:
        return json.dumps({"path": str(where), "manifest": manifest.model_dump(mode="json")})
    kept = ", ".join(map(str, manifest.kept_units))
    return (
        f"{where}: {manifest.bytes:,} bytes, sha256 {manifest.sha256[:12]}…, run {manifest.run} round"
        f" {manifest.round}, FFL units kept {kept} of {manifest.hidden_units} a block"
    )
