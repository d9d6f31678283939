"""Frames and hellos as bytes."""

from __future__ import annotations

import dataclasses
import struct

import msgpack
import pytest

from node.frames import (
    FrameParser,
    Hello,
    HelloRefusedError,
    ProtocolError,
    check_hello,
    pack_hello,
    unpack_hello,
)

HELLO = Hello(cluster="c", node="a", shard_count=12, dim=8, metric="cosine", boot=1)


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
    said = msgpack.unpackb(pack_hello(HELLO, HelloRefusedError("no", "other_cluster"))) | {"new": 1}
    hello, refused = unpack_hello(msgpack.packb(said))
    assert hello == HELLO
    assert refused is not None
    assert (str(refused), refused.code) == ("no", "other_cluster")
    # And be of a node that knows of no layout, or gives no code.
    del said["cluster_id"], said["code"]
    hello, refused = unpack_hello(msgpack.packb(said))
    assert (hello.cluster_id, refused and refused.code) == ("", "refused")


@pytest.mark.parametrize(
    ("mine", "theirs", "taken"),
    [("", "", True), ("0f", "", True), ("", "0f", True), ("0f", "0f", True), ("0f", "1e", False)],
)
def test_two_clusters_of_one_name_are_two(mine: str, theirs: str, taken: bool) -> None:
    one = dataclasses.replace(HELLO, cluster_id=mine)
    other = dataclasses.replace(HELLO, node="b", cluster_id=theirs)
    if taken:
        check_hello(one, other)
        return
    with pytest.raises(HelloRefusedError, match="another cluster of the same name") as caught:
        check_hello(one, other)
    assert caught.value.code == "other_cluster"
