"""Nothing leaves the machine: the demo in a namespace whose every outbound packet is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.offline import NOBODY, Empty, demo, empty
from bench.tun import DEVICE
from hedgerow.broker import find_broker
from tests.broker.conftest import LONG
from tests.conftest import require_service

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def nowhere() -> Iterator[Empty]:
    if os.geteuid() != 0 or not DEVICE.exists():
        pytest.skip(f"a network namespace and {DEVICE} need root and a kernel that has them")
    try:
        made = empty(f"hedgerow-off-{os.getpid()}")
        it = made.__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces or tun devices here: {getattr(error, 'stderr', error)}")
    yield it
    made.__exit__(None, None, None)


def test_a_packet_to_another_machine_is_seen_and_one_to_this_machine_is_not(nowhere: Empty) -> None:
    assert nowhere.control(), f"a packet to {NOBODY}"
    code = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"
    assert nowhere.command([sys.executable, "-c", code])[0] == 0
    assert nowhere.control(), "and that one alone"


@LONG
def test_the_whole_demo_sends_nothing_to_any_other_machine(nowhere: Empty) -> None:
    require_service(find_broker() is not None, "MQTT broker")
    assert nowhere.control()
    code, said, _ = demo(nowhere, Path(sys.executable), devices=3, rounds=3)
    assert code == 0, said
    assert dict(nowhere.seen) == {}
