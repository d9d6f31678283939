"""Files of snapshots from node to node, beside the peer link: a TCP connection whose bytes neither loop nor codec touch.

It comes in by the peer port, with a magic of its own. Then, again and again, several of them ahead if the asker likes:

    asker → frame: msgpack [snapshot id, file, offset, bytes]
    giver → frame: msgpack [code, message], and when the code is empty just so many raw bytes

Whoever knows the id of an open snapshot may read it: 128 random bits, told over the peer link to one peer. Both ends move
bytes in threads (`sendfile` there, `recv_into` a buffer and `pwrite` here), which end soon after their caller is cancelled.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import structlog
import trio
from xxhash import xxh3_64

from node.blocking import ThreadRunner
from node.config import Address
from node.frames import BROKEN_MSGPACK, BULK_MAGIC, HEADER, ProtocolError
from router.ports import NodeError
from storage.files import send_to_disk
from storage.vectors import disk_error

log = structlog.get_logger(__name__)

FRAME_BYTES_MAX = 4 << 10
# The most of one request.
PIECE_BYTES_MAX = 4 << 20
BUFFER_BYTES = 1 << 20
SEND_BYTES = 16 << 20
CONNECT_S = 3.0
# Without a byte that comes or goes.
SILENCE_S = 15.0
# An asker that throttles itself is silent between two requests; a snapshot that nobody reads goes after as long.
IDLE_S = 60.0
STEP_MS = 100


class Piece(NamedTuple):
    snapshot: str
    file: str
    offset: int
    bytes: int


class RefusedError(Exception):
    """The giver's answer to a request."""

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"{code}: {message}")


# The file of a piece, kept open until the end of the block. Raises NodeError.
Find = Callable[[Piece], AbstractContextManager[Path]]


# -- giving -------------------------------------------------------------------------------------------------------------


async def give(stream: trio.abc.Stream, find: Find, runner: ThreadRunner) -> None:
    """Answers what is asked on a connection whose magic has been read, until it ends. Raises ProtocolError,
    trio.BrokenResourceError."""
    assert isinstance(stream, trio.SocketStream)
    fd = -1
    try:
        while (piece := await _receive_request(stream)) is not None:
            try:
                with find(piece) as path:
                    if fd < 0:
                        # A thread's own; not for strangers, whose connections are as many as files are reserved for.
                        fd = os.dup(stream.socket.fileno())
                    await runner(_send, fd, path, piece)
            except NodeError as error:
                await stream.send_all(_frame([error.code, str(error)]))
            except OSError as error:
                # Also when it is the file that cannot be read: how much of it was sent nobody knows, so the connection ends.
                log.info("bulk_ended", snapshot=piece.snapshot, file=piece.file, reason=str(error))
                return
    finally:
        if fd >= 0:
            os.close(fd)


async def _receive_request(stream: trio.SocketStream) -> Piece | None:
    """None at the end of the connection, or of our patience."""
    with trio.move_on_after(IDLE_S):
        head = await _receive_exactly(stream, HEADER.size)
        if head is None:
            return None
        (length,) = HEADER.unpack(head)
        if length > FRAME_BYTES_MAX:
            raise ProtocolError(f"a request of {length:,} bytes; the bound is {FRAME_BYTES_MAX:,}")
        body = await _receive_exactly(stream, length)
        if body is None:
            return None
        try:
            piece = Piece(*msgpack.unpackb(body))
        except BROKEN_MSGPACK as error:
            raise ProtocolError(f"not a request: {error}") from error
        if [type(field) for field in piece] != [str, str, int, int]:
            raise ProtocolError("a field of a request has a wrong type")
        if piece.offset < 0 or not 0 < piece.bytes <= PIECE_BYTES_MAX:
            raise ProtocolError(f"{piece.bytes} bytes from {piece.offset}; the bound is {PIECE_BYTES_MAX:,}")
        return piece
    return None


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes | None:
    seen = b""
    while len(seen) < size:
        chunk = await stream.receive_some(size - len(seen))
        if not chunk:
            return None
        seen += bytes(chunk)
    return seen


def _send(fd: int, path: Path, piece: Piece) -> None:
    """In a thread. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        wait = _Wait(fd, select.POLLOUT)
        head = memoryview(_frame(["", ""]))
        while head:
            try:
                head = head[os.write(fd, head) :]
            except BlockingIOError:
                wait()
        offset, end = piece.offset, piece.offset + piece.bytes
        while offset < end:
            try:
                sent = os.sendfile(fd, file.fileno(), offset, end - offset)
            except BlockingIOError:
                wait()
                continue
            if not sent:
                raise OSError(errno.EIO, "it is shorter than it was", str(path))
            offset += sent


# -- asking -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def asking(address: Address) -> AsyncIterator[Asker]:
    """A connection to a giver. Raises OSError."""
    try:
        with trio.fail_after(CONNECT_S):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError as error:
        raise TimeoutError(f"connecting to {address} took over {CONNECT_S:g} s") from error
    async with stream:
        # The socket itself, for threads; trio's end is not used until they are done with it.
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as sock:
            sock.setblocking(False)
            yield Asker(stream, sock)


class Asker:
    """Answers come in the order of the questions."""

    def __init__(self, stream: trio.SocketStream, sock: socket.socket) -> None:
        self._stream, self._sock = stream, sock
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._hello = BULK_MAGIC

    async def ask(self, piece: Piece) -> None:
        """Raises OSError."""
        try:
            await self._stream.send_all(self._hello + _frame(piece))
        except trio.BrokenResourceError as error:
            raise ConnectionError(str(error.__cause__ or error)) from error
        self._hello = b""

    async def take(self, into: Target, size: int, runner: ThreadRunner) -> None:
        """The next answer, of `size` bytes. Raises OSError for the connection's sake, then `into` says how far it came;
        RefusedError; DiskFullError and ReplicaStoppedError for the disk's."""
        await runner(self._take, into, size)

    def _take(self, into: Target, size: int) -> None:
        wait = _Wait(self._sock.fileno(), select.POLLIN)
        (length,) = HEADER.unpack(self._exactly(HEADER.size, wait))
        if length > FRAME_BYTES_MAX:
            raise ConnectionError(f"an answer of {length:,} bytes; the bound is {FRAME_BYTES_MAX:,}")
        try:
            code, message = msgpack.unpackb(self._exactly(length, wait))
        except BROKEN_MSGPACK as error:
            raise ConnectionError(f"not an answer: {error}") from error
        if code:
            raise RefusedError(str(code), str(message))
        while size:
            count = self._some(min(size, BUFFER_BYTES), 0, wait)
            into.write(self._buffer[:count])
            size -= count

    def _exactly(self, size: int, wait: _Wait) -> memoryview:
        have = 0
        while have < size:
            have += self._some(size - have, have, wait)
        return self._buffer[:size]

    def _some(self, size: int, at: int, wait: _Wait) -> int:
        while True:
            try:
                count = self._sock.recv_into(self._buffer[at:], size)
            except BlockingIOError:
                wait()
                continue
            if not count:
                raise ConnectionError("the giver closed the connection")
            return count


class Target:
    """A file as it comes: on the disk, and hashed (xxh3_64) on the way, so that nobody has to read it again."""

    def __init__(self, path: Path, fd: int) -> None:
        self.done = 0
        # Up to where the disk was told to begin.
        self._sent = 0
        self._path, self._fd = path, fd
        self._digest = xxh3_64()

    @property
    def xxh3(self) -> str:
        """In hex, of what has come."""
        return f"{self._digest.intdigest():016x}"

    def write(self, data: memoryview) -> None:
        """What follows. Raises DiskFullError, ReplicaStoppedError."""
        self._digest.update(data)
        try:
            while data:
                count = os.pwrite(self._fd, data, self.done)
                self.done += count
                data = data[count:]
            if self.done - self._sent >= SEND_BYTES:
                # The disk begins while more is coming; else it would have everything to do at the end.
                send_to_disk(self._fd, self._sent, self.done - self._sent)
                self._sent = self.done
        except OSError as error:
            raise disk_error(error, self._path) from error

    def sync(self) -> None:
        """Raises DiskFullError, ReplicaStoppedError."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise disk_error(error, self._path) from error


class _Wait:
    """For a socket, in a thread of trio's: until it is ready. Ends when the caller is cancelled, or it is silent for too long."""

    def __init__(self, fd: int, event: int) -> None:
        self._poll = select.poll()
        self._poll.register(fd, event)

    def __call__(self) -> None:
        until = time.monotonic() + SILENCE_S
        while not self._poll.poll(STEP_MS):
            trio.from_thread.check_cancelled()
            if time.monotonic() > until:
                raise TimeoutError(f"silent for {SILENCE_S:g} s")


def _frame(fields: Any) -> bytes:
    body: bytes = msgpack.packb(fields)
    return HEADER.pack(len(body)) + body
