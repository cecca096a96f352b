"""The application in process, where time and faults can be arranged, and the program's options."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.serving import bodies, control, protocol
from edge_agent.serving.answers import Refused
from edge_agent.serving.bodies import Bodies
from edge_agent.serving.child import ServingChild
from edge_agent.serving.guard import Guard, read_key
from edge_agent.serving.http import Application, ServerSettings
from edge_agent.serving.metrics import BUCKETS_S, Histogram, Metrics
from edge_agent.serving.predictor import Handle, Prediction, Predictor
from edge_agent.serving.runner import Ran, Runner
from edge_agent.settings import ServeSettings
from foundation.errors import DataError, FrameTooLarge, HedgerowError, SettingsError, WireError
from foundation.hosts import is_loopback
from foundation.parameters import Array
from tests.conftest import require_service
from tests.export.reference import SPECS, raw_inputs
from tests.served import START_S, damage, expected, publish, run_server, serving

pytestmark = pytest.mark.anyio

X = raw_inputs(SPECS["image-mean"], 3)
RAW = {"Inference-Header-Content-Length": "0"}
INFER = "/v2/models/model/infer"
KEY = "a-key-that-is-long-enough"
predictor_of = cache(Predictor)


class Slow(Predictor):
    """A predictor whose runs begin when they are let, and that counts as slow."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.let, self.begun = threading.Event(), threading.Semaphore(0)
        self.batches: list[int] = []

    @property
    def handle(self) -> Handle:
        return replace(super().handle, run_ms=50.0)

    def predict(self, x: Array, *more: Handle) -> Prediction:
        self.begun.release()
        assert self.let.wait(START_S)
        self.batches.append(len(x))
        return super().predict(x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("artifacts")
    publish(made)
    return made


@pytest.fixture
def slow(folder: Path) -> Iterator[Slow]:
    made = Slow(folder)
    yield made
    made.let.set()


@asynccontextmanager
async def asking(app: Application, url: str = "http://127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # it is typed narrower than ASGI is
    async with httpx.AsyncClient(transport=transport, base_url=url) as client:
        yield client


async def until_begun(slow: Slow) -> None:
    assert await asyncio.to_thread(slow.begun.acquire, timeout=START_S)


# --- runs -----------------------------------------------------------------------------------------


async def test_health_and_counters_answer_while_the_model_works(slow: Slow) -> None:
    async with asking(Application(slow)) as client:
        working = asyncio.create_task(client.post(INFER, content=X.tobytes(), headers=RAW))
        await until_begun(slow)
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert "hedgerow_in_flight 1" in (await client.get("/metrics")).text
        assert not working.done()
        slow.let.set()
        assert (await working).status_code == 200
        assert "hedgerow_in_flight 0" in (await client.get("/metrics")).text


async def test_one_too_many_is_asked_to_come_again(slow: Slow) -> None:
    async with asking(Application(slow, ServerSettings(most_in_flight=1))) as client:
        working = asyncio.create_task(client.post(INFER, content=X.tobytes(), headers=RAW))
        await until_begun(slow)
        for path in (INFER, "/predict"):
            refused = await client.post(path, content=X.tobytes(), headers=RAW)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert list(refused.json()) == ["error"]
        slow.let.set()
        assert (await working).status_code == 200
        assert (await client.post(INFER, content=X.tobytes(), headers=RAW)).status_code == 200


async def test_a_larger_batch_than_is_allowed_is_refused(folder: Path) -> None:
    async with asking(Application(Predictor(folder), ServerSettings(most_samples=2))) as client:
        answer = await client.post(INFER, content=X.tobytes(), headers=RAW)
    assert (answer.status_code, "1 to 2 samples, not 3" in answer.json()["error"]) == (400, True)


async def run_together(runner: Runner, predictor: Predictor, *batches: Array) -> list[Ran | BaseException]:
    handle = predictor.handle

    async def one(x: Array) -> Ran:
        with runner.place():
            return await runner.run(x, handle)

    return await asyncio.gather(*map(one, batches), return_exceptions=True)


async def test_requests_share_a_run_and_get_their_own_answers(slow: Slow) -> None:
    told: list[tuple[str, int, int]] = []
    runner = Runner(slow, lambda *ran: told.append(ran[:3]), window_s=START_S)
    slow.let.set()
    sizes = (1, 3, 2, 1)
    parts = [raw_inputs(SPECS["image-mean"], size, seed=size) for size in sizes]
    answers = await run_together(runner, slow, *parts)
    # Everybody on the way had arrived: nobody waited for the window to end.
    assert (slow.batches, told) == ([7], [("1", 7, 4)])
    for x, answer in zip(parts, answers, strict=True):
        assert isinstance(answer, Ran)
        np.testing.assert_allclose(answer.prediction.logits, expected("image-mean", x), rtol=0, atol=1e-5)
        assert len(answer.prediction.labels) == len(x)
    await runner.close()


async def test_a_run_takes_no_more_than_fits(slow: Slow) -> None:
    runner = Runner(slow, lambda *_: None, window_s=START_S, most_samples=4)
    slow.let.set()
    answers = await run_together(runner, slow, *[X] * 3, X[:1])
    assert sorted(slow.batches) == [3, 3, 4]
    assert all(isinstance(answer, Ran) for answer in answers)
    await runner.close()


async def test_one_bad_request_does_not_spoil_the_others(slow: Slow) -> None:
    runner = Runner(slow, lambda *_: None, window_s=START_S)
    slow.let.set()
    good, bad, also = await run_together(runner, slow, X, np.full_like(X, np.nan), X[:1])
    assert isinstance(bad, DataError)
    for answer, x in ((good, X), (also, X[:1])):
        assert isinstance(answer, Ran)
        np.testing.assert_allclose(answer.prediction.logits, expected("image-mean", x), rtol=0, atol=1e-5)
    await runner.close()


async def test_texts_of_unlike_length_are_run_apart(tmp_path: Path) -> None:
    publish(tmp_path, "text")
    told: list[int] = []
    predictor = Predictor(tmp_path)
    runner = Runner(predictor, lambda _, samples, *__: told.append(samples), window_s=START_S)
    texts = [np.array([[1, 2, 3]]), np.array([[1, 2]]), np.array([[4, 5, 6]])]
    answers = await run_together(runner, predictor, *texts)
    assert told == [2, 1]
    for x, answer in zip(texts, answers, strict=True):
        assert isinstance(answer, Ran)
        np.testing.assert_allclose(answer.prediction.logits, expected("text", x), rtol=0, atol=1e-5)
    await runner.close()


async def test_a_single_client_waits_for_nobody(slow: Slow) -> None:
    runner = Runner(slow, lambda *_: None, window_s=10 * START_S)
    slow.let.set()
    async with asyncio.timeout(START_S):
        for _ in range(3):
            (answer,) = await run_together(runner, slow, X)
            assert isinstance(answer, Ran)
    await runner.close()


async def test_a_server_fault_in_a_shared_run_reaches_everybody(folder: Path) -> None:
    class Broken(Predictor):
        def predict(self, x: Array, *more: Handle) -> Prediction:
            raise RuntimeError("memory")

    async with asking(Application(Broken(folder), ServerSettings(window_s=START_S))) as client:
        answers = await asyncio.gather(
            *[client.post(INFER, content=X.tobytes(), headers=RAW) for _ in range(3)]
        )
    assert [(a.status_code, list(a.json())) for a in answers] == [(500, ["error"])] * 3
    assert "memory" not in answers[0].text


async def test_an_answer_of_another_version_than_asked_is_none(folder: Path) -> None:
    class Swapped(Predictor):
        def predict(self, x: Array, *more: Handle) -> Prediction:
            found = super().predict(x)
            return replace(found, manifest=found.manifest.model_copy(update={"round": 2}))

    async with asking(Application(Swapped(folder))) as client:
        one = await client.post("/v2/models/model/versions/1/infer", content=X.tobytes(), headers=RAW)
        any_ = await client.post(INFER, content=X.tobytes(), headers=RAW)
    assert (one.status_code, any_.status_code) == (404, 200)


# --- bodies ---------------------------------------------------------------------------------------


async def test_a_body_that_takes_too_long_is_given_up(folder: Path) -> None:
    reader = Bodies(1000, seconds=0.01)

    async def never() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    with pytest.raises(Refused, match="did not arrive within") as refused:
        async with reader.read({}, never):
            pass
    assert refused.value.status == 408


async def test_bodies_together_are_bounded_and_forgotten() -> None:
    reader = Bodies(1000)

    async def full() -> dict[str, object]:
        return {"type": "http.request", "body": bytes(1000), "more_body": False}

    async def held(depth: int) -> None:
        async with reader.read({}, full):
            await held(depth + 1)

    for _ in range(3):  # what was held is free again
        with pytest.raises(Refused, match="fill the memory") as refused:
            await held(0)
        assert refused.value.status == 503
    async with reader.read({}, full) as body:
        assert len(body) == 1000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([15, 31]), st.binary(max_size=60), st.integers(0, 80))
def test_any_packing_is_undone_or_refused(body: bytes, container: int, noise: bytes, at: int) -> None:
    packing = zlib.compressobj(9, zlib.DEFLATED, container)
    packed = packing.compress(body) + packing.flush()
    if len(body) <= 200:
        assert bodies.unpack(packed, container, 200) == body
    else:
        with pytest.raises(FrameTooLarge):
            bodies.unpack(packed, container, 200)
    for damaged in (noise, packed[:at] + noise + packed[at + 1 :], packed + noise):
        with suppress(WireError):
            assert len(bodies.unpack(damaged, container, 200)) <= 200


WANTED = st.dictionaries(
    st.sampled_from(["name", "parameters", "x"]),
    st.sampled_from(["logits", "probabilities", "label", "", 1, None, True])
    | st.dictionaries(
        st.sampled_from(["binary_data", "classification", "shared_memory_region"]),
        st.sampled_from([True, False, 0, 1, 4, 99, -1, 2**70, "1", None, [], 0.5]),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WANTED, max_size=4), st.sampled_from([True, False, 1, None, "yes"]), st.booleans())
def test_any_wish_for_outputs_is_answered_or_refused(
    folder: Path, wanted: list[object], default: object, binary: bool
) -> None:
    predictor = predictor_of(folder)
    tensor = {"name": "input", "datatype": "FP32", "shape": list(X.shape)}
    how = {"parameters": {"binary_data_size": X.nbytes}} if binary else {"data": X.tolist()}
    request = {
        "inputs": [{**tensor, **how}],
        "outputs": wanted,
        "parameters": {"binary_data_output": default},
    }
    head = json.dumps(request).encode()
    try:
        asked = protocol.decode(
            head + X.tobytes() * binary, str(len(head)) if binary else None, predictor.manifest
        )
    except WireError:
        return
    body, length = protocol.encode("model", predictor.predict(asked.x), asked)
    answer = json.loads(body[:length])
    sizes = [o["parameters"]["binary_data_size"] for o in answer["outputs"] if "parameters" in o]
    assert len(body) == (length or len(body)) + sum(sizes)
    assert [output["name"] for output in answer["outputs"]] == [output.name for output in asked.outputs]


# --- who may ask ----------------------------------------------------------------------------------


async def test_the_key_opens_and_nothing_else_does(folder: Path) -> None:
    async with asking(Application(Predictor(folder), guard=Guard(KEY))) as client:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await client.get(path)).status_code == 200
        page = (await client.get("/")).text
        assert "agent" not in page.lower().replace("user-agent", "")
        assert 'data-model="null"' in page
        wrong: list[dict[str, str]] = [
            {}, {"x-api-key": KEY + "x"}, {"x-api-key": KEY[:-1]}, {"x-api-key": ""},
            {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer"},
        ]  # fmt: skip
        for path in ("/metrics", "/v2", "/v2/models/model", "/nothing"):
            for headers in wrong:
                refused = await client.get(path, headers=headers)
                assert (refused.status_code, list(refused.json())) == (401, ["error"])
                assert refused.headers["www-authenticate"] == "Bearer"
        for headers in (
            {"x-api-key": KEY},
            {"Authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer {KEY}"},
        ):
            assert (await client.get("/v2", headers=headers)).status_code == 200
            assert "agent &lt;1&gt;" in (await client.get("/", headers=headers)).text


async def test_foreign_pages_are_refused(folder: Path) -> None:
    app = Application(Predictor(folder), guard=Guard(loopback=True))
    async with asking(app, "http://127.0.0.1:8090") as client:
        for origin, status in (
            ("http://127.0.0.1:8090", 200),
            ("http://127.0.0.1:9", 403),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            answer = await client.post(INFER, content=X.tobytes(), headers={**RAW, "Origin": origin})
            assert answer.status_code == status, origin
    for url, status in (
        ("http://localhost:8090", 200), ("http://[::1]:8090", 200), ("http://127.9.9.9", 200),
        ("http://evil.example", 403), ("http://127.0.0.1.evil.example:8090", 403),
    ):  # fmt: skip
        async with asking(app, url) as client:
            assert (await client.get("/v2/health/live")).status_code == status, url


def test_a_key_file_has_to_hold_a_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
    for wrong in ("", "short", "two keys in one file", "x" * 600, "schlüssel-mit-umlaut"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(SettingsError) as raised:
            read_key(file)
        assert wrong == "" or wrong not in str(raised.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "192.0.2.1", "no.such.host.invalid")))


def test_beyond_loopback_only_with_a_key_or_in_so_many_words(folder: Path, tmp_path: Path) -> None:
    done = run_server(str(folder), "--host", "0.0.0.0", "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--api-key-file" in done.stderr
    assert "--insecure" in done.stderr
    done = run_server(str(folder), "--host", "0.0.0.0", "--port", "0", "--insecure", "--control")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--control" in done.stderr
    (tmp_path / "key").write_text(KEY)
    for option in (["--insecure"], ["--api-key-file", str(tmp_path / "key")]):
        with serving(folder, "--host", "0.0.0.0", *option) as running:
            port = running.address.rpartition(":")[2]
            assert httpx.get(f"http://127.0.0.1:{port}/v2/health/live").status_code == 200


def test_the_key_is_never_logged(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    with serving(folder, "--api-key-file", str(tmp_path / "key"), "--watch", "0") as running:
        for headers in ({"x-api-key": KEY}, {"x-api-key": "another-key-that-is-long"}):
            httpx.post(f"{running.url}/predict", content=b"{", headers=headers)
        with socket.create_connection(running.address.split(":")) as broken:  # type: ignore[arg-type]
            broken.sendall(f"GET / HTTP/1.1\r\nx-api-key: {KEY}\r\nbad header\r\n\r\n".encode())
            broken.recv(1000)
        running.process.terminate()
        out, err = running.process.communicate(timeout=START_S)
    assert running.process.returncode == 0
    for text in (KEY, "another-key"):
        assert text not in out + err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tls-cert", "cert.pem"), "go together"),
        (("--tls-cert", "none.pem", "--tls-key", "none.pem"), "cannot be used"),
        (("--api-key-file", "none"), "cannot be read"),
        (("--name", "a/b"), "letters, digits"),
        (("--max-batch", "65"), "at most 64"),
        (("--max-in-flight", "0"), "from 1 on"),
        (("--batch-window-ms", "-1"), "from 0 on"),
        (("--watch", "nan"), "from 0 on"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    done = run_server(str(folder), "--port", "0", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_tls(folder: Path, tmp_path: Path) -> None:
    tool = shutil.which("openssl")
    require_service(tool is not None, "openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [str(tool), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(folder, "--tls-cert", str(cert), "--tls-key", str(key)) as running:
        assert running.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(cert))
        answer = httpx.post(f"{running.url}/predict", json={"inputs": X.tolist()}, verify=trusted)
        assert answer.status_code == 200
        with pytest.raises(httpx.ConnectError, match="verify"):
            httpx.get(f"{running.url}/v2/health/live")


def test_an_agent_passes_its_settings_on(tmp_path: Path) -> None:
    told = ServeSettings(
        api_key_file=tmp_path / "k", tls_cert=tmp_path / "c", batch_window_ms=2, insecure=True
    )
    assert told.options() == [
        f"--api-key-file={tmp_path / 'k'}", f"--tls-cert={tmp_path / 'c'}",
        "--batch-window-ms=2.0", "--insecure",
    ]  # fmt: skip
    assert ServeSettings().options() == []


def test_the_agents_child_passes_its_options_on_and_says_why_it_did_not_start(tmp_path: Path) -> None:
    publish(tmp_path / "artifacts")
    (tmp_path / "key").write_text(KEY)
    child = ServingChild("127.0.0.1", 0, tmp_path / "artifacts", [f"--api-key-file={tmp_path / 'key'}"])
    try:
        address = child.start()
        assert (child.address, child.start()) == (address, address)
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/metrics", headers={"x-api-key": KEY}).status_code == 200
    finally:
        child.stop()
    assert child.address is None
    open_to_all = ServingChild("0.0.0.0", 0, tmp_path / "artifacts")
    with pytest.raises(HedgerowError, match="nobody would be asked for a key"):
        open_to_all.start()


# --- loading --------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=100),
        st.dictionaries(
            st.sampled_from(["file:1/model.onnx", "file:manifest.json", "file:../../x", "config", "file:"]),
            st.one_of(st.text(max_size=8), st.integers(), st.binary(max_size=9).map(base64.b64encode)),
        ).map(lambda p: json.dumps({"parameters": p}, default=bytes.decode).encode()),
    )
)
def test_any_load_request_is_read_or_refused(body: bytes) -> None:
    with suppress(WireError):
        assert set(control.files_of(body)) in (set(), set(control.NEEDED))


async def test_load_looks_at_once_and_says_why_not(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(Application(Predictor(tmp_path), ServerSettings(watch_s=0))) as client:
        load = "/v2/repository/models/model/load"
        assert (await client.post(load)).status_code == 200
        publish(tmp_path, round=2, seed=4)
        assert (await client.post(load, json={})).status_code == 200
        assert (await client.get("/v2/models/model")).json()["versions"] == ["2"]
        damage(tmp_path / publish(tmp_path, round=3, seed=5).sha256)
        refused = await client.post(load)
        assert (refused.status_code, "serves on" in refused.json()["error"]) == (409, True)
        assert (await client.get("/v2/models/model")).json()["versions"] == ["2"]
        counters = (await client.get("/metrics")).text
        assert "hedgerow_swaps_total 1\n" in counters
        assert "hedgerow_refused_artifacts_total 1\n" in counters
        assert (await client.post("/v2/repository/models/other/load")).status_code == 404


async def test_one_artifacts_own_folder_takes_no_other(tmp_path: Path) -> None:
    own = tmp_path / publish(tmp_path).sha256
    files = {f"file:{name}": base64.b64encode((own / name).read_bytes()).decode() for name in control.NEEDED}
    async with asking(Application(Predictor(own), ServerSettings(control=own))) as client:
        refused = await client.post("/v2/repository/models/model/load", json={"parameters": files})
    assert (refused.status_code, "one artifact" in refused.json()["error"]) == (409, True)


def test_leaving_is_said_and_what_was_begun_is_answered(tmp_path: Path) -> None:
    publish(tmp_path)
    with serving(tmp_path, "--watch", "0") as running:
        with socket.create_connection(running.address.split(":")) as begun:  # type: ignore[arg-type]
            begun.settimeout(START_S)
            head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {X.nbytes}\r\n"
            begun.sendall(f"{head}Inference-Header-Content-Length: 0\r\n\r\n".encode() + X.tobytes()[:100])
            deadline = threading.Event()
            while "hedgerow_in_flight 1" not in httpx.get(f"{running.url}/metrics").text:
                assert not deadline.wait(0.01)
            running.process.terminate()
            while True:  # it listens no more
                with suppress(OSError), socket.create_connection(running.address.split(":")):  # type: ignore[arg-type]
                    continue
                break
            begun.sendall(X.tobytes()[100:])
            assert begun.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert running.process.wait(START_S) == 0


async def test_ready_is_503_while_leaving(folder: Path) -> None:
    app = Application(Predictor(folder))
    async with asking(app) as client:
        app.leave()
        for path, status in (
            ("/v2/health/live", 200), ("/v2/health/ready", 503), ("/v2/models/model/ready", 503),
        ):  # fmt: skip
            assert (await client.get(path)).status_code == status
        assert (await client.post(INFER, content=X.tobytes(), headers=RAW)).status_code == 200


# --- counters -------------------------------------------------------------------------------------

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z0-9_]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (-?[0-9.e+-]+|\+Inf)')


def exposition(text: str) -> dict[str, dict[str, float]]:
    """Prometheus' text form by its grammar: family -> sample -> value."""
    found: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            assert what in ("HELP", "TYPE")
            if what == "TYPE":
                assert name not in kinds
                kinds[name] = rest
                found[name] = {}
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        family = sample[1]
        if family not in kinds:
            family = re.sub(r"_(bucket|sum|count)$", "", family)
            assert kinds[family] == "histogram"
        found[family][line.rpartition(" ")[0]] = float(sample[3])
    return found


async def test_counters_are_prometheus_and_count(folder: Path) -> None:
    async with asking(Application(Predictor(folder), load_s=0.25)) as client:
        for _ in range(3):
            await client.post(INFER, content=X.tobytes(), headers=RAW)
        await client.post("/predict", json={"inputs": X.tolist()})
        await client.post(INFER, content=b"{")
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = exposition(answer.text)
    assert found["hedgerow_requests_total"] == {
        'hedgerow_requests_total{code="200"}': 4, 'hedgerow_requests_total{code="400"}': 1,
    }  # fmt: skip
    for name in ("hedgerow_inference_seconds", "hedgerow_request_seconds"):
        buckets = [v for key, v in found[name].items() if "_bucket" in key]
        assert len(buckets) == len(BUCKETS_S) + 1
        assert buckets == sorted(buckets)
        assert buckets[-1] == found[name][f"{name}_count"] == 4
        assert found[name][f"{name}_sum"] > 0
    assert found["hedgerow_samples_total"] == {"hedgerow_samples_total": 12}
    assert found["hedgerow_load_seconds"] == {"hedgerow_load_seconds": 0.25}
    assert found["process_resident_memory_bytes"]["process_resident_memory_bytes"] > 1 << 20
    (info,) = found["hedgerow_model_info"]
    assert 'version="1"' in info
    assert 'agent="agent <1>"' in info


def test_what_was_never_measured_is_not_told_and_labels_are_escaped(folder: Path) -> None:
    handle = Predictor(folder).handle
    named = replace(handle, manifest=handle.manifest.model_copy(update={"agent": 'a"b\\c\nd'}))
    found = exposition(Metrics().text(named, 0))
    assert "hedgerow_load_seconds" not in found
    assert r'agent="a\"b\\c\nd"' in next(iter(found["hedgerow_model_info"]))


def test_a_bucket_holds_its_own_bound() -> None:
    histogram = Histogram()
    for seconds in (0.0005, 0.0006, 1.0, 5.0):
        histogram.add(seconds)
    found = {(sample.suffix, sample.labels.get("le")): sample.value for sample in histogram.samples()}
    assert (found["_bucket", "0.0005"], found["_bucket", "0.001"]) == (1, 2)
    assert (found["_bucket", "1.0"], found["_bucket", "+Inf"], found["_count", None]) == (3, 4, 4)


# --- the process ----------------------------------------------------------------------------------


@contextmanager
def cpu_of(process: psutil.Process) -> Iterator[list[float]]:
    spent: list[float] = []
    before = sum(process.cpu_times()[:2])
    yield spent
    spent.append(sum(process.cpu_times()[:2]) - before)


def test_nothing_spins_after_a_request(folder: Path) -> None:
    with serving(folder) as running, httpx.Client(base_url=running.url) as client:
        process = psutil.Process(running.process.pid)
        client.post(INFER, content=X.tobytes(), headers=RAW)
        with cpu_of(process) as spent:
            client.post(INFER, content=X.tobytes(), headers=RAW)
            threading.Event().wait(0.5)  # a thread that spins would use all of it
    assert spent[0] < 0.2
