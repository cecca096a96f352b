"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from foundation.durable import SECRET, write_first, write_whole


def test_a_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_whole(tmp_path / "deep" / "file", b"old")
    write_whole(tmp_path / "deep" / "file", b"new")
    assert (tmp_path / "deep" / "file").read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]


def test_on_a_full_disk_the_old_file_stays_and_nothing_is_left(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old")
    program = (
        "import resource, signal, sys; from pathlib import Path; from foundation.durable import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: write_whole(Path(sys.argv[1]), b'x' * 100)\n"
        "except OSError as error: print(error.errno)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(27)  # EFBIG
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_secret_is_its_owners_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fsync = os.fsync

    def look(handle: int) -> None:
        seen.append(os.fstat(handle).st_mode & 0o777)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_whole(tmp_path / "key", b"secret", mode=SECRET)
    assert seen[0] == 0o600
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_of_several_first_writers_one_stays(tmp_path: Path) -> None:
    path, begin = tmp_path / "key", threading.Barrier(4)

    def write(content: bytes) -> None:
        begin.wait()
        write_first(path, content, mode=SECRET)

    threads = [threading.Thread(target=write, args=(bytes([n]) * 1_000,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = path.read_bytes()
    assert kept == kept[:1] * 1_000
    write_first(path, b"later")
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["key"]
