"""Joules and seconds of this device, without torch."""
