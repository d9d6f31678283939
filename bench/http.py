"""`http.*`: what the HTTP port answers a second, against starlette on hypercorn's trio worker, which gives back the same bytes.

* `http.keepalive`: one real daemon, `GET /recommend` of a few users on kept connections. With a cache configured these are L0
  hits (the line before says how many); without one each is a real search of a small index.
* `http.door`: the port alone: its handler returns a prebuilt answer, which is what an L0 hit costs it.
* `http.door_cpu_us`: the same in CPU of the server's process, which a busy machine disturbs less.
* `http.parser_us`: one request through our reader over llhttp, against h11.

The load is wrk where there is one (on the PATH, or named by WRK), else bench/http_load.py. Generator and servers share the cores.

    python -m bench.http [--quick]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import NamedTuple

import h11
import hypercorn
import hypercorn.trio
import trio
from starlette.applications import Starlette
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response as StarletteResponse
from starlette.routing import Route

import gmco
from bench import http_load
from bench.harness import arguments, figure, say
from node.httpapi import Api
from node.httpconn import HttpBounds
from node.httpserver import HttpServer
from node.httpwire import RequestReader, Response, WireBounds
from node.meters import Meters
from router.requests import Limits, Request, parse
from tests.processes.cluster import cluster

CONNECTIONS = 32
USERS = 50
ITEMS = 1_000
DIM = 16
RUNS = 5
PEER = "starlette + hypercorn (trio), the same bytes"


class Run(NamedTuple):
    requests_per_s: float
    cpu_us: float


# ---- Servers, each in a process of its own ----


def _door(pipe: Pipe) -> None:
    """Our port with a prebuilt answer behind it: everything but the question itself."""
    body: bytes = pipe.recv()
    meters = Meters()

    def ask(request: Request) -> dict[str, object]:
        raise AssertionError("nothing is asked")

    class Prebuilt(Api):
        def _question(self, op: str, fields: dict[str, object], route: str) -> Response:
            # As for a hit of L0: the request is checked, the answer lies there as bytes.
            parse(op, fields, self._limits)
            return Response(200, body, route=route)

    async def serve() -> None:
        api = Prebuilt(ask, Limits(dim=DIM), {}, frozenset())
        server = HttpServer(api, HttpBounds(), count=meters.http_answered, port=0)
        async with trio.open_nursery() as nursery:
            pipe.send(await nursery.start(server.run))
            await trio.to_thread.run_sync(pipe.recv)
            nursery.cancel_scope.cancel()

    trio.run(serve)


def _peer(pipe: Pipe) -> None:
    body: bytes = pipe.recv()

    async def recommend(request: StarletteRequest) -> StarletteResponse:
        return StarletteResponse(body, media_type="application/json")

    app = Starlette(routes=[Route("/recommend", recommend)])
    config = hypercorn.Config()
    config.bind = ["127.0.0.1:0"]
    config.accesslog = None
    config.errorlog = None

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            binds = await nursery.start(partial(hypercorn.trio.serve, app, config))
            pipe.send(int(binds[0].rsplit(":", 1)[1]))
            await trio.to_thread.run_sync(pipe.recv)
            nursery.cancel_scope.cancel()

    trio.run(serve)


def _start(target: Callable[[Pipe], None], body: bytes) -> tuple[int, int, Pipe]:
    """Port, process id, and what ends it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), daemon=True)
    process.start()
    pipe.send(body)
    return pipe.recv(), process.pid or 0, pipe


# ---- Measuring ----


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _load(port: int, pid: int, seconds: float) -> Run:
    cpu = _cpu_s(pid)
    wrk = os.environ.get("WRK") or shutil.which("wrk")
    if wrk is None:
        found = http_load.run(
            port, [_target(user) for user in range(USERS)], connections=CONNECTIONS, seconds=seconds
        )
        rate, count = found.requests_per_s, found.requests_per_s * seconds
    else:
        rate, count = _wrk(wrk, port, seconds)
    return Run(rate, 1e6 * (_cpu_s(pid) - cpu) / count)


def _wrk(wrk: str, port: int, seconds: float) -> tuple[float, float]:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            f"i = 0\nrequest = function()\n  i = (i + 1) % {USERS}\n"
            '  return wrk.format("GET", "/recommend?user_id=" .. (100 + i) .. "&k=10&context=homepage")\nend\n'
        )
        script.flush()
        said = subprocess.run(
            [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "-s", script.name, f"http://127.0.0.1:{port}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    if "Non-2xx" in said:
        raise RuntimeError(said)
    rate, count = re.search(r"Requests/sec:\s+([\d.]+)", said), re.search(r"(\d+) requests in", said)
    assert rate is not None
    assert count is not None
    return float(rate[1]), float(count[1])


def _target(user: int) -> str:
    return f"/recommend?user_id={100 + user}&k=10&context=homepage"


def _turns(servers: list[tuple[int, int]], seconds: float, runs: int) -> list[Run]:
    """Medians of each server's runs, taken in turn."""
    found: list[list[Run]] = [[] for _ in servers]
    for port, pid in servers:
        _load(port, pid, min(1.0, seconds))
    for _ in range(runs):
        for place, (port, pid) in enumerate(servers):
            found[place].append(_load(port, pid, seconds))
    return [
        Run(
            statistics.median(one.requests_per_s for one in some),
            statistics.median(one.cpu_us for one in some),
        )
        for some in found
    ]


def _parser_us(feed: Callable[[bytes], object], raw: bytes, count: int) -> float:
    begun = time.process_time()
    for _ in range(count):
        feed(raw)
    return 1e6 * (time.process_time() - begun) / count


def _h11(raw: bytes) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    while connection.next_event() is not h11.NEED_DATA:
        if connection.their_state is h11.DONE:
            break


def _parsers(quick: bool) -> None:
    raw = http_load.request(7401, _target(1))
    reader = RequestReader(WireBounds())
    count = 20_000 if quick else 100_000
    ours, theirs = [], []
    for _ in range(5):
        ours.append(_parser_us(reader.feed, raw, count))
        theirs.append(_parser_us(_h11, raw, count // 10))
    figure(
        "http.parser_us", statistics.median(ours), "µs of CPU", peer="h11", peer_value=statistics.median(theirs),
        target="below h11", n=5,
    )  # fmt: skip


def _hit_ratio(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as page:
        text = page.read().decode()
    found = re.findall(r'^cache_hit_ratio\{level="(\w+)"\} ([\d.e+-]+)', text, re.MULTILINE)
    return ", ".join(f"{level} {float(ratio):.3f}" for level, ratio in found) or "no cache: real searches"


def main() -> None:
    options = arguments(__doc__ or "")
    seconds, runs = (1.0, 3) if options.quick else (3.0, RUNS)
    _parsers(options.quick)
    rng = random.Random(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(Path(folder), 1, storage='dim = 16\nengine = "exact"') as (node,),
    ):
        with gmco.connect_blocking([node.url], timeout_s=30.0) as client:
            vectors = [[rng.gauss(0, 1) for _ in range(DIM)] for _ in range(ITEMS)]
            client.put_items([gmco.Item(i, one, (), {"title": f"film {i}"}) for i, one in enumerate(vectors)])
            # All alike, so that all answers are of one length.
            client.put_users([gmco.User(100 + i, vectors[0], (), {}) for i in range(USERS)])
        url = node.status()["http"]
        with urllib.request.urlopen(url + _target(1)) as answer:
            body = answer.read()
        assert node.process is not None
        peer_port, peer_pid, peer = _start(_peer, body)
        door_port, door_pid, door = _start(_door, body)
        node_port = int(url.rsplit(":", 1)[1])
        generator = "wrk" if os.environ.get("WRK") or shutil.which("wrk") else "bench/http_load.py"
        say(f"answers of {len(body)} bytes, {CONNECTIONS} connections, load by {generator}")
        ours, prebuilt, theirs = _turns(
            [(node_port, node.process.pid), (door_port, door_pid), (peer_port, peer_pid)], seconds, runs
        )
        say(f"http.keepalive: hits of the caches: {_hit_ratio(url)}")
        figures = {
            "http.keepalive": (
                ours.requests_per_s,
                theirs.requests_per_s,
                "requests/s",
                "≥ 3,000/s, ≥ 4 × (L0 hits)",
            ),
            "http.door": (prebuilt.requests_per_s, theirs.requests_per_s, "requests/s", "≥ 3,000/s, ≥ 4 ×"),
            "http.keepalive_cpu_us": (ours.cpu_us, theirs.cpu_us, "µs of CPU", "(for builders)"),
            "http.door_cpu_us": (prebuilt.cpu_us, theirs.cpu_us, "µs of CPU", "≤ 0.25 ×"),
        }
        for name, (value, peer_value, unit, target) in figures.items():
            figure(name, value, unit, peer=PEER, peer_value=peer_value, target=target, n=runs)
        for pipe in (peer, door):
            pipe.send(None)


if __name__ == "__main__":
    main()
