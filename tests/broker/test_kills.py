"""Kill -9 of every process of a federation in the middle of a round: it comes back to the very same end.

The processes are real, the broker too, and what they must come back to is a run of the same seed inside this
process, where nothing was killed. Agents live on from test to test, as they do on devices.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.settings import RunSettings
from foundation.mqtt import MqttSettings, MqttTransport
from foundation.transport import MemoryBroker
from hedgerow.broker import EmbeddedBroker
from tests.fleet import TOPICS, fleet, memory, run_settings
from tests.processes import AGENTS, Processes, loader, until

pytestmark = [pytest.mark.broker, pytest.mark.slow]


def run_of(name: str) -> RunSettings:
    settings = {"warm_up": 0, "target": 0.5, "every": 2, "learning_rate": 5e-3, "epochs": 20}
    return run_settings(name=name, settings=settings)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last state of a run in which nothing was killed, through the broker inside this process."""
    folder = tmp_path_factory.mktemp("unbroken")

    async def unbroken() -> bytes:
        async with fleet(folder, memory(MemoryBroker()), run_of("unbroken"), loader(folder)) as whole:
            assert await whole.finished(120) == "finished"
            return whole.state().to_bytes()

    return asyncio.run(unbroken())


async def introduced(port: int) -> None:
    """Wait for the cards of all agents."""
    awaited = set(AGENTS)
    async with MqttTransport(MqttSettings(port=port), "introduced", clean=True) as transport:
        async with asyncio.timeout(30):
            async for letter in await transport.subscribe(TOPICS.every("card")):
                awaited.discard(TOPICS.agent_of(letter.topic))
                if not awaited:
                    return


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_an_agent_has_no_torch_in_memory_until_its_first_assignment(
    processes: Processes, expected: bytes
) -> None:
    asyncio.run(introduced(processes.port))
    for agent in AGENTS:
        assert not has_torch(processes.pid(agent))
    processes.start_coordinator(run_of("first"))
    assert processes.finished("first") == expected, "processes and memory come to the same end"
    assert all(has_torch(processes.pid(agent)) for agent in AGENTS)


def test_an_agent_killed_in_training_finishes_the_round_with_its_personal_state(
    processes: Processes, expected: bytes
) -> None:
    work = processes.vault("d1") / "work"
    checkpoint, personal = work / "checkpoint.safetensors", processes.vault("d1") / "personal" / "agentkill"
    processes.start_coordinator(run_of("agentkill"))
    until((personal / "000001.safetensors").exists)
    until(lambda: not checkpoint.exists())
    until(checkpoint.exists)
    processes.kill("d1")
    assert checkpoint.exists(), "it was killed in the middle of its work"
    assert (work / "assignment.frame").exists()
    kept = {path.name: path.read_bytes() for path in personal.iterdir()}
    assert kept
    processes.start_agent("d1")
    assert processes.finished("agentkill") == expected
    assert "resuming" in (processes.folder / "d1.log").read_text()
    with processes.store("agentkill") as store:
        assert [len(store.updates("agentkill", n)) for n in (1, 2, 3)] == [3, 3, 3]
    assert not [*(processes.vault("d1") / "outbox").glob("*")]


def in_mid_round(processes: Processes, run: str) -> None:
    """Come to the middle of round 2: two updates are stored, and the third agent stands still."""
    until(lambda: processes.updates(run, 1) > 0)
    processes.pause("d2")
    # Where d2 stood by chance, the rest of round 1 may need it: only then is it let go once more.
    until(lambda: processes.updates(run, 1) + processes.updates(run, 2) >= 2)
    if processes.updates(run, 1) < 3:
        processes.go_on("d2")
        until(lambda: processes.opened(run, 2))
        processes.pause("d2")
    until(lambda: processes.updates(run, 2) >= 2)


def test_a_coordinator_killed_while_collecting_resumes_the_round(
    processes: Processes, expected: bytes
) -> None:
    processes.start_coordinator(run_of("coordinatorkill"))
    in_mid_round(processes, "coordinatorkill")
    stored = processes.updates("coordinatorkill", 2)
    processes.kill("coordinator")
    processes.go_on("d2")
    processes.start_coordinator(run_of("coordinatorkill"))
    assert processes.finished("coordinatorkill") == expected
    with processes.store("coordinatorkill") as store:
        assert [len(store.updates("coordinatorkill", n)) for n in (1, 2, 3)] == [3, 3, 3]
        assert [r.state for r in store.rounds("coordinatorkill")] == ["closed"] * 3
        told = [e.kind for e in store.latest_events(500, "coordinatorkill")]
    assert told.count("run_resumed") == 1
    assert told.count("update") <= 9, "no update was counted twice"
    assert stored >= 2


def test_a_broker_killed_in_mid_round_and_started_again_costs_nothing_but_time(
    processes: Processes, expected: bytes, running_broker: EmbeddedBroker
) -> None:
    processes.start_coordinator(run_of("brokerkill"))
    in_mid_round(processes, "brokerkill")
    running_broker.kill()
    processes.go_on("d2")
    time.sleep(0.5)  # that everyone notices
    running_broker.start()
    assert processes.finished("brokerkill") == expected
    with processes.store("brokerkill") as store:
        assert [len(store.updates("brokerkill", n)) for n in (1, 2, 3)] == [3, 3, 3]
    assert all(child.process.poll() is None for child in processes.children.values())


def refused_start(command: list[str]) -> str:
    """Start an agent that must not come up; returns what it says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_second_process_on_the_same_vault_is_refused_in_words(processes: Processes) -> None:
    until(lambda: (processes.vault("d0") / "identity.json").exists())
    said = refused_start(processes.agent_command("d0"))
    assert re.search(r"vault folder .*d0 is in use by another process: stop that one", said), said
    assert processes.children["d0"].process.poll() is None


Command = Callable[[list[str]], list[str]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: [*c, "--set", "mqtt.prot=1"], r"unknown setting mqtt\.prot .* did you mean mqtt\.port"),
        (lambda c: [*c, "--set", "agent=d9"], "belongs to agent 'd0', not to 'd9'"),
        (lambda c: [*c, "--set", "data.lables=[1]"], r"unknown setting data\.lables"),
        (lambda c: [*c, "--set", "agent=a b"], "'a b' cannot be used in a topic"),
        (lambda c: [*c, "--set", "profile=nonsense"], "nonsense"),
    ],
)
def test_a_wrong_setting_ends_the_agent_with_2_and_its_name(
    processes: Processes, tmp_path: Path, change: Command, words: str
) -> None:
    command = processes.agent_command("d0")
    vault = tmp_path / "vault"
    vault.mkdir()
    until((processes.vault("d0") / "identity.json").exists)
    (vault / "identity.json").write_bytes((processes.vault("d0") / "identity.json").read_bytes())
    said = refused_start(change([*command, "--set", f"vault={vault}"]))
    assert re.search(words, said), said


def test_a_wrong_key_in_a_file_is_named_with_its_place(tmp_path: Path) -> None:
    for module, text in (("edge_agent", '[data]\nkind = "npz"\n'), ("coordinator", "")):
        config = tmp_path / f"{module}.toml"
        config.write_text(f'federatoin = "x"\n{text}')
        said = refused_start([sys.executable, "-m", module, "--config", str(config)])
        assert f"unknown setting federatoin ({config}); did you mean federation?" in said
