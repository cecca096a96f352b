"""`hedgerow model get`: a device's model through the coordinator's API, checked on both sides."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from coordinator import exports
from coordinator.app import create_app
from coordinator.exports import Exporter
from coordinator.fleet.records import FleetRecords
from coordinator.fleet.tokens import ApiTokens
from coordinator.live import Live
from coordinator.store.sql import Store
from export.folder import load_artifact, read_files, resolve
from foundation.errors import StoreError, WorkRefused
from hedgerow.cli import app
from tests.coordinator.filled_store import Clock, Engine, fill
from tests.coordinator.test_api import served
from tests.hedgerow.test_export import simulated
from tests.served import publish

pytestmark = pytest.mark.anyio
RUN, DEVICE = "greenhouse-1", "pi-kitchen"


class Maker:
    """Gives the files it has, or refuses."""

    def __init__(self, files: dict[str, bytes] | WorkRefused) -> None:
        self.given = files

    async def files(self, run: str, device: str) -> dict[str, bytes]:
        if isinstance(self.given, WorkRefused):
            raise self.given
        return self.given


@asynccontextmanager
async def house(folder: Path, maker: Any) -> AsyncIterator[Callable[..., Any]]:
    """Serve a coordinator, and yield what runs `hedgerow model get` as an operator, or as somebody else."""
    with Store.open(folder / "store") as store:
        async with Live(store) as live:
            fill(store, Clock())
            tokens, records = ApiTokens(store), FleetRecords(store)
            for role in ("viewer", "operator"):
                (folder / role).write_text(tokens.make(f"a-{role}", role, expires_s=None))
            web = create_app(store, live, Engine(store, live), maker=maker, tokens=tokens, records=records)
            async with served(web) as (http, _):

                async def run(*words: str, role: str = "operator") -> tuple[int, str, str]:
                    where = ["--coordinator", str(http.base_url), "--token-file", str(folder / role)]
                    said = await asyncio.to_thread(CliRunner().invoke, app, ["model", "get", *words, *where])
                    return said.exit_code, said.stdout, said.stderr

                yield run
            who = [deed.who for deed in records.deeds() if deed.what.endswith(f"/devices/{DEVICE}/export")]
            assert who == ["a-operator"] * 4, "what was handed out is written down, and nothing else"


async def test_a_model_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    manifest = publish(tmp_path / "made", agent=DEVICE)
    maker = Maker(read_files(resolve(tmp_path / "made")))
    assert isinstance(maker.given, dict)
    async with house(tmp_path, maker) as run:
        alone, whole = tmp_path / "kitchen.onnx", tmp_path / "kitchen"
        code, said, hint = await run(RUN, DEVICE, "-o", str(alone))
        assert code == 0, hint
        assert f"sha256 {manifest.sha256[:12]}" in said
        assert alone.read_bytes() == maker.given["model.onnx"]
        code, said, _ = await run(RUN, DEVICE, "-o", str(whole), "--json")
        assert (code, json.loads(said)["manifest"]["sha256"]) == (0, manifest.sha256)
        assert load_artifact(resolve(whole), agent=DEVICE)[0] == manifest

        alone.unlink()
        code, _, said = await run(RUN, DEVICE, "-o", str(alone), role="viewer")
        assert (code, "takes an operator" in said) == (3, True)
        code, _, said = await run(RUN, "nobody", "-o", str(alone))
        assert (code, "no device 'nobody'" in said) == (1, True)
        code, _, said = await run(RUN, DEVICE, "-o", str(tmp_path / "no" / "x.onnx"))
        assert (code, "does not exist" in said) == (2, True)

        bent = bytearray(maker.given["model.onnx"])
        bent[len(bent) // 2] ^= 1
        maker.given = maker.given | {"model.onnx": bytes(bent)}
        code, _, said = await run(RUN, DEVICE, "-o", str(alone))
        assert (code, "is not the model of its manifest" in said, alone.exists()) == (1, True, False)
        maker.given = maker.given | {"../evil": b"x"}
        code, _, said = await run(RUN, DEVICE, "-o", str(alone))
        assert (code, "other files than those of a model" in said) == (1, True)
        maker.given = WorkRefused("the head never left the device")
        code, _, said = await run(RUN, DEVICE, "-o", str(alone))
        assert (code, "the head never left the device" in said, alone.exists()) == (3, True, False)


def scripted(folder: Path, script: str) -> Exporter:
    return Exporter(folder, (sys.executable, "-c", script))


async def test_why_not_is_told_and_what_is_a_fault_stays_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "import sys; sys.stderr.write('reading\\nhedgerow export: the head is elsewhere\\n'); sys.exit(1)"
    with pytest.raises(WorkRefused, match=r"^the head is elsewhere$"):
        await scripted(tmp_path, says).files("r", "d")
    with pytest.raises(StoreError, match="log has it"):
        await scripted(tmp_path, "raise RuntimeError('a secret')").files("r", "d")
    assert "a secret" in caplog.text
    monkeypatch.setattr(exports, "LONGEST_S", 0.01)
    with pytest.raises(WorkRefused, match=r"within 0\.01 s"):
        await scripted(tmp_path, "import time; time.sleep(60)").files("r", "d")


async def test_an_artifact_that_no_answer_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "made")
    copies = f"""
import shutil, sys
out = next(word.partition("=")[2] for word in sys.argv if word.startswith("--output="))
assert "--from=r" in sys.argv and "--device=d" in sys.argv and "--folder={tmp_path}" in sys.argv
shutil.copytree({str(tmp_path / "made")!r}, out, symlinks=True, dirs_exist_ok=True)
"""
    exporter = scripted(tmp_path, copies)
    assert (await exporter.files("r", "d")).keys() >= {"model.onnx", "manifest.json", "probe.npz"}
    monkeypatch.setattr(exports, "LARGEST_BYTES", 1000)
    with pytest.raises(WorkRefused, match="an answer at most 1000"):
        await exporter.files("r", "d")


@pytest.mark.slow
async def test_a_real_run_is_exported_by_a_process_of_its_own(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(simulated, tmp_path / "s", "fedavg")
    store = next(path for path in (folder, *folder.iterdir()) if (path / "hedgerow.sqlite").exists())
    files = await Exporter(store).files("simulation", "device-1")
    manifest = json.loads(files["manifest.json"])
    assert (manifest["agent"], manifest["round"]) == ("device-1", 2)
    assert len(base64.b64encode(files["model.onnx"])) > 1000
    with pytest.raises(WorkRefused, match="did you mean 'device-1'"):
        await Exporter(store).files("simulation", "device-9")
