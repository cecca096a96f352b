"""`python -m edge_agent.calibration.net_load`: sends to the broker, and gets it back, until it is killed.

Which broker and topic stands in the environment, where no other user sees the password.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence

from foundation.mqtt import MqttSettings, MqttTransport
from foundation.transport import Letter

WHERE = "HEDGEROW_NET_LOAD"
"""Environment variable: JSON with `mqtt` and `topic`."""
BODY = os.urandom(32 << 10)
PERIOD_S = 0.2
"""A duty of a half sends for half of each such period."""


def where(mqtt: MqttSettings, topic: str) -> dict[str, str]:
    """Return what to put into the environment."""
    told = mqtt.model_dump(mode="json", exclude_defaults=True)
    if mqtt.password is not None:
        told["password"] = mqtt.password.get_secret_value()
    return {WHERE: json.dumps({"mqtt": told, "topic": topic})}


def main(argv: Sequence[str] | None = None) -> int:
    """Send until killed."""
    parser = argparse.ArgumentParser(prog="python -m edge_agent.calibration.net_load", description=__doc__)
    parser.add_argument("way", choices=("up", "both"), help="both: what is sent comes back")
    parser.add_argument("--duty", type=float, default=1.0, help="share of the time that is spent sending")
    arguments = parser.parse_args(argv)
    told = json.loads(os.environ[WHERE])
    asyncio.run(_run(MqttSettings.model_validate(told["mqtt"]), told["topic"], arguments))
    return 0


async def _run(mqtt: MqttSettings, topic: str, arguments: argparse.Namespace) -> None:
    async with MqttTransport(mqtt, f"hedgerow-net-load-{os.getpid()}", clean=True) as transport:
        if arguments.way == "both":
            taking = asyncio.create_task(_take(await transport.subscribe(topic)))
            taking.add_done_callback(lambda _: None)
        await transport.publish(topic, BODY, qos=1)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            start = time.monotonic()
            while time.monotonic() - start < arguments.duty * PERIOD_S:
                await transport.publish(topic, BODY, qos=1)  # returns when the broker has it
            rest = PERIOD_S - (time.monotonic() - start)
            if arguments.duty < 1 and rest > 0:
                await asyncio.sleep(rest)


async def _take(letters: AsyncIterator[Letter]) -> None:
    async for _ in letters:
        pass


if __name__ == "__main__":
    sys.exit(main())
