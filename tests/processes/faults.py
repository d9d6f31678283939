"""What breaks under a running cluster: links that are cut, and a seeded sequence of faults."""

from __future__ import annotations

import contextlib
import queue
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgpack

from node.frames import ERROR, HEADER, MAGIC, READS, REQUEST, FrameParser
from tests.processes.cluster import Daemon


class Proxy:
    """A TCP proxy in front of one node's peer port. Cut, it breaks what is open and takes nothing new: the others cannot reach
    the node, while what the node itself opens goes through the others' proxies. So a cut link is a one-way partition."""

    def __init__(self, listen_port: int, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._server = socket.create_server(("127.0.0.1", listen_port), backlog=64)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._cut = self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, cut: bool) -> None:
        with self._lock:
            self._cut = cut
            broken, self._open = (self._open, set()) if cut else (set(), self._open)
        for one in broken:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed = True
        self.cut(True)
        self._server.close()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        """Until both directions have ended."""
        other = threading.Thread(target=_pump, args=(far, near), daemon=True)
        other.start()
        _pump(near, far)
        other.join()

    def _accept(self) -> None:
        while not self._closed:
            try:
                readable, _, _ = select.select([self._server], [], [], 0.2)
                if not readable:
                    continue
                near, _ = self._server.accept()
            except (OSError, ValueError):
                return
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            with near, socket.create_connection(self._target, 2.0) as far:
                near.settimeout(None)
                far.settimeout(None)
                with self._lock:
                    if self._cut:
                        return
                    self._open |= {near, far}
                self._carry(near, far)
        except OSError:
            return
        finally:
            with self._lock:
                self._open -= {near}


class ReadFaults(Proxy):
    """A proxy that spoils what a node answers to other nodes' reads, and nothing else: gossip goes on as if all were well.

    `fault`: "" none; "slow": answers come SLOW_S later; "hang": reads get no answer; "error": they get an error at once.
    """

    SLOW_S = 0.5
    fault = ""

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        magic = near.recv(len(MAGIC), socket.MSG_WAITALL)
        far.sendall(magic)
        if magic != MAGIC:
            super()._carry(near, far)
            return
        late: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        for work, args in ((self._answers, (far, late)), (self._send_late, (near, late))):
            threading.Thread(target=work, args=args, daemon=True).start()
        with contextlib.suppress(OSError):
            for payload in _frames(near):
                spoiled = self._spoiled(payload)
                if spoiled is None:
                    far.sendall(HEADER.pack(len(payload)) + payload)
                elif spoiled:
                    late.put((time.monotonic(), spoiled))
        for one in (near, far):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _spoiled(self, payload: bytes) -> bytes | None:
        """What to send back instead of passing a message on; None: it is passed on."""
        if self.fault not in ("hang", "error"):
            return None
        message = msgpack.unpackb(payload, strict_map_key=False)
        if not isinstance(message, list) or message[0] != REQUEST or message[2] not in READS:
            return None
        return (
            b"" if self.fault == "hang" else msgpack.packb([ERROR, message[1], "internal", ["broken", None]])
        )

    def _answers(self, far: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            for payload in _frames(far):
                late.put((time.monotonic() + (self.SLOW_S if self.fault == "slow" else 0.0), payload))
        late.put((0.0, b""))

    @staticmethod
    def _send_late(near: socket.socket, late: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                due, payload = late.get()
                if not payload:
                    near.shutdown(socket.SHUT_RDWR)
                    return
                time.sleep(max(0.0, due - time.monotonic()))
                near.sendall(HEADER.pack(len(payload)) + payload)


def _frames(source: socket.socket) -> Iterator[bytes]:
    parser = FrameParser(1 << 30)
    while data := source.recv(65536):
        for payload in parser.feed(data):
            yield bytes(payload)


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Nemesis:
    """One fault after the other, drawn from a seed; most are over before the next begins."""

    def __init__(self, daemons: Sequence[Daemon], proxies: Sequence[Proxy], seed: int) -> None:
        self.daemons, self.proxies = daemons, proxies
        self.random = random.Random(seed)
        self.story: list[str] = []
        self._faults: list[tuple[int, Callable[[int], None]]] = [
            (4, self._kill),
            (2, self._pause),
            (2, self._restart),
            (2, self._cut),
            (1, self._kill_two),
        ]

    def strike(self) -> None:
        weights = [weight for weight, _ in self._faults]
        (fault,) = self.random.choices([do for _, do in self._faults], weights)
        victim = self.random.randrange(len(self.daemons))
        began = time.monotonic()
        fault(victim)
        self.story.append(
            f"{fault.__name__[1:]} {self.daemons[victim].name}, {time.monotonic() - began:.1f} s"
        )
        time.sleep(self.random.uniform(0.0, 1.5))

    def heal(self) -> None:
        for proxy in self.proxies:
            proxy.cut(False)
        for daemon in self.daemons:
            if daemon.running:
                daemon.signal(signal.SIGCONT)
            else:
                daemon.start(wait=False)
        for daemon in self.daemons:
            daemon.wait_ready()

    def _kill(self, victim: int) -> None:
        daemon = self.daemons[victim]
        daemon.kill()
        time.sleep(self.random.choice([0.0, 0.5, 3.0]))
        daemon.start(wait=False)

    def _kill_two(self, victim: int) -> None:
        others = [self.daemons[victim], self.daemons[victim - 1]]
        for daemon in others:
            daemon.kill()
        time.sleep(self.random.uniform(0.0, 2.0))
        for daemon in others:
            daemon.start(wait=False)

    def _pause(self, victim: int) -> None:
        daemon = self.daemons[victim]
        daemon.signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(1.0, 5.0))
        daemon.signal(signal.SIGCONT)

    def _restart(self, victim: int) -> None:
        daemon = self.daemons[victim]
        daemon.stop()
        daemon.start(wait=False)

    def _cut(self, victim: int) -> None:
        self.proxies[victim].cut(True)
        time.sleep(self.random.uniform(0.5, 4.0))
        self.proxies[victim].cut(False)
