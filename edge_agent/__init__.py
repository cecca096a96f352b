"""The program on the device."""
