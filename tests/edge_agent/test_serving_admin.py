"""The owner's door over HTTP: who gets in, that it does what the command line does, and that it is kept."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.serving import admin, record
from edge_agent.serving.guard import Guard, Refused
from export import folder as artifacts
from export.folder import CURRENT, PINNED, SERVING, linked
from export.sign import DEVICE_KEY, SIGNATURE, DeviceKey
from foundation.artifact import Manifest
from foundation.errors import ExportError, WireError
from tests.served import publish, serving

KEY, OWNER = "a-key-for-clients", "another-key-for-the-owner"


def asked(url: str, path: str, body: object = None, key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {} if key is None else {"x-api-key": key}
    with httpx.Client(base_url=url, headers=headers, timeout=20) as client:
        method = "GET" if path == "/admin/models" else "POST"
        answer = client.request(method, path, json=body)
    return answer.status_code, answer.json()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "artifacts"
    publish(folder)
    return folder


def test_pin_unpin_and_roll_back(root: Path) -> None:
    first = linked(root, CURRENT)
    with serving(root, "--watch", "0") as running:
        second = publish(root, round=2, seed=4).sha256
        status, told = asked(running.url, "/admin/pin", {"model": "1"})
        assert (status, told["pinned"], told["serves"], told["refusal"]) == (200, first, first, None)
        status, told = asked(running.url, "/admin/rollback", {})
        assert (status, "unpin it first" in told["error"]) == (409, True)
        status, told = asked(running.url, "/admin/unpin")
        assert (status, told["was_pinned"], told["serves"]) == (200, True, second), "the newest one, at once"
        status, told = asked(running.url, "/admin/rollback", {"reason": "wrong at night"})
        assert (status, told["rolled_back"], told["serves"], told["serves_round"]) == (200, second, first, 1)
        assert asked(running.url, "/admin/unpin")[1]["was_pinned"] is False
        status, told = asked(running.url, "/admin/models")
        assert status == 200
        assert [one["manifest"]["round"] for one in told["models"] if "serving" in one["links"]] == [1]
        assert told["verdicts"][-1]["reason"] == "wrong at night"
    actions = record.read(root).actions
    assert [(a.kind, a.round, a.by, a.reason) for a in actions] == [
        ("pin", 1, "http 127.0.0.1", None),
        ("unpin", 1, "http 127.0.0.1", None),
        ("rollback", 2, "http 127.0.0.1", "wrong at night"),
    ]
    assert linked(root, SERVING) == first
    assert linked(root, PINNED) is None


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/admin/pin", {"model": "9"}, 409, "no artifact is '9'"),
        ("/admin/pin", {"round": 1}, 400, "round: Extra inputs"),
        ("/admin/rollback", {"reason": ""}, 400, "reason: String should have"),
        ("/admin/rollback", {}, 409, "no earlier model"),
        ("/admin/unpin", {"all": True}, 400, "all: Extra"),
        ("/admin/other", {}, 404, "there is nothing at"),
    ],
)
def test_what_cannot_be_done_is_said(root: Path, path: str, body: object, status: int, said: str) -> None:
    with serving(root, "--watch", "0") as running:
        found, told = asked(running.url, path, body)
    assert (found, said in told["error"]) == (status, True), told
    assert record.read(root).actions == ()


def test_the_clients_key_or_the_owners(root: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "owner").write_text(OWNER)
    options = ("--watch", "0", "--api-key-file", str(tmp_path / "key"))
    with serving(root, *options) as running:
        assert [asked(running.url, "/admin/models", key=key)[0] for key in (None, OWNER, KEY)] == [
            401,
            401,
            200,
        ]
    with serving(root, *options, "--admin-key-file", str(tmp_path / "owner")) as running:
        assert [asked(running.url, "/admin/models", key=key)[0] for key in (None, KEY, OWNER)] == [
            401,
            401,
            200,
        ]
        assert asked(running.url, "/v2/repository/index", key=OWNER)[0] == 401
        assert asked(running.url, "/v2/repository/index", key=KEY)[0] == 200


def test_the_network_decides_nothing_without_a_key(root: Path) -> None:
    with serving(root, "--watch", "0", "--host", "0.0.0.0", "--insecure") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        status, told = asked(url, "/admin/rollback", {})
        assert (status, "--api-key-file" in told["error"]) == (403, True)
        assert asked(url, "/v2/repository/index")[0] == 200


def test_a_page_of_another_origin_decides_nothing() -> None:
    guard = Guard(loopback=True)
    headers = {b"host": b"127.0.0.1:8090", b"origin": b"http://elsewhere"}
    with pytest.raises(Refused, match="another origin"):
        guard.check("POST", "/admin/pin", headers)
    with pytest.raises(Refused, match="on loopback only"):
        guard.check("GET", "/admin/models", {b"host": b"elsewhere"})


def test_one_artifact_alone_leaves_no_choice(root: Path) -> None:
    with serving(root / str(linked(root, CURRENT)), "--watch", "0") as running:
        status, told = asked(running.url, "/admin/models")
    assert (status, "one artifact" in told["error"]) == (409, True)


@given(
    st.sampled_from(sorted(admin.ACTIONS)),
    st.binary(max_size=40) | st.from_regex(r'\{"model": ?[^}]*\}').map(str.encode),
)
def test_any_body_is_understood_or_refused(path: str, body: bytes) -> None:
    with suppress(WireError, ExportError):
        admin.ACTIONS[path](Path("nowhere"), body, "a test")


# --- signed uploads ------------------------------------------------------------------------------------


def signed(folder: Path, key: DeviceKey, round: int, seed: int) -> tuple[Manifest, dict[str, str]]:
    """An artifact that was signed elsewhere, as a client sends it."""
    plain = publish(folder, round=round, seed=seed)
    files = artifacts.read_files(folder / plain.sha256)
    artifacts.publish(folder, plain, files["model.onnx"], files["probe.npz"], key)
    files = artifacts.read_files(folder / plain.sha256)
    return plain, {f"file:1/{name}": base64.b64encode(content).decode() for name, content in files.items()}


def test_a_signed_artifact_is_taken_with_its_signature_and_others_are_not(tmp_path: Path) -> None:
    root, other = tmp_path / "vault" / "artifacts", tmp_path / "other"
    key = DeviceKey.load(tmp_path / "vault" / DEVICE_KEY, make=True) if root.parent.mkdir() is None else None
    assert key is not None
    first = publish(root)
    files = artifacts.read_files(root / first.sha256)
    artifacts.publish(root, first, files["model.onnx"], files["probe.npz"], key)
    manifest, sent = signed(other, key, 2, 4)
    with serving(root, "--control", "--watch", "0") as running:

        def load(parameters: dict[str, str]) -> tuple[int, dict[str, Any]]:
            return asked(running.url, "/v2/repository/models/model/load", {"parameters": parameters})

        unsigned = {name: content for name, content in sent.items() if not name.endswith(SIGNATURE)}
        status, told = load(unsigned)
        assert (status, "not signed" in told["error"]) == (409, True)
        _, foreign = signed(tmp_path / "foreign", DeviceKey(bytes(32)), 2, 4)
        status, told = load(foreign)
        assert (status, "not among the trusted" in told["error"]) == (409, True)
        changed = json.loads(base64.b64decode(sent["file:1/manifest.json"])) | {"accuracy": 1.0}
        status, told = load(
            {**sent, "file:1/manifest.json": base64.b64encode(json.dumps(changed).encode()).decode()}
        )
        assert (status, "does not fit" in told["error"]) == (409, True)
        assert linked(root, CURRENT) == first.sha256
        assert load(sent) == (200, {})
        assert load(sent) == (200, {}), "once more"
        assert linked(root, SERVING) == manifest.sha256
    there = artifacts.read_files(root / manifest.sha256)
    assert {
        f"file:1/{n}": base64.b64encode(c).decode() for n, c in there.items() if n != SIGNATURE
    } == unsigned
    with serving(root, "--watch", "0") as running:
        assert asked(running.url, "/admin/models")[1]["problems"] == []


def test_a_signature_that_is_none_is_refused_where_nobody_could_check_it(root: Path, tmp_path: Path) -> None:
    _, sent = signed(tmp_path / "other", DeviceKey(bytes(32)), 2, 4)
    with serving(root, "--control", "--watch", "0") as running:
        path = "/v2/repository/models/model/load"
        nonsense = {**sent, f"file:1/{SIGNATURE}": base64.b64encode(b"{]").decode()}
        assert asked(running.url, path, {"parameters": nonsense})[0] == 409
        assert asked(running.url, path, {"parameters": sent})[0] == 200
