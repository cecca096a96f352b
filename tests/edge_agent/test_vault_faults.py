"""A vault on a bad card or a full disk: what is broken is put aside and said, and what is good is used."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.vault import OUTBOX, Outgoing, Personal, Vault, full
from foundation.parameters import Parameters


def own(value: float) -> Parameters:
    return Parameters({"w": np.full(4, value, np.float32)})


def test_personal_parameters_that_are_broken_are_passed_over_and_that_is_said(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    for number in (1, 2):
        vault.save_personal("r", Personal(number, own(number)))
    (tmp_path / "personal/r/000002.safetensors").write_bytes(b"rot")
    found = vault.personal("r", before=3)
    assert found is not None
    assert found.round == 1
    assert vault.said() == ["personal parameters of round [2] are broken: those of 1 are used"]
    assert vault.said() == [], "once"
    (tmp_path / "personal/r/000001.safetensors").write_bytes(b"rot")
    assert vault.personal("r", before=3) is None
    (said,) = vault.said()
    assert "none before: begun anew" in said


@settings(deadline=None)
@given(st.binary(max_size=200), st.data())
def test_no_frame_that_the_card_has_changed_is_ever_sent(frame: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vault = Vault(Path(folder), "a")
        vault.finish(Outgoing("r", 1, frame))
        (file,) = (vault.folder / "outbox").glob("*.frame")
        written = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(written) - 1))
        written[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(written)
        assert vault.outbox() == []
        assert not file.exists(), "it is not looked at again"
        assert (vault.folder / "broken" / file.name).read_bytes() == written
        (said,) = vault.said()
        assert "was not what was written" in said


@pytest.mark.parametrize("cut", [0, 5, 39])
def test_work_in_hand_that_is_broken_is_put_down(tmp_path: Path, cut: int) -> None:
    vault = Vault(tmp_path, "a")
    vault.receive(b"next")
    vault.take_in_hand(b"next")
    file = tmp_path / "work/assignment.frame"
    file.write_bytes(file.read_bytes()[:cut])
    assert not vault.begun(b"next")
    assert vault.waiting() is None
    assert vault.said()
    vault.take_in_hand(b"next")
    assert vault.waiting() == b"next"


def test_a_broken_checkpoint_costs_its_epochs_and_nothing_else(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    vault.take_in_hand(b"work")
    vault.save_checkpoint(own(1), {"epoch": 1})
    (tmp_path / "work/checkpoint.safetensors").write_bytes(b"\xff" * 40)
    assert vault.checkpoint() is None
    assert vault.waiting() == b"work"


def test_the_outbox_is_bounded_and_the_oldest_goes_first(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    for number in range(1, OUTBOX + 4):
        vault.finish(Outgoing("r", number, b"x"))
    assert [out.round for out in vault.outbox()] == [*range(4, OUTBOX + 4)]
    said = vault.said()
    assert len(said) == 3
    assert "r~000001 is given up" in said[0]


def test_an_assignment_that_was_done_is_remembered_and_broken_memory_is_begun_anew(tmp_path: Path) -> None:
    vault = Vault(tmp_path, "a")
    vault.take_in_hand(b"work")
    assert not vault.is_done(b"work")
    vault.finish(Outgoing("r", 1, b"update"))
    assert Vault(tmp_path, "a").is_done(b"work")
    assert not vault.is_done(b"other")
    for rot in (b"", b"{}", b"\xff", b"[[1]]", b"null"):
        (tmp_path / "done.json").write_bytes(rot)
        assert not Vault(tmp_path, "a").is_done(b"work")


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from edge_agent.vault import Outgoing, Vault, full
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
vault = Vault(Path(sys.argv[1]), "a")
vault.take_in_hand(b"work")
vault.finish(Outgoing("r", 1, b"small"))
vault.take_in_hand(b"more")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    vault.finish(Outgoing("r", 2, b"x" * 10_000))
except OSError as error:
    print(full(error, vault.folder))
"""


def test_a_full_disk_leaves_what_was_there_and_no_half_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert f"the disk of this device is full (File too large): make room for {tmp_path}" in done.stdout
    assert not [*tmp_path.rglob(".*.tmp")]
    vault = Vault(tmp_path, "a")
    assert [(out.round, out.frame) for out in vault.outbox()] == [(1, b"small")]
    assert vault.waiting() == b"more", "it is still to be done"


def test_other_errors_are_no_full_disk(tmp_path: Path) -> None:
    assert full(PermissionError(errno.EACCES, "no"), tmp_path) is None
