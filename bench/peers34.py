"""The other nodes of a simulated fan-out: one process, a listener for each, that answer searches with canned hits at once.

Run by `bench.router`; prints its ports as JSON, and ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from node.config import Address
from node.peerlink import Hello, PeerListener

DIM = 64
METADATA = b"\x81\xa5title\xd9\x60" + b"x" * 96


def hello(name: str) -> Hello:
    return Hello(cluster_id="bench", node=name, shard_count=100, dim=DIM, metric="cosine", boot=1)


def handlers(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    ids = (np.arange(500) * 64 + number).astype(np.uint64)

    @cache
    def scores(shards: int) -> npt.NDArray[np.float32]:
        """The best of a shard's 10,000 items, times so many shards."""
        return np.sort(rng.random(10_000 * shards).astype(np.float32))[::-1][:500].copy()

    vector = rng.normal(size=DIM).astype(np.float16).tobytes()

    def search(peer: str, body: Any) -> Any:
        k = body[2]
        return [
            ids[:k].tobytes(),
            scores(len(body[0]))[:k].tobytes(),
            [METADATA] * k if body[4] else None,
            {},
            0,
        ]

    def get(peer: str, body: Any) -> Any:
        return [[[[1, 1], vector, (), METADATA] for _ in body[1]], 0]

    return {"search": search, "get": get}


async def main(count: int) -> None:
    async with trio.open_nursery() as nursery:
        ports = []
        for number in range(count):
            listener = PeerListener(handlers(number), hello(f"n{number}"), listen=Address("127.0.0.1", 0))
            ports.append((await nursery.start(listener.run)).port)
        print(json.dumps(ports), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
