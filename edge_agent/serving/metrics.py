"""What was asked, answered and refused, in Prometheus' text form and as the protocol's statistics."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

import psutil

from edge_agent.serving.predictor import Handle
from foundation.prometheus import Family, Sample, Value, counter, gauge, process_families, render

BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
VERSIONS_KEPT = 4
"""Rounds whose statistics are kept: the one that answers, and some before it."""


class Histogram:
    """Seconds, counted by `BUCKETS_S`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of Prometheus' histogram: buckets that add up, sum, count."""
        below = 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self._counts, strict=True):
            below += count
            yield Sample({"le": bound}, below, "_bucket")
        yield Sample({}, self.sum_s, "_sum")
        yield Sample({}, below, "_count")


class Statistics:
    """What the protocol's statistics say of one version: counts, and nanoseconds by stage."""

    STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")

    def __init__(self) -> None:
        self._ns: dict[str, list[int]] = {stage: [0, 0] for stage in self.STAGES}
        self._last_s: float | None = None
        self.samples = 0
        self.runs = 0
        self.batches: dict[int, list[int]] = {}

    def stage(self, stage: str, seconds: float) -> None:
        """Count one request's stage."""
        counted = self._ns[stage]
        counted[0] += 1
        counted[1] += round(1e9 * seconds)

    def ran(self, samples: int, seconds: float) -> None:
        """Count one run of the model."""
        self.samples += samples
        self.runs += 1
        self._last_s = time.time()
        batch = self.batches.setdefault(samples, [0, 0])
        batch[0] += 1
        batch[1] += round(1e9 * seconds)

    def as_json(self, name: str, version: str) -> dict[str, object]:
        """Return it as the protocol wants it."""
        return {
            "name": name,
            "version": version,
            "last_inference": 0 if self._last_s is None else round(1e3 * self._last_s),
            "inference_count": self.samples,
            "execution_count": self.runs,
            "inference_stats": {stage: {"count": n, "ns": ns} for stage, (n, ns) in self._ns.items()},
            "batch_stats": [
                {"batch_size": size, "compute_infer": {"count": n, "ns": ns}}
                for size, (n, ns) in sorted(self.batches.items())
            ],
        }


class Metrics:
    """Counters since the process started; `load_s` is how long the present model took to load and prove."""

    def __init__(self, load_s: float | None = None) -> None:
        self.requests: Counter[int] = Counter()
        """Answers by HTTP status."""
        self.inference = Histogram()
        self.total = Histogram()
        """From a request's headers to its answer, inference requests only."""
        self.load_s = load_s
        self.samples = 0
        self.batched_requests = 0
        """Requests that shared their run with another."""
        self.swaps = 0
        self.rollbacks = 0
        self.refused_artifacts = 0
        self._statistics: dict[str, Statistics] = {}
        self._process = psutil.Process()

    def statistics(self, version: str) -> Statistics:
        """Return the statistics of a version, new ones for a new version."""
        found = self._statistics.get(version)
        if found is None:
            found = self._statistics[version] = Statistics()
            for old in list(self._statistics)[:-VERSIONS_KEPT]:
                del self._statistics[old]
        return found

    def ran(self, version: str, samples: int, requests: int, seconds: float) -> None:
        """Count one run of the model."""
        self.inference.add(seconds)
        self.samples += samples
        self.batched_requests += requests if requests > 1 else 0
        self.statistics(version).ran(samples, seconds)

    def text(self, handle: Handle, in_flight: int, *, loaded: bool = True) -> str:
        """Return all counters, and which model serves."""
        return render(self._families(handle, in_flight, loaded))

    def _families(self, handle: Handle, in_flight: int, loaded: bool) -> Iterator[Family]:
        codes: list[Value] = [({"code": code}, n) for code, n in sorted(self.requests.items())]
        yield counter("hedgerow_requests_total", "Answers by HTTP status.", codes)
        for name, told, histogram in (
            ("hedgerow_inference_seconds", "Time of one run of the model.", self.inference),
            ("hedgerow_request_seconds", "Time of one inference request, without the network.", self.total),
        ):
            yield Family(name, "histogram", told, tuple(histogram.samples()))
        for name, told, value in (
            ("hedgerow_samples_total", "Samples that the model was run on.", self.samples),
            ("hedgerow_batched_requests_total", "Requests that shared a run.", self.batched_requests),
            ("hedgerow_swaps_total", "Other models that took over.", self.swaps),
            ("hedgerow_rollbacks_total", "New models that went again.", self.rollbacks),
            ("hedgerow_refused_artifacts_total", "Newer artifacts not taken.", self.refused_artifacts),
        ):
            yield counter(name, told, [({}, value)])
        m = handle.manifest
        info = {"agent": m.agent, "run": m.run, "version": handle.version, "sha256": m.sha256}
        which: Value = ({**info, "round": m.round}, float(loaded))
        yield gauge("hedgerow_model_info", "Which model answers.", [which])
        for name, told, known in (
            ("hedgerow_in_flight", "Inference requests being answered.", in_flight),
            ("hedgerow_load_seconds", "Loading and proving the model.", self.load_s),
            ("hedgerow_model_parity", "Largest difference from the trained model.", handle.parity.difference),
        ):
            if known is not None:
                yield gauge(name, told, [({}, known)])
        yield from process_families(self._process)
