"""HTTP as it comes over a socket: whatever comes is answered once, by both of uvicorn's parsers."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.serving.predictor import Predictor
from tests.served import Server, publish, serving


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with each of uvicorn's parsers; without httptools, which a device may lack, it takes h11."""
    folder = tmp_path_factory.mktemp("artifacts")
    publish(folder)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "h11":
            hidden = tmp_path_factory.mktemp("hidden")
            (hidden / "httptools.py").write_text("raise ImportError('hidden by the test')\n")
            patch.setenv("PYTHONPATH", str(hidden), prepend=os.pathsep)
        with serving(folder) as running:
            yield running


def connected(server: Server) -> socket.socket:
    host, port = server.address.split(":")
    line = socket.create_connection((host, int(port)), 20)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def answers_of(line: socket.socket, count: int) -> list[tuple[int, dict[str, str], bytes]]:
    found = []
    with line.makefile("rb") as reader:
        for _ in range(count):
            status = int(reader.readline().split()[1])
            told = {}
            while text := reader.readline().strip():
                name, _, value = text.decode().partition(":")
                assert name.lower() not in told, "said twice"
                told[name.lower()] = value.strip()
            found.append((status, told, reader.read(int(told["content-length"]))))
    return found


ASK = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
UNKNOWN = b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_whole_and_chunked_requests_in_one_connection(server: Server) -> None:
    with connected(server) as line:
        chunked = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"2\r\n{}\r\n0\r\n\r\n"
        for asked, status in ((ASK, 200), (chunked, 400), (ASK, 200), (UNKNOWN, 404), (chunked, 400)):
            line.sendall(asked)
            ((found, told, body),) = answers_of(line, 1)
            assert found == status
            assert told["date"].endswith("GMT")
            json.loads(body)


def test_what_comes_while_one_is_answered_is_answered_after_it(server: Server) -> None:
    with connected(server) as line:
        line.sendall(ASK + UNKNOWN + ASK)
        assert [status for status, _, _ in answers_of(line, 3)] == [200, 404, 200]
        for asked in (ASK, UNKNOWN, ASK + ASK, UNKNOWN):
            line.sendall(asked)
        assert [status for status, _, _ in answers_of(line, 5)] == [200, 404, 200, 200, 404]


def test_a_request_in_pieces_is_answered(server: Server) -> None:
    with connected(server) as line:
        for byte in ASK:
            line.sendall(bytes([byte]))
        line.sendall(ASK)
        assert [status for status, _, _ in answers_of(line, 2)] == [200, 200]


def test_a_client_may_close_and_nonsense_is_refused(server: Server) -> None:
    with connected(server) as line:
        line.sendall(ASK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answers_of(line, 1)[0][0] == 200
        assert line.recv(1) == b""
    with connected(server) as line:
        line.sendall(b"nonsense\r\n\r\n")
        assert line.recv(12) == b"HTTP/1.1 400"


def test_an_idle_connection_is_closed_when_it_ends(tmp_path: Path) -> None:
    publish(tmp_path)
    with serving(tmp_path) as running, connected(running) as line:
        line.sendall(ASK)
        assert answers_of(line, 1)[0][0] == 200
        running.process.send_signal(signal.SIGTERM)
        assert line.recv(1) == b""
        assert running.process.wait(20) == 0


# --- looking for a newer artifact ----------------------------------------------------------------------


def aged(folder: Path) -> None:
    """Let a folder's change lie so far back that its time proves something."""
    os.utime(folder, ns=(0, folder.stat().st_mtime_ns - 10_000_000_000))


def test_a_folder_that_did_not_change_need_not_be_looked_at(tmp_path: Path) -> None:
    publish(tmp_path)
    predictor = Predictor(tmp_path)
    assert not predictor.unchanged(), "a change in the same instant could not be told"
    aged(tmp_path)
    assert not predictor.unchanged()
    predictor.reload()
    assert predictor.unchanged()
    publish(tmp_path, round=2, seed=4)
    assert not predictor.unchanged()
    assert predictor.reload().changed
    assert predictor.on_trial
    aged(tmp_path)
    assert not predictor.unchanged(), "a model on trial is judged every time"


def test_a_refused_artifact_is_looked_at_again_when_a_file_of_it_changes(tmp_path: Path) -> None:
    publish(tmp_path)
    predictor = Predictor(tmp_path)
    manifest = publish(tmp_path, round=2, seed=4)
    model = tmp_path / manifest.sha256 / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    assert predictor.reload().refusal is not None
    for path in (*(tmp_path / manifest.sha256).iterdir(), tmp_path / manifest.sha256, tmp_path):
        aged(path)
    predictor.reload()
    assert predictor.unchanged()
    model.write_bytes(whole)
    assert not predictor.unchanged()
    assert predictor.reload().changed
