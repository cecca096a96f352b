"""NVIDIA's own client against the server: `tritonclient[http]`, unchanged."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from export.folder import resolve
from tests.conftest import require_service
from tests.export.reference import SPECS, raw_inputs
from tests.served import Server, damage, expected, publish, serving, softmax

X = raw_inputs(SPECS["image-mean"], 3)


@pytest.fixture(scope="module")
def triton() -> ModuleType:
    require_service(importlib.util.find_spec("tritonclient") is not None, "tritonclient[http]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its dependencies deprecate is not ours
        import tritonclient.http

    module: ModuleType = tritonclient.http
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("artifacts")
    publish(made)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


@pytest.fixture
def client(triton: ModuleType, server: Server) -> Iterator[Any]:
    opened = triton.InferenceServerClient(server.address)
    yield opened
    opened.close()


def tensor(triton: ModuleType, *, binary: bool = True, name: str = "input", kind: str = "FP32") -> Any:
    made = triton.InferInput(name, list(X.shape), kind)
    made.set_data_from_numpy(X.astype(np.float64) if kind == "FP64" else X, binary_data=binary)
    return made


def refusal(triton: ModuleType, call: Any) -> tuple[str, str]:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException) as raised:
        call()
    return raised.value.status(), raised.value.message()


def test_health_metadata_configuration_index_and_statistics(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert client.is_model_ready("model", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("model", "2")
    assert client.get_server_metadata()["name"] == "hedgerow"
    described = client.get_model_metadata("model", "1")
    assert described["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 2, 8, 12]}]
    assert client.get_model_config("model")["max_batch_size"] == 64
    assert client.get_model_repository_index()[0]["state"] == "READY"
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "model"
    assert client.get_inference_statistics("model", "1")["model_stats"][0]["version"] == "1"
    client.load_model("model")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
def test_infer(triton: ModuleType, client: Any, binary: bool, packing: str | None) -> None:
    answer = client.infer(
        "model", [tensor(triton, binary=binary)], request_id="seven",
        request_compression_algorithm=packing, response_compression_algorithm=packing,
    )  # fmt: skip
    logits = expected("image-mean", X)
    np.testing.assert_allclose(answer.as_numpy("logits"), logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(answer.as_numpy("probabilities"), softmax(logits), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(answer.as_numpy("label"), logits.argmax(-1))
    told = answer.get_response()
    assert (told["id"], told["model_version"]) == ("seven", "1")


def test_infer_with_chosen_outputs_versions_and_classes(triton: ModuleType, client: Any) -> None:
    wanted = [
        triton.InferRequestedOutput("label", binary_data=False),
        triton.InferRequestedOutput("probabilities", binary_data=True, class_count=2),
    ]
    answer = client.infer("model", [tensor(triton, kind="FP64")], model_version="1", outputs=wanted)
    probabilities = softmax(expected("image-mean", X))
    np.testing.assert_array_equal(answer.as_numpy("label"), probabilities.argmax(-1))
    named = answer.as_numpy("probabilities")
    assert named.shape == (3, 2)
    assert [text.decode().split(":")[2] for text in named[:, 0]] == [
        "abcde"[i] for i in probabilities.argmax(-1)
    ]
    assert answer.as_numpy("logits") is None


def test_infer_asynchronously(triton: ModuleType, server: Server) -> None:
    client = triton.InferenceServerClient(server.address, concurrency=4)
    waiting = [client.async_infer("model", [tensor(triton)]) for _ in range(8)]
    for one in waiting:
        np.testing.assert_allclose(
            one.get_result().as_numpy("logits"), expected("image-mean", X), rtol=0, atol=1e-5
        )
    client.close()


def test_errors_are_readable_through_the_client(triton: ModuleType, client: Any) -> None:
    wrong = triton.InferInput("input", [1, 2, 8, 11], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 2, 8, 11), np.float32))
    truth = triton.InferInput("input", [1, 2, 8, 12], "BOOL")
    truth.set_data_from_numpy(np.zeros((1, 2, 8, 12), bool))
    for call, status, message in (
        (lambda: client.infer("other", [tensor(triton)]), "404", "there is no model 'other'"),
        (lambda: client.infer("model", [tensor(triton)], model_version="9"), "404", "at version '1'"),
        (lambda: client.infer("model", [tensor(triton, name="x")]), "400", "no input 'x'"),
        (lambda: client.infer("model", [wrong]), "400", "has shape"),
        (lambda: client.infer("model", [truth]), "400", "datatype 'BOOL'"),
        (lambda: client.unload_model("model"), "403", "--control"),
        (lambda: client.get_model_metadata("other"), "404", "there is no model"),
        (lambda: client.get_system_shared_memory_status(), "404", "Not Found"),
        (lambda: client.get_trace_settings(), "404", "Not Found"),
    ):
        found, said = refusal(triton, call)
        assert found == status
        assert message in said


def test_the_key(triton: ModuleType, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("not-so-secret-key")
    with serving(folder, "--api-key-file", str(tmp_path / "key")) as running:
        client = triton.InferenceServerClient(running.address)
        assert client.is_server_live()
        status, said = refusal(triton, lambda: client.infer("model", [tensor(triton)]))
        assert status == "401"
        assert "x-api-key" in said
        headers = {"Authorization": "Bearer not-so-secret-key"}
        answer = client.infer("model", [tensor(triton)], headers=headers)
        assert answer.as_numpy("label").shape == (3,)
        client.close()


def test_load_files_unload_and_load_again(triton: ModuleType, tmp_path: Path) -> None:
    served, other = tmp_path / "served", tmp_path / "other"
    publish(served)
    publish(other, round=2, seed=4)
    files = {f"file:1/{file.name}": file.read_bytes() for file in resolve(other).iterdir()}
    with serving(served, "--control", "--watch", "0") as running:
        client = triton.InferenceServerClient(running.address)

        def version() -> str:
            return str(client.infer("model", [tensor(triton)]).get_response()["model_version"])

        client.unload_model("model")
        assert not client.is_model_ready("model")
        assert refusal(triton, version)[0] == "503"
        assert client.get_model_repository_index()[0]["state"] == "UNAVAILABLE"
        client.load_model("model")
        assert version() == "1"
        client.load_model("model", config="{}", files=files)
        assert version() == "2"
        logits = client.infer("model", [tensor(triton)]).as_numpy("logits")
        np.testing.assert_allclose(logits, expected("image-mean", X, 4), rtol=0, atol=1e-5)

        before = resolve(served)
        publish(other, round=3, seed=5)
        damage(resolve(other))
        files = {f"file:1/{file.name}": file.read_bytes() for file in resolve(other).iterdir()}
        status, said = refusal(triton, lambda: client.load_model("model", config="{}", files=files))
        assert (status, "is not the model of its manifest" in said) == ("409", True)
        assert (version(), resolve(served)) == ("2", before)
        client.close()
