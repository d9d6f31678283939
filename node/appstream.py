"""The bytes under an app's WebSocket: it notes signs of life, and lets a close's reason arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import trio
from trio_websocket import WebSocketConnection

DRAIN_S = 1.0
DRAIN_BYTES = 64 << 10


class AppStream(trio.abc.Stream):
    """A TCP stream of one app. trio sets TCP_NODELAY on every socket stream by itself."""

    def __init__(self, transport: trio.SocketStream, received: Callable[[int], None]) -> None:
        """`received` is told of each read's size."""
        self.heard = False
        self.handshake: trio.CancelScope | None = None
        self.websocket: WebSocketConnection | None = None
        self._transport = transport
        self._received = received
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._transport.receive_some(max_bytes)
        self.heard = True
        self._received(len(data))
        if not data and self.handshake is not None:
            self.handshake.cancel()  # it went away while we waited for its handshake; harmless later
        return data

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self.handshake is not None:
            self.handshake.cancel()
        reason = self.websocket.closed if self.websocket is not None else None
        try:
            if reason is not None and reason.code in (1002, 1007, 1009):
                await self._explain(reason.code)
        finally:
            await self._transport.aclose()

    async def _explain(self, code: int) -> None:
        """Sends the close frame that the library leaves out for broken framing, and reads what is still under
        way: closing a socket with unread bytes makes a reset, which would overtake the frame.
        """
        with (
            contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            trio.move_on_after(DRAIN_S),
        ):
            if code != 1009:
                await self._transport.send_all(b"\x88\x02" + code.to_bytes(2, "big"))
            await self._transport.send_eof()
            while await self._transport.receive_some(DRAIN_BYTES):
                pass
