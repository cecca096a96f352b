"""Which of torch's libraries computes: the same on both sides, so that their bits agree.

oneDNN compiles a kernel for every shape it meets first, and a pruned model has new widths in every round:
docs/evidence.md has what that costs on x86. Elsewhere nothing is changed, because nothing was measured there.
"""

import platform

import torch


def choose() -> None:
    """Compute without oneDNN on x86; called by every module that brings torch in, once is enough."""
    if platform.machine() in ("x86_64", "AMD64"):
        torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
