"""The protocol, byte by byte: a client of its own, written from the specification and not from our code."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foundation.parameters import Array
from tests.export.reference import SPECS, raw_inputs
from tests.served import Server, expected, publish, serving, softmax

X = raw_inputs(SPECS["image-mean"], 3)
LOGITS = expected("image-mean", X)


class Wire:
    """One connection; requests are written and answers read as bytes."""

    def __init__(self, server: Server) -> None:
        host, port = server.address.split(":")
        self.socket = socket.create_connection((host, int(port)), 20)
        self.reader = self.socket.makefile("rb")

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: object
    ) -> tuple[int, dict[str, str], bytes]:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return self.answer()

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        status = int(self.reader.readline().split()[1])
        told: dict[str, str] = {}
        while line := self.reader.readline().strip():
            name, _, value = line.decode().partition(":")
            told[name.strip().lower()] = value.strip()
        return status, told, self.reader.read(int(told["content-length"]))

    def close(self) -> None:
        self.reader.close()
        self.socket.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("artifacts")
    publish(folder)
    with serving(folder) as running:
        yield running


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    opened = Wire(server)
    yield opened
    opened.close()


def head(x: Array = X, **more: object) -> bytes:
    tensor = {"name": "input", "shape": list(x.shape), "datatype": "FP32"}
    return json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}], **more}).encode()


INFER = "/v2/models/model/infer"


def tensors(told: dict[str, str], body: bytes) -> dict[str, Array]:
    """The outputs of an answer whose tensors are all appended, each after the other."""
    length = int(told["inference-header-content-length"])
    assert told["content-type"] == "application/octet-stream"
    kinds = {"FP32": "<f4", "INT64": "<i8"}
    found, at = {}, length
    for output in json.loads(body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        values = np.frombuffer(body[at : at + size], kinds[output["datatype"]])
        found[output["name"]] = values.reshape(output["shape"])
        at += size
    assert at == len(body)
    return found


def check(found: dict[str, Array]) -> None:
    assert list(found) == ["logits", "probabilities", "label"]
    np.testing.assert_allclose(found["logits"], LOGITS, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["probabilities"], softmax(LOGITS), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found["label"], LOGITS.argmax(-1))


def test_tensors_follow_the_header_both_ways(wire: Wire) -> None:
    header = head(parameters={"binary_data_output": True}, id="a")
    status, told, body = wire.ask(
        "POST", INFER, header + X.tobytes(), Inference_Header_Content_Length=len(header)
    )
    assert status == 200
    check(tensors(told, body))
    answer = json.loads(body[: int(told["inference-header-content-length"])])
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "model", "1")


def test_one_outputs_own_word_wins_over_the_requests(wire: Wire) -> None:
    header = head(
        outputs=[{"name": "label", "parameters": {"binary_data": False}}],
        parameters={"binary_data_output": True},
    )
    _, told, body = wire.ask("POST", INFER, header + X.tobytes(), Inference_Header_Content_Length=len(header))
    assert "inference-header-content-length" not in told
    assert json.loads(body)["outputs"][0]["data"] == LOGITS.argmax(-1).tolist()


def test_a_raw_body_is_the_one_tensor_and_answered_as_bytes(wire: Wire) -> None:
    status, told, body = wire.ask("POST", INFER, X.tobytes(), Inference_Header_Content_Length=0)
    assert status == 200
    check(tensors(told, body))


def test_a_raw_body_is_answered_as_json_where_nothing_else_is_accepted(wire: Wire) -> None:
    status, told, body = wire.ask(
        "POST", INFER, X.tobytes(), Inference_Header_Content_Length=0, Accept="application/json"
    )
    assert (status, told["content-type"]) == (200, "application/json")
    logits = json.loads(body)["outputs"][0]
    np.testing.assert_allclose(np.reshape(logits["data"], logits["shape"]), LOGITS, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_packed_bodies_and_answers(wire: Wire, name: str, pack: object) -> None:
    assert callable(pack)
    header = head(parameters={"binary_data_output": True})
    status, told, body = wire.ask(
        "POST", INFER, pack(header + X.tobytes()),
        Content_Encoding=name, Accept_Encoding=name, Inference_Header_Content_Length=len(header),
    )  # fmt: skip
    assert (status, told["content-encoding"]) == (200, name)
    check(tensors(told, gzip.decompress(body) if name == "gzip" else zlib.decompress(body)))


def test_whoever_accepts_many_packings_gets_none(wire: Wire) -> None:
    _, told, _ = wire.ask(
        "POST", INFER, X.tobytes(), Inference_Header_Content_Length=0, Accept_Encoding="gzip, deflate, br"
    )
    assert "content-encoding" not in told


def test_classification_names_the_largest(wire: Wire) -> None:
    wanted = [
        {"name": "logits", "parameters": {"classification": 2, "binary_data": True}},
        {"name": "probabilities", "parameters": {"classification": 1}},
    ]
    header = head(outputs=wanted)
    status, told, body = wire.ask(
        "POST", INFER, header + X.tobytes(), Inference_Header_Content_Length=len(header)
    )
    assert status == 200
    length = int(told["inference-header-content-length"])
    logits, probabilities = json.loads(body[:length])["outputs"]
    assert (logits["datatype"], logits["shape"], probabilities["shape"]) == ("BYTES", [3, 2], [3, 1])
    texts, at = [], length
    while at < len(body):
        (size,) = struct.unpack("<I", body[at : at + 4])
        texts.append(body[at + 4 : at + 4 + size].decode())
        at += 4 + size
    order = (-LOGITS).argsort(-1)[:, :2]
    assert [text.split(":")[1:] for text in texts] == [[str(i), "abcde"[i]] for i in order.ravel()]
    values = [float(text.split(":")[0]) for text in texts]
    np.testing.assert_allclose(values, np.take_along_axis(LOGITS, order, -1).ravel(), rtol=0, atol=1e-5)
    assert [text.split(":")[2] for text in probabilities["data"]] == ["abcde"[i] for i in LOGITS.argmax(-1)]


BOMB = gzip.compress(bytes(64 << 20), 9, mtime=0)


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/v2/models/none", b"", {}, 404),
        ("GET", "/v2/models/none/ready", b"", {}, 404),
        ("GET", "/v2/models/model/versions/7/ready", b"", {}, 404),
        ("POST", "/v2/models/model/versions/7/infer", b"{}", {}, 404),
        ("GET", "/v2/models/model/nothing", b"", {}, 404),
        ("GET", "/v2/models/model/infer/more", b"", {}, 404),
        ("GET", "/%2e%2e/page.html", b"", {}, 404),
        ("DELETE", "/v2/models/model", b"", {}, 405),
        ("POST", INFER, b"\xff", {}, 400),
        ("POST", INFER, X.tobytes()[:-1], {"Inference_Header_Content_Length": 0}, 400),
        ("POST", INFER, head() + X.tobytes()[:-4], {"Inference_Header_Content_Length": len(head())}, 400),
        ("POST", INFER, head(), {"Inference_Header_Content_Length": len(head()) - 3}, 400),
        ("POST", INFER, b"not packed", {"Content_Encoding": "gzip"}, 400),
        ("POST", INFER, gzip.compress(b"{}", mtime=0)[:-3], {"Content_Encoding": "gzip"}, 400),
        ("POST", INFER, gzip.compress(b"{}", mtime=0) + b"x", {"Content_Encoding": "gzip"}, 400),
        ("POST", INFER, zlib.compress(b"{}"), {"Content_Encoding": "gzip"}, 400),
        ("POST", INFER, BOMB, {"Content_Encoding": "gzip"}, 413),
        ("POST", INFER, b"x", {"Content_Encoding": "zstd"}, 415),
        ("POST", "/v2/repository/models/model/unload", b"", {}, 403),
    ],
)
def test_errors_have_the_protocols_shape(
    wire: Wire, method: str, path: str, body: bytes, headers: dict[str, object], status: int
) -> None:
    found, told, answer = wire.ask(method, path, body, **headers)
    assert (found, told["content-type"]) == (status, "application/json")
    assert list(json.loads(answer)) == ["error"]
    assert wire.ask("GET", "/v2/health/live")[0] == 200  # on the same connection


def test_shared_memory_is_refused_and_not_ignored(wire: Wire) -> None:
    there = {"shared_memory_region": "r", "shared_memory_byte_size": X.nbytes}
    tensor = {"name": "input", "shape": list(X.shape), "datatype": "FP32"}
    for request in (
        {"inputs": [{**tensor, "parameters": there}]},
        {
            "inputs": [{**tensor, "data": X.ravel().tolist()}],
            "outputs": [{"name": "label", "parameters": there}],
        },
    ):
        status, _, answer = wire.ask("POST", INFER, json.dumps(request).encode())
        assert status == 400
        assert "shared memory" in json.loads(answer)["error"]


def test_a_client_that_leaves_in_the_middle_harms_nobody(server: Server, wire: Wire) -> None:
    leaving = Wire(server)
    leaving.socket.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
    leaving.close()
    status, told, body = wire.ask("POST", INFER, X.tobytes(), Inference_Header_Content_Length=0)
    assert status == 200
    check(tensors(told, body))


def test_head_is_get_without_a_body(wire: Wire) -> None:
    wire.socket.sendall(b"HEAD /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = wire.reader.read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\n")


def test_description_configuration_and_statistics(tmp_path: Path) -> None:
    publish(tmp_path, "text")
    options = ("--name", "mine", "--max-batch", "8", "--batch-window-ms", "2")
    with serving(tmp_path, *options) as running:
        wire = Wire(running)
        described = json.loads(wire.ask("GET", "/v2/models/mine/versions/1")[2])
        configured = json.loads(wire.ask("GET", "/v2/models/mine/config")[2])
        assert [tensor["shape"] for tensor in described["outputs"]] == [[-1, -1, 11], [-1, -1, 11], [-1, -1]]
        assert configured["input"] == [{"name": "input", "data_type": "TYPE_INT64", "dims": [-1]}]
        assert configured["max_batch_size"] == 8
        assert configured["dynamic_batching"] == {"max_queue_delay_microseconds": 2000}
        for tensors, config in (("inputs", "input"), ("outputs", "output")):
            for one, other in zip(described[tensors], configured[config], strict=True):
                assert one["shape"] == [-1, *other["dims"]]
                assert other["data_type"] == f"TYPE_{one['datatype']}"
        ids = np.array([[0, 1, 2], [3, 4, 5]], "<i8")
        header = json.dumps({"inputs": [{"name": "input", "datatype": "INT64", "shape": [2, 3],
                             "parameters": {"binary_data_size": 48}}]}).encode()  # fmt: skip
        for body, length in ((header + ids.tobytes(), len(header)), (b"{", 1)):
            wire.ask("POST", "/v2/models/mine/infer", body, Inference_Header_Content_Length=length)
        for path in ("/v2/models/mine/stats", "/v2/models/mine/versions/1/stats", "/v2/models/stats"):
            (stats,) = json.loads(wire.ask("GET", path)[2])["model_stats"]
            assert (stats["name"], stats["version"]) == ("mine", "1")
            assert (stats["inference_count"], stats["execution_count"]) == (2, 1)
            counts = {stage: told["count"] for stage, told in stats["inference_stats"].items()}
            assert counts == {
                "success": 1, "fail": 1, "queue": 1, "compute_input": 1, "compute_infer": 1,
                "compute_output": 1,
            }  # fmt: skip
            assert stats["batch_stats"][0]["batch_size"] == 2
            assert stats["last_inference"] > 1e12
        wire.close()
