from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.serving import people, protocol
from edge_agent.serving.predictor import Predictor, Reload
from export.folder import load_artifact, resolve
from foundation.artifact import Manifest
from foundation.errors import DataError, ExportError, WireError
from foundation.normalisation import Normalisation
from foundation.parameters import Array
from tests.export.reference import SPECS, raw_inputs
from tests.served import (
    KEPT,
    ROOT,
    START_S,
    Server,
    damage,
    expected,
    labels_of,
    publish,
    run_server,
    serving,
    softmax,
)

# --- the predictor ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_predictions_of_raw_values_are_the_references(tmp_path: Path, name: str) -> None:
    publish(tmp_path, name)
    x = raw_inputs(SPECS[name], 7)
    prediction = Predictor(tmp_path).predict(x)
    logits = expected(name, x)
    np.testing.assert_allclose(prediction.logits, logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(prediction.probabilities, softmax(logits), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(prediction.indices, logits.argmax(-1))
    last = logits if logits.ndim == 2 else logits[:, -1]
    assert prediction.labels == [labels_of(SPECS[name])[i] for i in last.argmax(-1)]


def test_one_artifacts_own_folder_can_be_served(tmp_path: Path) -> None:
    manifest = publish(tmp_path)
    predictor = Predictor(tmp_path / manifest.sha256)
    assert predictor.manifest == manifest
    assert not predictor.reload().changed


def test_reload_moves_to_the_next_artifact_and_only_then(tmp_path: Path) -> None:
    publish(tmp_path)
    predictor, x = Predictor(tmp_path), raw_inputs(SPECS["image-mean"], 2)
    before = predictor.handle
    assert predictor.reload() == Reload(changed=False)
    assert predictor.handle is before
    publish(tmp_path, round=2, seed=4)
    assert predictor.reload().changed
    prediction = predictor.predict(x)
    assert prediction.manifest.round == 2
    np.testing.assert_allclose(prediction.logits, expected("image-mean", x, seed=4), rtol=0, atol=1e-5)


def test_damaged_next_artifact_leaves_the_last_good_one_serving(tmp_path: Path) -> None:
    publish(tmp_path)
    predictor = Predictor(tmp_path)
    bad = publish(tmp_path, round=2, seed=4)
    damage(tmp_path / bad.sha256)
    first, second = predictor.reload(), predictor.reload()
    assert not first.changed
    assert first.refusal is not None
    assert "is not the model of its manifest" in first.refusal
    assert second == first
    assert predictor.manifest.round == 1
    assert len(predictor.predict(raw_inputs(SPECS["image-mean"], 1)).labels) == 1
    publish(tmp_path, round=3, seed=5)
    assert predictor.reload().changed
    assert predictor.manifest.round == 3


def test_damaged_current_artifact_falls_back_to_the_previous_at_start(tmp_path: Path) -> None:
    publish(tmp_path)
    damage(tmp_path / publish(tmp_path, round=2, seed=4).sha256)
    predictor = Predictor(tmp_path)
    assert predictor.manifest.round == 1
    refusal = predictor.reload().refusal
    assert refusal is not None
    assert "is not the model" in refusal


def test_damaged_only_artifact_is_refused(tmp_path: Path) -> None:
    damage(tmp_path / publish(tmp_path).sha256)
    with pytest.raises(ExportError, match="is not the model of its manifest"):
        Predictor(tmp_path)
    with pytest.raises(ExportError, match="there is no artifact"):
        Predictor(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("image-mean", np.zeros((1, 8, 12), np.float32), "has shape"),
        ("image-mean", np.zeros((1, 2, 8, 11), np.float32), "has shape"),
        ("image-mean", np.zeros((0, 2, 8, 12), np.float32), "1 to 64 samples"),
        ("image-mean", np.zeros((65, 2, 8, 12), np.float32), "1 to 64 samples"),
        ("image-mean", np.full((1, 2, 8, 12), np.nan), "not finite"),
        ("image-mean", np.full((1, 2, 8, 12), 1e39), "not finite"),
        ("series-mean", np.full((1, 24, 3), 3e38), "no finite answer"),
        ("image-mean", np.zeros((1, 2, 8, 12), bool), "has to be numbers"),
        ("text", np.zeros((1, 10), np.int64), "1 to 9 characters"),
        ("text", np.zeros((1, 0), np.int64), "1 to 9 characters"),
        ("text", np.zeros((1, 3), np.float32), "whole numbers"),
        ("text", np.array([[0, 11]]), "0 to 10"),
        ("text", np.array([[0, -1]]), "0 to 10"),
    ],
)
def test_what_the_model_cannot_take_is_refused(tmp_path: Path, name: str, x: Array, message: str) -> None:
    publish(tmp_path, name)
    with pytest.raises(DataError, match=message):
        Predictor(tmp_path).predict(x)


# --- the protocol -------------------------------------------------------------------------------

MANIFEST = Manifest(
    agent="a", run="r", round=1, strategy="s", sha256="", bytes=1, dense_bytes=1, parameters=1,
    dense_parameters=1, input="image", shape=(1, 2, 2), labels=("a", "b"), normalisation=Normalisation(),
    kept_units=(1,), hidden_units=1, opset=17, tolerance=1e-4, parity=0.0,
)  # fmt: skip


def request(**changes: object) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1, 2, 2], "data": [1, 2, 3, 4], **changes}
    return json.dumps({"inputs": [{k: v for k, v in tensor.items() if v is not None}]}).encode()


@pytest.mark.parametrize(
    ("body", "header", "message"),
    [
        (b"", None, "malformed"),
        (b"{", None, "malformed"),
        (b"[" * 100_000, None, "malformed"),
        (b'{"inputs": []}', None, "inputs"),
        (request(name="x"), None, "no input 'x'"),
        (request(datatype="BYTES"), None, "BYTES"),
        (request(shape=[1, 1, 2, 3]), None, "4 numbers do not make"),
        (request(shape=[-1, -1, 2, 2]), None, "negative"),
        (request(shape=[2**40, 2**40]), None, "do not make"),
        (request(data=[1, 2, 3, "4"]), None, "other than numbers"),
        (request(data=[True, False, True, True]), None, "other than numbers"),
        (request(data=[[1, 2], [3]]), None, "ragged"),
        (request(data=[1, 2, 3, 2**70]), None, "other than numbers"),
        (request(datatype="UINT8", data=[1, 2, 3, 256]), None, "no uint8"),
        (request(datatype="INT64", data=[1, 2, 3, 0.5]), None, "no int64"),
        (request(data=None), None, "neither data nor"),
        (request(data=None, parameters={"binary_data_size": 16}), None, "does not fit 0 bytes"),
        (request(parameters={"binary_data_size": 16}), None, "both data and"),
        (request() + b"1234", str(len(request())), "no tensor claims"),
        (request(), "-1", "Inference-Header-Content-Length"),
        (request(), "100000", "Inference-Header-Content-Length"),
        (request(), "²", "Inference-Header-Content-Length"),
        (b"12345", "0", "no multiple of 16"),
        (b"", "0", "no multiple of 16"),
    ],
)
def test_malformed_requests_are_refused_by_name(body: bytes, header: str | None, message: str) -> None:
    with pytest.raises(WireError, match=message):
        protocol.decode(body, header, MANIFEST)


def test_binary_data_size_that_lies_is_refused() -> None:
    for size, appended in ((16, 12), (12, 16), (2**60, 16), (-16, 16)):
        head = request(data=None, parameters={"binary_data_size": size})
        with pytest.raises(WireError, match="does not fit"):
            protocol.decode(head + bytes(appended), str(len(head)), MANIFEST)


def test_flat_nested_binary_and_raw_tensors_are_the_same() -> None:
    x = np.array([[[[1.0, 2.0], [3.0, 4.0]]]], np.float32)
    head = request(data=None, parameters={"binary_data_size": 16})
    for body, header in (
        (request(), None),
        (request(data=x.tolist()), None),
        (request(datatype="UINT8"), None),
        (head + x.tobytes(), str(len(head))),
        (x.tobytes(), "0"),
    ):
        np.testing.assert_array_equal(protocol.decode(body, header, MANIFEST).x, x)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(-2, 400).map(str), st.text(max_size=5)))
def test_any_body_is_decoded_or_refused(body: bytes, header: str | None) -> None:
    with suppress(WireError):
        protocol.decode(body, header, MANIFEST)
    with suppress(WireError):
        people.samples(body, MANIFEST)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["name", "datatype", "shape", "data", "parameters"]), JSON)
def test_any_value_in_any_field_is_decoded_or_refused(field: str, value: object) -> None:
    with suppress(WireError):
        protocol.decode(request(**{field: value}), None, MANIFEST)
    with suppress(WireError):
        people.samples(json.dumps({"inputs": value}).encode(), MANIFEST)


# --- a real server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("artifacts")
    publish(folder)
    with serving(folder) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as opened:
        yield opened


X = raw_inputs(SPECS["image-mean"], 3)


def v2(x: Array = X, **more: object) -> dict[str, object]:
    tensor = {"name": "input", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return {"inputs": [tensor], **more}


def test_health_and_metadata(client: httpx.Client) -> None:
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/model/ready",
        "/v2/models/model/versions/1/ready",
    ):
        assert client.get(path).status_code == 200
    assert "binary_tensor_data" in client.get("/v2").json()["extensions"]
    described = client.get("/v2/models/model").json()
    assert described["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 2, 8, 12]}]
    assert [(o["name"], o["shape"]) for o in described["outputs"]] == [
        ("logits", [-1, 5]), ("probabilities", [-1, 5]), ("label", [-1]),
    ]  # fmt: skip
    told = described["properties"]  # texts, by the protocol
    assert (described["versions"], json.loads(told["kept_units"])) == (["1"], list(KEPT))
    assert (told["agent"], told["round"], "accuracy" in told) == ("agent <1>", "1", False)
    assert all(isinstance(value, str) for value in told.values())
    index = client.post("/v2/repository/index").json()
    assert index == [{"name": "model", "version": "1", "state": "READY", "reason": ""}]


def test_infer_as_json(client: httpx.Client) -> None:
    answer = client.post("/v2/models/model/infer", json=v2(id="seven")).json()
    outputs = {o["name"]: np.reshape(o["data"], o["shape"]) for o in answer["outputs"]}
    logits = expected("image-mean", X)
    np.testing.assert_allclose(outputs["logits"], logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs["probabilities"], softmax(logits), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(outputs["label"], logits.argmax(-1))
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("seven", "model", "1")


def test_infer_as_binary_with_selected_outputs(client: httpx.Client) -> None:
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": list(X.shape),
        "parameters": {"binary_data_size": X.nbytes},
    }
    wanted = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "logits"}]
    head = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    answer = client.post(
        "/v2/models/model/versions/1/infer",
        content=head + X.tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    length = int(answer.headers["Inference-Header-Content-Length"])
    label, logits = json.loads(answer.content[:length])["outputs"]
    reference = expected("image-mean", X)
    assert label["parameters"] == {"binary_data_size": 24}
    np.testing.assert_array_equal(np.frombuffer(answer.content[length:], "<i8"), reference.argmax(-1))
    np.testing.assert_allclose(np.reshape(logits["data"], (3, 5)), reference, rtol=0, atol=1e-5)


def test_predict_for_people(client: httpx.Client) -> None:
    probabilities = softmax(expected("image-mean", X))
    answer = client.post("/predict", json={"inputs": X.tolist()}).json()
    for found, values in zip(answer["predictions"], probabilities, strict=True):
        assert found["label"] == "abcde"[values.argmax()]
        assert found["probability"] == pytest.approx(values.max(), abs=1e-5)
        assert found["probabilities"] == {
            c: pytest.approx(v, abs=1e-5) for c, v in zip("abcde", values, strict=True)
        }
    assert answer["model"]["agent"] == "agent <1>"
    single = client.post("/predict", json={"inputs": X[0].tolist()}).json()
    assert single["predictions"][0]["label"] == answer["predictions"][0]["label"]
    assert len(single["predictions"]) == 1


def test_card_and_counters(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "agent &lt;1&gt;, round 1" in page.text
    assert "9, 2, 30 of 64 per block" in page.text
    assert "Energy of training</th><td>unknown" in page.text
    client.post("/v2/models/model/infer", json=v2())
    counters = client.get("/metrics").text
    assert 'hedgerow_requests_total{code="200"}' in counters
    assert "# TYPE hedgerow_inference_seconds histogram" in counters
    assert 'round="1"} 1' in counters


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v2/models/other/infer", b"{}", 404, "no model 'other'"),
        ("GET", "/v2/models/model/versions/9", b"", 404, "at version '1'"),
        ("GET", "/nothing", b"", 404, "Not Found"),
        ("GET", "/v2/models/model/infer", b"", 405, "Method Not Allowed"),
        ("POST", "/v2/models/model/infer", b"{", 400, "malformed"),
        ("POST", "/v2/models/model/infer", json.dumps(v2(X[:, :1])).encode(), 400, "has shape"),
        (
            "POST",
            "/v2/models/model/infer",
            json.dumps(v2(np.tile(X, (22, 1, 1, 1)))).encode(),
            400,
            "1 to 64",
        ),
        (
            "POST",
            "/v2/models/model/infer",
            json.dumps(v2(outputs=[{"name": "x"}])).encode(),
            400,
            "no output",
        ),
        ("POST", "/predict", b'{"inputs": [1, 2]}', 400, "has shape"),
        ("POST", "/predict", b'{"inputs": []}', 400, "has shape"),
        ("POST", "/predict", b'{"input": 1}', 400, "inputs"),
        ("POST", "/predict", b" " * (9 << 20), 413, "at most"),
    ],
)
def test_errors_have_a_status_and_a_reason(
    client: httpx.Client, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    answer = client.request(method, path, content=content)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


def test_body_without_a_length_is_bounded_while_it_streams(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(9 * 16):
            yield bytes(1 << 16)

    with suppress(httpx.WriteError):  # the server may hang up before all is sent
        assert client.post("/predict", content=chunks()).status_code == 413
    assert client.get("/v2/health/live").status_code == 200


def test_unknown_packings_are_refused(client: httpx.Client) -> None:
    answer = client.post("/predict", content=b"x", headers={"Content-Encoding": "br"})
    assert (answer.status_code, list(answer.json())) == (415, ["error"])


def test_answers_do_not_wait_for_acknowledgements(client: httpx.Client) -> None:
    # With Nagle's algorithm on, no answer on a kept connection takes less than 40 ms.
    spent = []
    for _ in range(15):
        start = time.perf_counter()
        client.post(
            "/v2/models/model/infer", content=X.tobytes(), headers={"Inference-Header-Content-Length": "0"}
        )
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.03


def test_process_holds_no_training_code_and_little_memory(server: Server, client: httpx.Client) -> None:
    client.post("/v2/models/model/infer", json=v2())
    process = psutil.Process(server.process.pid)
    mapped = {Path(entry.path).name for entry in process.memory_maps()}
    assert not any("torch" in name or "onnx_cpp2py" in name for name in mapped)
    assert process.memory_info().rss < 160 << 20


def test_serving_imports_neither_torch_nor_onnx_nor_training() -> None:
    program = (
        "import sys, edge_agent.serving.__main__, edge_agent.serving.http\n"
        "unwanted = ('torch', 'onnx', 'coordinator', 'paho', 'fastapi', 'starlette', 'PIL')\n"
        "heavy = [n for n in sys.modules if n.split('.')[0] in unwanted]\n"
        "heavy += [n for n in sys.modules if n.startswith(('edge_agent.training', 'edge_agent.agent'))]\n"
        "print(heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_server_takes_the_next_artifact_refuses_a_damaged_one_and_leaves_cleanly(tmp_path: Path) -> None:
    publish(tmp_path)

    def version(client: httpx.Client) -> str:
        return str(client.post("/v2/models/model/infer", json=v2()).json()["model_version"])

    with serving(tmp_path, "--watch", "0.05") as running, httpx.Client(base_url=running.url) as client:
        assert version(client) == "1"
        publish(tmp_path, round=2, seed=4)
        deadline = time.monotonic() + START_S
        while version(client) != "2":
            assert time.monotonic() < deadline
        answer = client.post("/v2/models/model/infer", json=v2()).json()
        np.testing.assert_allclose(
            np.reshape(answer["outputs"][0]["data"], (3, 5)), expected("image-mean", X, 4), rtol=0, atol=1e-5
        )
        # A current link to a damaged artifact, as a failing disk would make it.
        good, broken = resolve(tmp_path), tmp_path / "broken"
        broken.mkdir()
        for file in good.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        damage(broken)
        (tmp_path / "fresh").symlink_to("broken")
        (tmp_path / "fresh").replace(tmp_path / "current")
        while "hedgerow_refused_artifacts_total 1" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        assert version(client) == "2"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(START_S) == 0
    assert load_artifact(good)[0].round == 2


def test_interrupt_leaves_cleanly_too(tmp_path: Path) -> None:
    publish(tmp_path, "text")
    with serving(tmp_path, "--name", "mine", "--watch", "0") as running:
        answer = httpx.post(f"{running.url}/predict", json={"inputs": ["abc", "bca"]}).json()
        logits = expected("text", np.array([[0, 1, 2], [1, 2, 0]]))[:, -1]
        assert [p["label"] for p in answer["predictions"]] == ["abcdefghijk"[i] for i in logits.argmax(-1)]
        unknown = httpx.post(f"{running.url}/predict", json={"inputs": ["xyz"]})
        assert (unknown.status_code, unknown.json()["error"]) == (
            400,
            "the model does not know the character 'x'",
        )
        assert httpx.get(f"{running.url}/v2/models/mine/ready").status_code == 200
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(START_S) == 0


def test_folder_without_a_good_artifact_is_refused_with_a_reason(tmp_path: Path) -> None:
    done = run_server(str(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert "refused: there is no artifact" in done.stderr


def test_taken_port_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    publish(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_server(str(tmp_path), "--port", str(port))
    assert done.returncode == 1
    assert f"failed: 127.0.0.1:{port}" in done.stderr
