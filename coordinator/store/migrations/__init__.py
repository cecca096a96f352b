"""Alembic's folder: how a database of any age becomes the tables of `schema.py`."""
