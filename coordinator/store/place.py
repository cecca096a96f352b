"""Where a store is: settings, and the note in its folder by which commands find what is elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError, field_validator
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from foundation.durable import write_whole
from foundation.errors import StoreError
from foundation.frozen import Frozen

NOTE = "store.json"
HOW = "write it as postgresql://user@host:5432/database"


class S3Settings(Frozen):
    """An S3-compatible store for blobs; key and secret come from the environment, as boto3 has it."""

    bucket: str | None = Field(None, min_length=3, max_length=63)
    """Not set: blobs are files in the coordinator's `folder`."""
    endpoint: str | None = Field(None, pattern=r"^https?://")
    """Not set: Amazon's own."""
    prefix: str = Field("", pattern=r"^[A-Za-z0-9._/-]*$")
    """Before every key, for several stores in one bucket."""
    region: str | None = None


class StoreSettings(Frozen):
    """Where rows and blobs are; not set, both are in the coordinator's `folder`."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error must not print the password in an URL

    database: str | None = None
    """`postgresql://user@host/database`; a password is better in PGPASSWORD or ~/.pgpass."""
    s3: S3Settings = S3Settings()

    @field_validator("database")
    @classmethod
    def _is_postgres(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                url = make_url(text)
            except ArgumentError:
                raise ValueError(f"it is no database URL: {HOW}") from None
            if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg") or not url.database:
                raise ValueError(f"rows are in PostgreSQL, or in a file where this is not set: {HOW}")
        return text

    @property
    def url(self) -> URL | None:
        """The database with the driver that is used; `None` where it is a file in the folder."""
        if self.database is None:
            return None
        return make_url(self.database).set(drivername="postgresql+psycopg")


def remember(folder: Path, place: StoreSettings) -> None:
    """Write down where the store of a folder is, without its password; nothing where all is in the folder."""
    note = folder / NOTE
    if place == StoreSettings():
        note.unlink(missing_ok=True)
        return
    told = place.model_dump(mode="json")
    if place.url is not None:
        bare = URL.create(
            "postgresql",
            place.url.username,
            None,
            place.url.host,
            place.url.port,
            place.url.database,
            {key: value for key, value in place.url.query.items() if "password" not in key},
        )
        told["database"] = bare.render_as_string()
    write_whole(note, json.dumps(told, indent=2).encode())


def recall(folder: Path) -> StoreSettings:
    """Return where the store of a folder is; raises `StoreError` for a note that cannot be read."""
    note = folder / NOTE
    try:
        return StoreSettings.model_validate_json(note.read_bytes())
    except FileNotFoundError:
        return StoreSettings()
    except (OSError, ValidationError) as error:
        raise StoreError(f"{note} does not say where the store is: {error}") from error
