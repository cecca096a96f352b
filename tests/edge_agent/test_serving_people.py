"""`/predict` and the page: pictures, arrays, JSON; what people are told."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.serving import card, pictures
from edge_agent.serving.answers import Refused
from edge_agent.serving.http import Application
from edge_agent.serving.predictor import Predictor
from foundation.artifact import Manifest
from foundation.errors import FrameTooLarge, WireError
from foundation.parameters import Array
from tests.export.reference import SPECS, raw_inputs
from tests.served import ROOT, expected, publish, softmax

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def asking(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Application(Predictor(folder)))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


def saved(x: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def png(pixels: Array) -> bytes:
    """A PNG of (H, W) or (H, W, 3) bytes, made by the format's own rules and not with Pillow."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return len(content).to_bytes(4, "big") + name + content + crc.to_bytes(4, "big")

    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, colour, 0, 0, 0])
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# --- what is asked --------------------------------------------------------------------------------


async def test_a_picture_is_what_the_device_would_have_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    publish(tmp_path, "image-cls")
    pixels = np.random.default_rng(5).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    probabilities = softmax(expected("image-cls", pixels.transpose(2, 0, 1)[None]))[0]
    jpeg = io.BytesIO()
    image.fromarray(pixels).resize((31, 17)).save(jpeg, "JPEG")
    async with asking(tmp_path) as client:
        answer = await client.post(
            "/predict", content=png(pixels), headers={"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert answer.status_code == 200, answer.text
        (found,) = answer.json()["predictions"]
        assert found["label"] == "abcd"[probabilities.argmax()]
        assert found["probability"] == pytest.approx(probabilities.max(), abs=1e-5)
        assert (await client.post("/predict", content=jpeg.getvalue())).status_code == 200


@pytest.mark.parametrize(("top", "factor"), [(1.0, 1 / 255), (16.0, 16 / 255), (255.0, 1.0)])
def test_a_pictures_values_have_the_models_range(tmp_path: Path, top: float, factor: float) -> None:
    pytest.importorskip("PIL")
    manifest = publish(tmp_path, "image-cls")
    pixels = np.random.default_rng(5).integers(0, 256, (8, 8), dtype=np.uint8)
    grey = pictures.picture(png(pixels), manifest.model_copy(update={"shape": (1, 8, 8)}), top)
    np.testing.assert_allclose(grey, pixels[None, None] * factor, rtol=1e-5)
    np.savez(tmp_path / "probe.npz", inputs=np.array([0.9 * top]), logits=np.zeros(1))
    assert pictures.largest_value(tmp_path) == top


def test_the_range_is_that_of_bytes_where_nothing_says_it(tmp_path: Path) -> None:
    assert pictures.largest_value(tmp_path) == 255
    (tmp_path / "probe.npz").write_bytes(b"x")
    assert pictures.largest_value(tmp_path) == 255


def test_too_many_pixels_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    manifest = publish(tmp_path, "image-cls")
    with pytest.raises(FrameTooLarge, match="million pixels"):
        pictures.picture(png(np.zeros((4097, 4096), np.uint8)), manifest, 255)


async def test_what_is_no_picture_here_is_refused_with_a_way_out(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    publish(tmp_path / "two")  # two channels
    publish(tmp_path / "three", "image-cls")
    whole = png(np.random.default_rng(5).integers(0, 256, (8, 8), dtype=np.uint8))
    for folder, body, status, message in (
        ("two", whole, 415, ".npy"),
        ("three", whole[:40], 400, "cannot be read"),
        ("three", whole[:43] + bytes(8) + whole[51:], 400, "cannot be read"),
        ("three", b"\xff\xd8\xff", 400, "cannot be read"),
        ("three", b"GIF89a", 415, "PNG or JPEG"),
        ("three", b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n', 415, "--data-binary"),
    ):
        async with asking(tmp_path / folder) as client:
            answer = await client.post("/predict", content=body)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
        assert message in answer.json()["error"]


def test_without_pillow_a_picture_is_refused_and_says_what_to_install(tmp_path: Path) -> None:
    publish(tmp_path, "image-cls")
    program = (
        "import sys; sys.modules['PIL'] = None\n"
        "from pathlib import Path\n"
        "from edge_agent.serving import pictures\n"
        "from edge_agent.serving.answers import Refused\n"
        "from edge_agent.serving.predictor import Predictor\n"
        "try: pictures.picture(b'', Predictor(Path(sys.argv[1])).manifest, 255)\n"
        "except Refused as error: print(error.status, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("415")
    assert "pip install 'hedgerow[images]'" in done.stdout


@pytest.mark.parametrize("name", SPECS)
async def test_an_array_file_is_one_sample_or_several(tmp_path: Path, name: str) -> None:
    publish(tmp_path, name)
    x = raw_inputs(SPECS[name], 4)
    logits = expected(name, x)
    last = logits if logits.ndim == 2 else logits[:, -1]
    labels = ["abcdefghijklmnop"[i] for i in last.argmax(-1)]
    async with asking(tmp_path) as client:
        several = (await client.post("/predict", content=saved(x))).json()
        one = (await client.post("/predict", content=saved(x[0]))).json()
        fortran = (await client.post("/predict", content=saved(np.asfortranarray(x)))).json()
    assert [found["label"] for found in several["predictions"]] == labels
    assert [found["label"] for found in one["predictions"]] == labels[:1]
    assert fortran["predictions"] == several["predictions"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["<f4", ">f8", "|u1", "<i8", "<f2", ">i2"]),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.booleans(),
)
def test_what_numpy_saves_is_read_back(kind: str, shape: list[int], fortran: bool) -> None:
    x = np.arange(int(np.prod(shape, dtype=int))).astype(kind).reshape(shape)
    found = pictures.npy(saved(np.asfortranarray(x) if fortran else x))
    np.testing.assert_array_equal(found, x)
    assert found.shape == x.shape


WHOLE = saved(np.arange(6, dtype=np.float32).reshape(2, 3))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(WHOLE)), st.binary(max_size=12))
def test_any_array_file_is_read_or_refused(body: bytes, at: int, noise: bytes) -> None:
    for damaged in (b"\x93NUMPY" + body, WHOLE[:at], WHOLE[:at] + noise + WHOLE[at + len(noise) :]):
        with suppress(WireError):
            assert pictures.npy(damaged).size <= len(damaged)
    with suppress(Refused):
        assert pictures.kind(body) in ("picture", "npy", "json")


@pytest.mark.parametrize(
    "x",
    [
        np.array([object()]), np.array(["text"]), np.array([True]), np.array([1j]),
        np.zeros(2, [("a", "<f4")]),
    ],
)  # fmt: skip
def test_arrays_of_other_than_numbers_are_refused(x: Array) -> None:
    with pytest.raises(WireError, match=r"numpy\.save"):
        pictures.npy(saved(x))


def test_a_shape_that_lies_takes_no_memory() -> None:
    lying = WHOLE.replace(b"(2, 3), }    ", b"(2, 3333333)")
    assert lying != WHOLE
    with pytest.raises(WireError):
        pictures.npy(lying)


# --- what is told ---------------------------------------------------------------------------------


async def test_the_answer_names_the_likeliest_and_the_model(tmp_path: Path) -> None:
    publish(tmp_path, "text")
    probabilities = softmax(expected("text", np.array([[0, 1, 2]])))[0, -1]
    async with asking(tmp_path) as client:
        answer = (await client.post("/predict", json={"inputs": ["abc"]})).json()
    (found,) = answer["predictions"]
    order = (-probabilities).argsort()
    assert [top["label"] for top in found["top"]] == ["abcdefghijk"[i] for i in order[:3]]
    assert [top["probability"] for top in found["top"]] == pytest.approx(probabilities[order[:3]], abs=1e-5)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["run_ms"] > 0
    model = answer["model"]
    assert (model["agent"], model["round"], model["kept_units"]) == ("agent <1>", 1, [9, 2, 30])
    # Unknown is null, and not zero.
    assert (model["accuracy"], model["train_joules"], model["train_joules_kind"]) == (None, None, "none")


async def test_the_manifest_is_told_as_it_is(tmp_path: Path) -> None:
    manifest = publish(tmp_path)
    async with asking(tmp_path) as client:
        told = await client.get("/manifest")
    assert Manifest.model_validate_json(told.text) == manifest


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
async def test_the_page_tells_its_script_what_the_model_takes(tmp_path: Path, name: str) -> None:
    manifest = publish(tmp_path, name)
    async with asking(tmp_path) as client:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        for file in re.findall(r'(?:src|href)="(/page\.\w+)"', page.text):
            assert (await client.get(file)).status_code == 200
    told = re.search(r'data-model="([^"]*)"', page.text)
    assert told
    model = json.loads(told[1].replace("&quot;", '"'))
    assert (model["input"], tuple(model["shape"])) == (manifest.input, manifest.shape)
    assert tuple(model["labels"]) == manifest.labels


async def test_the_page_takes_nothing_from_elsewhere_and_runs_nothing_of_a_name(tmp_path: Path) -> None:
    publish(tmp_path)
    async with asking(tmp_path) as client:
        answers = [await client.get(path) for path in ("/", "/page.css", "/page.js")]
        assert (await client.get("/page.html")).status_code == 404
    for answer in answers:
        assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"// [^\n]*|http://this-device", "", answer.text))
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert "<1>" not in answers[0].text
    assert "&lt;1&gt;" in answers[0].text


def test_the_card_tells_accuracy_joules_sizes_and_speed(tmp_path: Path) -> None:
    publish(tmp_path)
    handle = Predictor(tmp_path).handle
    from dataclasses import replace

    manifest = handle.manifest.model_copy(
        update={"accuracy": 0.91, "accuracy_sent": 0.5, "latency_ms": 0.4, "dense_latency_ms": 0.8,
                "train_joules": 12.5, "train_joules_kind": "modelled"}
    )  # fmt: skip
    text = card.page("model", replace(handle, manifest=manifest), 255).body.decode()
    for fact in ("91.0%", "50.0%", "0.40 ms (uncut: 0.80 ms)", "12.5 J, modelled", "9, 2, 30 of 64"):
        assert fact in text
    before = card.page("model", handle, 255).body.decode()
    for fact in (
        "unknown (as it was sent: unknown)",
        "not measured (uncut: not measured)",
        "<td>unknown</td>",
    ):
        assert fact in before
