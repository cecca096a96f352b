"""Files to raw values: PNG and JPEG through Pillow where it is installed, .npy without it."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np

from edge_agent.serving.answers import Refused
from export.folder import PROBE
from foundation.artifact import Manifest
from foundation.errors import FrameTooLarge, WireError
from foundation.parameters import Array

MOST_PIXELS = 16 << 20
RANGES = (1.0, 16.0, 255.0)
"""Largest values that raw pictures are kept with: shares, scikit-learn's digits, bytes."""

_NPY = b"\x93NUMPY"
_OURS = {b"\x89PNG\r\n\x1a\n": "picture", b"\xff\xd8\xff": "picture", _NPY: "npy"}
_OTHERS = {b"GIF8": "GIF", b"RIFF": "WebP", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF"}

# What numpy writes, word for word; nothing that would have to be evaluated.
_HEADER = re.compile(
    rb"\{'descr': '([<>|][iuf][1248])', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,80})\), \} *\n"
)


def kind(body: bytes) -> str:
    """Return `picture`, `npy` or `json` by a body's first bytes; raises `Refused` (415) for other files."""
    for magic, name in _OURS.items():
        if body.startswith(magic):
            return name
    for magic, name in _OTHERS.items():
        if body.startswith(magic):
            raise Refused(415, f"pictures are PNG or JPEG here, not {name}")
    if body.startswith(b"--") and b"form-data" in body[:200]:
        raise Refused(415, "send the file itself: curl --data-binary @picture.png, not -F")
    return "json"


def npy(body: bytes) -> Array:
    """Return the array of an .npy file of numbers, no copy. Raises `WireError` for anything else."""
    if body[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise WireError("the .npy file is of a version that is not read here: save it with numpy.save")
    size, start = (2, 10) if body[6] == 1 else (4, 12)
    end = start + int.from_bytes(body[8 : 8 + size], "little")
    header = _HEADER.fullmatch(body, start, end)
    if header is None or len(body) < end:
        raise WireError("the .npy file is not one of plain numbers: save it with numpy.save")
    shape = tuple(int(part) for part in header[3].split(b",") if part.strip())
    if header[1][1:] == b"f1":
        raise WireError("the .npy file has numbers of a size that there is not")
    values = np.dtype(header[1].decode())
    if len(body) - end != values.itemsize * math.prod(shape):
        raise WireError(f"{len(body) - end} bytes of numbers do not make the .npy file's shape {shape}")
    return np.frombuffer(body, values, offset=end).reshape(shape, order="F" if header[2] == b"True" else "C")


def picture(body: bytes, manifest: Manifest, top: float) -> Array:
    """Return a PNG or JPEG as a batch of one (1, C, H, W) in the model's size, 0 to `top`.

    Scaled like `edge_agent/sources.py` scales image folders. Raises `Refused` (415) where Pillow is
    missing or the model takes no pictures, `FrameTooLarge`, and `WireError` for a damaged file.
    """
    if manifest.input != "image" or manifest.shape[0] not in (1, 3):
        wanted = f"{manifest.input} of shape {manifest.shape}"
        raise Refused(415, f"this model takes {wanted}, no pictures: send JSON or an .npy file")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise Refused(
            415, "reading pictures needs Pillow on the server: pip install 'hedgerow[images]'; or send .npy"
        ) from error
    Image.MAX_IMAGE_PIXELS = None  # bounded here, before a pixel is unpacked
    channels, height, width = manifest.shape
    try:
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > MOST_PIXELS:
                raise FrameTooLarge(f"a picture has at most {MOST_PIXELS >> 20} million pixels")
            scaled = image.convert("L" if channels == 1 else "RGB")
            scaled = scaled.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(scaled, np.uint8)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise WireError(f"the picture cannot be read: {error}") from error
    planes = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    values: Array = planes[None].astype(np.float32) * np.float32(top / 255)
    return values


def largest_value(folder: Path) -> float:
    """Return the largest value that an artifact's raw pictures have, one of `RANGES`; by its probe.

    A manifest does not say it. 255 where the probe is gone.
    """
    try:
        with np.load(folder / PROBE) as probe:
            seen = float(np.abs(probe["inputs"]).max(initial=0.0))
    except (OSError, ValueError, KeyError):
        return RANGES[-1]
    return next((top for top in RANGES if seen <= top), RANGES[-1])
