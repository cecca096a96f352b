"""A PostgreSQL of the tests' own: a cluster in a folder, on a Unix socket, gone when they are."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("/usr/lib/postgresql/17/bin", "/usr/lib/postgresql/16/bin", "/usr/lib/postgresql/15/bin")
SEARCH = os.pathsep.join((*FOLDERS, os.environ.get("PATH", os.defpath)))
NOT_DURABLE = ("fsync=off", "full_page_writes=off", "listen_addresses=")


def program(name: str) -> str | None:
    """Return where a program of PostgreSQL is, `None` where it is not installed."""
    return shutil.which(name, path=SEARCH)


def _nobody() -> str | None:
    """Return whom the server runs as where this is root, whom it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


class Cluster:
    """A running server; `database()` makes room for one store in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._data, self._count = folder / "data", 0
        self._made: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._user = _nobody()

    def make(self) -> None:
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        initdb = program("initdb")
        assert initdb is not None
        words = [initdb, "-D", str(self._data), "-U", "hedgerow", "-A", "trust", "-E", "UTF8", "-N"]
        subprocess.run([*words, "--locale=C.UTF-8"], check=True, capture_output=True, **self._as())

    def _as(self) -> dict[str, object]:
        return {"cwd": self.folder} | ({} if self._user is None else {"user": self._user, "extra_groups": []})

    def start(self) -> None:
        server = program("postgres")
        assert server is not None
        options = [word for option in NOT_DURABLE for word in ("-c", option)]
        command = [server, "-D", str(self._data), "-k", str(self.folder), *options]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._as())
        deadline = time.monotonic() + 30
        while "ready" not in self._status():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)

    def _status(self) -> str:
        pid = self._data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError):
            return pid.read_text().splitlines()[-1]
        return ""

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: at once but cleanly, or with SIGQUIT as a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    def database(self, encoding: str = "UTF8") -> str:
        """Return the URL of what is empty: a schema, which costs nothing, in a database of this encoding.

        The database's own order of text is not that of code points.
        """
        import psycopg

        self._count += 1
        where = {"host": str(self.folder), "user": "hedgerow", "autocommit": True}
        locale = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'" if encoding == "UTF8" else "LOCALE 'C'"
        name, schema = encoding.lower(), f"s{self._count}"
        if name not in self._made:
            with psycopg.connect(dbname="postgres", **where) as connection:
                text = f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' {locale}"
                connection.execute(text.encode())
            self._made.add(name)
        with psycopg.connect(dbname=name, **where) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"postgresql://hedgerow@/{name}?host={self.folder}&options=-csearch_path%3D{schema}"


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a server; its folder is short, as the path of a socket has to be."""
    folder = Path(tempfile.mkdtemp(prefix="hr-pg-"))
    made = Cluster(folder)
    try:
        made.make()
        made.start()
        yield made
    finally:
        made.stop(signal.SIGQUIT)  # nothing of it is kept
        shutil.rmtree(folder)
