"""The short way through HTTP reads what h11 reads, or leaves it to h11; whatever comes is answered once."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.serving.predictor import Predictor
from edge_agent.serving.web import plain
from tests.served import Server, publish, serving

PLAIN = b"POST /v2?a=b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nX-Some:  thing \r\n\r\nab"
PIECES = (
    b"GET ", b"POST ", b"/", b"/a%2f", b"?", b" HTTP/1.1", b" HTTP/1.0", b"\r\n", b"\n", b"\r", b" ", b"\t",
    b":", b"Host: x", b"Content-Length: 2", b"content-length: +2", b"Content-Length: 2, 2", b"X-Y: z",
    b"Transfer-Encoding: chunked", b"Connection: close", b"Connection: keep-alive", b"Expect: 100-continue",
    b"X Y: z", b"\r\n\r\n", b"ab", b"\x00", b"\xff", b"0\r\n\r\n",
)  # fmt: skip


def by_h11(data: bytes) -> tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes]:
    """What h11 makes of one whole request; it has to end with the data."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert connection.trailing_data == (b"", False)
    assert connection.their_state is h11.DONE, "it would be kept open"
    return request.method, request.target, [(k.lower(), v) for k, v in request.headers], body


@given(st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join) | st.binary(max_size=60))
@example(PLAIN)
@example(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nab")
@example(b"POST / HTTP/1.1\r\nHost: x\r\nX: y\r\n folded\r\n\r\n")
def test_what_is_plain_means_the_same_to_h11(data: bytes) -> None:
    found = plain(data)
    if found is None:
        return
    method, target, headers, body = by_h11(data)
    path = found.path.encode() + (b"?" + found.query if b"?" in target else b"")
    assert (found.method.encode(), path, found.headers, found.body) == (method, target, headers, body)


@given(st.integers(0, len(PLAIN) - 1), st.integers(0, 255))
def test_one_byte_of_a_plain_request_may_be_any(place: int, value: int) -> None:
    data = PLAIN[:place] + bytes([value]) + PLAIN[place + 1 :]
    if (found := plain(data)) is not None:
        assert by_h11(data)[2:] == (found.headers, found.body)


@pytest.mark.parametrize(
    "data",
    [
        PLAIN[:-1],
        PLAIN + b"G",
        PLAIN.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked"),
        PLAIN.replace(b"X-Some:  thing ", b"Connection: close"),
        PLAIN.replace(b"X-Some:  thing ", b"Expect: 100-continue"),
        PLAIN.replace(b"X-Some:  thing ", b"Content-Length: 2"),
        PLAIN.replace(b"X-Some:  thing ", b"X-Long: " + b"y" * 9000),
        PLAIN.replace(b"Host: localhost\r\n", b""),
        PLAIN.replace(b"/v2?", b"/v%32?"),
        PLAIN.replace(b"POST", b"HEAD"),
    ],
)
def test_the_rest_is_left_to_h11(data: bytes) -> None:
    assert plain(PLAIN) is not None
    assert plain(data) is None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("artifacts")
    publish(folder)
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


def test_plain_requests_and_others_in_one_connection(server: Server) -> None:
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
