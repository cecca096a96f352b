"""Counters of the serving process, in Prometheus' text form."""

from __future__ import annotations

from collections import Counter

import psutil

from edge_agent.serving.predictor import Handle


class Metrics:
    """What was asked, answered and refused since the process started."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        """Answers by HTTP status."""
        self.samples = 0
        self.inferences = 0
        self.inference_s = 0.0
        self.swaps = 0
        self.rollbacks = 0
        self.refused_artifacts = 0

    def inferred(self, samples: int, seconds: float) -> None:
        """Count one run of the model."""
        self.inferences += 1
        self.samples += samples
        self.inference_s += seconds

    def text(self, handle: Handle) -> str:
        """Return all counters, and which model serves."""
        lines = [f'hedgerow_requests_total{{code="{c}"}} {n}' for c, n in sorted(self.requests.items())]
        lines += [
            f"hedgerow_inferences_total {self.inferences}",
            f"hedgerow_samples_total {self.samples}",
            f"hedgerow_inference_seconds_total {self.inference_s:.6f}",
            f"hedgerow_swaps_total {self.swaps}",
            f"hedgerow_rollbacks_total {self.rollbacks}",
            f"hedgerow_refused_artifacts_total {self.refused_artifacts}",
            f'hedgerow_model_info{{sha256="{handle.manifest.sha256}",round="{handle.version}"}} 1',
            f"hedgerow_model_parity {handle.parity.difference:.3g}",
            f"hedgerow_resident_memory_bytes {psutil.Process().memory_info().rss}",
        ]
        typed = dict.fromkeys(line.partition("{")[0].partition(" ")[0] for line in lines)
        kinds = {name: "counter" if name.endswith("_total") else "gauge" for name in typed}
        out: list[str] = []
        for name, kind in kinds.items():
            out.append(f"# TYPE {name} {kind}")
            out += [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return "\n".join(out) + "\n"
