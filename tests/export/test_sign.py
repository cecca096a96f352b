"""Signatures: who made an artifact, and every way in which that can be wrong."""

from __future__ import annotations

import contextlib
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import sign as module
from export.folder import load_artifact, publish, read_files, resolve
from export.package import export_artifact
from export.sign import CoordinatorKey, DeviceKey, Keys, Signatures, check, parse, sign, verify
from foundation.artifact import Manifest
from foundation.errors import ExportError, SignatureError, SignatureWrong, UnknownSigner, Unsigned
from tests.export.reference import SPECS, masks_for, normalisation_for, probe_for, trained

SPEC = SPECS["series-mean"]
MASKS = masks_for(SPEC, (3, 9, 0))
PARAMETERS = trained(SPEC)
PROBE = probe_for(SPEC, PARAMETERS, MASKS)
KEY, OTHER = DeviceKey(bytes(range(32))), DeviceKey(bytes(32))
FILES = {"model.onnx": b"model", "manifest.json": b"manifest", "probe.npz": b"probe"}


def export(folder: Path, *, key: DeviceKey | None = KEY, **changes: object) -> Manifest:
    facts: dict[str, object] = {"agent": "kitchen", "run": "r", "round": 1, "strategy": "fedavg"} | changes
    return export_artifact(
        *(SPEC, PARAMETERS, MASKS, normalisation_for(SPEC), ("a", "b", "c"), PROBE, folder),
        measure_latency=False,
        key=key,
        **facts,  # type: ignore[arg-type]
    )


def signed(key: DeviceKey = KEY, files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    one = sign(files, key, "kitchen")
    return {**files, "signature.json": Signatures(signatures=(one,)).model_dump_json().encode()}


def test_what_was_signed_loads_and_says_by_whom(tmp_path: Path) -> None:
    manifest = export(tmp_path)
    folder = resolve(tmp_path)
    assert load_artifact(folder, Keys([OTHER, KEY]))[0] == manifest
    signer = check(folder, Keys([KEY]))
    assert (signer.name, signer.key, signer.algorithm) == ("kitchen", KEY.id, "hmac-sha256")


def test_without_keys_signatures_are_not_looked_at(tmp_path: Path) -> None:
    export(tmp_path)
    (resolve(tmp_path) / "signature.json").write_bytes(b"no signature at all")
    assert load_artifact(resolve(tmp_path))[0].agent == "kitchen"


def test_unsigned_is_refused_where_keys_ask(tmp_path: Path) -> None:
    export(tmp_path, key=None)
    with pytest.raises(Unsigned, match="not signed"):
        load_artifact(resolve(tmp_path), Keys([KEY]))
    with pytest.raises(Unsigned):
        verify({**FILES, "signature.json": b'{"signatures": []}'}, Keys([KEY]))


def test_a_signature_of_nobody_known_is_refused_with_its_name(tmp_path: Path) -> None:
    export(tmp_path)
    with pytest.raises(UnknownSigner, match=f"kitchen.*{KEY.id}"):
        load_artifact(resolve(tmp_path), Keys([OTHER]))


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_was_changed_is_refused(name: str) -> None:
    files = signed()
    with pytest.raises(SignatureWrong, match="a file was changed"):
        verify({**files, name: files[name] + b"!"}, Keys([KEY]))


def test_a_changed_manifest_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    export(tmp_path)
    path = resolve(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"parity": ', '"parity": 1'))
    load_artifact(resolve(tmp_path))  # nothing else covers what was measured
    with pytest.raises(SignatureWrong):
        load_artifact(resolve(tmp_path), Keys([KEY]))


def test_a_signature_cannot_change_its_name_or_its_key() -> None:
    content = signed()["signature.json"].decode()
    renamed = {**FILES, "signature.json": content.replace("kitchen", "cellar").encode()}
    with pytest.raises(SignatureWrong):
        verify(renamed, Keys([KEY]))
    with pytest.raises(SignatureWrong):
        verify({**FILES, "signature.json": content.replace(KEY.id, OTHER.id).encode()}, Keys([KEY, OTHER]))


def test_one_right_signature_of_several_is_enough() -> None:
    both = (sign({**FILES, "probe.npz": b"older"}, KEY, "kitchen"), sign(FILES, OTHER, "hall"))
    files = {**FILES, "signature.json": Signatures(signatures=both).model_dump_json().encode()}
    assert verify(files, Keys([KEY, OTHER])).name == "hall"


def test_a_kill_while_the_same_model_is_measured_anew_leaves_a_signed_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = export(tmp_path)
    model, probe = ((resolve(tmp_path) / name).read_bytes() for name in ("model.onnx", "probe.npz"))
    replace, left = Path.replace, 0

    def counted(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("the power is gone")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    found = []
    for steps in range(5):  # four files are replaced: none of them, one, ... all
        left = steps
        anew = first.model_copy(update={"latency_ms": 1.0 + steps})
        with contextlib.suppress(ExportError) if steps < 4 else contextlib.nullcontext():
            publish(tmp_path, anew, model, probe, KEY)
        found.append(load_artifact(resolve(tmp_path), Keys([KEY]))[0].latency_ms)
    assert found == [None, None, None, 4.0, 5.0]


def test_the_manifest_before_stays_signed_until_it_is_replaced(tmp_path: Path) -> None:
    export(tmp_path)
    before = read_files(resolve(tmp_path))
    again = export_artifact(
        *(SPEC, PARAMETERS, MASKS, normalisation_for(SPEC), ("a", "b", "c"), PROBE, tmp_path),
        agent="kitchen",
        run="r",
        round=1,
        strategy="fedavg",
        key=KEY,
    )
    after = read_files(resolve(tmp_path))
    assert again.latency_ms is not None
    assert before["manifest.json"] != after["manifest.json"]
    for manifest in (before["manifest.json"], after["manifest.json"]):
        verify({**after, "manifest.json": manifest}, Keys([KEY]))


# --- keys ------------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    with pytest.raises(SignatureError, match="cannot be read"):
        DeviceKey.load(path)
    made = DeviceKey.load(path, make=True)
    assert len(path.read_bytes()) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert DeviceKey.load(path, make=True) == DeviceKey.load(path) == made
    assert [p.name for p in tmp_path.iterdir()] == ["signing.key"]
    assert made.secret.hex() not in repr(made)


def test_of_two_makers_the_first_ones_key_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "signing.key"
    first = DeviceKey.load(path, make=True)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # the second one looked before the first wrote
    assert DeviceKey.load(path, make=True) == first


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33), bytes(5000)])
def test_a_key_of_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "signing.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SignatureError, match="not a key of 32 bytes"):
        DeviceKey.load(path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    DeviceKey.load(path, make=True)
    path.chmod(0o640)
    with pytest.raises(SignatureError, match="chmod 600"):
        DeviceKey.load(path)


def test_keys_beside_a_folder_of_artifacts(tmp_path: Path) -> None:
    artifacts = tmp_path / "vault" / "artifacts"
    export(artifacts)
    assert Keys.beside(artifacts) is None
    DeviceKey.load(tmp_path / "vault" / "signing.key", make=True)
    (tmp_path / "vault" / "trusted").mkdir()
    (tmp_path / "vault" / "trusted" / "coordinator.pub").write_text("5a" * 32 + "\n")
    for place in (artifacts, artifacts / "current", resolve(artifacts)):
        keys = Keys.beside(place)
        assert keys is not None
        assert len(keys) == 2
        with pytest.raises(UnknownSigner):
            load_artifact(resolve(artifacts), keys)


def test_a_public_key_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "x.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(SignatureError, match="64 hexadecimal digits"):
        Keys.beside(tmp_path / "artifacts")


# --- what is not believed --------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_whatever_the_bytes_they_are_signatures_or_refused(content: bytes) -> None:
    with contextlib.suppress(SignatureWrong):
        assert isinstance(parse(content), tuple)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_signature_with_another_byte_never_passes_for_another_content(at: int, byte: int) -> None:
    content = bytearray(signed()["signature.json"])
    content[at % len(content)] = byte
    files = {**FILES, "model.onnx": b"another model", "signature.json": bytes(content)}
    with pytest.raises(SignatureError):
        verify(files, Keys([KEY]))


# --- Ed25519 ---------------------------------------------------------------------------------------


def test_without_cryptography_the_error_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [n for n in sys.modules if n.startswith("cryptography.")]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "signing.ed25519"
    with pytest.raises(SignatureError, match="needs the package `cryptography`"):
        CoordinatorKey.load(path, make=True)
    assert not path.exists()
    public = CoordinatorKey(bytes(32))
    files = signed()
    content = files["signature.json"].decode().replace("hmac-sha256", "ed25519").replace(KEY.id, public.id)
    with pytest.raises(SignatureError, match="needs the package `cryptography`"):
        verify({**files, "signature.json": content.encode()}, Keys([public]))


def test_a_coordinator_signs_and_a_device_checks(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="the `sign` extra is not installed")
    key = CoordinatorKey.load(tmp_path / "signing.ed25519", make=True)
    public = CoordinatorKey.trusted(tmp_path / "signing.pub")
    one = sign(FILES, key, "coordinator")
    files = {**FILES, "signature.json": Signatures(signatures=(one,)).model_dump_json().encode()}
    assert verify(files, Keys([public])).algorithm == "ed25519"
    with pytest.raises(SignatureWrong):
        verify({**files, "probe.npz": b"changed"}, Keys([public]))
    with pytest.raises(SignatureError, match="cannot sign"):
        sign(FILES, public, "device")


def test_ed25519_is_that_of_rfc_8032() -> None:
    pytest.importorskip("cryptography", reason="the `sign` extra is not installed")
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    key = CoordinatorKey(module._public_of(secret), secret)
    assert key.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.sign(b"\x72").hex().startswith("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8f")
