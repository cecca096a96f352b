"""Devices' models made here on request: by `hedgerow export` in a process of its own, one at a time.

In a process of its own, as it loads torch and computes for seconds: the engine and the page go on meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from export.folder import read_files, resolve
from foundation.errors import StoreError, WorkRefused

logger = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "hedgerow.cli", "export")
SAYS = "hedgerow export: "
"""How its last line begins where it says why not."""
LONGEST_S = 300.0
LARGEST_BYTES = 32 << 20
"""Of all files of one answer."""


class Exporter:
    """Makes artifacts from the store in the coordinator's folder, which may be in use."""

    def __init__(self, folder: Path, program: Sequence[str] = PROGRAM) -> None:
        self._folder, self._program = folder.absolute(), tuple(program)
        self._alone = asyncio.Lock()

    async def files(self, run: str, device: str) -> dict[str, bytes]:
        """Return the files of an artifact by name: what this coordinator would send `device` next.

        Raises `WorkRefused` where the whole model is not here, or cannot be made here or sent; `StoreError`
        for a fault, which is in the log.
        """
        if self._program == PROGRAM and importlib.util.find_spec("torch") is None:
            raise WorkRefused(
                "torch is not installed here, and makes models: `hedgerow agent export` does it on the device"
            )
        async with self._alone:
            with tempfile.TemporaryDirectory(prefix="hedgerow-export-") as folder:
                await self._make(run, device, Path(folder))
                files = await asyncio.to_thread(lambda: read_files(resolve(Path(folder))))
        size = sum(map(len, files.values()))
        if size > LARGEST_BYTES:
            raise WorkRefused(
                f"the artifact has {size} bytes, and an answer at most {LARGEST_BYTES}: use `hedgerow export`"
                " where the coordinator runs"
            )
        return files

    async def _make(self, run: str, device: str, output: Path) -> None:
        words = (f"--from={run}", f"--device={device}", f"--folder={self._folder}", f"--output={output}")
        nothing, told = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
        program = await asyncio.create_subprocess_exec(
            *self._program, *words, stdin=nothing, stdout=nothing, stderr=told
        )
        try:
            async with asyncio.timeout(LONGEST_S):
                _, said = await program.communicate()
        except TimeoutError as error:
            raise WorkRefused(f"the model was not made within {LONGEST_S:g} s: try it again later") from error
        finally:
            if program.returncode is None:
                program.kill()
                await program.wait()
        if program.returncode:
            raise _why(said.decode("utf-8", "replace"))


def _why(said: str) -> WorkRefused | StoreError:
    """Return what the last line says, where it is one of ours; the rest belongs into the log alone."""
    last = (said.strip().splitlines() or [""])[-1]
    if last.startswith(SAYS):
        return WorkRefused(last.removeprefix(SAYS))
    logger.error("hedgerow export failed: %s", said[-4000:])
    return StoreError("the export failed; the coordinator's log has it")
