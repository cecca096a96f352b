"""Local: every device trains alone; the yardstick that costs no bytes."""

from __future__ import annotations

from typing import ClassVar

from coordinator.strategies.base import Strategy
from coordinator.strategies.fedavg import FedAvg
from foundation.parameters import Role


class Local(FedAvg):
    """FedAvg of nothing: no parameters travel, metrics and ledger do."""

    shared: ClassVar[frozenset[Role]] = frozenset()


STRATEGY: type[Strategy] = Local
