"""The vault: nothing torn is ever read, and whoever is killed while writing loses that write at most."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.vault import Outgoing, Personal, Vault
from foundation.errors import SettingsError
from foundation.parameters import Parameters


def own(value: float, size: int = 4) -> Parameters:
    # Not in the order of the alphabet: order is part of what is kept.
    return Parameters(
        {"head.weight": np.full(size, value, np.float32), "embed.bias": np.zeros(2, np.float32)}
    )


def test_personal_parameters_come_back_with_their_order(tmp_path: Path) -> None:
    Vault(tmp_path, "a").save_personal("r", Personal(1, own(1), pruning_steps=7))
    found = Vault(tmp_path, "a").personal("r", before=2)
    assert found is not None
    assert (found.round, found.pruning_steps) == (1, 7)
    assert list(found.parameters) == ["head.weight", "embed.bias"]
    assert found.parameters["head.weight"].tolist() == [1, 1, 1, 1]


def test_two_rounds_are_kept_so_that_a_round_can_be_repeated(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    for number in range(1, 12):
        vault.save_personal("r", Personal(number, own(number)))
    assert sorted(p.name for p in (tmp_path / "personal" / "r").iterdir()) == [
        "000010.safetensors",
        "000011.safetensors",
    ]
    again = vault.personal("r", before=11)  # round 11 is to be repeated: it starts from round 10
    assert again is not None
    assert again.round == 10
    assert vault.personal("r", before=10) is None
    assert vault.personal("other", before=99) is None


def test_a_corrupt_file_is_passed_over_for_the_older_one(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    vault.save_personal("r", Personal(1, own(1)))
    vault.save_personal("r", Personal(2, own(2)))
    newest = tmp_path / "personal" / "r" / "000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    found = vault.personal("r", before=3)
    assert found is not None
    assert found.round == 1
    newest.with_name("000001.safetensors").write_bytes(b"")
    assert vault.personal("r", before=3) is None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_of_a_file_is_more_than_a_missing_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    vault = Vault(tmp_path_factory.mktemp("v"), "a")
    vault.save_checkpoint(own(3), {"epoch": 2})
    path = vault.folder / "work" / "checkpoint.safetensors"
    whole = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "byte", "noise"]))
    if kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    elif kind == "byte":
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
    else:
        path.write_bytes(data.draw(st.binary(max_size=200)))
    found = vault.checkpoint()
    if found is not None:  # a byte that means nothing to the format was hit
        assert found[1] == {"epoch": 2}
        assert list(found[0]) == ["head.weight", "embed.bias"]
        assert found[0]["head.weight"].tolist() == [3, 3, 3, 3]


def test_a_torn_temporary_file_is_ignored_and_swept(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    vault.save_personal("r", Personal(1, own(1)))
    torn = tmp_path / "personal" / "r" / ".000002.safetensors.4711.tmp"
    torn.write_bytes(b"half")
    found = vault.personal("r", before=3)
    assert found is not None
    assert found.round == 1
    Vault(tmp_path, "a")
    assert not torn.exists()


WRITER = """
import sys
import numpy as np
from pathlib import Path
from edge_agent.vault import Outgoing, Personal, Vault
from foundation.parameters import Parameters

vault = Vault(Path(sys.argv[1]), "a")
number = int(sys.argv[2])
while True:
    number += 1
    own = Parameters({"w": np.full(300_000, number, np.float32)})
    vault.save_personal("r", Personal(number, own, number))
    vault.save_checkpoint(own, {"epoch": number})
    vault.finish(Outgoing("r", number, bytes([number % 256]) * 300_000))
    vault.delivered("r", number - 1)
    print(number, flush=True)
"""


def test_a_process_killed_while_writing_loses_that_write_at_most(tmp_path: Path) -> None:
    done = 0
    for wait_for in (1, 2, 3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [int(writer.stdout.readline()) for _ in range(wait_for)]
            writer.send_signal(signal.SIGKILL)
            said += [int(line) for line in writer.stdout.read().split()]
        vault = Vault(tmp_path, "a")
        found = vault.personal("r", before=10**6)
        assert found is not None
        assert found.round in (said[-1], said[-1] + 1)
        assert found.pruning_steps == found.round
        assert (found.parameters["w"] == found.round).all()
        for outgoing in vault.outbox():
            assert outgoing.frame == bytes([outgoing.round % 256]) * 300_000
        assert max(outgoing.round for outgoing in vault.outbox()) >= said[-1]
        checkpoint = vault.checkpoint()
        assert checkpoint is None or (checkpoint[0]["w"] == checkpoint[1]["epoch"]).all()
        assert not [*tmp_path.rglob(".*.tmp")]
        done = found.round


def test_work_is_in_hand_until_its_update_is_in_the_outbox(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    assert vault.waiting() is None
    vault.receive(b"one")
    assert Vault(tmp_path, "a").waiting() == b"one"
    vault.take_in_hand(b"one")
    vault.save_checkpoint(own(1), {"epoch": 1})
    assert Vault(tmp_path, "a").waiting() == b"one"
    vault.receive(b"two")
    assert vault.waiting() == b"two", "the newest that arrived goes first"
    assert vault.checkpoint() is not None, "until it is begun, the older one's checkpoint stays"
    vault.take_in_hand(b"two")
    assert vault.checkpoint() is None, "the checkpoint was another work's"
    vault.finish(Outgoing("r", 2, b"update"))
    assert vault.waiting() is None
    assert [(o.run, o.round, o.frame) for o in vault.outbox()] == [("r", 2, b"update")]
    vault.delivered("r", 2)
    assert vault.outbox() == []


def test_a_dropped_assignment_takes_its_checkpoint_and_no_others(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    vault.take_in_hand(b"one")
    vault.save_checkpoint(own(1), {"epoch": 1})
    vault.receive(b"two")
    vault.drop(b"two")
    assert vault.waiting() == b"one"
    assert vault.checkpoint() is not None
    vault.drop(b"one")
    assert vault.waiting() is None
    assert vault.checkpoint() is None


def test_runs_with_a_tilde_or_dots_in_their_name_do_not_mix_in_the_outbox(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    for run in ("r", "r.1", "r-1"):
        vault.finish(Outgoing(run, 1, run.encode()))
    assert sorted((o.run, o.frame) for o in vault.outbox()) == [
        ("r", b"r"),
        ("r-1", b"r-1"),
        ("r.1", b"r.1"),
    ]


def test_another_agents_vault_is_refused_in_words(tmp_path: Path) -> None:
    Vault(tmp_path, "a")
    with pytest.raises(SettingsError, match="belongs to agent 'a', not to 'b': give this agent a vault"):
        Vault(tmp_path, "b")


def test_an_identity_that_cannot_be_read_is_said_in_words(tmp_path: Path) -> None:
    Vault(tmp_path, "a")
    (tmp_path / "identity.json").write_text("{")
    with pytest.raises(SettingsError, match=r"identity\.json"):
        Vault(tmp_path, "a")
