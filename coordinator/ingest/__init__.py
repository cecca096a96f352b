"""Ingest workers: several processes that take updates for one coordinator."""
