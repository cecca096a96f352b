"""Bytes through one network interface, as the kernel counts them."""

from __future__ import annotations

from pathlib import Path

from edge_agent.energy.files import NumberFile

MBIT = 8e-6
"""Megabits of a byte."""


class Link:
    """Counts one interface, all programs together, through descriptors that stay open."""

    def __init__(self, interface: str, root: Path = Path("/")) -> None:
        self.interface = interface
        place = root / "sys/class/net" / interface / "statistics"
        self._sent, self._received = NumberFile(place / "tx_bytes"), NumberFile(place / "rx_bytes")

    def mbit(self) -> tuple[float, float] | None:
        """Return megabits sent and received since the interface came up; `None` where nobody says."""
        sent, received = self._sent.read(), self._received.read()
        return None if sent is None or received is None else (sent * MBIT, received * MBIT)
