"""TOML tables → frozen dataclasses, by their own field types. Every refusal names the key's path."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Ranges = Mapping[str, tuple[float, float]]


class ConfigError(Exception):
    """The configuration cannot be used. One line: where, what is wrong, what would be right."""


def read_section(
    kind: type[T],
    table: Any,
    path: str,
    *,
    skip: tuple[str, ...] = (),
    ranges: Mapping[str, Ranges] | None = None,
) -> T:
    """An instance of the dataclass `kind` from a TOML table.

    A field's bounds are in its metadata (`range`), or in `ranges` by section path for other packages' types.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: must be a table, is {_kind(table)}")
    assert dataclasses.is_dataclass(kind)
    fields = {one.name: one for one in dataclasses.fields(kind) if one.name not in skip}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key not in fields:
            raise ConfigError(f"{where}: unknown {_noun(path)}{_nearest(key, list(fields))}")
        bounds = fields[key].metadata.get("range") or (ranges or {}).get(path, {}).get(key)
        values[key] = _read_value(hints[key], value, where, bounds, ranges)
    for name, one in fields.items():
        has_default = one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            where = f"{path}.{name}" if path else f"[{name}]"
            raise ConfigError(f"{where}: missing")
    return kind(**values)


def _read_value(
    hint: Any, value: Any, where: str, bounds: tuple[float, float] | None, ranges: Mapping[str, Ranges] | None
) -> Any:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return read_section(hint, value, where, ranges=ranges)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            said = ", ".join(f'"{choice}"' for choice in choices)
            raise ConfigError(f"{where}: must be one of {said}; is {_show(value)}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: must be a list, is {_kind(value)}")
        inner = get_args(hint)[0]
        return tuple(_read_value(inner, one, f"{where}[{i}]", bounds, ranges) for i, one in enumerate(value))
    return _read_scalar(hint, value, where, bounds)


def _read_scalar(hint: Any, value: Any, where: str, bounds: tuple[float, float] | None) -> Any:
    # bool is an int to Python, but `threads = true` is a mistake.
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
        str: isinstance(value, str),
        Path: isinstance(value, str) and value != "",
    }
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", Path: "a path"}
    assert hint in fits, f"no reader for {hint}"
    if not fits[hint]:
        raise ConfigError(f"{where}: must be {nouns[hint]}, is {_kind(value)} ({_show(value)})")
    if bounds is not None and not bounds[0] <= value <= bounds[1]:
        raise ConfigError(f"{where}: must be from {bounds[0]:,} to {bounds[1]:,}, is {value:,}")
    return hint(value)


def _noun(path: str) -> str:
    return "key" if path else "section"


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known are {', '.join(sorted(known))}"


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a whole number", float: "a number", str: "a string"}
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return names.get(type(value), "a date or time")


def _show(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
