"""Who made an artifact: signatures, made and checked.

An artifact's folder holds `signature.json`, a list of {algorithm, key, signer, value}. What is signed are the
SHA-256 of model.onnx, of manifest.json and of probe.npz, the algorithm, the key's id and the signer's name.

Two algorithms:

* `hmac-sha256`: one secret key of 32 bytes, which signs and checks. A device signs its own artifacts with
  the one in its vault, `signing.key`; only the standard library is needed.
* `ed25519`: a secret key that signs and a public one that checks. A coordinator signs with it, for devices
  that do not share a secret with it. Needs the package `cryptography`.

For whoever loads artifacts, three lines:

    keys = Keys.beside(folder)            # of vault/artifacts: vault/signing.key and vault/trusted/*.pub;
                                          # None where there are none: then nothing is checked
    manifest, model, probe = load_artifact(folder, keys, agent=name)       # checks, where keys are given
    signer = check(folder, keys)          # for tools; on bytes that were read: verify(files, keys)

All that goes wrong is a `SignatureError`, an `ExportError`: `Unsigned`, `UnknownSigner`, `SignatureWrong`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError

from foundation.durable import SECRET, write_first
from foundation.errors import SignatureError, SignatureWrong, UnknownSigner, Unsigned
from foundation.frozen import Frozen

SIGNATURE = "signature.json"
SIGNED = ("model.onnx", "manifest.json", "probe.npz")
DEVICE_KEY, COORDINATOR_KEY, TRUSTED = "signing.key", "signing.ed25519", "trusted"
LARGEST_SIGNATURE_BYTES = 16 << 10
MOST_SIGNATURES = 8

_KEY_BYTES = 32
_HEX_KEY = re.compile(r"[0-9a-f]{64}")


class Signature(Frozen):
    """One signature: by whom, with which key, how."""

    algorithm: Literal["hmac-sha256", "ed25519"]
    key: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Id of the key: the beginning of the SHA-256 of its public part, or of the secret where it has none."""
    signer: str = Field(max_length=200)
    value: str = Field(pattern=r"^([0-9a-f]{64}|[0-9a-f]{128})$")


class Signatures(Frozen):
    """What `signature.json` says; any one that is right will do."""

    signatures: tuple[Signature, ...] = Field((), max_length=MOST_SIGNATURES)


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signed: the name, the key's id, the algorithm."""

    name: str
    key: str
    algorithm: str


class Key(Protocol):
    """Checks signatures of one algorithm; with the secret part it also makes them."""

    @property
    def algorithm(self) -> Literal["hmac-sha256", "ed25519"]:
        """The algorithm's name in `signature.json`."""
        ...

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return a signature; raises `SignatureError` where this key only checks."""
        ...

    def right(self, message: bytes, value: bytes) -> bool:
        """Whether a signature fits a message."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class DeviceKey:
    """A secret of 32 bytes; HMAC-SHA256."""

    secret: bytes

    algorithm: Literal["hmac-sha256"] = "hmac-sha256"

    @classmethod
    def load(cls, path: Path, *, make: bool = False) -> DeviceKey:
        """Read a key file; with `make`, write a new one where there is none, readable by its owner alone."""
        return cls(_secret(path, make=make))

    @property
    def id(self) -> str:
        """The beginning of the secret's SHA-256."""
        return _id(self.secret)

    def sign(self, message: bytes) -> bytes:
        """Return the message's HMAC."""
        return hmac.digest(self.secret, message, "sha256")

    def right(self, message: bytes, value: bytes) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(self.sign(message), value)


@dataclass(frozen=True, slots=True, repr=False)
class CoordinatorKey:
    """An Ed25519 key: the public half, and the secret half where it is this process's own."""

    public: bytes
    secret: bytes | None = None

    algorithm: Literal["ed25519"] = "ed25519"

    @classmethod
    def load(cls, path: Path, *, make: bool = False) -> CoordinatorKey:
        """Read a secret key's file; with `make`, write a new one where there is none.

        Its public half is written beside it, with the ending `.pub`: what devices put into
        `vault/trusted/`. Raises `SignatureError` where `cryptography` is not installed.
        """
        _ed25519()  # said before a key is made that nobody here could use
        secret = _secret(path, make=make)
        public = _public_of(secret)
        beside = path.with_suffix(".pub")
        if make and not beside.exists():
            _write(beside, public.hex().encode() + b"\n", 0o644)
        return cls(public, secret)

    @classmethod
    def trusted(cls, path: Path) -> CoordinatorKey:
        """Read a public key's file: 64 hexadecimal digits."""
        text = _read(path, 200).decode("ascii", "replace").strip()
        if not _HEX_KEY.fullmatch(text):
            raise SignatureError(f"{path} is not a public key: it has to be 64 hexadecimal digits")
        return cls(bytes.fromhex(text))

    @property
    def id(self) -> str:
        """The beginning of the public key's SHA-256."""
        return _id(self.public)

    def sign(self, message: bytes) -> bytes:
        """Return the signature of the secret half."""
        if self.secret is None:
            raise SignatureError(f"key {self.id} has no secret half here: it checks, and cannot sign")
        value: bytes = _ed25519().Ed25519PrivateKey.from_private_bytes(self.secret).sign(message)
        return value

    def right(self, message: bytes, value: bytes) -> bool:
        """Whether the public half says so."""
        module = _ed25519()
        from cryptography.exceptions import InvalidSignature

        try:
            module.Ed25519PublicKey.from_public_bytes(self.public).verify(value, message)
        except InvalidSignature:
            return False
        return True


class Keys:
    """The keys that are trusted, by id."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {key.id: key for key in keys}

    @classmethod
    def beside(cls, folder: Path) -> Keys | None:
        """Return the keys of the vault that a folder of artifacts, or one artifact in it, lies in.

        They are `signing.key` and `trusted/*.pub` beside the folder of artifacts. `None` where there is
        neither: such a folder is not checked. Raises `SignatureError` for a key that cannot be used.
        """
        folder = folder.resolve()
        vault = folder.parent.parent if (folder / "manifest.json").is_file() else folder.parent
        found: list[Key] = []
        if (vault / DEVICE_KEY).exists():
            found.append(DeviceKey.load(vault / DEVICE_KEY))
        found += [CoordinatorKey.trusted(path) for path in sorted((vault / TRUSTED).glob("*.pub"))]
        return cls(found) if found else None

    def get(self, signature: Signature) -> Key | None:
        """Return the key that a signature names, if it is trusted."""
        key = self._keys.get(signature.key)
        return key if key is not None and key.algorithm == signature.algorithm else None

    def __len__(self) -> int:
        return len(self._keys)


def sign(files: Mapping[str, bytes], key: Key, signer: str) -> Signature:
    """Sign an artifact's files, by name as in its folder."""
    unsigned = Signature(algorithm=key.algorithm, key=key.id, signer=signer, value="0" * 64)
    return unsigned.model_copy(update={"value": key.sign(_message(files, unsigned)).hex()})


def verify(files: Mapping[str, bytes], keys: Keys) -> Signer:
    """Return who signed an artifact's files, or raise what is wrong.

    `files` are the bytes of model.onnx, manifest.json, probe.npz and, where there is one, signature.json.
    Raises `Unsigned` without a signature, `UnknownSigner` when no key of `keys` made one, `SignatureWrong`
    when one that a trusted key is said to have made does not fit the files.
    """
    signatures = parse(files[SIGNATURE]) if SIGNATURE in files else ()
    if not signatures:
        raise Unsigned("the artifact is not signed, and the keys here ask for it: export it anew")
    known = [(signature, key) for signature in signatures if (key := keys.get(signature)) is not None]
    if not known:
        names = ", ".join(f"{s.signer} (key {s.key})" for s in signatures)
        raise UnknownSigner(f"the artifact is signed by {names}, whose key is not among the trusted ones")
    for signature, key in known:
        if fits(signature, files, key):
            return Signer(signature.signer, signature.key, signature.algorithm)
    wrong = known[0][0]
    raise SignatureWrong(
        f"the signature of {wrong.signer} (key {wrong.key}) does not fit the artifact: a file was changed"
    )


def fits(signature: Signature, files: Mapping[str, bytes], key: Key) -> bool:
    """Whether a key made this signature of these files."""
    named = (signature.key, signature.algorithm) == (key.id, key.algorithm)
    return named and key.right(_message(files, signature), bytes.fromhex(signature.value))


def check(folder: Path, keys: Keys) -> Signer:
    """Return who signed the artifact in a folder; raises as `verify` does.

    For people and tools. What is going to be run is checked on the bytes that were read:
    `export.folder.load_artifact(folder, keys)`.
    """
    from export.folder import read_files  # it knows the bounds; it imports this module

    return verify(read_files(folder), keys)


def parse(content: bytes) -> tuple[Signature, ...]:
    """Return the signatures of a `signature.json`; raises `SignatureWrong` for anything else."""
    try:
        return Signatures.model_validate_json(content).signatures
    except ValidationError as error:
        problem = error.errors()[0]
        raise SignatureWrong(f"{SIGNATURE} is not a signature: {problem['loc']}: {problem['msg']}") from error


def _message(files: Mapping[str, bytes], signature: Signature) -> bytes:
    lines = ["hedgerow artifact 1", signature.algorithm, signature.key, signature.signer.encode().hex()]
    return "\n".join([*lines, *(hashlib.sha256(files[name]).hexdigest() for name in SIGNED)]).encode()


def _id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _secret(path: Path, *, make: bool) -> bytes:
    if make and not path.exists():
        _write(path, secrets.token_bytes(_KEY_BYTES), SECRET)
    content = _read(path, _KEY_BYTES)
    if len(content) != _KEY_BYTES:
        raise SignatureError(f"{path} is not a key of {_KEY_BYTES} bytes: put back the file, or remove it")
    if path.stat().st_mode & 0o077:
        raise SignatureError(f"{path} can be read by others than its owner: chmod 600 {path.name}")
    return content


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise SignatureError(f"the key {path} cannot be read: {error}") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        write_first(path, content, mode=mode)
    except OSError as error:
        raise SignatureError(f"the key {path} cannot be written: {error}") from error


def _public_of(secret: bytes) -> bytes:
    module = _ed25519()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public: bytes = (
        module.Ed25519PrivateKey.from_private_bytes(secret)
        .public_key()
        .public_bytes(Encoding.Raw, PublicFormat.Raw)
    )
    return public


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SignatureError(
            "an Ed25519 key needs the package `cryptography`, which is not installed here: install it"
        ) from error
    return ed25519
