"""The bytes between nodes: frames, the hello, and what two nodes must agree on. Pure.

A connection begins with MAGIC and a hello frame from the node that connects; the listener answers with its
own hello, which carries the reason when it refuses. Then frames both ways, in any order:

    u32 little endian length | msgpack [type, request_id, op or code, body]

A frame's length is checked before anything is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack

MAGIC = b"GMCOpeer"
# Of a connection for the files of snapshots (node/bulk.py).
BULK_MAGIC = b"GMCObulk"
# 2: a pull names the last record by its checksum, and answers say how old they may be.
# 3: an asker takes a read back, and a search says how urgent it is and for whom.
#    A hello tells the cluster's name from its random id.
FORMAT_MIN = 3
FORMAT_MAX = 3
HELLO_BYTES_MAX = 4 << 10
HEADER = struct.Struct("<I")

# CANCEL: the asker wants no answer to that request any more; it may come nevertheless.
REQUEST, REPLY, ERROR, HEARTBEAT, CANCEL = range(5)
# What coordinators ask for apps that read; only these can be cancelled.
READS = frozenset({"search", "get", "score"})

BROKEN_MSGPACK = (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException)


OTHER_CLUSTER = "other_cluster"


class ProtocolError(Exception):
    """The remote sent what no peer sends. Its connection is closed; nothing else is affected."""


class HelloRefusedError(Exception):
    """The two nodes do not belong together; the sentence says in what they differ. code: stable, sent along."""

    def __init__(self, message: str, code: str = "refused") -> None:
        self.code = code
        super().__init__(message)


@dataclass(kw_only=True, slots=True)
class Hello:
    """Who speaks. Everything but `node` and `boot` must agree between two peers, and `cluster_id` where both know it.

    cluster: the configured `cluster.id`. cluster_id: the random one of the layout; set once that is known, empty before.
    """

    cluster: str
    node: str
    shard_count: int
    dim: int
    metric: str
    class_width: int = 256
    # Counts the starts of this node, so that an old process can be told from a new one.
    boot: int = 0
    cluster_id: str = ""
    format_min: int = FORMAT_MIN
    format_max: int = FORMAT_MAX


def pack_hello(hello: Hello, refused: HelloRefusedError | None = None) -> bytes:
    """The hello as a frame's payload; unknown keys are skipped by the reader, so fields can be added."""
    why = {"refused": None} if refused is None else {"refused": str(refused), "code": refused.code}
    packed: bytes = msgpack.packb(asdict(hello) | why)
    return packed


def unpack_hello(payload: bytes | memoryview) -> tuple[Hello, HelloRefusedError | None]:
    """A hello and what it was refused with. Raises ProtocolError."""
    try:
        said = msgpack.unpackb(payload)
    except BROKEN_MSGPACK as error:
        raise ProtocolError(f"the hello is not msgpack: {error}") from error
    if not isinstance(said, dict):
        raise ProtocolError("the hello is not a map")
    values: dict[str, Any] = {}
    for one in fields(Hello):
        # A node that knows of no layout may leave its id out.
        value = said.get(one.name, "" if one.name == "cluster_id" else None)
        wanted = str if one.name in ("cluster", "cluster_id", "node", "metric") else int
        if type(value) is not wanted:
            raise ProtocolError(f"the hello's {one.name} is missing or of a wrong type")
        values[one.name] = value
    refused, code = said.get("refused"), said.get("code")
    if not isinstance(refused, str):
        return Hello(**values), None
    return Hello(**values), HelloRefusedError(refused, code if isinstance(code, str) else "refused")


def check_hello(mine: Hello, theirs: Hello) -> int:
    """The format version to speak: the highest that both know. Raises HelloRefusedError."""
    version = min(mine.format_max, theirs.format_max)
    if version < max(mine.format_min, theirs.format_min):
        raise HelloRefusedError(
            f"no common format: {mine.node} speaks {mine.format_min}–{mine.format_max}, "
            f"{theirs.node} speaks {theirs.format_min}–{theirs.format_max}; upgrade the older one"
        )
    if mine.cluster != theirs.cluster:
        raise HelloRefusedError(
            f"different cluster: {mine.node} is of {mine.cluster!r}, {theirs.node} is of {theirs.cluster!r}",
            OTHER_CLUSTER,
        )
    if mine.cluster_id and theirs.cluster_id and mine.cluster_id != theirs.cluster_id:
        raise HelloRefusedError(
            f"another cluster of the same name: {mine.node} goes by a layout of {mine.cluster_id}, {theirs.node} by one of "
            f"{theirs.cluster_id}; give one of the two another cluster.id, or this node the data directory that belongs to it",
            OTHER_CLUSTER,
        )
    for key in ("shard_count", "dim", "metric", "class_width"):
        here, there = getattr(mine, key), getattr(theirs, key)
        if here != there:
            raise HelloRefusedError(f"different {key}: {mine.node} has {here!r}, {theirs.node} has {there!r}")
    if mine.node == theirs.node:
        raise HelloRefusedError(
            f'two nodes are named "{mine.node}"; each node of a cluster needs its own name'
        )
    return version


class FrameParser:
    """Bytes as they arrive → payloads of whole frames. A payload is a view, good until the next `feed`."""

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._rest = bytearray()
        self._needed = HEADER.size

    @property
    def missing(self) -> int:
        """How many bytes the frame that has begun still lacks; 0 between frames."""
        return max(0, self._needed - len(self._rest)) if self._rest else 0

    def feed(self, chunk: bytes | bytearray) -> Iterator[memoryview]:
        """Payloads of the frames that are now whole. Raises ProtocolError for one that is too long."""
        data: bytes | bytearray = chunk
        if self._rest:
            self._rest += chunk
            if len(self._rest) < self._needed:
                return
            data = self._rest
            self._rest = bytearray()
        start, end = 0, len(data)
        # Whole frames are parsed where they arrived; only a last, torn one is copied.
        with memoryview(data) as view:
            while end - start >= HEADER.size:
                (length,) = HEADER.unpack_from(data, start)
                if length > self.frame_bytes_max:
                    raise ProtocolError(f"a frame of {length:,} bytes; the bound is {self.frame_bytes_max:,}")
                stop = start + HEADER.size + length
                if stop > end:
                    break
                yield view[start + HEADER.size : stop]
                start = stop
            self._rest = bytearray(view[start:end])
        self._needed = HEADER.size
        if len(self._rest) >= HEADER.size:
            self._needed += HEADER.unpack_from(self._rest)[0]


def unpack_message(payload: memoryview) -> tuple[int, int, str, Any]:
    """(type, request_id, op or code, body). Raises ProtocolError."""
    try:
        message = msgpack.unpackb(payload, strict_map_key=False)
    except BROKEN_MSGPACK as error:
        raise ProtocolError(f"a frame is not msgpack: {error}") from error
    if type(message) is not list or len(message) != 4:
        raise ProtocolError("a frame is not [type, request_id, op, body]")
    kind, request_id, op, body = message
    if type(kind) is not int or type(request_id) is not int or type(op) is not str:
        raise ProtocolError("a frame's type, request_id or op has a wrong type")
    return kind, request_id, op, body
