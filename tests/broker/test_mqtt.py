from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from foundation.errors import FrameTooLarge, NotConnected, TransportError
from foundation.mqtt import Letters, MqttSettings, MqttTransport
from foundation.transport import Letter, Transport
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.broker.conftest import RunBroker, free_port
from tests.conftest import require_service

pytestmark = [pytest.mark.broker, pytest.mark.anyio]

WAIT_S = 10.0


@pytest.fixture(
    params=[("mosquitto", "5"), ("mosquitto", "3.1.1"), ("nats", "auto")], ids=lambda pair: "-".join(pair)
)
def spoken(
    request: pytest.FixtureRequest,
) -> tuple[Literal["mosquitto", "nats"], Literal["auto", "5", "3.1.1"]]:
    """A broker and the MQTT that is spoken to it; NATS has 3.1.1 only, and `auto` comes to that."""
    pair: tuple[Literal["mosquitto", "nats"], Literal["auto", "5", "3.1.1"]] = request.param
    return pair


@pytest.fixture
def broker(spoken: tuple[Literal["mosquitto", "nats"], str], tmp_path: Path) -> Iterator[EmbeddedBroker]:
    require_service(find_broker(spoken[0]) is not None, spoken[0])
    with EmbeddedBroker(tmp_path / "broker", prefer=spoken[0]) as running:
        yield running


@pytest.fixture
def settings(spoken: tuple[str, Literal["auto", "5", "3.1.1"]], broker: EmbeddedBroker) -> MqttSettings:
    return MqttSettings(port=broker.port, version=spoken[1])


async def next_letter(letters: AsyncIterator[Letter], within_s: float = WAIT_S) -> Letter:
    return await asyncio.wait_for(anext(letters), within_s)


async def until(true: Callable[[], bool], within_s: float = WAIT_S) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.01)


def our_threads() -> list[str]:
    """The network threads of the clients `a` and `b`."""
    return [thread.name for thread in threading.enumerate() if thread.name in ("mqtt-a", "mqtt-b")]


# Letters


async def test_letters_arrive_in_order_at_everyone_who_asked(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a, MqttTransport(settings, "b") as b:
        everything = await b.subscribe("x/#")
        ones = await b.subscribe("x/+/one", "y")
        await a.publish("x/1/one", b"\x00\xff")
        await a.publish("x/1/two", b"")
        await a.publish("y", b"y")
        await a.publish("z", b"nobody asked")
        await a.publish("x/end", b"end")
        seen: list[Letter] = []
        while not seen or seen[-1].topic != "x/end":
            seen.append(await next_letter(everything))
        # Where patterns overlap a broker may deliver once for each of them.
        assert list(dict.fromkeys(seen)) == [
            Letter("x/1/one", b"\x00\xff"),
            Letter("x/1/two", b""),
            Letter("x/end", b"end"),
        ]
        assert await next_letter(ones) == Letter("x/1/one", b"\x00\xff")
        assert (a.connected, a.reconnects, a.dropped, b.overflowed) == (True, 0, 0, 0)


async def test_qos_0_arrives_too(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a, MqttTransport(settings, "b") as b:
        letters = await b.subscribe("telemetry")
        for n in range(20):
            await a.publish("telemetry", b"%d" % n, qos=0)
        assert [int((await next_letter(letters)).body) for _ in range(20)] == list(range(20))
        assert a.dropped == 0


async def test_five_megabytes_in_parts_arrive_whole(settings: MqttSettings) -> None:
    frame = os.urandom(5_000_000)
    parts = [frame[i : i + 120_000] for i in range(0, len(frame), 120_000)]
    async with MqttTransport(settings, "a") as a, MqttTransport(settings, "b") as b:
        letters = await b.subscribe("parts")
        sending = asyncio.gather(*(a.publish("parts", part) for part in parts))
        received = [(await next_letter(letters)).body for _ in parts]
        await sending
    assert hashlib.sha256(b"".join(received)).digest() == hashlib.sha256(frame).digest()


async def test_what_is_retained_meets_whoever_comes_later_until_it_is_emptied(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a, MqttTransport(settings, "b", clean=True) as b:
        await a.publish("card", b"one", retain=True)
        await a.publish("card", b"two", retain=True)
        first = await b.subscribe("card")
        assert await next_letter(first) == Letter("card", b"two", retained=True)
        await a.publish("card", b"", retain=True)
        assert await next_letter(first) == Letter("card", b"")
        second = await b.subscribe("card", "mark")
        await a.publish("mark", b"nothing before this")
        assert (await next_letter(second)).topic == "mark"


async def test_a_kept_session_holds_letters_while_its_owner_is_away(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a:
        async with MqttTransport(settings, "b") as b:
            await b.subscribe("work/#")
        for n in range(50):
            await a.publish("work/b", b"%d" % n)
        async with MqttTransport(settings, "b") as b:
            # They come before anyone could have subscribed again.
            await asyncio.sleep(0.2)
            letters = await b.subscribe("work/#")
            # NATS may still have sent one to the connection just closed; it comes again, out of order.
            assert sorted([int((await next_letter(letters)).body) for _ in range(50)]) == list(range(50))


async def test_a_clean_session_holds_nothing(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a:
        async with MqttTransport(settings, "b", clean=True) as b:
            await b.subscribe("work")
        await a.publish("work", b"missed")
        async with MqttTransport(settings, "b", clean=True) as b:
            letters = await b.subscribe("work")
            await a.publish("work", b"seen")
            assert (await next_letter(letters)).body == b"seen"


async def test_a_subscription_that_was_given_up_ends_and_others_go_on(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a:
        one, other = await a.subscribe("x", "only-one"), await a.subscribe("x")
        assert isinstance(one, Letters)
        await one.aclose()
        with pytest.raises(StopAsyncIteration):
            await next_letter(one)
        await a.publish("only-one", b"")
        await a.publish("x", b"still")
        assert (await next_letter(other)).body == b"still"


async def test_a_reader_too_far_behind_loses_letters_but_not_in_silence(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    settings = MqttSettings(port=broker.port, inbox_letters=5)
    async with MqttTransport(settings, "a") as a:
        letters = await a.subscribe("x")
        for n in range(8):
            await a.publish("x", b"%d" % n)
        await until(lambda: a.overflowed == 3)
        assert [(await next_letter(letters)).body for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        await a.publish("x", b"room again")
        assert (await next_letter(letters)).body == b"room again"
    assert "inbox of x is full" in caplog.text


# Presence


CLIENT = """
import asyncio, sys
from foundation.mqtt import MqttSettings, MqttTransport

async def main():
    async with MqttTransport(MqttSettings.from_url(sys.argv[1]), "dying", will=("presence", b"offline")) as a:
        await a.publish("presence", b"online", retain=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_will_of_a_killed_process_is_published_and_retained(
    broker: EmbeddedBroker, settings: MqttSettings
) -> None:
    root = Path(__file__).parents[2]
    async with MqttTransport(settings, "watcher", clean=True) as watcher:
        letters = await watcher.subscribe("presence")
        with subprocess.Popen([sys.executable, "-c", CLIENT, broker.url], cwd=root) as process:
            try:
                assert (await next_letter(letters, 30)).body == b"online"
                process.send_signal(signal.SIGKILL)
                assert (await next_letter(letters)).body == b"offline"
            finally:
                process.kill()
        late = await watcher.subscribe("presence")
        assert await next_letter(late) == Letter("presence", b"offline", retained=True)


async def test_a_goodbye_keeps_the_will_unpublished(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "watcher", clean=True) as watcher:
        letters = await watcher.subscribe("presence", "mark")
        async with MqttTransport(settings, "a", will=("presence", b"offline")):
            pass
        await asyncio.sleep(0.1)
        await watcher.publish("mark", b"")
        assert (await next_letter(letters)).topic == "mark"


async def test_closing_without_a_goodbye_publishes_the_will(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "watcher", clean=True) as watcher:
        letters = await watcher.subscribe("presence")
        async with MqttTransport(settings, "a", will=("presence", b"offline")) as a:
            await a.close(goodbye=False)
        assert await next_letter(letters) == Letter("presence", b"offline")


# A broker that goes away


async def test_after_a_killed_broker_all_is_as_before(
    broker: EmbeddedBroker, settings: MqttSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        MqttTransport(settings, "a", will=("a/presence", b"offline")) as a,
        MqttTransport(settings, "b") as b,
    ):
        await a.publish("a/presence", b"online", retain=True)
        await a.publish("a/card", b"old", retain=True)
        await a.publish("a/card", b"card", retain=True)
        await a.publish("a/gone", b"gone", retain=True)
        await a.publish("a/gone", b"", retain=True)
        # Its own letters: a killed Mosquitto has forgotten b, and acknowledges what b then never gets.
        own, letters = await a.subscribe("outage"), await b.subscribe("work")
        broker.kill()
        await until(lambda: not a.connected and not b.connected)
        late = asyncio.create_task(a.publish("outage", b"said during the outage"))
        await a.publish("work", b"telemetry is not kept", qos=0)
        await asyncio.sleep(0.2)
        assert not late.done()
        broker.start()
        assert (await next_letter(own)).body == b"said during the outage"
        await late
        await until(lambda: b.connected)
        await a.publish("work", b"and on")
        assert (await next_letter(letters)).body == b"and on"
        assert (a.reconnects, b.reconnects, a.dropped) == (1, 1, 1)
        async with MqttTransport(settings, "c", clean=True) as c:
            retained = await c.subscribe("a/#")
            await c.publish("a/mark", b"")
            seen: dict[str, bytes] = {}
            while "a/mark" not in seen:
                letter = await next_letter(retained)
                seen[letter.topic] = letter.body
            if broker.name == "nats":  # killed, it brings back what was emptied just before
                seen.pop("a/gone", None)
            assert seen == {"a/presence": b"online", "a/card": b"card", "a/mark": b""}
    assert "lost the broker at" in caplog.text


async def test_publishing_while_the_broker_dies_again_and_again(
    broker: EmbeddedBroker, settings: MqttSettings
) -> None:
    async with MqttTransport(settings, "a") as a:

        async def send() -> None:
            for n in range(300):
                await a.publish("n", b"%d" % n, retain=n == 299)

        sending = asyncio.create_task(send())
        for _ in range(2):
            await asyncio.sleep(0.05)
            broker.kill()
            broker.start()
            await until(lambda: a.connected)
        await asyncio.wait_for(sending, 20)
        async with MqttTransport(settings, "b", clean=True) as b:
            assert (await next_letter(await b.subscribe("n"))).body == b"299"


@contextlib.asynccontextmanager
async def rude_relay(port: int, break_after: int) -> AsyncIterator[int]:
    """A relay that resets every connection after so many bytes from the client; yields its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def copy(
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        budget: list[int],
        both: list[asyncio.WriteTransport],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(16_384):
                budget[0] -= len(data)
                if budget[0] < 0:
                    break
                writer.write(data)
                await writer.drain()
        for transport in both:
            transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        both = [writer.transport, upstream_writer.transport]
        forth = asyncio.create_task(copy(reader, upstream_writer, [break_after], both))
        back = asyncio.create_task(copy(upstream_reader, writer, [1 << 40], both))
        tasks.update((forth, back))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_parts_pass_a_link_that_breaks_every_megabyte(
    broker: EmbeddedBroker, settings: MqttSettings
) -> None:
    async with rude_relay(broker.port, 1_000_000) as port, MqttTransport(settings, "b") as b:
        letters = await b.subscribe("parts")
        async with MqttTransport(MqttSettings(port=port), "a") as a:
            bodies = [n.to_bytes(2) + os.urandom(119_998) for n in range(25)]
            await asyncio.wait_for(asyncio.gather(*(a.publish("parts", body) for body in bodies)), 60)
            assert a.reconnects >= 2
        seen: set[bytes] = set()
        while len(seen) < len(bodies):
            seen.add((await next_letter(letters)).body)
        assert seen == set(bodies)


async def test_patience_has_an_end(broker: EmbeddedBroker) -> None:
    settings = MqttSettings(port=broker.port, patience_s=0.3)
    async with MqttTransport(settings, "a") as a:
        broker.kill()
        await until(lambda: not a.connected)
        begun = time.monotonic()
        with pytest.raises(NotConnected, match=r"work was not confirmed: for 0\.3 s .* is away: "):
            await a.publish("work", b"")
        with pytest.raises(NotConnected, match=r"subscription to x, y was not confirmed within 0\.3 s"):
            await a.subscribe("x", "y")
        assert time.monotonic() - begun > 0.5


async def test_what_waits_when_the_transport_closes_is_told(
    broker: EmbeddedBroker, settings: MqttSettings
) -> None:
    async with MqttTransport(settings, "a") as a:
        letters = await a.subscribe("x")
        broker.kill()
        await until(lambda: not a.connected)
        publishing = asyncio.create_task(a.publish("work", b""))
        subscribing = asyncio.create_task(a.subscribe("y"))
        reading = asyncio.ensure_future(anext(letters))
        await asyncio.sleep(0.05)
    for waiting in (publishing, subscribing):
        with pytest.raises(NotConnected, match="closed"):
            await asyncio.wait_for(waiting, 1)
    with pytest.raises(StopAsyncIteration):
        await reading
    with pytest.raises(NotConnected, match="not open"):
        await a.publish("work", b"")
    with pytest.raises(NotConnected, match="not open"):
        await a.subscribe("x")


async def test_a_cancelled_publish_leaves_the_window_usable(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a:
        letters = await a.subscribe("x")
        for n in range(100):
            task = asyncio.create_task(a.publish("x", b"%d" % n))
            await asyncio.sleep(0)
            task.cancel()
        await a.publish("x", b"last")
        while (await next_letter(letters)).body != b"last":
            pass


# What is refused


async def test_what_would_poison_the_connection_is_refused_before_it_is_sent(settings: MqttSettings) -> None:
    async with MqttTransport(settings, "a") as a:
        letters = await a.subscribe("x")
        with pytest.raises(FrameTooLarge, match=r"120001 bytes for x are .*max_part_bytes = 120000"):
            await a.publish("x", bytes(120_001))
        for topic in ("", "x/+", "#", "x\0", "x" * 70_000):
            with pytest.raises(ValueError, match="cannot publish to"):
                await a.publish(topic, b"")
        with pytest.raises(ValueError, match="QoS 2"):
            await a.publish("x", b"", qos=2)
        for pattern in ("", "x/#/y", "x+", "x#", "a\0b"):
            with pytest.raises(ValueError, match="not a topic pattern"):
                await a.subscribe(pattern)
        with pytest.raises(ValueError, match="at least one"):
            await a.subscribe()
        with pytest.raises(TransportError, match="already open"):
            await a.__aenter__()
        await a.publish("x", bytes(120_000))
        assert len((await next_letter(letters)).body) == 120_000
        assert a.reconnects == 0


async def test_a_refused_subscription_names_the_pattern(run_broker: RunBroker, tmp_path: Path) -> None:
    config = f"""
server_name: test
port: -1
host: 127.0.0.1
jetstream {{ store_dir: "{tmp_path}/js" }}
mqtt {{ host: 127.0.0.1, port: {{port}} }}
authorization {{ users: [ {{ user: "u", password: "p", permissions: {{
  publish: {{ allow: [">"] }}, subscribe: {{ allow: ["allowed.>", "$MQTT.>"] }} }} }} ] }}
"""
    port = run_broker("nats", config)
    async with MqttTransport(MqttSettings.from_url(f"mqtt://u:p@127.0.0.1:{port}"), "a") as a:
        with pytest.raises(TransportError, match=r"refused the subscription to secret/\+.*ACL.*user u"):
            await a.subscribe("allowed/x", "secret/+")
        letters = await a.subscribe("allowed/x")
        await a.publish("allowed/x", b"in")
        assert (await next_letter(letters)).body == b"in"


async def test_a_wrong_password_is_refused_in_words_and_the_right_one_works(
    run_broker: RunBroker, tmp_path: Path
) -> None:
    tool = shutil.which("mosquitto_passwd")
    require_service(tool is not None, "mosquitto_passwd")
    users, password_file = tmp_path / "users", tmp_path / "password"
    subprocess.run([str(tool), "-b", "-c", users, "agent", "right"], check=True, capture_output=True)
    users.chmod(0o644)  # the broker reads it as its own user
    tmp_path.chmod(0o755)
    config = f"listener {{port}} 127.0.0.1\nallow_anonymous false\npassword_file {users}\n"
    config += "user root\n" if os.getuid() == 0 else ""
    port = run_broker("mosquitto", config)
    for url, who in (
        (f"mqtt://agent:wrong@127.0.0.1:{port}", "user 'agent'"),
        (f"mqtt://127.0.0.1:{port}", "without"),
    ):
        with pytest.raises(
            NotConnected, match=rf"127\.0\.0\.1:{port}.*refused .*{who}.*mqtt\.password"
        ) as caught:
            await MqttTransport(MqttSettings.from_url(url), "a").__aenter__()
        assert "wrong" not in str(caught.value)
    password_file.write_text("right\n")
    settings = MqttSettings(port=port, username="agent", password_file=password_file)
    async with MqttTransport(settings, "a") as a:
        await a.publish("x", b"")
    assert our_threads() == []


# TLS


def make_certificates(folder: Path) -> None:
    """One authority, one server for 127.0.0.1, one client, with the openssl program."""
    tool = shutil.which("openssl")
    require_service(tool is not None, "openssl")

    def openssl(*arguments: str) -> None:
        subprocess.run([str(tool), *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    usage = ["-addext", "keyUsage=critical,keyCertSign"]
    openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=test ca",
        "-days",
        "2",
        *usage,
    )
    for name in ("server", "client"):
        (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext", "-days", "2"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    for file in folder.iterdir():
        if file.suffix in (".key", ".pem"):
            file.chmod(0o644)


async def test_tls_with_a_private_authority_and_client_certificates(
    run_broker: RunBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_certificates(tmp_path)
    config = (
        f"listener {{port}} 127.0.0.1\nallow_anonymous true\ncafile {tmp_path}/ca.pem\n"
        f"certfile {tmp_path}/server.pem\nkeyfile {tmp_path}/server.key\nrequire_certificate true\n"
    )
    port = run_broker("mosquitto", config + ("user root\n" if os.getuid() == 0 else ""))
    common = {"tls": True, "port": port, "connect_timeout_s": 0.5}
    client = {"cert_file": tmp_path / "client.pem", "key_file": tmp_path / "client.key"}

    good = MqttSettings.model_validate({**common, **client, "ca_file": tmp_path / "ca.pem"})
    async with MqttTransport(good, "a", clean=True) as a:
        letters = await a.subscribe("x")
        await asyncio.gather(*(a.publish("x", bytes(120_000)) for _ in range(20)))
        assert sum([len((await next_letter(letters)).body) for _ in range(20)]) == 2_400_000

    insecure = MqttSettings.model_validate({**common, **client, "insecure": True})
    async with MqttTransport(insecure, "a", clean=True) as a:
        await a.publish("x", b"")
    assert "mqtt.insecure" in caplog.text

    unknown = MqttSettings.model_validate({**common, **client})
    with pytest.raises(NotConnected, match=r"certificate is not accepted .*mqtt\.ca_file"):
        await MqttTransport(unknown, "a").__aenter__()
    wrong_name = MqttSettings.model_validate(
        {**common, **client, "ca_file": tmp_path / "ca.pem", "host": "localhost"}
    )
    with pytest.raises(NotConnected, match=r"certificate is not accepted .*mqtt\.host"):
        await MqttTransport(wrong_name, "a").__aenter__()
    nobody = MqttSettings.model_validate({**common, "ca_file": tmp_path / "ca.pem"})
    with pytest.raises(NotConnected, match=r"TLS|closed"):
        await MqttTransport(nobody, "a").__aenter__()
    plain = MqttSettings(port=port, connect_timeout_s=0.5)
    with pytest.raises(NotConnected, match="is TLS needed there"):
        await MqttTransport(plain, "a").__aenter__()
    gc.collect()  # failed handshakes leave no socket to be warned about


# No broker


@contextlib.contextmanager
def peer(answer: bytes | None) -> Iterator[int]:
    """A listener that is no broker: it says `answer` to every connection, or accepts and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        links: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = server.accept()
                    links.append(link)
                    link.recv(1024)
                    if answer is not None:
                        link.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for link in links:
        link.close()
    thread.join(2)


async def fails_in_time(settings: MqttSettings, match: str, client_id: str = "a") -> None:
    begun = time.monotonic()
    with pytest.raises(NotConnected, match=match):
        await MqttTransport(settings, client_id).__aenter__()
    assert settings.connect_timeout_s is not None
    assert time.monotonic() - begun < settings.connect_timeout_s + 15  # it does not wait for ever


async def test_nobody_listening_is_said_in_time() -> None:
    port = free_port()
    settings = MqttSettings(port=port, connect_timeout_s=0.4)
    await fails_in_time(settings, rf"mqtt://127\.0\.0\.1:{port} within 0\.4 s: nothing listens there")
    assert our_threads() == []


async def test_an_unknown_name_is_said_in_time() -> None:
    settings = MqttSettings(host="no-such-host.invalid", connect_timeout_s=0.5)
    # Looking a name up cannot be interrupted; a thread of this id may live on for a while.
    await fails_in_time(settings, r"no-such-host\.invalid:1883", client_id="lost")


async def test_a_listener_that_says_nothing_is_given_up() -> None:
    with peer(None) as port:
        await fails_in_time(MqttSettings(port=port, connect_timeout_s=0.3), "no answer yet")


async def test_a_listener_that_speaks_something_else_is_given_up() -> None:
    with peer(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        await fails_in_time(MqttSettings(port=port, connect_timeout_s=0.5), f"127.0.0.1:{port}")


async def test_a_broker_that_is_not_ready_is_waited_for() -> None:
    with peer(b"\x20\x02\x00\x03") as port:  # CONNACK: server unavailable
        await fails_in_time(MqttSettings(port=port, connect_timeout_s=0.5), "not ready")


async def test_opening_can_wait_for_ever_and_be_cancelled(tmp_path: Path, broker: EmbeddedBroker) -> None:
    settings = MqttSettings(port=broker.port, connect_timeout_s=None)
    broker.stop()
    transport = MqttTransport(settings, "a")
    opening = asyncio.create_task(transport.__aenter__())
    await asyncio.sleep(0.3)
    assert not opening.done()
    broker.start()
    await asyncio.wait_for(opening, WAIT_S)
    await transport.publish("x", b"")
    await transport.close()

    broker.stop()
    opening = asyncio.create_task(transport.__aenter__())
    await asyncio.sleep(0.1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert our_threads() == []


# The thread


async def test_nothing_is_left_after_closing(settings: MqttSettings) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def use() -> None:
        async with MqttTransport(settings, "a", will=("w", b"")) as a, MqttTransport(settings, "b") as b:
            letters = await b.subscribe("x")
            await a.publish("x", b"")
            await next_letter(letters)

    await use()
    gc.collect()
    before = open_files()
    for _ in range(3):
        await use()
    assert our_threads() == []
    if sys.platform == "linux":
        assert open_files() <= before  # without a collection: nothing waits for one
    gc.collect()  # and no ResourceWarning, which would be an error here


async def test_a_transport_can_be_opened_again(settings: MqttSettings) -> None:
    transport: Transport = MqttTransport(settings, "a")
    for _ in range(2):
        async with transport as a:
            letters = await a.subscribe("x")
            await a.publish("x", b"")
            await next_letter(letters)


async def test_too_many_open_files_are_named_as_the_reason(broker: EmbeddedBroker) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2_000:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2_000), hard))
    with contextlib.ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1_100):
            files.enter_context(Path(os.devnull).open("rb"))
        await fails_in_time(
            MqttSettings(port=broker.port, connect_timeout_s=0.3), "fewer agents in one process"
        )


async def test_two_clients_of_one_id_are_told_why_they_lose_each_other(
    settings: MqttSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async with MqttTransport(settings, "a"), MqttTransport(settings, "a"):
        await until(lambda: "is another client called a?" in caplog.text, 20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_network_thread_that_ends_unasked_is_started_again(
    settings: MqttSettings, caplog: pytest.LogCaptureFixture
) -> None:
    async with MqttTransport(settings, "a") as a:
        letters = await a.subscribe("x")
        await a.publish("x/presence", b"online", retain=True)
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "mqtt-a")
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        await until(lambda: not thread.is_alive())
        await a.publish("x", b"still here")
        assert (await next_letter(letters)).body == b"still here"
        assert a.reconnects == 1
    assert "ended unasked" in caplog.text
    assert our_threads() == []


async def test_a_letter_on_a_topic_that_is_no_text_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A peer of ours may be faulty or hostile; the broker of this test is."""
    connack, bad, good = b"\x20\x02\x00\x00", b"\x30\x05\x00\x02\xff\xfeX", b"\x30\x05\x00\x02okY"
    with peer(connack + bad + good) as port:
        async with MqttTransport(MqttSettings(port=port, patience_s=0.5), "a") as a:
            await asyncio.sleep(0.1)
            subscribing = asyncio.create_task(a.subscribe("ok"))
            with pytest.raises(NotConnected, match="not confirmed"):
                await subscribing  # this broker never answers it
            with pytest.raises(NotConnected, match="confirms nothing"):
                await a.publish("x", b"")
            assert a.connected
    assert "not UTF-8" in caplog.text


async def test_the_event_loop_is_never_blocked(broker: EmbeddedBroker, settings: MqttSettings) -> None:
    turns = 0
    async with MqttTransport(settings, "a") as a:
        os.kill(broker.pid or 0, signal.SIGSTOP)  # the broker hangs: sockets stay open and fill up
        sending = asyncio.gather(*(a.publish("x", bytes(120_000)) for _ in range(100)))
        for _ in range(50):
            await asyncio.sleep(0.01)
            turns += not sending.done()
        # Only this loop lets the broker go on: one that waited for it would never come here.
        os.kill(broker.pid or 0, signal.SIGCONT)
        await asyncio.wait_for(sending, WAIT_S)
    assert turns == 50
