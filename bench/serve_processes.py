"""The processes of bench/serve.py: our server, torch behind FastAPI, torch's import, an exporting agent."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

import numpy as np
import psutil
from safetensors.numpy import save_file

from bench.serve_models import Drawn
from export.folder import load_artifact, resolve
from export.proof import open_session
from foundation.artifact import Probe

CHILD = Path(__file__).with_name("serve_child.py")
LENGTH = b"inference-header-content-length"


@dataclass(frozen=True)
class Start:
    """A process from its start to its first right answer: medians over several."""

    wall_s: float
    cpu_s: float
    rss_bytes: float = 0.0


def ours(folder: Path) -> list[str]:
    return [sys.executable, "-m", "edge_agent.serving", str(folder), "--port", "0"]


def peer(folder: Path) -> list[str]:
    return [sys.executable, str(CHILD), "serve", str(folder)]


def write(one: Drawn, folder: Path) -> Path:
    """Write what the children read: the artifact, and the small model's parameters for torch."""
    one.publish(folder)
    save_file({k: np.ascontiguousarray(a) for k, a in one.parameters.items()}, folder / "dense.safetensors")
    np.savez(folder / "masks.npz", **one.masks)
    (folder / "spec.json").write_text(one.spec.model_dump_json())
    return folder


def cpu_s(pid: int) -> float:
    """CPU seconds of another process, all threads, to the nanosecond (Linux's clock of a process)."""
    return time.clock_gettime((~pid << 3) | 2)


class Server:
    """A serving process, and one kept connection to it."""

    def __init__(self, command: list[str]) -> None:
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        if not line:
            raise RuntimeError(f"{command} ended with {self.process.wait()}")
        host, _, port = line[-1].removeprefix("http://").partition(":")
        self.address = host, int(port)
        self.connect()

    def connect(self) -> None:
        """Open the kept connection; the server hangs up after five idle seconds."""
        self.socket = socket.create_connection(self.address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)

    @property
    def cpu_s(self) -> float:
        return cpu_s(self.process.pid)

    @property
    def rss_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def ask(self, request: bytes) -> tuple[bytes, Mapping[bytes, bytes]]:
        """Send a whole request and read the whole answer; returns body and headers."""
        self.socket.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._more()
        head, _, body = received.partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
        while len(body) < int(headers[b"content-length"]):
            body += self._more()
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {body[:200]!r}")
        return body, headers

    def _more(self) -> bytes:
        received = self.socket.recv(1 << 16)
        if not received:
            raise RuntimeError("the server hung up")
        return received


def request(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    told = {"Host": "localhost", "Content-Length": str(len(body)), **headers}
    lines = "".join(f"{key}: {value}\r\n" for key, value in told.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def binary(x: np.ndarray) -> bytes:
    """A request of the Open Inference Protocol: the tensor in bytes, logits in bytes."""
    head = json.dumps(
        {
            "inputs": [
                {"name": "input", "datatype": "FP32", "shape": list(x.shape),
                 "parameters": {"binary_data_size": x.nbytes}}
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()  # fmt: skip
    return request(
        "/v2/models/model/infer", head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    )


def logits_of(body: bytes, headers: Mapping[bytes, bytes]) -> np.ndarray:
    return np.frombuffer(body[int(headers.get(LENGTH, b"0")) :], "<f4")


# --- starts ------------------------------------------------------------------------------------------


def starts(one: Drawn, folder: Path, repeats: int) -> tuple[Start, Start, Start]:
    """Start our server, torch's and torch's import in turn; the first of each is not counted."""
    write(one, folder)
    _, _, probe = load_artifact(resolve(folder))
    found: dict[str, list[Start]] = {"ours": [], "peer": [], "import": []}
    for turn in range(-1, repeats):
        each = {
            "ours": first_answer(ours(folder), binary(probe.inputs[:1]), probe),
            "peer": first_answer(peer(folder), request("/infer", probe.inputs[:1].tobytes(), {}), probe),
            "import": import_torch(),
        }
        for name, start in each.items():
            if turn >= 0:
                found[name].append(start)
    return middle(found["ours"]), middle(found["peer"]), middle(found["import"])


def middle(found: list[Start]) -> Start:
    return Start(
        *(median(column) for column in zip(*((s.wall_s, s.cpu_s, s.rss_bytes) for s in found), strict=True))
    )


def first_answer(command: list[str], asked: bytes, probe: Probe) -> Start:
    """Start a server and ask at once; its memory is looked at after a hundred answers."""
    with Server(command) as server:
        right(logits_of(*server.ask(asked)), probe)
        wall, cpu = time.perf_counter() - server.began, server.cpu_s
        for _ in range(100):
            right(logits_of(*server.ask(asked)), probe)
        return Start(wall, cpu, float(server.rss_bytes))


def right(logits: np.ndarray, probe: Probe) -> None:
    if not np.abs(logits - probe.logits[0]).max() < 1e-4:
        raise RuntimeError("the server's answer is not the trained model's")


def import_torch() -> Start:
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(time.perf_counter() - began, spent)


# --- http --------------------------------------------------------------------------------------------


def overhead(server: Server, one: Drawn, count: int) -> dict[str, float]:
    """Ask the server and run the session in turn; wall medians, and the server's CPU for a request."""
    session, asked, x = open_session(one.pruned), binary(one.sample), one.sample
    asking, running = [], []
    spent = 0.0
    for turn in range(-50, count):
        before, begin = server.cpu_s, time.perf_counter()
        server.ask(asked)
        middle_s = time.perf_counter()
        after = server.cpu_s
        run_begin = time.perf_counter()
        session.run(["logits"], {"input": x})
        end = time.perf_counter()
        if turn >= 0:
            asking.append(middle_s - begin)
            running.append(end - run_begin)
            spent += after - before
    return {
        "http ms": 1e3 * median(asking),
        "run ms": 1e3 * median(running),
        "server's CPU ms": 1e3 * spent / count,
    }


def isolated(server: Server, one: Drawn, count: int) -> dict[str, float]:
    """Ask now and then; returns the server's CPU until the answer, and until half a second later."""
    asked = binary(one.sample)
    server.socket.close()
    server.connect()
    until = whole = 0.0
    for _ in range(count):
        time.sleep(0.1)
        before = server.cpu_s
        server.ask(asked)
        until += server.cpu_s - before
        time.sleep(0.5)
        whole += server.cpu_s - before
    return {"until answered ms": 1e3 * until / count, "with after ms": 1e3 * whole / count}


def export_memory(one: Drawn, folder: Path) -> dict[str, float]:
    """Let a process that has loaded what a waiting agent has export a model; returns its memory."""
    write(one, folder)
    command = [sys.executable, str(CHILD), "export", str(folder)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout
    found: dict[str, float] = json.loads(said)
    return found
