"""Small JSON files with a checksum over their fields. Pure."""

from __future__ import annotations

import json
from typing import Any

from xxhash import xxh3_64_hexdigest

CHECK = "check"


def encode(fields: dict[str, Any]) -> bytes:
    return json.dumps({**fields, CHECK: _check(fields)}).encode() + b"\n"


def decode(data: bytes) -> dict[str, Any]:
    """Raises ValueError, TypeError."""
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise TypeError("it is no map")
    if fields.pop(CHECK, None) != _check(fields):
        raise ValueError("its checksum does not match")
    return fields


def _check(fields: dict[str, Any]) -> str:
    held = {name: value for name, value in fields.items() if name != CHECK}
    return xxh3_64_hexdigest(json.dumps(held, sort_keys=True).encode())
