"""Learning on the device; the only room of the agent that knows torch."""
