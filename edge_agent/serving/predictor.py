"""Answers with the personal model, and moves to the next one without a gap.

A model is loaded beside the one that serves, proven with its own probe on this device, compared with the
one that serves on the canary set, and only then takes over, in one assignment. What fails never answers:
the last good model goes on, and the reason is kept (record.py) and logged. After the swap the new model is
on trial (trial.py): the one before stays loaded, answers what the new one cannot, and takes over again when
the new one leaves its band.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_agent.serving import canary, record
from edge_agent.serving.admission import Handle as Handle
from edge_agent.serving.admission import keep, load, owner_of, run, side_by_side
from edge_agent.serving.optimized import Choice, Forms
from edge_agent.serving.trial import Band, Trial, Window
from export.folder import CURRENT, FALLBACK, GOOD, ORDERED, PINNED, PREVIOUS, SERVING, linked, resolve
from export.proof import LARGEST_BATCH
from foundation import halt
from foundation.artifact import Manifest
from foundation.errors import DataError, ExportError
from foundation.memory import give_back
from foundation.messages import Verdict
from foundation.parameters import Array

logger = logging.getLogger(__name__)

SURE_S = 60.0
"""How long a look is good for where nothing seems to have changed."""
_COARSE_S = 2.0
"""No file system with links keeps times more coarsely."""
_CANARY_BATCH = 8
"""A larger batch would leave its memory with the process."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When a new model may take over, and when it must go again."""

    agent: str | None = None
    """Whose models are served; not set, that of the vault the folder lies in, or anybody's."""
    canary_drop: float | None = None
    """Points of accuracy on the canary set that a new model may lose; not set, what chance explains."""
    band: Band | None = field(default_factory=Band)
    """`None`: a model that was taken stays."""
    optimized: Choice = "auto"
    """Whether onnxruntime's optimized form of a model is kept for the next start: `auto` where it pays."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answers to one batch, all from one model.

    `logits` and `probabilities` are (batch, classes) and `indices` (batch,); for text there is a
    sequence axis after the batch.
    """

    logits: Array
    probabilities: Array
    indices: Array
    manifest: Manifest

    @property
    def labels(self) -> list[str]:
        """Names of the answers; for text, the character that follows each sample."""
        last = self.indices if self.indices.ndim == 1 else self.indices[:, -1]
        return [self.manifest.labels[i] for i in last]


@dataclass(frozen=True, slots=True)
class Reload:
    """What came of looking for a newer model."""

    changed: bool
    """Whether another model answers now."""
    refusal: str | None = None
    """Why a newer artifact was not taken; `None` when there is none, or when it was taken."""
    rolled_back: str | None = None
    """Why the model that served is gone and an earlier one serves again."""


@dataclass(frozen=True, slots=True)
class _Serving:
    """What answers now, and what is known of it; replaced whole."""

    handle: Handle
    window: Window
    before: Handle | None = None
    """The model before, while this one is on trial."""
    trial: Trial | None = None


@dataclass(frozen=True, slots=True)
class _Calm:
    """A look that changed nothing: what it saw, and when."""

    seen: tuple[int, ...]
    wall_s: float
    looked_at: float


class _Worse(ExportError):  # noqa: N818 - named for what was found
    """A sound model that is worse than the one that serves."""


class Predictor:
    """Serves the current artifact of a folder, or one given artifact's folder.

    Threads may call `predict` while another calls `reload`. Raises `ExportError` or `ProofFailed` when
    no artifact of the folder can be proven.
    """

    def __init__(self, folder: Path, rules: Rules | None = None) -> None:
        self._folder = folder
        rules = rules or Rules()
        self._agent = rules.agent or owner_of(folder.resolve())
        self._drop, self._band = rules.canary_drop, rules.band
        self._alone = not (folder / CURRENT).is_symlink()
        """One artifact's own folder: there is nothing to choose, and nothing is written down."""
        self._forms = None if self._alone or rules.optimized == "off" else Forms(folder, rules.optimized)
        self._kept: Path | None = None
        self._reloading = threading.Lock()
        self._refused: tuple[Path, int, str] | None = None
        self._stuck: Handle | None = None
        self._unwritten: str | None = None
        self._calm: _Calm | None = None
        self._serving = _Serving(self._first(), Window())
        self.reload()

    @property
    def handle(self) -> Handle:
        """The model that answers now."""
        return self._serving.handle

    @property
    def manifest(self) -> Manifest:
        """What the model that answers now says about itself."""
        return self._serving.handle.manifest

    @property
    def on_trial(self) -> bool:
        """Whether the model that answers now may still be rolled back by itself."""
        return self._serving.trial is not None

    def predict(self, x: Array, handle: Handle | None = None) -> Prediction:
        """Answer a batch of raw samples (batch, *shape), or (batch, sequence) of ids for text.

        `handle` is the model that the request was read for: it is answered by that one, even if another
        serves by now. Raises `DataError` for what the model cannot take: another shape, an empty or too
        large batch, values that are not finite, ids outside of the vocabulary.
        """
        serving = self._serving
        if handle is not None and handle is not serving.handle:
            return _answer(handle, _checked(handle.manifest, x))
        checked = _checked(serving.handle.manifest, x)
        start = time.perf_counter()
        try:
            prediction = _answer(serving.handle, checked)
        except DataError:
            if serving.before is None or not _alike(serving.before, serving.handle):
                raise
            # The new model fails: is it the model, or the input? The one before is asked the same.
            prediction = _answer(serving.before, _checked(serving.before.manifest, x))
            serving.window.missed()
            return prediction
        serving.window.answered(time.perf_counter() - start)
        return prediction

    def reload(self) -> Reload:
        """Judge the model on trial, then move to what the folder wants to be served, if that is another one.

        That is what its owner pinned, else the coordinator, else what is current, if it need not wait for
        the coordinator's word (docs/rollout.md), proves itself and is not worse than the model that serves.
        Otherwise the model that answers stays, and the refusal says why; the same artifact is not tried
        again until its link or its files change.
        """
        with self._reloading:
            seen = _seen(self._folder, self._refused)  # first: what changes from here on is looked at again
            before = self._serving
            found = self._judged() or self._called_back() or self._looked()
            if self._serving is not before:
                del before
                give_back()  # of the model that is gone: the C library keeps what was freed
            calm = not found.changed and self._serving.trial is None
            self._calm = _Calm(seen, time.time(), time.monotonic()) if calm and seen else None
            return found

    def unchanged(self) -> bool:
        """Whether `reload` would find what it found the last time: cheap, and true only if it is sure.

        Links and record are replaced, never written to, so the time of their folder tells. A time that is
        less than two seconds before the look proves nothing (a second change would have the same), and once
        a minute everything is looked at anyway.
        """
        calm = self._calm
        if calm is None or self._serving.trial is not None or time.monotonic() - calm.looked_at > SURE_S:
            return False
        if any(calm.wall_s - ns / 1e9 < _COARSE_S for ns in calm.seen):
            return False
        return _seen(self._folder, self._refused) == calm.seen

    @property
    def root(self) -> Path:
        """The folder of artifacts; raises `ExportError` where one artifact alone is served."""
        if self._alone:
            raise ExportError(
                "this server serves one artifact, not a folder of them: there is nothing to choose"
            )
        return self._folder

    @property
    def keeps_none(self) -> bool:
        """Whether the optimized form of the model that serves is still to be kept; not of one on trial."""
        serving = self._serving
        return self._forms is not None and serving.trial is None and self._kept != serving.handle.folder

    def keep(self) -> None:
        """Keep the optimized form of the model that serves, for the next start; tried once for each model."""
        folder = self._serving.handle.folder
        self._kept = folder
        if self._forms is None or self._serving.handle.optimized:
            return
        try:
            keep(folder, self._forms, self._agent)
        except (ExportError, OSError) as error:
            logger.warning("no optimized form of %s is kept: %s", folder.name[:12], error)

    # --- looking for another model -------------------------------------------------------------

    def _looked(self) -> Reload:
        try:
            target, chosen = self._target()
        except ExportError as error:
            return Reload(changed=False, refusal=str(error))
        serving = self._serving
        if target == serving.handle.folder:
            self._refused = None
            if chosen and serving.trial is not None:
                self._settle()  # its owner wants it: nobody rolls it back
            return Reload(changed=False)
        stamp = _stamp(target)
        if self._refused is not None and self._refused[:2] == (target, stamp):
            return Reload(changed=False, refusal=self._refused[2])
        try:
            candidate = load(target, self._agent, self._forms)
            if not chosen:
                self._compare(candidate)
        except ExportError as error:
            if self._moved_on(target):
                return Reload(changed=False)  # swept away while it was read: the next look sees the next one
            self._refuse(target, stamp, error)
            return Reload(changed=False, refusal=str(error))
        self._refused = None
        self._take(candidate, on_trial=not chosen)
        return Reload(changed=True)

    def _target(self) -> tuple[Path, bool]:
        """Return the folder of the model that should answer, and whether its owner chose it."""
        if self._alone:
            return resolve(self._folder), True
        if (pinned := self._pinned()) is not None:
            return (self._folder / pinned).resolve(), True
        target, said = resolve(self._folder), record.read(self._folder)
        if target.name in said.barred or self._waits(target, said):
            return self._serving.handle.folder, False
        return target, False

    def _pinned(self) -> str | None:
        return linked(self._folder, PINNED) or linked(self._folder, ORDERED)

    def _waits(self, folder: Path, said: record.Record) -> bool:
        """Whether a model may not answer before the coordinator lets it; one that was good here may."""
        good = (linked(self._folder, GOOD), linked(self._folder, FALLBACK))
        return said.holds(folder.name) and folder.name not in good

    def _moved_on(self, target: Path) -> bool:
        try:
            return self._target()[0] != target
        except ExportError:
            return True

    def _compare(self, candidate: Handle) -> None:
        """Raise `_Worse` when the candidate is worse on the canary set than the model that serves."""
        found = canary.read(self._folder.resolve().parent / canary.FILE)
        old = self.handle
        if found is None or not (found.fits(candidate.manifest) and found.fits(old.manifest)):
            return
        try:
            before = _hits(old, found)
        except DataError as error:
            logger.warning("the model that serves cannot answer the canary set: %s", error)
            return
        try:
            now = _hits(candidate, found)
        except DataError as error:
            raise _Worse(f"it cannot answer the canary samples of this device: {error}") from error
        if (reason := canary.worse(now, before, self._drop)) is not None:
            raise _Worse(reason)

    def _refuse(self, target: Path, stamp: int, error: ExportError) -> None:
        self._refused = (target, stamp, str(error))
        logger.warning("artifact refused, the last good one serves on: %s", error)
        self._note(record.verdict_on(target, "refused", str(error)), bar=isinstance(error, _Worse))

    # --- swapping, settling, going back --------------------------------------------------------

    def _take(self, candidate: Handle, *, on_trial: bool) -> None:
        old, window, trial = self.handle, Window(), None
        if on_trial and self._band is not None:
            # The old model and nothing else of what served: that would hold the one before it, and so on.
            before_ms = self._serving.window.p95_ms()
            trial = Trial(window, before_ms, self._band, lambda: side_by_side(candidate, old))
        halt.at("swap", candidate.manifest.round)
        # First the folder, then the memory: a kill in between starts with the model before.
        good = self._good(candidate if trial is None else old)
        self._link({SERVING: candidate.folder.name, **good})
        self._serving = _Serving(candidate, window, None if trial is None else old, trial)
        logger.info(
            "artifact taken round=%s folder=%s on_trial=%s",
            *(candidate.version, candidate.folder.name[:12], trial is not None),
        )

    def _settle(self) -> None:
        """The model on trial kept within its band: it is the last good one now."""
        serving = self._serving
        self._link(self._good(serving.handle))
        self._serving = _Serving(serving.handle, serving.window)
        logger.info("artifact kept round=%s", serving.handle.version)

    def _good(self, handle: Handle) -> dict[str, str | None]:
        """Return the links that make a model the last good one, and the one that is it now the fallback."""
        good = linked(self._folder, GOOD)
        fallback = {FALLBACK: good} if good not in (None, handle.folder.name) else {}
        return {**fallback, GOOD: handle.folder.name}

    def _judged(self) -> Reload | None:
        serving = self._serving
        if serving.trial is None or serving.before is None:
            return None
        found = serving.trial.judge()
        if found is None:
            return None
        if found == "passed":
            self._settle()
            return None
        reason = found[1]
        verdict = record.verdict_on(serving.handle.folder, "rolled_back", reason, serving.handle.manifest)
        # Memory first: the requests of now are what suffers.
        self._serving = _Serving(serving.before, Window())
        logger.warning("rolled back from round=%s: %s", serving.handle.version, reason)
        self._note(verdict, bar=True, links={SERVING: serving.before.folder.name})
        return Reload(changed=True, rolled_back=reason)

    def _called_back(self) -> Reload | None:
        """Go back to an earlier model when the one that serves was barred by hand."""
        serving = self._serving
        if self._alone or self._pinned() is not None:
            return None
        said = record.read(self._folder)
        if serving.handle.folder.name not in said.barred or serving.handle is self._stuck:
            return None
        reason = next(
            (v.reason for v in reversed(said.verdicts) if v.sha256 == serving.handle.folder.name), "barred"
        )
        for folder in self._earlier():
            if folder == serving.handle.folder or folder.name in said.barred or self._waits(folder, said):
                continue
            try:
                handle = load(folder, self._agent, self._forms)
            except ExportError as error:
                logger.warning("cannot go back to %s: %s", folder.name[:12], error)
                continue
            self._take(handle, on_trial=False)
            return Reload(changed=True, rolled_back=reason)
        self._stuck = serving.handle  # there is nothing else that answers: better this one than none
        logger.warning("the model that serves was barred, and there is no earlier one that proves itself")
        return None

    def _earlier(self) -> Iterator[Path]:
        for link in (GOOD, FALLBACK, PREVIOUS, CURRENT):
            if (name := linked(self._folder, link)) is not None:
                yield (self._folder / name).resolve()

    # --- starting ------------------------------------------------------------------------------

    def _first(self) -> Handle:
        """Return the first model that proves itself: pinned, last good, current, and those before."""
        if self._alone:
            return load(resolve(self._folder), self._agent)
        current = resolve(self._folder)
        tried: list[Path] = []
        reasons: list[ExportError] = []
        for folder in self._candidates(current):
            if folder in tried:
                continue
            tried.append(folder)
            try:
                handle = load(folder, self._agent, self._forms)
            except ExportError as error:
                reasons.append(error)
                self._refuse(folder, _stamp(folder), error)
                continue
            self._link({SERVING: folder.name, **self._good(handle)})
            return handle
        raise reasons[0]

    def _candidates(self, current: Path) -> Iterator[Path]:
        said = record.read(self._folder)
        if (pinned := self._pinned()) is not None:
            yield (self._folder / pinned).resolve()
        earlier = list(self._earlier())
        known = [*earlier[:1], current, *earlier] if linked(self._folder, GOOD) else [current, *earlier]
        yield from (f for f in known if f.name not in said.barred and not self._waits(f, said))
        yield from known  # a model that was rolled back, or waits, is better than none

    def _note(self, verdict: Verdict, *, bar: bool, links: dict[str, str | None] | None = None) -> None:
        if self._alone:
            return
        try:
            record.note(self._folder, verdict, bar=bar, links=links)
        except ExportError as error:
            self._cannot_write(error)

    def _link(self, links: dict[str, str | None]) -> None:
        if self._alone:
            return
        try:
            record.note(self._folder, links=links)
        except ExportError as error:
            self._cannot_write(error)

    def _cannot_write(self, error: ExportError) -> None:
        if str(error) != self._unwritten:
            self._unwritten = str(error)
            logger.warning("what is decided here will be forgotten at the next start: %s", error)


def _seen(folder: Path, refused: tuple[Path, int, str] | None) -> tuple[int, ...]:
    """Return when a folder of artifacts changed last, and what was refused of it, in nanoseconds.

    Nothing where that cannot be told.
    """
    known = [folder] if refused is None else [folder, refused[0], *sorted(refused[0].glob("*"))]
    try:
        return tuple(path.stat().st_mtime_ns for path in known)
    except OSError:
        return ()


def _stamp(folder: Path) -> int:
    """Return what changes when one of an artifact's files does."""
    found = 0
    for path in sorted(folder.glob("*")):
        stat = path.stat()
        found = hash((found, path.name, stat.st_mtime_ns, stat.st_size))
    return found


def _alike(first: Handle, second: Handle) -> bool:
    """Whether two models answer the same questions."""
    a, b = first.manifest, second.manifest
    return (a.input, a.shape, a.labels) == (b.input, b.shape, b.labels)


def _answer(handle: Handle, x: Array) -> Prediction:
    logits = run(handle, x)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    return Prediction(logits, probabilities, logits.argmax(-1), handle.manifest)


def _hits(handle: Handle, found: canary.Canary) -> Array:
    """Return the share of right answers of each canary sample; raises `DataError` where it has no answer."""
    x = _checked(handle.manifest, found.x)
    pieces = [run(handle, x[i : i + _CANARY_BATCH]) for i in range(0, len(x), _CANARY_BATCH)]
    return canary.hits(np.concatenate(pieces), found.y)


def _checked(manifest: Manifest, x: Array) -> Array:
    """Return the batch in the type that the model takes, or say what is wrong with it."""
    text = manifest.input == "text"
    if x.ndim != 1 + len(manifest.shape) or (not text and x.shape[1:] != manifest.shape):
        wanted = ("batch", f"1 to {manifest.shape[0]}") if text else ("batch", *manifest.shape)
        raise DataError(f"the input has shape {x.shape}; the model takes ({', '.join(map(str, wanted))})")
    if not 1 <= len(x) <= LARGEST_BATCH:
        raise DataError(f"a batch has 1 to {LARGEST_BATCH} samples, not {len(x)}")
    return _ids(manifest, x) if text else _values(x)


def _ids(manifest: Manifest, x: Array) -> Array:
    if not 1 <= x.shape[1] <= manifest.shape[0]:
        raise DataError(f"a text has 1 to {manifest.shape[0]} characters, not {x.shape[1]}")
    if x.dtype.kind not in "iu":
        raise DataError(f"characters are whole numbers, not {x.dtype}")
    if x.min() < 0 or x.max() >= len(manifest.labels):
        raise DataError(f"characters are numbered 0 to {len(manifest.labels) - 1}")
    return x.astype(np.int64)


def _values(x: Array) -> Array:
    if x.dtype.kind not in "iuf":
        raise DataError(f"the input has to be numbers, not {x.dtype}")
    if x.dtype != np.float32 and not (np.abs(x) <= np.finfo(np.float32).max).all():
        raise DataError("the input has values that are not finite in float32")
    values = x.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise DataError("the input has values that are not finite in float32")
    return values
