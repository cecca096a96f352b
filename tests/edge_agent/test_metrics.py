"""`/metrics` of an agent: opt-in, on loopback, and what stands there."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from edge_agent.metrics_port import AT_ONCE, HEAD_BYTES, metrics_on
from foundation.energy import Stage
from foundation.errors import SettingsError
from tests.exposition import follows_the_conventions, read
from tests.metrics_told import told_by

pytestmark = pytest.mark.anyio


def test_joules_of_all_windows_stand_by_stage_kind_and_scope(tmp_path: Path) -> None:
    found = told_by(tmp_path, "raspberry-pi-4b", Stage.TRAIN, Stage.SEND, Stage.TRAIN)
    follows_the_conventions(found)
    joules = found["hedgerow_agent_energy_joules_total"]
    assert joules.value(stage="train", kind="modelled", scope="board_dc") > 0
    assert found["hedgerow_agent_stage_seconds_total"].value(stage="train") == 4
    assert found["hedgerow_agent_stage_seconds_total"].value(stage="send") == 2
    assert found["hedgerow_agent_stage"].value(stage="idle") == 1
    assert found["hedgerow_agent_outbox_updates"].value() == 0
    assert found["hedgerow_agent_info"].value(agent="d0", profile="raspberry-pi-4b") == 1


def test_without_a_meter_there_are_seconds_and_no_joules(tmp_path: Path) -> None:
    found = told_by(tmp_path, "unknown-linux", Stage.TRAIN)
    assert found["hedgerow_agent_stage_seconds_total"].value(stage="train") == 2
    assert not found["hedgerow_agent_energy_joules_total"].samples
    assert not found["hedgerow_agent_power_watts"].samples


# --- the port -------------------------------------------------------------------------------------


async def test_it_answers_metrics_on_loopback_and_nothing_else() -> None:
    async with metrics_on(0, lambda: "# nothing\n") as port:
        address = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=address) as client:
            answer = await client.get("/metrics")
            assert (answer.status_code, answer.text) == (200, "# nothing\n")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert (await client.get("/metrics?x=1")).status_code == 200
            assert (await client.get("/")).status_code == 404
            assert (await client.post("/metrics")).status_code == 405
            assert (await client.get("/metrics", headers={"Host": "evil.example"})).status_code == 403
        with pytest.raises(SettingsError, match=r"metrics\.port = .* cannot be opened"):
            async with metrics_on(port, lambda: ""):
                pass


async def said(port: int, words: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(words)
    if not words.endswith(b"\r\n\r\n"):
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    "words",
    [b"", b"GET /metrics", b"x" * (HEAD_BYTES + 1), b"\x00\xff\r\n\r\n", b"GET /metrics SPDY/1\r\n\r\n"],
)
async def test_nonsense_is_not_answered_with_figures(words: bytes) -> None:
    async with metrics_on(0, lambda: "secret\n") as port:
        try:
            answer = await said(port, words)
        except ConnectionResetError:
            answer = b""  # closed with what it sent unread
        assert b"secret" not in answer
        ask = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert (await said(port, ask)).endswith(b"secret\n")


async def test_those_who_say_nothing_do_not_grow_without_end() -> None:
    async with metrics_on(0, lambda: "figures\n") as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(AT_ONCE)]
        ask = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
        async with asyncio.timeout(10):
            while not (await said(port, ask)).startswith(b"HTTP/1.1 503"):
                pass
            for one in silent:
                one.close()
            while not (await said(port, ask)).startswith(b"HTTP/1.1 200"):
                pass


def test_an_agents_process_answers_while_its_broker_is_away(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text(
        f'vault = "{tmp_path}/vault"\nagent = "d0"\nprofile = "raspberry-pi-4b"\n'
        'data = { kind = "builtin" }\n'
        "metrics = { port = 0 }\n[mqtt]\nport = 1\n"
    )
    command = [sys.executable, "-m", "edge_agent", "--config", str(tmp_path / "agent.toml")]
    command += ["--set", "mqtt.connect_timeout_s=none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            (address,) = next(
                found
                for line in process.stderr
                if (found := re.findall(r"http://127\.0\.0\.1:\d+/metrics", line))
            )
            found = read(httpx.get(address).text)
        finally:
            process.terminate()
    assert process.returncode == 0
    follows_the_conventions(found)
    assert found["hedgerow_agent_info"].value(agent="d0", profile="raspberry-pi-4b") == 1
    assert found["hedgerow_agent_power_watts"].kind == "gauge"
