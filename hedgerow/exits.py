"""How commands that ask the coordinator end: 0 done, 1 failed, 2 misuse, 3 refused; errors in words."""

from __future__ import annotations

import sys
from collections.abc import Callable

from foundation.errors import HedgerowError, SettingsError
from hedgerow.client import ApiProblem

DONE, FAILED, WRONG, REFUSED = 0, 1, 2, 3


def code_of(error: HedgerowError) -> int:
    """Return the exit code of an error: 3 for what was understood and not done, 2 for misuse."""
    if isinstance(error, ApiProblem):
        return REFUSED if error.is_refusal else WRONG if error.status == 422 else FAILED
    return WRONG if isinstance(error, SettingsError) else FAILED


def done(command: str, work: Callable[[], int | None]) -> int:
    """Do it, and return the exit code: what `work` returns, or that of its error, which is said on stderr."""
    try:
        return work() or DONE
    except HedgerowError as error:
        sys.stderr.write(f"{command}: {error}\n")
        return code_of(error)
