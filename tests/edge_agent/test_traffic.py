from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

from edge_agent.traffic import InterfaceMeter, Traffic, interface_to


def test_the_way_to_this_machine_is_the_loopback() -> None:
    assert interface_to("127.0.0.1", 1883) == "lo"
    assert interface_to("no-such-host.invalid", 1883) is None


def test_bytes_that_went_through_are_counted_with_their_headers() -> None:
    meter = InterfaceMeter("127.0.0.1", 1883)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with client, there:
            client.sendall(b"x" * 20_000)
            got = 0
            while got < 20_000:
                got += len(there.recv(65536))
    traffic = meter.take()
    assert traffic is not None
    assert traffic.interface == "lo"
    assert traffic.sent > 20_000
    assert traffic.received > 20_000


def test_an_interface_that_began_anew_or_is_another_one_is_unknown_not_negative() -> None:
    counts: dict[str, Any] = {"lo": SimpleNamespace(bytes_recv=1000, bytes_sent=500)}
    meter = InterfaceMeter("127.0.0.1", 1883, lambda: counts)
    counts["lo"] = SimpleNamespace(bytes_recv=1500, bytes_sent=900)
    assert meter.take() == Traffic("lo", 500, 400)
    counts["lo"] = SimpleNamespace(bytes_recv=10, bytes_sent=10)
    assert meter.take() is None
    counts["lo"] = SimpleNamespace(bytes_recv=30, bytes_sent=10)
    assert meter.take() == Traffic("lo", 20, 0)
    del counts["lo"]
    assert meter.take() is None
