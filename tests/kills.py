"""Processes that are killed at a chosen step: each step is a file operation below their vault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from foundation.artifact import Manifest
from tests.artifacts import LABELS, ROOT, Artifact, samples

STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "os.truncate")


def written(artifact: Artifact, folder: Path) -> Path:
    """Write an artifact's bytes for another process and return where."""
    place = folder / artifact.sha256
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.onnx").write_bytes(artifact.model)
    (place / "manifest.json").write_text(artifact.manifest.model_dump_json())
    (place / "probe.npz").write_bytes(artifact.probe)
    return place


class Nursery:
    """A process with everything loaded, which forks those that are to be killed: 10 ms and not a second."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.kills"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def install(self, at: int, vault: Path, artifacts: list[Path]) -> int:
        """Publish artifacts, and be killed before step `at`; returns the signal, 0 for an end."""
        return self._told("install", at, vault, artifacts)

    def life(self, at: int, vault: Path, artifacts: list[Path]) -> int:
        """Publish artifacts and swap to them, roll back the last; be killed before step `at` (0: never).

        Without a kill, the number of steps is written to `vault/steps`.
        """
        return self._told("life", at, vault, artifacts)

    def _told(self, what: str, at: int, vault: Path, artifacts: list[Path]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join([what, str(at), str(vault), *map(str, artifacts)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class _Steps:
    """Counts file operations below a folder, and kills this process before the one that was chosen."""

    def __init__(self, at: int, folder: Path) -> None:
        self.taken = 0
        self._at, self._folder = at, str(folder)
        sys.addaudithook(self._count)

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS and any(str(word).startswith(self._folder) for word in arguments[:2]):
            self.taken += 1
            if self.taken == self._at:
                os.kill(os.getpid(), signal.SIGKILL)


def _install(at: int, vault: Path, artifacts: list[Path]) -> None:
    found = [_read(place) for place in artifacts]
    _Steps(at, vault)
    for one in found:
        one.publish(vault / "artifacts")


def _life(at: int, vault: Path, artifacts: list[Path]) -> None:
    from edge_agent.serving import owner
    from edge_agent.serving.canary import Canary, to_bytes
    from edge_agent.serving.predictor import Predictor
    from edge_agent.serving.trial import TRIAL_REQUESTS
    from edge_agent.vault import Vault

    root, x = vault / "artifacts", samples(4)
    found = [_read(place) for place in artifacts]
    predictor, kept = Predictor(root), Vault(vault, "d0")
    steps = _Steps(at, vault)
    for i, one in enumerate(found):
        y = (np.arange(len(x), dtype=np.int64) + i) % len(LABELS)
        kept.save_canary(to_bytes(Canary(x, y, LABELS)))  # too few to find anything worse
        one.publish(root)
        predictor.reload()
        for _ in range(0 if i else TRIAL_REQUESTS):
            predictor.predict(x[:1])
        predictor.reload()
    owner.roll_back(root)
    predictor.reload()
    (vault / "steps").write_text(str(steps.taken))


def _read(place: Path) -> Artifact:
    manifest = Manifest.model_validate_json((place / "manifest.json").read_text())
    return Artifact(manifest, (place / "model.onnx").read_bytes(), (place / "probe.npz").read_bytes())


def _main() -> None:
    import edge_agent.serving.predictor  # noqa: F401 - loaded once, for all, onnxruntime with it

    for line in sys.stdin:
        what, at, vault, *artifacts = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live = {"install": _install, "life": _life}[what]
                live(int(at), Path(vault), [Path(place) for place in artifacts])
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
