"""Constants of communication energy, from firmware_profiles/_radio.toml; every number with its source.

They are others' figures for others' radios. What a device's own radio costs is in its meter's joules.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from foundation.errors import SettingsError
from foundation.frozen import Frozen
from foundation.profile import Number, Source, check_sources, parsed

FILE = "_radio.toml"


class RadioConstants(Frozen):
    """Tables of numbers by what they are of, such as `lte_huang`; `fl_model` is that of the papers."""

    schema_: Literal[1] = Field(1, alias="schema")
    id: str
    title: str
    tables: dict[str, dict[str, Number]]
    source: tuple[Source, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _gathered(cls, told: Any) -> Any:
        """Take every table of the file that is not the file's own words as one of numbers."""
        if not isinstance(told, dict) or "tables" in told:
            return told
        own = {key: told[key] for key in ("schema", "id", "title", "source") if key in told}
        return own | {"tables": {key: table for key, table in told.items() if key not in own}}

    @model_validator(mode="after")
    def _sourced(self) -> RadioConstants:
        check_sources(self.numbers(), self.source)
        return self

    def numbers(self) -> Iterator[tuple[str, Number]]:
        """Yield every number with its dotted key."""
        for table, numbers in self.tables.items():
            for key, number in numbers.items():
                yield f"{table}.{key}", number

    def value(self, table: str, key: str) -> float:
        """Return one number; raises `SettingsError` when it is not there or is no single known one."""
        number = self.tables.get(table, {}).get(key)
        if number is None or not isinstance(number.v, float):
            raise SettingsError(f"firmware_profiles/{FILE} has no known number {table}.{key}")
        return number.v

    @classmethod
    def load(cls) -> Self:
        """Read the file that ships with Hedgerow."""
        return cls.parse((resources.files("firmware_profiles") / FILE).read_bytes())

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a file's bytes; raises `SettingsError` that names the key."""
        return parsed(cls, data, f"firmware_profiles/{FILE}")
