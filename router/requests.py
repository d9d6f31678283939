"""Requests of apps: typed, checked, with vectors ready to search or store. Pure.

`parse` is the only door. What comes out is safe to act on: ids fit 64 bits, vectors are float16 of the right
dimension (unit length for cosine), classes sorted and below the class width, metadata packed and bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import msgpack
import numpy as np
import numpy.typing as npt

from router import operating, shapes
from router.errors import RequestError
from router.operating import Operating
from router.shapes import Ack, Priority
from router.vectors import Vectors, from_wire
from storage.config import Metric
from storage.records import ID_MAX, METADATA_BYTES_MAX, NO_WRITE_ID, Kind
from storage.view import ClassConstraint

METADATA_DEPTH_MAX = 256  # its own map counts
TIMESTAMP_SECONDS = range(-62_135_596_800, 253_402_300_800)  # years 1 to 9999, which RFC 3339 can spell

# What goes first, where searches wait.
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
Session = tuple[tuple[int, int, int], ...]  # (shard, epoch, sequence) each


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is let in. Sizes in bytes or counts as named; docs/protocol.md tells them to clients."""

    dim: int
    metric: Metric = "cosine"
    class_width: int = 256
    k_max: int = 10_000
    items_max: int = 1_000
    examples_max: int = 100
    metadata_bytes_max: int = METADATA_BYTES_MAX
    frame_bytes_max: int = 8 << 20
    frame_requests_max: int = 1_024


@dataclass(frozen=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What every question for the k best items has."""

    k: int
    constraint: ClassConstraint
    metadata: bool
    timeout_ms: float | None
    session: Session
    # Place in PRIORITIES.
    priority: int = 0
    require_full: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommend(Query):
    user_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Similar(Query):
    positive: tuple[int, ...]
    negative: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search(Query):
    vector: npt.NDArray[np.float16]  # [dim]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    user_id: int
    media_ids: tuple[int, ...]
    metadata: bool
    timeout_ms: float | None
    session: Session
    require_full: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Get:
    kind: Kind
    ids: tuple[int, ...]
    vector: bool
    timeout_ms: float | None
    session: Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Put:
    """Parallel columns, one entry per record, as sent. vectors: float16 [n, dim]; metadata: packed."""

    kind: Kind
    ids: tuple[int, ...]
    vectors: Vectors
    classes: tuple[tuple[int, ...], ...]
    metadata: tuple[bytes, ...]
    ack: Ack
    write_id: bytes | None
    timeout_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Delete:
    kind: Kind
    ids: tuple[int, ...]
    ack: Ack
    write_id: bytes | None
    timeout_ms: float | None


Request = Ping | Operating | Recommend | Similar | Search | Batch | Get | Put | Delete

PING = Ping()


def parse(op: str, fields: dict[str, Any], limits: Limits) -> Request:
    """The request that `op` and its fields (without `id` and `op`) ask for. Raises RequestError only."""
    if op in operating.PARSERS:
        return operating.PARSERS[op](fields)
    parser = _PARSERS.get(op)
    if parser is None:
        raise RequestError(
            "unknown_op", f"there is no op {op[:64]!a}; see docs/protocol.md for those there are", "op"
        )
    return parser(fields, limits)


def _ping(fields: dict[str, Any], limits: Limits) -> Ping:
    if fields:
        shapes.convert(fields, shapes.NothingFields)
    return PING


def _recommend(fields: dict[str, Any], limits: Limits) -> Recommend:
    raw = shapes.convert(fields, shapes.RecommendFields)
    return Recommend(user_id=_id(raw.user_id, "user_id"), **_query(raw, limits))


def _similar(fields: dict[str, Any], limits: Limits) -> Similar:
    raw = shapes.convert(fields, shapes.SimilarFields)
    if raw.media_id is not None:
        if raw.positive or raw.negative:
            raise RequestError("bad_request", "send media_id, or positive and negative, not both", "media_id")
        raw.positive = [raw.media_id]
    elif not raw.positive:
        raise RequestError("missing_field", "send media_id, or at least one id in positive", "positive")
    if len(raw.positive) + len(raw.negative) > limits.examples_max:
        raise RequestError("too_large", f"send at most {limits.examples_max} examples in all", "positive")
    positive = _ids(raw.positive, "positive", limits)
    return Similar(positive=positive, negative=_ids(raw.negative, "negative", limits), **_query(raw, limits))


def _search(fields: dict[str, Any], limits: Limits) -> Search:
    raw = shapes.convert(fields, shapes.SearchFields)
    vector = from_wire([raw.vector], limits.dim, limits.metric, dtype=raw.dtype)[0]
    return Search(vector=vector, **_query(raw, limits))


def _batch(fields: dict[str, Any], limits: Limits) -> Batch:
    raw = shapes.convert(fields, shapes.BatchFields)
    return Batch(
        user_id=_id(raw.user_id, "user_id"),
        media_ids=_ids(raw.media_ids, "media_ids", limits),
        metadata=raw.metadata,
        timeout_ms=raw.timeout_ms,
        session=tuple(raw.session),
        require_full=raw.require_full,
    )


def _get(fields: dict[str, Any], limits: Limits) -> Get:
    raw = shapes.convert(fields, shapes.GetFields)
    return Get(
        kind=Kind.ITEM if raw.kind == "item" else Kind.USER,
        ids=_ids(raw.ids, "ids", limits),
        vector=raw.vector,
        timeout_ms=raw.timeout_ms,
        session=tuple(raw.session),
    )


def _put_items(fields: dict[str, Any], limits: Limits) -> Put:
    _count(fields, "items", limits)
    raw = shapes.convert(fields, shapes.PutItemsFields)
    return _put(Kind.ITEM, "items", "media_id", raw, raw.items, [i.media_id for i in raw.items], limits)


def _put_users(fields: dict[str, Any], limits: Limits) -> Put:
    _count(fields, "users", limits)
    raw = shapes.convert(fields, shapes.PutUsersFields)
    return _put(Kind.USER, "users", "user_id", raw, raw.users, [u.user_id for u in raw.users], limits)


def _put(
    kind: Kind,
    plural: str,
    name: str,
    raw: shapes.PutItemsFields | shapes.PutUsersFields,
    records: Sequence[shapes.ItemFields | shapes.UserFields],
    ids: list[int | str],
    limits: Limits,
) -> Put:
    vectors = [r.vector for r in records]
    packer = msgpack.Packer()
    return Put(
        kind=kind,
        ids=tuple(_id(one, f"{plural}[{i}].{name}") for i, one in enumerate(ids)),
        vectors=from_wire(vectors, limits.dim, limits.metric, dtype=raw.dtype, path=plural + "[{}].vector"),
        classes=tuple(_classes(r.classes, f"{plural}[{i}].classes", limits) for i, r in enumerate(records)),
        metadata=tuple(
            _metadata(packer, r.metadata, f"{plural}[{i}].metadata", limits) for i, r in enumerate(records)
        ),
        ack=raw.ack,
        write_id=_write_id(raw.write_id),
        timeout_ms=raw.timeout_ms,
    )


def _delete_items(fields: dict[str, Any], limits: Limits) -> Delete:
    raw = shapes.convert(fields, shapes.DeleteItemsFields)
    return _delete(Kind.ITEM, raw, raw.media_ids, "media_ids", limits)


def _delete_users(fields: dict[str, Any], limits: Limits) -> Delete:
    raw = shapes.convert(fields, shapes.DeleteUsersFields)
    return _delete(Kind.USER, raw, raw.user_ids, "user_ids", limits)


def _delete(kind: Kind, raw: shapes.WriteFields, ids: list[int | str], field: str, limits: Limits) -> Delete:
    checked = _ids(ids, field, limits)
    return Delete(
        kind=kind, ids=checked, ack=raw.ack, write_id=_write_id(raw.write_id), timeout_ms=raw.timeout_ms
    )


_PARSERS: dict[str, Callable[[dict[str, Any], Limits], Request]] = {
    "ping": _ping,
    "recommend": _recommend,
    "similar": _similar,
    "search": _search,
    "batch": _batch,
    "get": _get,
    "put_items": _put_items,
    "put_users": _put_users,
    "delete_items": _delete_items,
    "delete_users": _delete_users,
}
OPS = frozenset(_PARSERS) | frozenset(operating.PARSERS)

# ---- Single values ----


def _query(raw: shapes.QueryFields, limits: Limits) -> dict[str, Any]:
    if not 1 <= raw.k <= limits.k_max:
        raise RequestError("out_of_range", f"ask for 1 to {limits.k_max} hits", "k")
    return {
        "k": raw.k,
        "constraint": ClassConstraint(
            _classes(raw.require_all, "require_all", limits),
            _classes(raw.require_any, "require_any", limits),
            _classes(raw.exclude, "exclude", limits),
        ),
        "metadata": raw.metadata,
        "timeout_ms": raw.timeout_ms,
        "session": tuple(raw.session),
        "priority": PRIORITIES.index(raw.priority),
        "require_full": raw.require_full,
    }


def _id(raw: int | str, field: str) -> int:
    if isinstance(raw, str):
        # isdecimal alone lets other scripts' digits through
        if not (raw.isascii() and raw.isdecimal() and len(raw) <= 20):
            raise RequestError("bad_type", "send an id as a whole number or its decimal digits", field)
        raw = int(raw)
    if raw > ID_MAX:
        raise RequestError("out_of_range", "an id is at most 2^64 - 1", field)
    return raw


def _ids(raw: list[int | str], field: str, limits: Limits) -> tuple[int, ...]:
    if len(raw) > limits.items_max:
        raise RequestError("too_large", f"send at most {limits.items_max} ids in one request", field)
    return tuple([_id(one, f"{field}[{i}]") for i, one in enumerate(raw)])


def _count(fields: dict[str, Any], field: str, limits: Limits) -> None:
    """Refuses too many records before each is looked at."""
    value = fields.get(field)
    if isinstance(value, list) and len(value) > limits.items_max:
        raise RequestError("too_large", f"send at most {limits.items_max} records in one request", field)


def _classes(raw: list[int], field: str, limits: Limits) -> tuple[int, ...]:
    if not raw:
        return ()
    ids = sorted(set(raw))
    if ids[0] < 0 or ids[-1] >= limits.class_width:
        raise RequestError("out_of_range", f"a class is 0 to {limits.class_width - 1}", field)
    return tuple(ids)


def _metadata(packer: msgpack.Packer, raw: dict[str, Any], field: str, limits: Limits) -> bytes:
    try:
        packed: bytes = packer.pack(raw)
    except (
        TypeError,
        ValueError,
        OverflowError,
    ):  # a surrogate, an integer beyond 64 bits, or nested too deep
        message = (
            "metadata cannot be packed: send maps, lists, strings, bytes, booleans, null and 64-bit numbers"
        )
        raise RequestError("bad_request", message, field) from None
    if len(packed) > limits.metadata_bytes_max:
        message = f"metadata is at most {limits.metadata_bytes_max} bytes packed, not {len(packed)}"
        raise RequestError("too_large", message, field)
    wrong = _wrong_in(raw)
    if wrong is not None:
        raise RequestError("bad_request", wrong, field)
    return packed


def _wrong_in(metadata: dict[str, Any]) -> str | None:
    """What not every reader of the metadata could take, level by level: what is deep must not recurse here."""
    level: list[dict[Any, Any] | list[Any]] = [metadata]
    for _ in range(METADATA_DEPTH_MAX):
        deeper: list[dict[Any, Any] | list[Any]] = []
        for one in level:
            if isinstance(one, dict):
                if not all(type(key) is str for key in one):
                    return "the keys of maps in metadata are strings"
                values = list(one.values())
            else:
                values = one
            for value in values:
                if isinstance(value, dict | list):
                    deeper.append(value)
                elif isinstance(value, float):
                    if not math.isfinite(value):
                        return "numbers in metadata are finite"
                elif isinstance(value, msgpack.Timestamp) and value.seconds not in TIMESTAMP_SECONDS:
                    return "timestamps in metadata are of the years 1 to 9999"
        if not deeper:
            return None
        level = deeper
    return f"metadata is nested at most {METADATA_DEPTH_MAX} deep"


def _write_id(raw: Any) -> bytes | None:
    if raw is None:
        return None
    if isinstance(raw, str):
        if len(raw) != 32 or not raw.isalnum():  # fromhex skips blanks, which we do not
            raise RequestError("bad_type", "send write_id as 16 bytes or 32 hex digits", "write_id")
        try:
            raw = bytes.fromhex(raw)
        except ValueError:
            raise RequestError("bad_type", "send write_id as 16 bytes or 32 hex digits", "write_id") from None
    if not isinstance(raw, bytes):
        raise RequestError("bad_type", "send write_id as 16 bytes or 32 hex digits", "write_id")
    if len(raw) != 16 or raw == NO_WRITE_ID:
        raise RequestError("out_of_range", "send write_id as 16 random bytes, not all zero", "write_id")
    return raw
