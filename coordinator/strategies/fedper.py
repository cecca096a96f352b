"""FedPer: everything is averaged except the head, which never leaves its device.

Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv 1912.00818.
"""

from __future__ import annotations

from typing import ClassVar

from coordinator.strategies.base import Strategy
from coordinator.strategies.fedavg import FedAvg
from foundation.parameters import WEIGHTS, Role


class FedPer(FedAvg):
    """FedAvg without the head, which is the device's own."""

    shared: ClassVar[frozenset[Role]] = WEIGHTS - {Role.HEAD}


STRATEGY: type[Strategy] = FedPer
