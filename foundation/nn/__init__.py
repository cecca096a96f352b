"""The only torch in the foundation: the transformer and its bridge to Parameters.

Whoever imports it computes without oneDNN on x86, on both sides, so that their bits agree. oneDNN compiles a
kernel for every shape it meets first, and a pruned model has new widths in every round: docs/evidence.md has
what that costs. Elsewhere (Arm) nothing is changed, because nothing was measured there.
"""

import platform

import torch

if platform.machine() in ("x86_64", "AMD64"):
    torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
