"""Answering with the personal model; no torch, no training code."""
