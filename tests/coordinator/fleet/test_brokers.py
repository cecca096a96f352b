"""Files for brokers: the same rights in all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.fleet.authority import certified
from coordinator.fleet.brokers.access import (
    BROKERS,
    Access,
    Account,
    Listener,
    broker_files,
    reload,
    write,
)
from foundation.errors import SettingsError
from foundation.topics import READ_BY_AGENTS, WRITTEN_BY_AGENTS

pytest.importorskip("cryptography")
ACCESS = Access(
    federation="green",
    coordinator=Account("coordinator", "c-secret"),
    devices=[Account("pi.1", "d-secret")],
    joining=[Account("join-00ff", "j-secret")],
    coordinator_reads=["tele/#"],
    coordinator_writes=["cmnd/#"],
    devices_read=["sensors/#"],
)


def all_files(name: str, folder: Path) -> dict[str, str]:
    module = broker_files(name)
    listener = Listener(8883, certified(folder, ["broker.local"]))
    return {**module.config(folder, listener, ACCESS), **module.users(folder, ACCESS)}


@pytest.mark.parametrize("name", BROKERS)
def test_everybody_and_every_topic_is_in_the_files_of_every_broker(name: str, tmp_path: Path) -> None:
    text = "\n".join(all_files(name, tmp_path).values())
    for user in ("coordinator", "pi.1", "join-00ff"):
        assert user in text
    for word in (*WRITTEN_BY_AGENTS, *READ_BY_AGENTS, "request", "tele", "cmnd", "sensors"):
        assert word in text
    assert "8883" in text
    assert str(tmp_path / "server.pem") in text
    if name == "mosquitto":
        assert "secret" not in text, "it keeps hashes"


def test_mosquitto_keeps_what_a_person_wrote_below_the_mark(tmp_path: Path) -> None:
    module, listener = broker_files("mosquitto"), Listener(1883, None)
    write(tmp_path, {**module.config(tmp_path, listener, ACCESS), **module.users(tmp_path, ACCESS)})
    for file, own in (("passwords", "guest:$7$x"), ("acl", "topic read weather/#")):
        with (tmp_path / file).open("a") as opened:
            opened.write(own + "\n")
    files = {**module.config(tmp_path, listener, ACCESS), **module.users(tmp_path, ACCESS)}
    assert files["passwords"].endswith("they stay.\nguest:$7$x\n")
    assert files["acl"].endswith("they stay.\ntopic read weather/#\n")
    assert write(tmp_path, files) == [], "nothing has changed"


def test_a_dot_in_a_name_is_another_thing_than_a_level_for_nats(tmp_path: Path) -> None:
    text = all_files("nats", tmp_path)["users.conf"]
    assert json.dumps("hedgerow.v1.green.agents.pi//1.card") in text


def test_secrets_are_for_the_group_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path, {"users": "x"})
    assert (tmp_path / "users").stat().st_mode & 0o777 == 0o640


def test_a_broker_is_told_by_a_command_or_its_pid_and_failures_are_said(tmp_path: Path) -> None:
    assert "does not run with these files yet" in reload(tmp_path, "nats", ())
    assert reload(tmp_path, "nats", ("touch", str(tmp_path / "told"))) == f"ran touch {tmp_path / 'told'}"
    assert (tmp_path / "told").exists()
    with pytest.raises(SettingsError, match=r"enrolment\.reload did not work"):
        reload(tmp_path, "nats", ("false",))
    (tmp_path / "nats.pid").write_text("no number")
    with pytest.raises(SettingsError, match=r"set enrolment\.reload"):
        reload(tmp_path, "nats", ())
    with pytest.raises(SettingsError, match="use one of mosquitto"):
        broker_files("amqtt")
