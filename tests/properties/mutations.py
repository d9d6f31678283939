"""Broken inputs for fuzzing: frames, requests and HTTP messages that begin valid, and what random hands make of them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import msgpack

DIM = 4
VECTOR = [0.1, 0.2, 0.3, 0.4]
REQUESTS: list[dict[str, Any]] = [
    {"id": 1, "op": "ping"},
    {"id": "a", "op": "status"},
    {"id": 2, "op": "recommend", "user_id": 7, "k": 10, "require_all": [1, 2], "exclude": [], "metadata": True},
    {"id": 3, "op": "recommend", "user_id": "18446744073709551615", "timeout_ms": 50.5, "session": [[1, 2, 3]]},
    {"id": 4, "op": "similar", "positive": [1, "2"], "negative": [3], "k": 5},
    {"id": 5, "op": "similar", "media_id": 9},
    {"id": 6, "op": "search", "vector": VECTOR, "dtype": "f4", "require_any": [1]},
    {"id": 7, "op": "batch", "user_id": 7, "media_ids": [1, 2, 3]},
    {"id": 8, "op": "get", "kind": "item", "ids": [1, 2], "vector": True},
    {"id": 9, "op": "put_items", "items": [{"media_id": 1, "vector": VECTOR, "classes": [1], "metadata": {"a": {"b": [1]}}}]},
    {"id": 10, "op": "put_users", "users": [{"user_id": 1, "vector": VECTOR}], "ack": "all", "write_id": "0f" * 16},
    {"id": 11, "op": "delete_items", "media_ids": [1], "ack": "quorum"},
    {"id": 12, "op": "delete_users", "user_ids": [1]},
    {"id": 13, "op": "events", "after": 0, "wait_ms": 10},
    {"id": 14, "op": "forget_node", "node": "node-1"},
    {"id": 15, "op": "cluster", "action": "join", "node": "n", "capacity": 2},
    {"id": 16, "op": "failover", "shard": 1, "to": "n"},
    {"id": 17, "op": "moves", "action": "move", "shard": 1, "source": "a", "target": "b", "bytes_per_s": 0},
    {"id": 18, "op": "maintenance", "node": "n", "on": True},
    {"id": 19, "op": "keyring", "action": "use", "fingerprint": "abcd"},
    {"id": 20, "op": "repair", "shard": 1},
]  # fmt: skip
BYTES = [
    bytes(2 * DIM), b"\x00\x7e" * DIM, b"\xff" * (4 * DIM), b"\x00\x00\x80\x7f" * DIM, bytes(16), b"\x01" * 16, b"", b"\xff\xfe",
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for turn in range(depth):
        value = {"a": value} if turn % 2 else [value]
    return value


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0, 5e-324, 1.5, "",
    "a" * 300, "\x00", "١٢", "0x1", "1e9", "٣" * 20,
    "9" * 25, "ÿ", "\U0001f600", [], {}, [[]], {"": {}}, [None] * 20, [1] * 1_500,
    ["1"] * 1_200, [[1, 2, 3]] * 1_100, [[1, 2]], nested(30),
    nested(300), {"a": nested(250)}, {"k": 1}, {"media_id": 1}, "item", "primary",
]  # fmt: skip
NASTY_JSON: list[Any] = [
    10**30,
    -(10**400),
    10**5_000,
    float("nan"),
    float("inf"),
    "\ud800",
    {"\udfff": 1},
    nested(900),
]
NASTY_MSGPACK: list[Any] = [
    *BYTES, msgpack.Timestamp(2**40, 5), msgpack.ExtType(5, b"abc"), msgpack.ExtType(127, bytes(60)), float("nan"), float("-inf"),
    {1: 2}, {b"a": 1}, {"metadata": {1: 1}},
]  # fmt: skip
# They stand in many inputs and are never changed themselves.
_SHARED = frozenset(map(id, [*NASTY, *NASTY_JSON, *NASTY_MSGPACK]))
# Whole frames that no mutation would hit on.
RAW_MSGPACK = [
    b"\x91" * 3_000, b"\x81\xa1a" * 2_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff" + b"\xc0" * 65_535, b"\xc1", b"",
    b"\xa1\xff", b"\x92\x01",
]  # fmt: skip
RAW_JSON = [
    "[" * 5_000, '{"a":' * 5_000, "[" * 50_000 + "]" * 50_000, "1" * 6_000, "-" + "9" * 20_000, '{"id":' + "1" * 4_400 + "}",
    "nul", "", "\ufeff{}", '{"id":1e400,"op":"ping"}', '{"id":1,"id":2}', '"' + "\\u" * 10, "{" + '"a":1,' * 1_000 + '"a":1}',
    "\x00", "[NaN]", "-Infinity",
]  # fmt: skip


def mutated_value(rng: random.Random, nasty: list[Any]) -> Any:
    """One request, or several, with nodes replaced, removed, added or renamed."""
    value = copy.deepcopy(rng.choice(REQUESTS))
    for _ in range(rng.randrange(4)):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(keys)
            inside = place[key]
            if isinstance(inside, dict | list) and id(inside) not in _SHARED and rng.random() < 0.6:
                place = place[key]
                continue
            match rng.randrange(5):
                case 0:
                    del place[key]
                case 1 if isinstance(place, dict):
                    place[str(rng.choice(nasty))[:80]] = place.pop(key)
                case 2 if isinstance(place, dict):
                    place[rng.choice(["k", "id", "op", "ids", "vector", "user_id", "x"])] = rng.choice(nasty)
                case _:
                    place[key] = rng.choice(nasty)
            break
    return [value] * rng.randrange(1, 4) if rng.random() < 0.1 else value


def mutated_bytes(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """Bits flipped, bytes cut, doubled, put in, or another's put into it."""
    data = bytearray(raw)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randrange(1, 9)]
            case 2:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                del data[at:]
            case _:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at:at] = other[start : start + rng.randrange(1, 60)]
    return bytes(data)


PACKED = [msgpack.packb(one) for one in REQUESTS]
SPELT = [json.dumps(one).encode() for one in REQUESTS]


def msgpack_frame(rng: random.Random) -> bytes:
    choice = rng.random()
    if choice < 0.02:
        return rng.choice(RAW_MSGPACK)
    if choice < 0.05:
        return rng.randbytes(rng.randrange(200))
    if choice < 0.5:
        return mutated_bytes(rng, rng.choice(PACKED), PACKED)
    try:
        packed: bytes = msgpack.packb(mutated_value(rng, NASTY + NASTY_MSGPACK))
    except (ValueError, OverflowError):  # what no client could send
        return b""
    return mutated_bytes(rng, packed, PACKED) if choice < 0.6 else packed


def json_frame(rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.02:
        return rng.choice(RAW_JSON)
    if choice < 0.05:
        return rng.randbytes(rng.randrange(200)).decode("utf-8", "replace")
    if choice < 0.5:
        return mutated_bytes(rng, rng.choice(SPELT), SPELT).decode("utf-8", "replace")
    limit = 10**4_299
    value = mutated_value(
        rng, [one for one in NASTY + NASTY_JSON if type(one) is not int or abs(one) < limit]
    )
    return json.dumps(value, ensure_ascii=rng.random() < 0.9)


def _message(head: str, body: bytes = b"") -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if body or head.startswith("POST") else ""
    return f"{head}\r\n{length}\r\n".encode() + body


MESSAGES = [
    _message("GET /recommend?user_id=7&k=5&context=homepage HTTP/1.1\r\nHost: x"),
    _message(
        "GET /similar?positive=1,2&negative=3&session=1:2:3 HTTP/1.1\r\nHost: x\r\nOrigin: https://a.example"
    ),
    _message("HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: keep-alive"),
    _message("OPTIONS /search HTTP/1.1\r\nHost: x"),
    _message("GET / HTTP/1.0"),
    _message("GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c"),
    _message(
        "POST /recommend/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json",
        b'{"user_id": 7, "media_ids": [1, 2]}',
    ),
    _message(
        "POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue",
        json.dumps({"vector": VECTOR, "k": 3}).encode(),
    ),
    _message("POST /search HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked", b"5\r\nabcde\r\n0\r\n\r\n"),
]


def http_stream(rng: random.Random) -> bytes:
    """Some messages after each other, whole or broken, sometimes with a broken JSON body."""
    if rng.random() < 0.03:
        return rng.randbytes(rng.randrange(300))
    parts = [rng.choice(MESSAGES) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.2:
        body = json_frame(rng).encode("utf-8", "surrogatepass")
        path = rng.choice(["/search", "/recommend/batch"])
        parts.append(_message(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json", body))
    raw = b"".join(parts)
    return raw if rng.random() < 0.1 else mutated_bytes(rng, raw, MESSAGES)
