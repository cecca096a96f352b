"""FedProx: FedAvg whose devices are pulled back to what was sent.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, eq. 2.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from coordinator.strategies.base import Strategy
from coordinator.strategies.fedavg import FedAvg
from foundation.work import LocalWork, Proximal


class FedProx(FedAvg):
    """The mean; the local loss has mu/2 |w - w_sent|^2 on top."""

    mu: float = Field(0.01, ge=0)
    """Weight of the pull; 0 is FedAvg."""

    def work(self, **changes: Any) -> LocalWork:
        """Return FedAvg's local work with the proximal term."""
        return super().work(**({"terms": (Proximal(mu=self.mu),)} | changes))


STRATEGY: type[Strategy] = FedProx
