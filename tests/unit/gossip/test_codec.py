"""The bytes of docs/gossip.md, by example, and what the decoder refuses."""

from __future__ import annotations

import pytest

from gossip.codec import PARTS_BYTES_MAX, PARTS_MAX, STREAM_PACKET_BYTES_MAX, encode, size_of
from gossip.config import COUNTER_MAX, INCARNATION_MAX
from gossip.decoder import decode
from gossip.errors import CodecError, DropReason
from gossip.messages import Ack, Address, Claim, Digest, Fact, Join, Part, Ping, PingReq, State

HEAD = encode(7, 1, [])


def refusal(plain: bytes) -> DropReason:
    with pytest.raises(CodecError) as caught:
        decode(plain)
    return caught.value.reason


def test_the_bytes_of_the_page() -> None:
    assert b"\x01\x01" + b"\x07" + bytes(7) + b"\x01" == HEAD
    assert encode(7, 1, [Ping(1, 2, 3)])[len(HEAD) :] == (
        b"\x01\x10" + b"\x01\0\0\0" + b"\x02" + bytes(7) + b"\x03\0\0\0"
    )
    claim = Claim(5, 300, 1, State.DOWN, Address("10.0.0.1", 7402), 6)
    assert encode(7, 1, [claim])[len(HEAD) :] == (
        b"\x05\x1b"
        + b"\x05"
        + bytes(7)
        + b"\xac\x02"
        + b"\x01"
        + b"\x02"
        + b"\x04\x0a\0\0\x01\xea\x1c"
        + b"\x06"
        + bytes(7)
    )
    fact = Fact(5, 1, 2, b"zone", b"a")
    assert encode(7, 1, [fact])[len(HEAD) :] == b"\x06\x10" + b"\x05" + bytes(7) + b"\x01\x02\x04zonea"


def test_a_range_that_holds_our_version_is_read() -> None:
    plain = encode(7, 1, [Ack(1)])
    assert decode(b"\x01\x09" + plain[2:]).parts == (Ack(1),)
    assert decode(b"\x00\x01" + plain[2:]).version_min == 0
    assert refusal(b"\x02\x03" + plain[2:]) == "newer_version"
    assert refusal(b"\x03\x01" + plain[2:]) == "malformed"


def test_the_cluster_rides_along_and_a_packet_without_it_is_read() -> None:
    cluster = bytes(range(4))
    plain = encode(7, 1, [Ack(1)], cluster)
    assert plain == HEAD + bytes([13, 4]) + cluster + encode(7, 1, [Ack(1)])[len(HEAD) :]
    assert (decode(plain).cluster, decode(plain).parts) == (cluster, (Ack(1),))
    assert decode(encode(7, 1, [Ack(1)])).cluster == b""
    # Longer in a newer version; shorter in none.
    assert decode(HEAD + bytes([13, 6]) + cluster + b"xx").cluster == cluster
    assert refusal(HEAD + bytes([13, 3]) + cluster[:3]) == "malformed"


def test_bounds() -> None:
    assert refusal(b"") == "malformed"
    assert refusal(HEAD[:-1]) == "malformed"
    assert refusal(HEAD + bytes(STREAM_PACKET_BYTES_MAX)) == "too_large"
    assert refusal(HEAD + bytes((12, 0)) * (PARTS_MAX + 1)) == "too_large"
    assert len(decode(HEAD + bytes((12, 0)) * PARTS_MAX).parts) == PARTS_MAX


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(b"\x01", id="a kind without a length"),
        pytest.param(b"\x02\x05\0\0\0\0", id="a part longer than the packet"),
        pytest.param(b"\x02\x03\0\0\0", id="an ack too short"),
        pytest.param(b"\x02" + b"\x80" * 10 + b"\x01", id="an endless length"),
        pytest.param(b"\x06\x0d" + b"\x05" + bytes(7) + b"\x01\x02\x04ab", id="a key longer than its part"),
        pytest.param(b"\x06\x0b" + bytes(8) + b"\x01\x02\x00", id="a fact of nobody"),
        pytest.param(b"\x0b\x09" + bytes(9), id="a torn item"),
        pytest.param(b"\x0a\x10" + bytes(16), id="an item without a version"),
        pytest.param(b"\x03\x13" + bytes(12) + b"\x05" + bytes(6), id="an unknown family"),
        pytest.param(b"\x03\x13" + bytes(12) + b"\x04\x7f\0\0\x01\0\0", id="port 0"),
        pytest.param(b"\x03\x13" + bytes(12) + b"\x04\0\0\0\0\x01\0", id="0.0.0.0"),
        pytest.param(
            b"\x03\x1f" + bytes(12) + b"\x06" + bytes(10) + b"\xff\xff\x7f\0\0\x01\x01\0", id="IPv4 in IPv6"
        ),
    ],
)
def test_malformed_parts(part: bytes) -> None:
    assert refusal(HEAD + part) == "malformed"


def test_numbers_out_of_range() -> None:
    assert refusal(b"\x01\x01" + bytes(8) + b"\x01") == "malformed", "sender 0"
    assert refusal(HEAD[:10] + b"\x80\x80\x80\x80\x10") == "malformed", "boot 2^32"
    assert decode(HEAD[:10] + b"\xff\xff\xff\xff\x0f").boot == (1 << 32) - 1
    claim = encode(7, 1, [Claim(5, 1, 1, State.LEFT, Address("10.0.0.1", 1), 6)])
    state = len(HEAD) + 2 + 8 + 2
    assert refusal(claim[:state] + b"\x04" + claim[state + 1 :]) == "malformed"
    last = encode(7, 1, [Claim(5, 1, INCARNATION_MAX, State.ALIVE, Address("10.0.0.1", 1), 6)])
    at = len(HEAD) + 2 + 8 + 1
    assert last[at : at + 5] == b"\xff\xff\xff\xff\x03"
    assert refusal(last[: at + 4] + b"\x04" + last[at + 5 :]) == "malformed", "incarnation 2^30"
    fact = encode(7, 1, [Fact(5, 1, COUNTER_MAX, b"", b"")])
    assert fact[-6:] == b"\xff\xff\xff\xff\x0f\0"
    assert refusal(fact[:-2] + b"\x10\0") == "malformed", "counter 2^32"
    most = encode(7, 1, [Digest(1, ((1, (1 << 64) - 1),))])
    assert refusal(most[:-1] + b"\x02") == "malformed", "version 2^65"


@pytest.mark.parametrize("host", ["node-1", "127.1", "::FFFF", "fe80::1%eth0", "0::1", "::ffff:1.2.3.4", ""])
def test_only_canonical_addresses_are_written(host: str) -> None:
    with pytest.raises(ValueError):
        encode(7, 1, [PingReq(1, 2, Address(host, 7402))])


def test_a_ping_is_64_bytes_and_a_claim_rides_for_28() -> None:
    parts: list[Part] = [Ping(1, 2, 3)]
    assert 19 + 16 + len(encode(7, 1, parts)) == 64
    assert size_of(Claim(5, 1, 0, State.ALIVE, Address("10.0.0.1", 7402), 5)) == 28
    assert size_of(Claim(5, 1, 0, State.ALIVE, Address("::1", 7402), 5)) == 40
    assert size_of(Join()) == 2
    # The largest fact fits into a packet.
    assert size_of(Fact(1, (1 << 32) - 1, COUNTER_MAX, bytes(64), bytes(1_000))) <= PARTS_BYTES_MAX
