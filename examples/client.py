"""Writes three films and a viewer, and asks what the viewer may like. Needs a node on ws://127.0.0.1:7400.

python examples/client.py [ws://host:port …]
"""

from __future__ import annotations

import random
import sys

import trio

import gmco

DRAMA, COMEDY = 1, 2


def vector(dim: int, seed: int) -> list[float]:
    """Stands in for what an embedding model says of a film or a viewer."""
    numbers = random.Random(seed)
    return [numbers.gauss(0, 1) for _ in range(dim)]


async def main(urls: list[str], dim: int) -> None:
    async with gmco.connect(urls) as client:
        films = [
            gmco.Item(9_001, vector(dim, 1), [DRAMA], {"title": "The Long Winter"}),
            gmco.Item(9_002, vector(dim, 2), [COMEDY], {"title": "Two Left Shoes"}),
            gmco.Item(9_003, vector(dim, 3), [DRAMA, COMEDY], {"title": "Half a Smile"}),
        ]
        await client.put_items(films)
        written = await client.put_users([gmco.User(9_100, vector(dim, 3))])

        # The session makes this answer reflect the write above, whichever node gives it.
        answer = await client.recommend(9_100, k=3, require_any=[COMEDY], session=written.session)
        for hit in answer.hits:
            print(f"{hit.score:6.3f}  {hit.media_id}  {hit.metadata}")
        if answer.coverage is not None and not answer.coverage.complete:
            print("not all shards answered; missing:", answer.coverage.missing)

        # Tasks share the connection; requests that wait at the same moment share a frame.
        async with trio.open_nursery() as nursery:
            for film in films:
                nursery.start_soon(client.similar, film.media_id)

        await client.delete_items([film.media_id for film in films])
        await client.delete_users([9_100])


if __name__ == "__main__":
    trio.run(main, sys.argv[1:] or ["ws://127.0.0.1:7400"], 1024)
