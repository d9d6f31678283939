"""What we tell systemd (sd_notify): ready, stopping, alive, and a line of status. Does nothing outside systemd.

The protocol is a datagram of `KEY=value` lines to the unix socket in NOTIFY_SOCKET; a leading `@` means the
abstract namespace (sd_notify(3)). Keepalives come from the event loop, so a loop that is stuck is noticed
and the node restarted.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NoReturn

import structlog
import trio

log = structlog.get_logger(__name__)


class Notifier:
    """Sends states to the service manager; without one, `active` is False and everything is a no-op."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._socket: socket.socket | None = None
        self._address = ""
        self.sent = self.failed = 0
        self.watchdog_s = _watchdog_s(environ)
        address = environ.get("NOTIFY_SOCKET", "")
        if not address:
            return
        if address[0] not in "/@":
            log.warning("notify_socket_unknown", address=address)
            return
        self._address = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # A service manager that does not read must never stop the event loop.
        self._socket.setblocking(False)

    @property
    def active(self) -> bool:
        return self._socket is not None

    def send(self, **states: str | int) -> bool:
        """Sends `KEY=value` lines, as in `send(READY=1, STATUS="12 shards")`. Returns whether it was delivered."""
        if self._socket is None:
            return False
        # A newline in a value would begin a key of its own.
        lines = [f"{key}={str(value).replace(chr(10), ' ')}" for key, value in states.items()]
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            self.failed += 1
            log.warning("notify_failed", states=sorted(states), error=str(error))
            return False
        self.sent += 1
        return True

    def ready(self, status: str = "") -> bool:
        return self.send(READY=1, MAINPID=os.getpid(), **({"STATUS": status} if status else {}))

    def stopping(self, status: str = "stopping") -> bool:
        return self.send(STOPPING=1, STATUS=status)

    def status(self, text: str) -> bool:
        return self.send(STATUS=text)

    def extend_timeout(self, seconds: float, status: str) -> bool:
        """Asks for more time to start or stop, counted from now: recovery of a large log may take minutes."""
        return self.send(EXTEND_TIMEOUT_USEC=int(seconds * 1e6), STATUS=status)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Keepalives at half of the watchdog's time, from the event loop; sleeps when none is asked for."""
        task_status.started()
        if not self.active or self.watchdog_s is None:
            await trio.sleep_forever()
        while True:
            self.send(WATCHDOG=1)
            await trio.sleep(self.watchdog_s / 2)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """The watchdog's time, when it is meant for this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (usec.isascii() and usec.isdigit()) or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 1e6
