"""`hedgerow.client` against a server that says what it is told to: tokens, TLS, redirects, streams."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.fleet.authority import certified
from foundation.errors import SettingsError
from hedgerow.cli import app
from hedgerow.client import ApiProblem, Client, NoAnswer
from hedgerow.exits import done

STREAM = "text/event-stream"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Heard:
    method: str
    path: str
    token: str | None
    body: bytes


@dataclass
class Server:
    address: str
    heard: list[Heard]


@contextmanager
def answering(*answers: Answer | Callable[[], Answer], tls: Path | None = None) -> Iterator[Server]:
    """Serve these answers in turn, the last one again and again."""
    heard: list[Heard] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            heard.append(Heard(self.command, self.path, self.headers.get("Authorization"), body))
            chosen = answers[min(len(heard), len(answers)) - 1]
            answer = chosen() if callable(chosen) else chosen
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = _answer  # noqa: N815 - the library's names

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        files = certified(tls, ["127.0.0.1"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.certificate, files.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    serving = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02))
    serving.start()
    try:
        scheme = "http" if tls is None else "https"
        yield Server(f"{scheme}://127.0.0.1:{server.server_address[1]}", heard)
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


def problem(status: int) -> Answer:
    told = {"title": "x", "status": status, "detail": f"it is {status}", "instance": "/api/v1/x"}
    return Answer(status, json.dumps(told).encode(), {"Content-Type": "application/problem+json"})


def stream(text: str) -> Answer:
    return Answer(body=text.encode(), headers={"Content-Type": STREAM})


def test_the_token_comes_from_what_is_given_the_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("of-the-file\n")
    with answering(Answer()) as here:
        Client(here.address).ask("status")
        monkeypatch.setenv("HEDGEROW_TOKEN", "of-the-environment")
        Client(here.address).ask("status")
        Client(here.address, tmp_path / "token").ask("status")
        Client(here.address, tmp_path / "token", token="given").ask("status")
        Client(here.address, tmp_path / "token").ask("runs", {"name": "a"})
    assert [one.token for one in here.heard] == [
        None, "Bearer of-the-environment", "Bearer of-the-file", "Bearer given", "Bearer of-the-file",
    ]  # fmt: skip
    assert (here.heard[-1].method, json.loads(here.heard[-1].body)) == ("POST", {"name": "a"})
    with pytest.raises(SettingsError, match="cannot be read"):
        Client(here.address, tmp_path / "nothing").ask("status")


def test_an_authority_of_ones_own_is_trusted_and_no_other(tmp_path: Path) -> None:
    other = certified(tmp_path / "other", ["127.0.0.1"]).authority
    with answering(Answer(body=b'{"run": null}'), tls=tmp_path / "tls") as here:
        authority = tmp_path / "tls" / "authority.pem"
        assert Client(here.address, cacert=authority).ask("status") == {"run": None}
        for wrong in (None, other):
            with pytest.raises(NoAnswer, match=r"(?i)certificate"):
                Client(here.address, cacert=wrong).ask("status")
        assert len(here.heard) == 1, "no token went to whom nobody vouches for"
    with pytest.raises(SettingsError, match="authority"):
        Client(here.address, cacert=tmp_path / "nothing").ask("status")
    (tmp_path / "text").write_text("no certificate")
    with pytest.raises(SettingsError, match="authority"):
        Client(here.address, cacert=tmp_path / "text").ask("status")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("body", [None, {"reason": "x"}])
def test_no_redirect_is_followed(status: int, body: dict[str, str] | None) -> None:
    with answering(Answer()) as elsewhere:
        there = {"Location": f"{elsewhere.address}/api/v1/status"}
        with answering(Answer(status, headers=there)) as here:
            with pytest.raises(SettingsError, match="sends elsewhere") as caught:
                Client(here.address, token="secret").ask("status", body)
            with pytest.raises(SettingsError, match="sends elsewhere"):
                next(Client(here.address, token="secret").events())
    assert elsewhere.heard == []
    assert elsewhere.address in str(caught.value)
    assert "secret" not in str(caught.value)


REFUSED = (
    ["fleet"],
    ["fleet", "--watch"],
    ["run", "list"],
    ["run", "pause", "a"],
    ["model", "rollout", "show"],
    ["model", "rollout", "go"],
    ["model", "rollback", "--all"],
)


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_every_command_ends_with_3_where_it_is_refused(words: list[str]) -> None:
    with answering(problem(409)) as here:
        ended = CliRunner().invoke(app, [*words, "--coordinator", here.address])
    assert (ended.exit_code, "it is 409" in ended.stderr, ended.stdout) == (3, True, "")


@pytest.mark.parametrize(
    ("status", "code"), [(401, 3), (403, 3), (409, 3), (429, 3), (404, 1), (500, 1), (422, 2)]
)
def test_the_exit_code_says_whether_it_was_refused_failed_or_wrong(status: int, code: int) -> None:
    with answering(problem(status)) as here:
        assert done("hedgerow it", lambda: Client(here.address).ask("status")) == code


def test_a_stream_is_taken_up_after_the_last_id_through_cuts_and_failures() -> None:
    status = 'event: status\ndata: {"round": 1}\n\n'
    waits: list[float] = []
    with answering(
        stream(f"{status}id: 7\ndata: {{}}\n\n: heartbeat\n\nid: 8\ndata: {{"),  # cut in a message
        problem(503),
        problem(429),
        stream('data: {"half": '),
        stream("id: 8\ndata: [1]\n\n"),  # not ours
        stream('id: 8\ndata: {"n": 8}\n\n'),
        problem(401),
    ) as here:
        events = Client(here.address).events(wait=waits.append)
        found = [(event.name, event.id, event.data) for event in islice(events, 3)]
        with pytest.raises(ApiProblem, match="HEDGEROW_TOKEN"):
            next(events)
    assert found == [("status", None, {"round": 1}), ("message", 7, {}), ("message", 8, {"n": 8})]
    assert [one.path.rpartition("/")[2] for one in here.heard] == [
        "events", *["events?after=7"] * 5, "events?after=8",
    ]  # fmt: skip
    assert len(waits) == 6


def test_a_first_connection_that_fails_is_said_at_once() -> None:
    waits: list[float] = []
    with answering(problem(503)) as here, pytest.raises(ApiProblem, match="it is 503"):
        next(Client(here.address).events(wait=waits.append))
    assert waits == []


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"[" * 100_000, b'{"items": []}'])
def test_what_is_no_page_of_a_coordinator_is_no_answer(body: bytes) -> None:
    with answering(Answer(body=body)) as here, pytest.raises(NoAnswer):
        list(Client(here.address).pages("runs"))


def test_a_list_that_turns_in_circles_ends() -> None:
    with (
        answering(Answer(body=b'{"items": [{}], "next": "a"}')) as here,
        pytest.raises(NoAnswer, match="the same page again"),
    ):
        list(Client(here.address).pages("runs"))


def test_a_failure_without_words_is_told_by_its_status() -> None:
    with answering(Answer(502, b"<html>gateway</html>")) as here:
        with pytest.raises(ApiProblem, match="answered 502") as caught:
            Client(here.address).ask("status")
        assert (caught.value.status, caught.value.is_refusal, caught.value.passes) == (502, False, True)
