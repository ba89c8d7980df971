"""JSON files that people bring: read, and picked apart, with errors that say where what is wrong."""

import json
from pathlib import Path
from typing import Any

from hacan.errors import UserError

_NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}


def read_json(path: Path) -> Any:
    """The content of a JSON file; broken JSON is a `UserError` with line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(text, where=str(path))


def parse_json(text: str, *, where: str) -> Any:
    """The value of a JSON text that came from `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} is broken JSON at {place}: {error.msg}; download or write it again") from error
    except (RecursionError, ValueError) as error:  # nested thousands deep; a number of thousands of digits
        raise UserError(f"{where} is JSON that cannot be read: {error}") from error


def expect(value: Any, kind: type, *, where: str) -> Any:
    """`value`, which has to be of `kind`; True and False are not numbers."""
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        shown = repr(value)
        found = "nothing (null)" if value is None else shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise UserError(f"{where} is {found}: expected {_NAMES[kind]}")
    return value


def member(value: Any, key: str, kind: type, *, where: str) -> Any:
    """`value[key]` of an object, which has to be there and of `kind`."""
    if key not in expect(value, dict, where=where):
        there = ", ".join(repr(name[:40]) for name in sorted(value)[:8]) or "no keys"
        raise UserError(f"{where} lacks the key {key!r}; it has {there}")
    return expect(value[key], kind, where=f"{where}, {key!r}")


def caption_of(value: Any, key: str, *, where: str) -> str:
    """The text `value[key]`; halves of emoji, which JSON can hold but nothing can print, are replaced."""
    text = member(value, key, str, where=where)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
