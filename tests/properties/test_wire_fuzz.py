"""Whatever arrives at a door, it is answered or refused by a declared code, soon, and without eating memory.

A few thousand inputs each time; a million with `make soak`. A failure names the seed and the number of the input.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable

import msgpack
import pytest

from node.httpapi import Api
from node.httpwire import HttpError, HttpRequest, RequestReader, Response, WireBounds
from router.errors import CODES, RequestError
from router.requests import Limits, Request, parse
from router.wire import Refused, Reply, decode_frame, encode_replies, error_reply
from tests.properties.mutations import DIM, http_stream, json_frame, msgpack_frame

LIMITS = Limits(dim=DIM, frame_bytes_max=200_000)
BOUNDS = WireBounds(body_bytes_max=200_000)
# Of one input of at most 200 kB; on a crowded machine.
SECONDS_MAX = 2.0
MEMORY_BYTES_MAX = 200 << 20


def check_frame(frame: bytes | str) -> None:
    text = isinstance(frame, str)
    replies = []
    for one in decode_frame(frame, LIMITS):
        if isinstance(one, Refused):
            error, id = one.error, one.id
        else:
            id = one.pop("id")
            try:
                parse(one.pop("op"), one, LIMITS)
            except RequestError as refused:
                error = refused
            else:
                replies.append({"id": id, "ok": True})
                continue
        assert error.code in CODES
        assert error.code != "internal"
        assert len(error.message) < 1_000
        replies.append(error_reply(id, error))
    sent = encode_replies(replies, text)
    if replies:
        read = json.loads(sent) if isinstance(sent, str) else msgpack.unpackb(sent)
        assert (read if isinstance(read, list) else [read])[0]["id"] == replies[0]["id"]


class Refusing:
    """A node behind the door that refuses all that is well asked."""

    def __call__(self, request: Request) -> Reply:
        raise RequestError("unavailable", "nobody is here")


API = Api(Refusing(), LIMITS, {"/healthz": lambda: Response(200, b"{}")}, frozenset({"https://a.example"}))


def check_stream(raw: bytes, rng: random.Random) -> None:
    whole = _read([raw])
    size = rng.choice([1, 7, 50, 1_000])
    assert _read([raw[at : at + size] for at in range(0, len(raw), size)]) == whole
    requests, refusal = whole
    assert refusal is None or refusal[0] in (400, 411, 413, 414, 417, 431, 505)
    for request in requests:
        try:
            response = API(request)
        except HttpError as error:
            assert error.status < 500
            continue
        assert isinstance(response, Response)
        assert response.status != 500, response
        if response.body:
            json.loads(response.body)
        if not request.keep_alive:
            break


def _read(chunks: list[bytes]) -> tuple[list[HttpRequest], tuple[int, str] | None]:
    """Up to the last that the connection would answer: what follows is nobody's."""
    reader = RequestReader(BOUNDS)
    found: list[HttpRequest] = []
    for chunk in chunks:
        requests, refusal = reader.feed(chunk)
        for request in requests:
            found.append(request)
            if not request.keep_alive:
                return found, None
        if refusal is not None:
            return found, (refusal.status, refusal.code)
    return found, None


KINDS: dict[str, Callable[[random.Random], None]] = {
    "msgpack": lambda rng: check_frame(msgpack_frame(rng)),
    "json": lambda rng: check_frame(json_frame(rng)),
    "http": lambda rng: check_stream(http_stream(rng), rng),
}


def fuzz(kind: str, count: int, seed: int) -> None:
    rng = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        state = rng.getstate()
        begun = time.process_time()
        try:
            KINDS[kind](rng)
        except BaseException as error:
            error.add_note(f"input {number} of seed {seed}; state {hash(state)}")
            raise
        took = time.process_time() - begun
        assert took < SECONDS_MAX, f"input {number} of seed {seed} took {took:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MEMORY_BYTES_MAX, f"{grown >> 20} MiB more than before, seed {seed}"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_few_thousand(kind: str) -> None:
    fuzz(kind, 4_000, seed=random.randrange(1 << 32))


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "count"), [("msgpack", 400_000), ("json", 300_000), ("http", 300_000)])
def test_a_million(kind: str, count: int) -> None:
    fuzz(kind, count, seed=random.randrange(1 << 32))
