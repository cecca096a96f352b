"""onnxruntime, told to keep to itself: it is imported here and nowhere else.

From 1.29 on, its packages for Linux tell Microsoft of each process and session: names of files and graphs,
hashes of graph and weights, times. Whoever wants that sets ORT_DISABLE_TELEMETRY=0 before the start.
"""

from __future__ import annotations

import os

SILENCE = "ORT_DISABLE_TELEMETRY"

os.environ.setdefault(SILENCE, "1")

import onnxruntime as ort  # noqa: E402
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # noqa: E402

__all__ = ["SILENCE", "ort", "ort_errors"]
