"""Reads the pages: their fenced blocks, tables and links, and what the code has to say to them."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parents[2]
CODE = ("foundation", "export", "edge_agent", "coordinator", "hedgerow")
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("firmware_profiles/*.md")))
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"^(# )?([a-z][a-z0-9_]*) = (.+)$")
ELLIPSIS = "…"


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its info string, its text."""

    page: str
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return (self.info.split() or [""])[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """Return the blocks of all pages in one of these languages."""
    found = []
    for path in PAGES:
        page = path.relative_to(ROOT).as_posix()
        for match in FENCE.finditer(text := text_of(page)):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1].strip(), match[2]))
    return [block for block in found if block.language in languages]


def kind_of(block: Block) -> str:
    """Return which settings a TOML block is: the word after `toml`, or a first line like `# agent.toml`."""
    words = block.info.split()
    first = re.match(r"# (?:\S*/)?(\w+)\.toml", block.text)
    return words[1] if len(words) > 1 else first[1] if first else ""


def section(page: str, heading: str) -> str:
    """Return what stands under a heading of the second level."""
    _, _, rest = text_of(page).partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0]


def rows(text: str, first: str) -> Iterator[list[str]]:
    """Yield the rows of every table whose first column is headed `first`."""
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[0] == first:
            inside = True
        elif inside and not line.startswith("|---"):
            yield cells


def settings_in(toml: str) -> dict[str, tuple[Any, bool]]:
    """Return every key of a commented file by its dotted name: value, and whether it is commented out."""
    found: dict[str, tuple[Any, bool]] = {}
    table = ""
    for line in toml.splitlines():
        if header := re.match(r"\[([\w.]+)\]", line):
            table = f"{header[1]}."
        elif setting := SETTING.match(line):
            value = tomllib.loads(f"value = {setting[3]}")["value"]
            inner = value if isinstance(value, dict) and setting[1] else {"": value}
            for key, one in inner.items():
                found[f"{table}{setting[2]}.{key}".strip(".")] = (one, bool(setting[1]))
    return found


def leaves(model: type[BaseModel], above: str = "") -> dict[str, Any]:
    """Return the fields of a settings model, tables opened, by dotted name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= leaves(kind, f"{above}{name}.")
        else:
            found[above + name] = field
    return found


@cache
def messages() -> frozenset[str]:
    """Return every text of the code, with `…` where something is filled in."""
    found = set()
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(_part(value) for value in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return frozenset(found)


def _part(value: ast.expr) -> str:
    return str(value.value) if isinstance(value, ast.Constant) else ELLIPSIS


@cache
def names_in(file: str) -> frozenset[str]:
    """Return the dotted names that a module defines; fields of classes too."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], above: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(above + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{above}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(above + node.target.id)

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, "")
    return frozenset(found)
