"""sd_notify against real datagram sockets, and the log lines."""

from __future__ import annotations

import io
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import trio
import trio.testing

from node.logs import configure, every
from node.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The service manager's socket and the NOTIFY_SOCKET that names it."""
    name = f"gmco-test-{secrets.token_hex(8)}"
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name if request.param == "abstract" else path)
        sock.settimeout(2)
        yield sock, "@" + name if request.param == "abstract" else path


def test_states_arrive(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert notifier.ready("12 shards\nREADY=0")
    assert sock.recv(4096).decode() == f"READY=1\nMAINPID={os.getpid()}\nSTATUS=12 shards READY=0"
    assert notifier.status("busy")
    assert sock.recv(4096) == b"STATUS=busy"
    assert notifier.extend_timeout(1.5, "1 of 2")
    assert sock.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000\nSTATUS=1 of 2"
    assert notifier.stopping()
    assert sock.recv(4096) == b"STOPPING=1\nSTATUS=stopping"
    notifier.close()
    assert not notifier.ready()


def test_keepalives_at_half_of_the_watchdogs_time(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager

    async def main() -> None:
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "10000000"})
        with trio.move_on_after(16):
            await notifier.run()
        notifier.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    sock.setblocking(False)
    assert [sock.recv(4096) for _ in range(4)] == [b"WATCHDOG=1"] * 4
    with pytest.raises(BlockingIOError):
        sock.recv(4096)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdog_must_be_meant_for_us(environ: dict[str, str], expected: float | None) -> None:
    assert Notifier(environ).watchdog_s == expected


def test_without_a_manager_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.active
    assert not notifier.ready()


def test_a_manager_that_is_gone_or_full_stops_nobody(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")})
    with structlog.testing.capture_logs():
        assert not notifier.ready()
        assert notifier.failed == 1
        notifier.close()
        assert not Notifier({"NOTIFY_SOCKET": "vsock:2:1"}).active
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, structlog.testing.capture_logs():
        sock.bind(path)
        notifier = Notifier({"NOTIFY_SOCKET": path})
        while notifier.failed == 0 and notifier.sent < 100_000:
            notifier.status("x" * 1000)
        assert notifier.failed == 1
        notifier.close()


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("_restored")
def test_json_lines_stay_lines() -> None:
    out = io.StringIO()
    configure("info", "json", node="n1", stream=out)
    log = structlog.get_logger("x")
    log.debug("hidden")
    try:
        int("a\nb")
    except ValueError:
        log.exception("failed", path=Path("x"))
    (line,) = out.getvalue().splitlines()
    said = json.loads(line)
    assert (said["event"], said["level"], said["node"]) == ("failed", "error", "n1")
    assert "ValueError" in said["exception"]


@pytest.mark.usefixtures("_restored")
def test_console_lines_are_for_people() -> None:
    out = io.StringIO()
    configure("warning", "console", stream=out)
    structlog.get_logger().warning("careful", shard=3)
    assert "careful" in out.getvalue()
    assert "shard=3" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_every_holds_back_and_counts() -> None:
    now = [0.0]
    limit = every(10, clock=lambda: now[0])
    assert limit.due() == 0
    assert [limit.due(), limit.due()] == [None, None]
    now[0] = 10.0
    assert limit.due() == 2
    assert limit.due() is None
