"""What a cached answer costs: L0 against a bare WebSocket echo, L1 against L0, and a mix of hits and misses on three nodes.

One real node and the load generator share the machine. The echo answers each frame with one of our own reply frames, so both
sides send and decode the same bytes; runs alternate. L1 is a real redis-server; for its hits L0 is turned off in a second node.

    python -m bench.cache [--quick] [--only NAME]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import msgpack
import numpy as np
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, open_websocket_url

import gmco
from bench.harness import arguments, figure, interleaved, say
from bench.websocket import RECEIVE_BYTES, serve_echo
from tests.processes.cluster import Daemon, cluster
from tests.processes.redis_servers import redis_server

DEPTH = 64
FRAMED = 32
USERS = 500
ITEMS = 5_000
DIM = 64
RATE = 1_660.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
ECHO = "bare trio-websocket echo of the same reply frames"


# -- the peer --------------------------------------------------------------------------------------------------------


async def _echo(pipe: Pipe) -> None:
    frame = b""

    async def answer(request: WebSocketRequest) -> None:
        ws = await request.accept()
        try:
            while True:
                await ws.get_message()
                await ws.send_message(frame)
        except ConnectionClosed:
            pass

    async with trio.open_nursery() as nursery:
        pipe.send(await nursery.start(serve_echo, answer))
        while True:
            got = await trio.to_thread.run_sync(pipe.recv)
            if got is None:
                break
            frame = got
            pipe.send(True)
        nursery.cancel_scope.cancel()


def _echo_process(pipe: Pipe) -> None:
    trio.run(_echo, pipe)


# -- load ------------------------------------------------------------------------------------------------------------


def _frames(framed: int) -> list[bytes]:
    """Requests for all users in turn, packed; ids do not repeat within DEPTH."""
    frames = []
    for first in range(0, USERS, framed):
        batch = [
            {"id": first + i, "op": "recommend", "user_id": 1 + (first + i) % USERS} for i in range(framed)
        ]
        frames.append(msgpack.packb(batch[0] if framed == 1 else batch))
    return frames


async def _exchange(port: int, framed: int, seconds: float) -> float:
    """Requests per second with DEPTH or more in flight."""
    frames, most = _frames(framed), max(DEPTH // framed, 4) * framed
    async with open_websocket_url(
        f"ws://127.0.0.1:{port}", message_queue_size=64, receive_buffer_size=RECEIVE_BYTES
    ) as ws:
        return await _pump(ws, frames, framed, most, seconds)


async def _pump(
    ws: WebSocketConnection, frames: Sequence[bytes], framed: int, most: int, seconds: float
) -> float:
    in_flight = answered = 0
    sending = True
    room = trio.Event()
    began = time.perf_counter()

    async def send() -> None:
        nonlocal in_flight, sending, room
        at = 0
        while time.perf_counter() < began + seconds:
            while in_flight + framed > most:
                await room.wait()
            in_flight += framed
            await ws.send_message(frames[at % len(frames)])
            at += 1
        sending = False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while sending or in_flight:
            reply = msgpack.unpackb(await ws.get_message())
            count = len(reply) if isinstance(reply, list) else 1
            assert "error" not in (reply[0] if isinstance(reply, list) else reply), reply
            in_flight -= count
            answered += count
            room.set()
            room = trio.Event()
        nursery.cancel_scope.cancel()
    return answered / (time.perf_counter() - began)


async def _one_by_one(port: int, count: int) -> float:
    """Median seconds of an answer when nothing else is asked."""
    took = []
    async with open_websocket_url(f"ws://127.0.0.1:{port}", receive_buffer_size=RECEIVE_BYTES) as ws:
        for frame in (_frames(1) * (1 + count // USERS))[:count]:
            began = time.perf_counter()
            await ws.send_message(frame)
            await ws.get_message()
            took.append(time.perf_counter() - began)
    return statistics.median(took)


async def _reply_frame(port: int, framed: int) -> bytes:
    async with open_websocket_url(f"ws://127.0.0.1:{port}", receive_buffer_size=RECEIVE_BYTES) as ws:
        replies: list[object] = []
        await ws.send_message(_frames(framed)[0])
        while len(replies) < framed:
            reply = msgpack.unpackb(await ws.get_message())
            replies += reply if isinstance(reply, list) else [reply]
    packed: bytes = msgpack.packb(replies[0] if framed == 1 else replies)
    return packed


# -- nodes -----------------------------------------------------------------------------------------------------------


def _fill(urls: Sequence[str], items: int, dim: int) -> None:
    rng = np.random.default_rng(1)
    with gmco.connect_blocking(urls, timeout_s=120.0) as client:
        for first in range(0, items, 500):
            ids = range(first + 1, min(first + 501, items + 1))
            rows = rng.standard_normal((len(ids), dim)).astype(np.float32)
            client.put_items(
                gmco.Item(i, row, (), {"title": f"item number {i}", "year": 1950 + i % 70})
                for i, row in zip(ids, rows, strict=True)
            )
        vectors = rng.standard_normal((USERS, dim)).astype(np.float32)
        client.put_users(gmco.User(i + 1, vectors[i]) for i in range(USERS))


@contextmanager
def _node(folder: Path, cache: str) -> Iterator[Daemon]:
    storage = f'dim = {DIM}\nengine = "exact"'
    with cluster(folder, 1, storage=storage, replication=1, more=f"[cache]\n{cache}") as (node,):
        _fill([node.url], ITEMS, DIM)
        yield node


def _counters(node: Daemon) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = node.status()["counters"]["cache"]
    return found


def _warm(node: Daemon, level: str) -> None:
    """Until a round brings no more misses."""
    while True:
        before = _counters(node)[level]["misses"]
        trio.run(_exchange, node.app_port, 1, 1.0)
        if before and _counters(node)[level]["misses"] == before:
            return


def _costed(pid: int, spent: list[float], rate: Callable[[], float], seconds: float) -> Callable[[], float]:
    """`rate`, which also notes what a request has cost that process, in µs of CPU."""

    def run() -> float:
        before = _cpu_s(pid)
        found = rate()
        spent.append(1e6 * (_cpu_s(pid) - before) / (found * seconds))
        return found

    return run


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _rate(port: int, framed: int, seconds: float) -> Callable[[], float]:
    return lambda: trio.run(_exchange, port, framed, seconds)


def l0(folder: Path, wanted: Callable[[str], bool], seconds: float, runs: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_echo_process, args=(theirs,), daemon=True)
    process.start()
    echo_port = pipe.recv()
    with _node(folder / "l0", "") as node:
        for framed, name, target in (
            (1, "router.l0_single", "≥ 0.7, ≥ 1,660/s"),
            (FRAMED, f"router.l0_framed{FRAMED}", "≥ 5,000/s"),
        ):
            if not wanted(name):
                continue
            _warm(node, "l0")
            pipe.send(trio.run(_reply_frame, node.app_port, framed))
            pipe.recv()
            say(f"{name}: {runs} runs of {seconds} s each, and as many of the echo")
            before = _counters(node)
            spent: dict[str, list[float]] = {"ours": [], "echo": []}
            assert node.process is not None
            assert process.pid is not None
            ours, echo = interleaved(
                _costed(node.process.pid, spent["ours"], _rate(node.app_port, framed, seconds), seconds),
                _costed(process.pid, spent["echo"], _rate(echo_port, framed, seconds), seconds),
                runs,
            )
            after = _counters(node)
            hits, misses = (after["l0"][key] - before["l0"][key] for key in ("hits", "misses"))
            assert misses <= hits / 100, f"{misses} misses of {hits + misses}: this measures no hits"
            figure(name, ours, "requests/s", peer=ECHO, peer_value=echo, target=target, n=runs)
            figure(
                name + "_cpu_us", statistics.median(spent["ours"]), "µs of CPU per request", peer=ECHO,
                peer_value=statistics.median(spent["echo"]), target="(for builders)", n=runs,
            )  # fmt: skip
    pipe.send(None)
    process.join()


def l1(folder: Path, wanted: Callable[[str], bool], seconds: float, runs: int) -> None:
    with (
        redis_server(folder / "redis", "--maxmemory", "200mb") as server,
        _node(folder / "with-l0", "") as near,
        _node(folder / "without-l0", f'l0_bytes = 0\nredis = "{server.url}"\nredis_timeout_ms = 200') as far,
    ):
        _warm(near, "l0")
        _warm(far, "l1")
        if wanted("cache.l1_rate"):
            say(f"cache.l1_rate: {runs} runs of {seconds} s each, and as many of L0")
            before = _counters(far)
            ours, theirs = interleaved(
                _rate(far.app_port, 1, seconds), _rate(near.app_port, 1, seconds), runs
            )
            after = _counters(far)
            hits, misses = (after["l1"][key] - before["l1"][key] for key in ("hits", "misses"))
            revalidated = after["l1"]["revalidated"] - before["l1"]["revalidated"]
            shared = after["flights"]["shared"] - before["flights"]["shared"]
            say(f"{hits} hits, {misses} misses, {revalidated} revalidated, {shared} shared a flight")
            assert misses <= hits / 20, f"{misses} misses of {hits + misses}: this measures no hits"
            figure(
                "cache.l1_rate", ours, "requests/s", peer="the same with L0", peer_value=theirs,
                target="≥ 0.8", n=runs,
            )  # fmt: skip
        if wanted("cache.l1_added_p50_ms"):
            count = 300 if seconds < 2 else 1_000
            a, b = interleaved(
                lambda: 1000 * trio.run(_one_by_one, far.app_port, count),
                lambda: 1000 * trio.run(_one_by_one, near.app_port, count),
                runs,
            )
            figure(
                "cache.l1_added_p50_ms", a - b, "ms", peer="p50 of an L0 hit, ms", peer_value=b,
                target="≤ 2 ms", n=runs,
            )  # fmt: skip


# -- the mix ---------------------------------------------------------------------------------------------------------


def mix(folder: Path, items: int, dim: int, seconds: float) -> None:
    storage = f'dim = {dim}\nengine = "{"hnsw16" if items >= 50_000 else "exact"}"'
    with cluster(folder / "mix", 3, storage=storage, shard_count=6) as nodes:
        say(f"router.mix_p99_ms: {items} × {dim} items go in")
        _fill([node.url for node in nodes], items, dim)
        took, late = trio.run(_mix, [node.url for node in nodes], seconds)
        shares = [_counters(node)["l0"] for node in nodes]
    hits, misses = (sum(one[key] for one in shares) for key in ("hits", "misses"))
    p99, p50 = np.percentile(np.array(took) * 1000, [99, 50])
    say(f"{len(took) / seconds:.0f}/s, p50 {p50:.1f} ms, {late} sent late, hits {hits}, misses {misses}")
    figure(
        "router.mix_p99_ms", float(p99), "ms", peer="wanted requests/s, of which were made",
        peer_value=len(took) / seconds, target="< 100 ms at 1,660/s", n=len(took),
    )  # fmt: skip


async def _mix(urls: Sequence[str], seconds: float) -> tuple[list[float], int]:
    """RATE requests a second at fixed times; one in twenty excludes a class that nobody asked to exclude before."""
    took: list[float] = []
    late = 0
    rng = random.Random(1)
    async with gmco.connect(urls, timeout_s=10.0) as client, trio.open_nursery() as nursery:
        for user in range(1, USERS + 1):
            await client.recommend(user)

        async def one(number: int, due: float) -> None:
            user = 1 + rng.randrange(USERS)
            exclude = [] if number % 20 else [number // 20 % 200, 200 + number // 4_000 % 50]
            await client.recommend(user, exclude=exclude)
            took.append(trio.current_time() - due)

        began = trio.current_time()
        for number in range(int(RATE * seconds)):
            due = began + number / RATE
            if due > trio.current_time():
                await trio.sleep_until(due)
            late += trio.current_time() - due > 0.01
            nursery.start_soon(one, number, due)
    return took, late


def main() -> None:
    options = arguments(__doc__ or "")
    seconds, runs = (1.0, 5) if options.quick else (2.0, 9)

    def wanted(name: str) -> bool:
        return not options.only or options.only in name

    folder = Path(tempfile.mkdtemp(prefix="bench-cache-"))
    try:
        if wanted("router.l0_single") or wanted(f"router.l0_framed{FRAMED}"):
            l0(folder, wanted, seconds, runs)
        if wanted("cache.l1_rate") or wanted("cache.l1_added_p50_ms"):
            l1(folder, wanted, seconds, runs)
        if wanted("router.mix_p99_ms"):
            mix(
                folder, *((5_000, 128) if options.quick else (100_000, 1_024)), 5.0 if options.quick else 20.0
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
