"""What MQTT 5 adds, over a real Mosquitto; and what becomes of it where a broker has 3.1.1 only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundation.errors import DeliveryFailed, FrameTooLarge, NotConnected, PublishRefused
from foundation.mqtt import PACKET_ROOM, TOPIC_ROOM, WINDOW, BrokerLimits, MqttSettings, MqttTransport
from foundation.transfer import PART_HEADER, Courier
from hedgerow.broker import EmbeddedBroker, find_broker
from tests.broker.conftest import RunBroker
from tests.conftest import require_service

pytestmark = [pytest.mark.broker, pytest.mark.anyio]

ROOT = "user root\n" if os.getuid() == 0 else ""
OPEN = "listener {port} 127.0.0.1\nallow_anonymous true\nlog_type error\n" + ROOT


async def until_said(caplog: pytest.LogCaptureFixture, what: str, within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while what not in caplog.text:
            await asyncio.sleep(0.01)


async def test_auto_takes_5_and_falls_back_to_what_the_broker_has(broker: EmbeddedBroker) -> None:
    spoken = {"mosquitto": "5", "nats": "3.1.1"}[broker.name]
    async with MqttTransport(MqttSettings(port=broker.port), "a") as a:
        assert a.limits is not None
        assert a.limits.version == spoken
        broker.kill()
        broker.start()
        await a.publish("x", b"again")
        assert a.limits.version == spoken


async def test_a_version_the_broker_has_not_is_said(tmp_path: Path) -> None:
    require_service(find_broker("nats") is not None, "nats")
    with EmbeddedBroker(tmp_path, prefer="nats") as broker:
        settings = MqttSettings(port=broker.port, version="5")
        with pytest.raises(NotConnected, match=r"unsupported protocol version.*mqtt\.version"):
            await MqttTransport(settings, "a").__aenter__()


async def test_what_the_broker_takes_bounds_what_is_sent(run_broker: RunBroker) -> None:
    port = run_broker("mosquitto", OPEN + "max_packet_size 20000\nmax_inflight_messages 3\n")
    async with MqttTransport(MqttSettings(port=port), "a") as a:
        assert a.limits == BrokerLimits("5", packet_bytes=20_000, receive=3, shares=True)
        assert a.max_body_bytes == 20_000 - PACKET_ROOM - TOPIC_ROOM
        assert a.window == 3
        letters = await a.subscribe("x")
        with pytest.raises(FrameTooLarge, match=r"over the 19636 that the broker takes"):
            await a.publish("x", bytes(19_637))
        topic = "x/" + "y" * (TOPIC_ROOM - 2)
        await asyncio.gather(*(a.publish(topic, bytes(a.max_body_bytes)) for _ in range(20)))
        await a.publish("x", bytes(a.max_body_bytes))
        assert len((await anext(letters)).body) == a.max_body_bytes
        assert a.reconnects == 0


async def test_a_broker_that_takes_too_little_is_refused_in_words(run_broker: RunBroker) -> None:
    port = run_broker("mosquitto", OPEN + "max_packet_size 1000\n")
    with pytest.raises(NotConnected, match="packets of at most 1000 bytes, and we need 1388"):
        await MqttTransport(MqttSettings(port=port), "a").__aenter__()


async def test_nothing_announced_keeps_the_setting(broker: EmbeddedBroker) -> None:
    async with MqttTransport(MqttSettings(port=broker.port, max_part_bytes=50_000), "a") as a:
        assert a.max_body_bytes == 50_000
        assert a.window == WINDOW


@contextlib.asynccontextmanager
async def pair(settings: MqttSettings) -> AsyncIterator[tuple[Courier, MqttTransport, list[bytes]]]:
    """A courier that sends, its transport, and the frames that another one has taken."""
    taken: list[bytes] = []

    async def handle(topic: str, frame: bytes, wire_bytes: int) -> None:
        taken.append(frame)

    async def nothing(topic: str, frame: bytes, wire_bytes: int) -> None:
        raise AssertionError("nobody sends this way")

    async with MqttTransport(settings, "sender") as sender, MqttTransport(settings, "taker") as taker:
        shared = {"receipt_topic": lambda _: "f/receipt"}
        there = Courier(taker, frames="f/update", receipts="f/none", handle=handle, **shared)  # type: ignore[arg-type]
        here = Courier(sender, frames="f/other", receipts="f/receipt", handle=nothing, **shared)  # type: ignore[arg-type]
        async with there, here:
            yield here, sender, taken


async def test_the_part_size_follows_what_the_broker_says(run_broker: RunBroker) -> None:
    port = run_broker("mosquitto", OPEN + "max_packet_size 20000\n")
    frame = os.urandom(300_000)
    async with pair(MqttSettings(port=port)) as (courier, sender, taken):
        delivery = await courier.send("f/update", frame, deadline_s=30)
        assert taken == [frame]
        assert delivery.parts == -(-len(frame) // (sender.max_body_bytes - PART_HEADER.size))
        assert delivery.resent == 0


async def test_the_part_size_follows_what_the_broker_refuses(run_broker: RunBroker) -> None:
    """This limit is not announced; Mosquitto 2.0 ends the connection over it, in 5 with a reason."""
    port = run_broker("mosquitto", OPEN + "message_size_limit 20000\n")
    frame = os.urandom(300_000)
    async with pair(MqttSettings(port=port)) as (courier, sender, taken):
        delivery = await courier.send("f/update", frame, deadline_s=30)
        assert taken == [frame]
        assert sender.max_body_bytes < 20_000
        assert delivery.parts == -(-len(frame) // (sender.max_body_bytes - PART_HEADER.size))


async def test_a_broker_that_comes_back_with_a_smaller_limit_gets_smaller_parts(
    tmp_path: Path,
) -> None:
    program = find_broker("mosquitto")
    require_service(program is not None, "mosquitto")
    frame = os.urandom(2_000_000)
    with EmbeddedBroker(tmp_path / "b", prefer="mosquitto") as broker:
        async with pair(MqttSettings(port=broker.port)) as (courier, sender, taken):
            os.kill(broker.pid or 0, signal.SIGSTOP)  # it stands still with parts on their way
            sending = asyncio.create_task(courier.send("f/update", frame, deadline_s=60))
            async with asyncio.timeout(10):
                while not sender._unacked:
                    await asyncio.sleep(0.01)
            broker.kill()
            config = tmp_path / "less.conf"
            config.write_text(OPEN.replace("{port}", str(broker.port)) + "max_packet_size 20000\n")
            assert program is not None
            with subprocess.Popen([program.path, "-c", config], stderr=subprocess.DEVNULL) as less:
                try:
                    delivery = await sending
                finally:
                    less.kill()
            assert taken == [frame]
            assert sender.max_body_bytes < 20_000
            assert delivery.parts > 100


async def test_a_publish_that_the_access_list_refuses_is_told(
    run_broker: RunBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite own/#\n")
    acl.chmod(0o644)
    tmp_path.chmod(0o755)
    port = run_broker("mosquitto", OPEN + f"acl_file {acl}\n")
    async with MqttTransport(MqttSettings(port=port), "a") as a:
        with pytest.raises(PublishRefused, match=r"publish to other/x \(not authorized\): its ACL must let"):
            await a.publish("other/x", b"")
        await a.publish("own/x", b"")
        with pytest.raises(PublishRefused):
            await a.publish("other/kept", b"1", retain=True)
    old = MqttSettings(port=port, version="3.1.1")
    async with MqttTransport(old, "a") as a:
        await a.publish("other/x", b"")  # 3.1.1 cannot tell; whoever needs to know waits for a receipt

    async def nothing(topic: str, frame: bytes, wire_bytes: int) -> None:
        raise AssertionError("nothing comes")

    async with MqttTransport(MqttSettings(port=port), "a") as a:
        courier = Courier(
            a, frames="own/a", receipts="own/b", receipt_topic=lambda _: "own/c", handle=nothing
        )
        async with courier:
            with pytest.raises(DeliveryFailed, match=r"other/frame \(not authorized"):
                await courier.send("other/frame", b"frame", deadline_s=20)


async def test_letters_for_who_is_away_expire_but_what_is_retained_does_not(run_broker: RunBroker) -> None:
    port = run_broker("mosquitto", OPEN)
    short = MqttSettings(port=port, message_expiry_s=1)
    async with MqttTransport(MqttSettings(port=port), "b") as b:
        await b.subscribe("work")
    async with MqttTransport(short, "a") as a:
        await a.publish("work", b"expires")
        await a.publish("kept", b"stays", retain=True)
    await asyncio.sleep(2.5)  # the broker's clock: there is nothing else to wait for
    async with MqttTransport(MqttSettings(port=port), "b") as b:
        letters = await b.subscribe("work", "kept")
        async with MqttTransport(MqttSettings(port=port), "c", clean=True) as c:
            await c.publish("work", b"mark")
        seen = [(await anext(letters)).body for _ in range(2)]
        assert set(seen) == {b"stays", b"mark"}


async def test_a_session_of_no_length_is_gone_with_its_connection(run_broker: RunBroker) -> None:
    port = run_broker("mosquitto", OPEN)
    brief = MqttSettings(port=port, session_expiry_s=0)
    async with MqttTransport(brief, "b") as b:
        await b.subscribe("work")
    async with MqttTransport(brief, "a") as a:
        await a.publish("work", b"missed")
        async with MqttTransport(brief, "b") as b:
            letters = await b.subscribe("work")
            await a.publish("work", b"seen")
            assert (await anext(letters)).body == b"seen"


async def test_another_protocol_is_named_once(
    run_broker: RunBroker, caplog: pytest.LogCaptureFixture
) -> None:
    port = run_broker("mosquitto", OPEN)
    with pytest.MonkeyPatch.context() as patch:
        async with (
            MqttTransport(MqttSettings(port=port), "a") as a,
            MqttTransport(MqttSettings(port=port), "b") as b,
        ):
            letters = await b.subscribe("x")
            await a.publish("x", b"ours")
            await anext(letters)
            assert "of protocol" not in caplog.text
            patch.setattr("foundation.mqtt.PROTOCOL", 7)
            await b.publish("x", b"ours, cached", qos=0)
            await until_said(caplog, "is of protocol 1, this is 7: update the older side")


def test_a_broker_that_lacks_what_we_need_is_refused() -> None:
    assert "QoS 0 only" in BrokerLimits("5", qos=0).wanting()
    assert "retains nothing" in BrokerLimits("5", retains=False).wanting()
    assert BrokerLimits("3.1.1").wanting() == BrokerLimits("5", qos=1, packet_bytes=149_504).wanting() == ""
