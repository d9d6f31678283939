"""What is kept under the keys of L1, as bytes, and back. Pure.

Redis may be shared, restored, cut short or written to by others, so whatever comes from there is checked whole: what is
not exactly a value of ours, for that key, is None and counts as absent. Nothing here raises for bytes that it reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
import numpy as np
from xxhash import xxh64_intdigest

from router.cachekeys import GENERATION
from router.wire import Columns

FORMAT = 1
VALUE_BYTES_MAX = 8 << 20
TICK_MS = 200
Version = tuple[int, int]


class Origin(NamedTuple):
    """Who made a value, and when by its own count: docs/caching.md, `settled`."""

    node: str
    boot: int
    tick: int

    def older(self, age_ms: int) -> Origin:
        """Of something that is at least so much older. Ticks are never nearer to each other than TICK_MS."""
        return self._replace(tick=self.tick - -(-age_ms // TICK_MS) - 1) if age_ms else self


class CachedAnswer(NamedTuple):
    """A whole answer. version: of the user's record that it was made from. total: shards, all of which answered."""

    version: Version
    origin: Origin
    columns: Columns
    total: int


class CachedUser(NamedTuple):
    """vector: raw FP16 bytes."""

    version: Version
    origin: Origin
    vector: bytes


def pack_answer(user_id: int, context: str, answer: CachedAnswer) -> bytes:
    columns = answer.columns
    body: bytes = msgpack.packb(
        (
            user_id,
            context,
            GENERATION,
            answer.version,
            answer.origin,
            np.ascontiguousarray(columns.ids, "<u8").tobytes(),
            np.ascontiguousarray(columns.scores, "<f4").tobytes(),
            columns.metadata,
            answer.total,
        )
    )
    packed: bytes = msgpack.packb((FORMAT, xxh64_intdigest(body), body))
    return packed


def unpack_answer(user_id: int, context: str, data: object) -> CachedAnswer | None:
    """The answer in `data` if that is what `pack_answer` made for the same user and context."""
    body = _body(data)
    if body is None:
        return None
    try:
        user, hash_, generation, version, origin, ids, scores, metadata, total = body
        if (user, hash_, generation) != (user_id, context, GENERATION):
            return None
        count, rest = divmod(len(ids), 8)
        if rest or len(scores) != 4 * count or type(total) is not int or total < 1:
            return None
        if metadata is not None and (
            type(metadata) is not list
            or len(metadata) != count
            or not all(type(one) is bytes for one in metadata)
        ):
            return None
        columns = Columns(np.frombuffer(ids, "<u8"), np.frombuffer(scores, "<f4"), metadata)
        return CachedAnswer(_version(version), _origin(origin), columns, total)
    except (TypeError, ValueError):
        return None


def pack_user(user_id: int, user: CachedUser) -> bytes:
    """The FP16 bytes first, so that others can read them; then a trailer, its length and a checksum over all before."""
    trailer: bytes = msgpack.packb((FORMAT, user_id, GENERATION, user.version, user.origin))
    whole = user.vector + trailer + len(trailer).to_bytes(2, "little")
    return whole + xxh64_intdigest(whole).to_bytes(8, "little")


def unpack_user(user_id: int, dim: int, data: object) -> CachedUser | None:
    """The user in `data` if that is what `pack_user` made for the same user, with a vector of `dim`."""
    if type(data) is not bytes or len(data) < 2 * dim + 10:
        return None
    whole = data[:-8]
    if xxh64_intdigest(whole) != int.from_bytes(data[-8:], "little"):
        return None
    if 2 * dim + int.from_bytes(whole[-2:], "little") + 2 != len(whole):
        return None
    try:
        format_, user, generation, version, origin = msgpack.unpackb(whole[2 * dim : -2])
        if (format_, user, generation) != (FORMAT, user_id, GENERATION):
            return None
        return CachedUser(_version(version), _origin(origin), whole[: 2 * dim])
    except (TypeError, ValueError):  # msgpack's own errors are ValueErrors
        return None


def _body(data: object) -> list[Any] | None:
    if type(data) is not bytes or len(data) > VALUE_BYTES_MAX:
        return None
    try:
        format_, check, body = msgpack.unpackb(data)
        if format_ != FORMAT or type(body) is not bytes or check != xxh64_intdigest(body):
            return None
        fields = msgpack.unpackb(body)
    except (TypeError, ValueError):
        return None
    return fields if type(fields) is list else None


def _version(raw: Any) -> Version:
    """Raises TypeError, ValueError."""
    epoch, sequence = raw
    if type(epoch) is not int or type(sequence) is not int:
        raise TypeError("a version is two integers")
    return epoch, sequence


def _origin(raw: Any) -> Origin:
    """Raises TypeError, ValueError."""
    node, boot, tick = raw
    if type(node) is not str or type(boot) is not int or type(tick) is not int:
        raise TypeError("an origin is a name and two integers")
    return Origin(node, boot, tick)
