"""Fits this device's own power model against a meter; what `hedgerow agent calibrate` is made of."""
