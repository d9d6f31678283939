"""Frames and hellos as bytes."""

from __future__ import annotations

import struct

import msgpack
import pytest

from node.frames import FrameParser, Hello, ProtocolError, pack_hello, unpack_hello

HELLO = Hello(cluster_id="c", node="a", shard_count=12, dim=8, metric="cosine", boot=1)


def frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


@pytest.mark.parametrize("step", [1, 3, 7, 64, 10_000])
def test_frames_are_found_wherever_they_are_torn(step: int) -> None:
    payloads = [bytes([i % 256]) * (i * 37 % 300) for i in range(200)]
    stream = b"".join(frame(payload) for payload in payloads)
    parser = FrameParser(1_000)
    seen = [
        bytes(one)
        for start in range(0, len(stream), step)
        for one in parser.feed(stream[start : start + step])
    ]
    assert seen == payloads
    assert parser.missing == 0
    with pytest.raises(ProtocolError, match="the bound is"):
        list(parser.feed(struct.pack("<I", 1_001)))


def test_a_hello_may_gain_fields() -> None:
    said = msgpack.unpackb(pack_hello(HELLO, "no")) | {"new": 1}
    assert unpack_hello(msgpack.packb(said)) == (HELLO, "no")
