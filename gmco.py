"""GMC-O's client: `async with gmco.connect([...]) as client`, or `with gmco.connect_blocking([...]) as client`.

Any node answers any request, so a client keeps one connection, shares it among all its tasks (requests that wait at the
same moment share a frame), and moves to the next node when it breaks or refuses. What is about one user goes to that user's
node, which has the answer in its cache, while there is a connection to it. The wire is told in docs/protocol.md.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import random
import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import msgpack
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, wrap_client_stream

__all__ = [
    "Answer",
    "BadRequest",
    "BlockingClient",
    "Client",
    "Coverage",
    "DeadlineExceeded",
    "Events",
    "GmcoError",
    "Hit",
    "Item",
    "NotFound",
    "Overloaded",
    "Record",
    "Unavailable",
    "User",
    "Written",
    "connect",
    "connect_blocking",
]

Ack = Literal["primary", "quorum", "all"]
Priority = Literal["interactive", "batch", "prefetch"]
Session = Sequence[tuple[int, int, int]]
_Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]
Vector = Any
"""float numbers, or FP32 little endian bytes, or a numpy array of float16, float32 or float64."""

FRAME_BYTES_MAX = 64 << 20
REQUEST_BYTES_MAX = 8 << 20  # a node closes the connection over it, and with it fails everyone's requests
FRAME_REQUESTS_MAX = 256
FRAME_REQUEST_BYTES = 1 << 20
BACKOFF_S = (0.02, 1.0)
ATTEMPTS_MAX = 64
PING_S = 5.0
DIAL_S = 2.0
WAIT_S = 0.5  # so long a node that refuses is tried again: it may be about to start
CLOSE_S = 0.2


class GmcoError(Exception):
    """Whatever went wrong. `code` is stable (docs/protocol.md); `field` names what was wrong in the request."""

    def __init__(
        self, code: str, message: str, field: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(f"{code}: {message}" + (f" (field {field})" if field else ""))
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms


class BadRequest(GmcoError, ValueError):  # noqa: N818 - the names that apps of such services know
    """The request is wrong; sending it again will not help."""


class NotFound(GmcoError, LookupError):  # noqa: N818
    """There is no such user, item or node."""


class Overloaded(GmcoError):  # noqa: N818
    """Too much at once: wait `retry_after_ms`."""


class Unavailable(GmcoError, ConnectionError):  # noqa: N818
    """No node could be reached that can answer."""


class DeadlineExceeded(GmcoError, TimeoutError):  # noqa: N818
    """Not answered, or no connection made, within the time limit. Whether a write was applied is then not known."""


_BAD = "bad_frame bad_request unknown_op unknown_field missing_field bad_type out_of_range bad_vector"
_CLASSES: dict[str, type[GmcoError]] = {
    **dict.fromkeys([*_BAD.split(), "wrong_dimension", "zero_vector", "too_large"], BadRequest),
    **dict.fromkeys(["unknown_user", "unknown_item", "unknown_node"], NotFound),
    **dict.fromkeys(["overloaded", "indexing"], Overloaded),
    **dict.fromkeys(
        ["unavailable", "shutting_down", "no_lease", "no_primary", "session_behind", "partial"], Unavailable
    ),
    "deadline_exceeded": DeadlineExceeded,
}
_MOVE = frozenset({"unavailable", "shutting_down"})  # another node may do better
_WAIT = frozenset({"overloaded", "indexing", "no_lease", "no_primary"})  # the same may do better soon
_BEHIND = "session_behind"  # another node may have what the session wrote, or this one soon
_UNSURE = frozenset({"deadline_exceeded", "outcome_unknown", "ack_timeout"})  # true after a lost try, too


@dataclass(frozen=True)
class Item:
    """What `put_items` writes. Class ids are those of the cluster's class table."""

    media_id: int
    vector: Vector
    classes: Sequence[int] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class User:
    """What `put_users` writes."""

    user_id: int
    vector: Vector
    classes: Sequence[int] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """An item or user as stored. `vector` is FP16 little endian bytes, if asked for."""

    id: int
    version: tuple[int, int]
    classes: tuple[int, ...]
    metadata: dict[str, Any]
    vector: bytes | None = None


@dataclass(frozen=True)
class Hit:
    media_id: int
    score: float
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Coverage:
    """How many shards answered. `missing` ones could not, for `reason`: the hits are then the best of the others."""

    answered: int
    total: int
    missing: tuple[int, ...] = ()
    reason: str = ""

    @property
    def complete(self) -> bool:
        return not self.missing


@dataclass(frozen=True)
class Answer:
    """Hits, best first. `stale_ms` is set when a replica that answered may be that far behind."""

    hits: list[Hit]
    coverage: Coverage | None = None
    stale_ms: float | None = None


@dataclass(frozen=True)
class Events:
    """What has happened to the cluster's members, as one start (`boot`) of one node saw it, in order of `sequence`.

    Give `next` as `after` to go on. From another node or boot, begin again with 0. `lost`: forgotten before they were read.
    """

    node: str
    boot: int
    events: tuple[dict[str, Any], ...]
    next: int
    lost: int


@dataclass(frozen=True)
class Written:
    """`session` given to later reads makes them reflect this write."""

    written: int
    session: tuple[tuple[int, int, int], ...]
    write_id: bytes


def _error(raw: Mapping[str, Any]) -> GmcoError:
    code = str(raw.get("code", "internal"))
    kind = _CLASSES.get(code, GmcoError)
    return kind(code, str(raw.get("message", "")), raw.get("field"), raw.get("retry_after_ms"))


class _Waiter:
    __slots__ = ("done", "packed", "reply")

    def __init__(self, packed: bytes) -> None:
        self.packed = packed
        self.done = trio.Event()
        self.reply: dict[str, Any] | None = None  # None when done: the connection broke


class _Link:
    """One connection. Its requests wait in `outbox`; those sent wait in `waiting` for replies."""

    def __init__(self, url: str, ws: Any) -> None:
        self.url = url
        self.alive = True
        self._ws = ws
        self._next = 0
        self._waiting: dict[int, _Waiter] = {}
        self._outbox: list[_Waiter] = []
        self._wake = trio.Event()

    def pack(self, op: str, fields: dict[str, Any]) -> tuple[int, bytes]:
        """The request's id on this connection, and its bytes. Raises BadRequest for too many of them."""
        self._next = id = self._next + 1
        packed: bytes = msgpack.packb({"id": id, "op": op, **fields})
        if len(packed) > REQUEST_BYTES_MAX:
            message = f"a request is at most {REQUEST_BYTES_MAX} bytes packed, not {len(packed)}"
            raise BadRequest("too_large", message)
        return id, packed

    async def ask(self, id: int, packed: bytes) -> dict[str, Any] | None:
        """The reply, or None when the connection broke before it came."""
        if not self.alive:
            return None
        waiter = _Waiter(packed)
        self._waiting[id] = waiter
        self._outbox.append(waiter)
        self._wake.set()
        try:
            await waiter.done.wait()
        finally:
            self._waiting.pop(id, None)
        return waiter.reply

    async def run(self) -> None:
        """Until the connection ends; then everyone who waits knows at once."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                nursery.start_soon(self._keep_alive)
                await self._receive()
                nursery.cancel_scope.cancel()
        except* (ConnectionClosed, trio.TooSlowError, ValueError, TypeError, KeyError):
            pass  # it broke, hung, or does not speak our protocol: to those who wait it is all the same
        finally:
            self.alive = False
            for waiter in self._waiting.values():
                waiter.done.set()
            with trio.move_on_after(CLOSE_S, shield=True):
                await self._ws.aclose()

    async def _receive(self) -> None:
        while True:
            frame = msgpack.unpackb(await self._ws.get_message(), strict_map_key=False)
            for reply in frame if isinstance(frame, list) else [frame]:
                waiter = self._waiting.get(reply["id"])
                if waiter is not None:
                    waiter.reply = reply
                    waiter.done.set()

    async def _send(self) -> None:
        outbox = self._outbox
        while True:
            await self._wake.wait()
            ready = 0
            while ready < len(outbox) < FRAME_REQUESTS_MAX:  # other tasks may be about to ask, too
                ready = len(outbox)
                await trio.lowlevel.checkpoint()
            while outbox:
                parts: list[bytes] = []
                size = 0
                while outbox and len(parts) < FRAME_REQUESTS_MAX and size < FRAME_REQUEST_BYTES:
                    if parts and size + len(outbox[0].packed) > FRAME_REQUEST_BYTES:
                        break
                    parts.append(outbox.pop(0).packed)
                    size += len(parts[-1])
                header = b"" if len(parts) == 1 else msgpack.Packer().pack_array_header(len(parts))
                await self._ws.send_message(header + b"".join(parts))
            self._wake = trio.Event()

    async def _keep_alive(self) -> None:
        """A host that hangs or vanished resets nothing; without this its requests would wait for their deadline."""
        while True:
            await trio.sleep(PING_S)
            with trio.fail_after(PING_S):
                await self._ws.ping()


def _vector(raw: Vector) -> tuple[bytes, str | None]:
    """Wire bytes and what they are: "f2", "f4", or None for bytes whose kind only the caller knows."""
    if isinstance(raw, bytes | bytearray | memoryview):
        return bytes(raw), None
    dtype = getattr(raw, "dtype", None)
    if dtype is not None:  # a numpy array (or what behaves like one); numpy itself stays optional
        kind = "f2" if dtype.itemsize == 2 and dtype.kind == "f" else "f4"
        return bytes(raw.astype("<" + kind).tobytes()), kind
    try:
        return struct.pack(f"<{len(raw)}f", *raw), "f4"
    except (struct.error, OverflowError, TypeError) as error:
        raise BadRequest("bad_vector", f"a vector is finite numbers within FP32: {error}", "vector") from None


def _vectors(raw: Iterable[Vector]) -> tuple[list[bytes], dict[str, Any]]:
    pairs = [_vector(one) for one in raw]
    kinds = {kind for _, kind in pairs}
    kind = kinds.pop() if len(kinds) == 1 else None
    return [packed for packed, _ in pairs], {} if kind is None else {"dtype": kind}


def _metadata(packed: bytes) -> dict[str, Any]:
    return msgpack.unpackb(packed, strict_map_key=False) if packed else {}


def _answer(reply: dict[str, Any]) -> Answer:
    hits = reply["hits"]
    count = len(hits["media_ids"]) // 8
    ids = struct.unpack(f"<{count}Q", hits["media_ids"])
    scores = struct.unpack(f"<{count}f", hits["scores"])
    packed = hits.get("metadata")
    metadata: Sequence[dict[str, Any] | None] = (
        [None] * count if packed is None else [_metadata(p) for p in packed]
    )
    raw = reply.get("coverage")
    coverage = None
    if raw:
        coverage = Coverage(raw["answered"], raw["total"], tuple(raw["missing"]), raw.get("reason", ""))
    return Answer(list(map(Hit, ids, scores, metadata)), coverage, reply.get("stale_ms"))


def _record(raw: dict[str, Any] | None) -> Record | None:
    if raw is None:
        return None
    epoch, sequence = raw["version"]
    classes, vector = tuple(raw["classes"]), raw.get("vector")
    return Record(raw["id"], (epoch, sequence), classes, _metadata(raw["metadata"]), vector)


def _written(reply: dict[str, Any], write_id: bytes) -> Written:
    session = tuple((shard, epoch, sequence) for shard, epoch, sequence in reply["session"])
    return Written(reply["written"], session, reply.get("write_id") or write_id)


class Client:
    """Made by `connect`. Methods may be called from many tasks at once; all raise GmcoError.

    `timeout_s` bounds a call with all its retries. A node takes at most its `router.deadline_ms` (100 ms by default) for a read,
    unless the call gives a `timeout_s` of its own; what some shards cannot answer by then is missing (`Answer.coverage`), or
    with `require_full` the error `partial`. Reads are tried on another node when one is gone or refuses; writes too,
    with the same write_id, so that a retry is never applied twice.
    """

    def __init__(self, urls: Sequence[str], timeout_s: float, nursery: trio.Nursery) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._timeout_s = timeout_s
        self._nursery = nursery
        self._at = random.randrange(len(urls))  # so that many clients spread over the nodes
        self._links: dict[str, _Link] = {}
        self._failures = dict.fromkeys(self._urls, 0)
        self._not_before = dict.fromkeys(self._urls, 0.0)
        self._why: dict[str, GmcoError] = {}  # of nodes that could not be connected to, until they can
        self._dialling = trio.Lock()
        self._wanted: set[str] = set()  # being connected to for users' sake
        self._seeds = {url: hashlib.blake2b(url.encode(), digest_size=16).digest() for url in self._urls}
        self._calls: set[trio.CancelScope] = set()
        self._closed = False

    async def ping(self, *, timeout_s: float | None = None) -> None:
        """Returns when a node has answered."""
        await self._call("ping", {}, timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """What the node in use says of itself and of its cluster."""
        reply = await self._call("status", {}, timeout_s)
        return {key: value for key, value in reply.items() if key not in ("id", "ok")}

    async def events(self, after: int = 0, *, wait_s: float = 0.0) -> Events:
        """Events past the sequence `after`; the node holds its answer back up to `wait_s` for the first (60 s at most).

        Numbers are of one node, so this asks no other when that one is lost meanwhile: it raises Unavailable at once.
        """
        wait_ms = min(max(0.0, wait_s * 1000), 60_000.0)
        fields = {"after": after, "wait_ms": wait_ms}
        reply = await self._call("events", fields, self._timeout_s + wait_ms / 1000, stay=True)
        return Events(
            reply["node"], reply["boot"], tuple(reply["events"]), reply["next"], reply.get("lost", 0)
        )

    async def forget_node(self, node: str, *, timeout_s: float | None = None) -> None:
        """Tells the cluster that a member which is down will not come back. By name, or by id in hex."""
        await self._call("forget_node", {"node": node}, timeout_s)

    async def keyring(
        self,
        action: Literal["list", "install", "use", "remove"],
        *,
        key: bytes | None = None,
        fingerprint: str | None = None,
        timeout_s: float | None = None,
    ) -> list[dict[str, Any]]:
        """Does something with gossip's keys on all alive nodes; what each has then, or why it could not."""
        given = {"key": key, "fingerprint": fingerprint}
        fields = {"action": action, **{name: value for name, value in given.items() if value is not None}}
        nodes: list[dict[str, Any]] = (await self._call("keyring", fields, timeout_s))["nodes"]
        return nodes

    async def cluster(
        self,
        action: Literal["show", "join", "leave", "set", "plan", "commit", "revert", "init", "recover"],
        fields: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Does something with the layout through the node in use, where changes are staged (docs/protocol.md, *Cluster*)."""
        changes = action in ("commit", "init", "recover")
        return await self._order("cluster", {**(fields or {}), "action": action}, changes, timeout_s)

    async def moves(
        self,
        action: Literal["list", "move", "cancel", "drain", "rebalance"] = "list",
        fields: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Replicas on their way, and orders that send them (docs/protocol.md, *Moves*). Returns when the order is committed."""
        return await self._order("moves", {**(fields or {}), "action": action}, action != "list", timeout_s)

    async def maintenance(self, node: str, on: bool, *, timeout_s: float | None = None) -> dict[str, Any]:
        """While it is on, that node leads nothing, and nobody rebuilds elsewhere what it holds."""
        return await self._order("maintenance", {"node": node, "on": on}, True, timeout_s)

    async def _order(
        self, op: str, fields: dict[str, Any], changes: bool, timeout_s: float | None
    ) -> dict[str, Any]:
        """The node is told to give up before we do, so that what has become of a commit is said, not guessed."""
        given = {name: value for name, value in fields.items() if value is not None}
        allowed_s = self._timeout_s if timeout_s is None else timeout_s
        given["timeout_ms"] = min(max(1.0, 800 * allowed_s), 60_000.0)
        reply = await self._call(op, given, allowed_s, write=changes)
        return {key: value for key, value in reply.items() if key not in ("id", "ok")}

    async def shards(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """`replicas`: every replica of every node, as that node tells it; `silent`: nodes that did not answer."""
        reply = await self._call("shards", {}, timeout_s)
        return {"replicas": reply["replicas"], "silent": reply["silent"]}

    async def failover(
        self,
        shard: int,
        *,
        to: str = "",
        force: bool = False,
        confirmed: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Another node leads the shard: `to`, or the one that has most of it; waits until it does.

        force: without a majority of its voters, which may lose writes. Without `confirmed` only what may be lost is told.
        """
        fields = {"shard": shard, "to": to, "force": force, "confirmed": confirmed}
        reply = await self._call("failover", fields, timeout_s)
        return {key: value for key, value in reply.items() if key not in ("id", "ok")}

    async def repair(self, shard: int, *, timeout_s: float | None = None) -> dict[str, Any]:
        """The shard's replicas are compared at one place of its log, and what differs is repaired: {"equal": …, "replicas":
        {node: state}, "written": …, …}."""
        allowed_s = self._timeout_s if timeout_s is None else timeout_s
        fields = {"shard": shard, "timeout_ms": min(max(1.0, 800 * allowed_s), 60_000.0)}
        reply = await self._call("repair", fields, allowed_s)
        return {key: value for key, value in reply.items() if key not in ("id", "ok")}

    async def recommend(
        self,
        user_id: int,
        k: int = 10,
        *,
        require_all: Sequence[int] = (),
        require_any: Sequence[int] = (),
        exclude: Sequence[int] = (),
        metadata: bool = True,
        session: Session = (),
        priority: Priority = "interactive",
        require_full: bool = False,
        timeout_s: float | None = None,
    ) -> Answer:
        """The k best items for a user, among those that the class ids allow."""
        fields = _query(k, require_all, require_any, exclude, metadata, session, priority, require_full)
        return _answer(
            await self._call(
                "recommend", {"user_id": user_id, **fields}, timeout_s, bounded=True, user=user_id
            )
        )

    async def similar(
        self,
        media_id: int | None = None,
        *,
        positive: Sequence[int] = (),
        negative: Sequence[int] = (),
        k: int = 10,
        require_all: Sequence[int] = (),
        require_any: Sequence[int] = (),
        exclude: Sequence[int] = (),
        metadata: bool = True,
        session: Session = (),
        priority: Priority = "interactive",
        require_full: bool = False,
        timeout_s: float | None = None,
    ) -> Answer:
        """The k items nearest to `media_id`, or to all of `positive` and away from `negative`."""
        fields = _query(k, require_all, require_any, exclude, metadata, session, priority, require_full)
        fields["positive"] = [*([] if media_id is None else [media_id]), *positive]
        fields["negative"] = list(negative)
        return _answer(await self._call("similar", fields, timeout_s, bounded=True))

    async def search(
        self,
        vector: Vector,
        k: int = 10,
        *,
        require_all: Sequence[int] = (),
        require_any: Sequence[int] = (),
        exclude: Sequence[int] = (),
        metadata: bool = True,
        session: Session = (),
        priority: Priority = "interactive",
        require_full: bool = False,
        timeout_s: float | None = None,
    ) -> Answer:
        """The k items nearest to a vector."""
        fields = _query(k, require_all, require_any, exclude, metadata, session, priority, require_full)
        (fields["vector"],), dtype = _vectors([vector])
        return _answer(await self._call("search", fields | dtype, timeout_s, bounded=True))

    async def batch(
        self,
        user_id: int,
        media_ids: Sequence[int],
        *,
        metadata: bool = False,
        session: Session = (),
        require_full: bool = False,
        timeout_s: float | None = None,
    ) -> Answer:
        """Scores of given items for a user; items that do not exist are left out."""
        fields = {"user_id": user_id, "media_ids": list(media_ids), "metadata": metadata}
        fields |= _wishes("interactive", require_full)
        fields["session"] = [list(one) for one in session]
        return _answer(await self._call("batch", fields, timeout_s, bounded=True, user=user_id))

    async def get_items(
        self,
        ids: Sequence[int],
        *,
        vector: bool = False,
        session: Session = (),
        timeout_s: float | None = None,
    ) -> list[Record | None]:
        """In the order of `ids`; None for an item that does not exist."""
        return await self._get("item", ids, vector, session, timeout_s)

    async def get_users(
        self,
        ids: Sequence[int],
        *,
        vector: bool = False,
        session: Session = (),
        timeout_s: float | None = None,
    ) -> list[Record | None]:
        """In the order of `ids`; None for a user that does not exist."""
        return await self._get("user", ids, vector, session, timeout_s)

    async def put_items(
        self,
        items: Iterable[Item],
        ack: Ack = "primary",
        write_id: bytes | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Written:
        """Writes items, new or again. With `ack` "quorum" or "all" it returns when that many disks have them."""
        given = list(items)
        vectors, dtype = _vectors(item.vector for item in given)
        records = [
            {"media_id": i.media_id, "vector": v, "classes": list(i.classes), "metadata": dict(i.metadata)}
            for i, v in zip(given, vectors, strict=True)
        ]
        return await self._write("put_items", {"items": records, **dtype}, ack, write_id, timeout_s)

    async def put_users(
        self,
        users: Iterable[User],
        ack: Ack = "primary",
        write_id: bytes | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Written:
        """Writes users, new or again; see `put_items`."""
        given = list(users)
        vectors, dtype = _vectors(user.vector for user in given)
        records = [
            {"user_id": u.user_id, "vector": v, "classes": list(u.classes), "metadata": dict(u.metadata)}
            for u, v in zip(given, vectors, strict=True)
        ]
        user = given[0].user_id if len(given) == 1 else None
        return await self._write("put_users", {"users": records, **dtype}, ack, write_id, timeout_s, user)

    async def delete_items(
        self,
        ids: Sequence[int],
        ack: Ack = "primary",
        write_id: bytes | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Written:
        """Deletes items; those that do not exist are no error."""
        return await self._write("delete_items", {"media_ids": list(ids)}, ack, write_id, timeout_s)

    async def delete_users(
        self,
        ids: Sequence[int],
        ack: Ack = "primary",
        write_id: bytes | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Written:
        """Deletes users; those that do not exist are no error."""
        user = ids[0] if len(ids) == 1 else None
        return await self._write("delete_users", {"user_ids": list(ids)}, ack, write_id, timeout_s, user)

    async def _get(
        self, kind: str, ids: Sequence[int], vector: bool, session: Session, timeout_s: float | None
    ) -> list[Record | None]:
        fields = {"kind": kind, "ids": list(ids), "vector": vector, "session": [list(one) for one in session]}
        reply = await self._call("get", fields, timeout_s, bounded=True)
        return [_record(raw) for raw in reply["records"]]

    async def _write(
        self,
        op: str,
        fields: dict[str, Any],
        ack: Ack,
        write_id: bytes | None,
        timeout_s: float | None,
        user: int | None = None,
    ) -> Written:
        write_id = write_id or os.urandom(16)
        fields |= {"ack": ack, "write_id": write_id}
        return _written(
            await self._call(op, fields, timeout_s, bounded=True, write=True, user=user), write_id
        )

    async def _call(
        self,
        op: str,
        fields: dict[str, Any],
        timeout_s: float | None,
        *,
        bounded: bool = False,
        write: bool = False,
        stay: bool = False,
        user: int | None = None,
    ) -> dict[str, Any]:
        """One request with its retries. `bounded`: the op takes timeout_ms. `stay`: once asked, no other node is. `user`: whom
        it is about.

        Once a try of a write was sent and not answered, no refusal of another try says that nothing was written.
        """
        doubt = broken = False
        deadline = trio.current_time() + (self._timeout_s if timeout_s is None else timeout_s)
        last: GmcoError | None = None
        refusals = 2 * len(self._urls)
        # Of a question that waits for news, the waiting is for the answer, not for a node.
        scope = trio.CancelScope(deadline=trio.current_time() + self._timeout_s if stay else deadline)
        self._calls.add(scope)
        try:
            with scope:
                for attempt in range(ATTEMPTS_MAX):
                    behind = last is not None and last.code == _BEHIND
                    home = None if user is None or behind else self._home(user)
                    link = home or await self._connected()
                    scope.deadline = deadline
                    if bounded and (write or timeout_s is not None):
                        left_ms = (deadline - trio.current_time()) * 1000
                        fields["timeout_ms"] = min(max(left_ms, 1.0), 60_000.0)
                    id, packed = link.pack(op, fields)
                    doubted, doubt = doubt, doubt or (write and link.alive)
                    reply = await link.ask(id, packed)
                    if reply is None:
                        last = Unavailable(
                            "unavailable", f"the connection to {link.url} broke before the answer came"
                        )
                        if stay:
                            raise last
                        if broken:
                            await trio.sleep(_pause_s(attempt))
                        broken = True
                        continue
                    doubt = doubted
                    if reply.get("error") is None:
                        return reply
                    last = _error(reply["error"])
                    if last.code in _MOVE:
                        refusals -= 1
                        self._leave(link)
                    elif last.code == _BEHIND:
                        self._turn(link)
                    if stay or not (
                        (last.code in _MOVE and (write or refusals > 0))
                        or (last.code in _WAIT and write)
                        or (last.code == _BEHIND and not write)
                    ):
                        raise last
                    await trio.sleep((last.retry_after_ms or 0) / 1000 + _pause_s(attempt))
            if self._closed:
                raise Unavailable("unavailable", "the client is closed")
            if doubt and scope.cancelled_caught:
                message = "a try was not answered in time: the write may have been applied"
                raise DeadlineExceeded("deadline_exceeded", message)
            raise self._overdue(last)
        except GmcoError as error:
            if not doubt or error.code in _UNSURE:
                raise
            message = f"a try was not answered and may have been applied; another one: {error}"
            raise GmcoError("outcome_unknown", message) from error
        finally:
            self._calls.discard(scope)

    async def _connected(self, give_up_at: float = math.inf) -> _Link:
        """A live connection: the one in use, or else one to the next node that takes us.

        Raises Unavailable when from `give_up_at` on each is away; one that is silent or full may take us yet.
        """
        if self._closed:
            raise Unavailable("unavailable", "the client is closed")
        link = self._links.get(self._urls[self._at])
        if link is not None and link.alive:
            return link
        async with self._dialling:
            while True:
                for step in range(len(self._urls)):
                    at = (self._at + step) % len(self._urls)
                    found = await self._try(self._urls[at])
                    if found is not None:
                        self._at = at
                        return found
                away = all(isinstance(self._why.get(url), Unavailable) for url in self._urls)
                if away and trio.current_time() >= give_up_at:
                    raise self._nobody()
                until = min(self._not_before.values())
                if away:
                    until = min(until, give_up_at)
                await trio.sleep(max(0.001, until - trio.current_time()))

    def _home(self, user_id: int) -> _Link | None:
        """The connection to that user's node, by rendezvous hashing: always the same one of those that are there.

        A node that is not is connected to meanwhile, for the next request.
        """
        if self._closed:
            return None
        now, user = trio.current_time(), str(user_id).encode()

        def weight(url: str) -> bytes:
            # Addresses often differ in one digit: a checksum would give some node hardly anybody.
            return hashlib.blake2b(user, digest_size=8, key=self._seeds[url]).digest()

        for url in sorted(self._urls, key=weight, reverse=True):
            if self._not_before[url] > now:
                continue  # away, or refuses
            link = self._links.get(url)
            if link is not None and link.alive:
                return link
            if url not in self._wanted:
                self._wanted.add(url)
                self._nursery.start_soon(self._want, url)
        return None

    async def _want(self, url: str) -> None:
        try:
            async with self._dialling:
                await self._try(url)
        finally:
            self._wanted.discard(url)

    async def _try(self, url: str) -> _Link | None:
        if self._not_before[url] > trio.current_time():
            return None
        link = self._links.get(url)
        if link is not None and link.alive:
            return link
        try:
            opened: _Link = await self._nursery.start(_hold, url)
        except (Unavailable, Overloaded, DeadlineExceeded) as error:
            self._why[url] = error
            self._failures[url] += 1
            self._not_before[url] = trio.current_time() + _pause_s(self._failures[url])
            return None
        self._failures[url] = 0
        self._why.pop(url, None)
        self._links[url] = opened
        return opened

    def _overdue(self, last: GmcoError | None) -> GmcoError:
        """What to raise when the time of a call is up, whose last try ended with `last`."""
        if self._why and not any(link.alive for link in self._links.values()):
            return self._nobody()
        return last or DeadlineExceeded("deadline_exceeded", "no node answered in time")

    def _nobody(self) -> GmcoError:
        """That no node can be reached, and why each cannot. DeadlineExceeded when more time might have helped."""
        reasons = {url: error.message for url, error in self._why.items()}
        late = any(isinstance(error, DeadlineExceeded) for error in self._why.values())
        for url in self._urls:
            if url not in reasons:
                late = late or url not in self._links
                reasons[url] = "the connection broke" if url in self._links else "no answer in time"
        said = "no node can be reached: " + "; ".join(f"{url}: {reasons[url]}" for url in self._urls)
        return DeadlineExceeded("deadline_exceeded", said) if late else Unavailable("unavailable", said)

    def _leave(self, link: _Link) -> None:
        """Turns to the next node. What is in flight on this one may still be answered."""
        self._not_before[link.url] = trio.current_time() + BACKOFF_S[1] * random.uniform(0.2, 0.5)
        self._turn(link)

    def _turn(self, link: _Link) -> None:
        if link.url == self._urls[self._at]:
            self._at = (self._at + 1) % len(self._urls)

    def _close(self) -> None:
        self._closed = True
        for scope in list(self._calls):
            scope.cancel()


def _pause_s(attempt: int) -> float:
    """Exponential backoff with full jitter, so that clients do not come back all at once."""
    low, high = BACKOFF_S
    return random.uniform(low / 2, min(high, low * 2 ** min(attempt, 10)))


def _query(
    k: int,
    require_all: Sequence[int],
    require_any: Sequence[int],
    exclude: Sequence[int],
    metadata: bool,
    session: Session,
    priority: Priority,
    require_full: bool,
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "k": k,
        "require_all": list(require_all),
        "require_any": list(require_any),
        "exclude": list(exclude),
        "metadata": metadata,
        "session": [list(one) for one in session],
    }
    return fields | _wishes(priority, require_full)


def _wishes(priority: Priority, require_full: bool) -> dict[str, Any]:
    """What is not as a node takes it to be when nothing is said."""
    wishes: dict[str, Any] = {} if priority == "interactive" else {"priority": priority}
    return wishes | {"require_full": True} if require_full else wishes


async def _open(url: str) -> tuple[_Stream, str, str]:
    """A stream to the URL's host (TLS for wss), its host:port, and the path to ask for."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise OSError(f"not a WebSocket URL: {url}")
    secure = parts.scheme == "wss"
    tcp = await trio.open_tcp_stream(parts.hostname, parts.port or 7400)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not secure:
        return tcp, parts.netloc, path
    context = ssl.create_default_context()
    tls = trio.SSLStream(tcp, context, server_hostname=parts.hostname, https_compatible=True)
    return tls, parts.netloc, path


def _why_not(error: BaseException | None, *, connected: bool) -> GmcoError:
    """Why a connection did not open, in a few words.

    Unavailable: there is no node. Overloaded: it takes no more connections now. DeadlineExceeded: nothing came in time.
    """
    leaf = error
    while True:
        if isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        elif isinstance(leaf, OSError) and leaf.errno is None and leaf.__cause__ is not None:
            leaf = leaf.__cause__  # what trio says of several addresses
        else:
            break
    if isinstance(leaf, trio.TooSlowError):
        what = "it takes connections, but does not speak as a node does" if connected else "timed out"
        return DeadlineExceeded("deadline_exceeded", f"{what} ({DIAL_S:g} s)")
    if isinstance(leaf, ConnectionRejected) and leaf.status_code == 503:
        return Overloaded("overloaded", "it takes no connections now (HTTP 503): it is full, or stops")
    return Unavailable("unavailable", _reason(leaf))


def _reason(error: BaseException | None) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror):
        return "name not found"
    if isinstance(error, ConnectionRejected):
        return f"not a GMC-O node (HTTP {error.status_code})"
    if isinstance(error, ConnectionClosed | trio.BrokenResourceError):
        return "not a GMC-O node (it closed the connection)"
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason or error}"
    return str((error.strerror if isinstance(error, OSError) else None) or error)


async def _hold(url: str, *, task_status: trio.TaskStatus[_Link]) -> None:
    """Opens a connection and runs it to its end. Raises what `_why_not` makes of it when it does not open."""
    started = False
    stream: _Stream | None = None
    reason: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(DIAL_S):
                stream, authority, path = await _open(url)
                ws = await wrap_client_stream(
                    nursery,
                    stream,
                    authority,
                    path,
                    subprotocols=["gmco.msgpack"],
                    message_queue_size=16,
                    max_message_size=FRAME_BYTES_MAX,
                    receive_buffer_size=64 << 10,
                )
            if ws.subprotocol != "gmco.msgpack":
                raise OSError("not a GMC-O node (it does not speak gmco.msgpack)")  # noqa: TRY301
            link = _Link(url, ws)
            started = True
            task_status.started(link)
            await link.run()
            nursery.cancel_scope.cancel()
    except* Exception as group:
        reason = group
    finally:
        # The library leaves the socket open when the node closed first.
        if stream is not None:
            with trio.move_on_after(CLOSE_S, shield=True):
                await stream.aclose()
    if not started:
        raise _why_not(reason, connected=stream is not None) from reason


@asynccontextmanager
async def connect(
    urls: Sequence[str], *, timeout_s: float = 5.0, wait_s: float = WAIT_S
) -> AsyncIterator[Client]:
    """A client of the nodes at `urls` (`ws://host:7400`). `timeout_s` is the time limit of calls that give none, too.

    Raises Unavailable, with each node's reason, when none was there within `wait_s`: give more to wait for a cluster that
    starts. A node that is silent or full is tried for `timeout_s`; then silence is DeadlineExceeded.
    """
    if isinstance(urls, str) or not urls:
        raise BadRequest("bad_request", 'give a list of URLs, as in ["ws://127.0.0.1:7400"]', "urls")
    raised: BaseException | None = None
    async with trio.open_nursery() as nursery:
        client = Client(urls, timeout_s, nursery)
        try:
            with trio.move_on_after(timeout_s) as scope:
                await client._connected(trio.current_time() + wait_s)
            if scope.cancelled_caught:
                raise client._nobody()  # noqa: TRY301
            yield client
        except BaseException as error:
            raised = error
        client._close()
        nursery.cancel_scope.cancel()
    if raised is not None:
        raise raised


P = ParamSpec("P")
R = TypeVar("R")


def _blocking(
    method: Callable[Concatenate[Client, P], Awaitable[R]],
) -> Callable[Concatenate[BlockingClient, P], R]:
    def call(self: BlockingClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return trio.from_thread.run(
                functools.partial(method, self._client, *args, **kwargs), trio_token=self._token
            )
        except trio.RunFinishedError:
            raise Unavailable("unavailable", "the client is closed") from None

    functools.update_wrapper(call, method)
    return call


class BlockingClient:
    """Made by `connect_blocking`: the methods of `Client`, for programs without trio. Any thread may call them."""

    def __init__(self, client: Client, token: trio.lowlevel.TrioToken) -> None:
        self._client = client
        self._token = token

    ping = _blocking(Client.ping)
    status = _blocking(Client.status)
    events = _blocking(Client.events)
    forget_node = _blocking(Client.forget_node)
    keyring = _blocking(Client.keyring)
    cluster = _blocking(Client.cluster)
    moves = _blocking(Client.moves)
    maintenance = _blocking(Client.maintenance)
    shards = _blocking(Client.shards)
    failover = _blocking(Client.failover)
    repair = _blocking(Client.repair)
    recommend = _blocking(Client.recommend)
    similar = _blocking(Client.similar)
    search = _blocking(Client.search)
    batch = _blocking(Client.batch)
    get_items = _blocking(Client.get_items)
    get_users = _blocking(Client.get_users)
    put_items = _blocking(Client.put_items)
    put_users = _blocking(Client.put_users)
    delete_items = _blocking(Client.delete_items)
    delete_users = _blocking(Client.delete_users)


@contextmanager
def connect_blocking(
    urls: Sequence[str], *, timeout_s: float = 5.0, wait_s: float = WAIT_S
) -> Iterator[BlockingClient]:
    """`connect` for programs without trio. The connection lives in a thread of its own."""
    ready = threading.Event()
    opened: list[BlockingClient] = []
    done: list[trio.Event] = []
    failed: list[BaseException] = []

    async def live() -> None:
        async with connect(urls, timeout_s=timeout_s, wait_s=wait_s) as client:
            done.append(trio.Event())
            opened.append(BlockingClient(client, trio.lowlevel.current_trio_token()))
            ready.set()
            await done[0].wait()

    def thread() -> None:
        try:
            trio.run(live)
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    runner = threading.Thread(target=thread, name="gmco", daemon=True)
    runner.start()
    ready.wait()
    if not opened:
        runner.join()
        raise failed[0]
    try:
        yield opened[0]
    finally:
        opened[0]._token.run_sync_soon(done[0].set)
        runner.join()
