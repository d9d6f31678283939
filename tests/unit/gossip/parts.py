"""Any part that a machine may make, for hypothesis."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

from hypothesis import strategies as st

from gossip.codec import BUCKETS
from gossip.config import COUNTER_MAX, INCARNATION_MAX
from gossip.messages import (
    Ack,
    Address,
    Buckets,
    Claim,
    Digest,
    Fact,
    Hot,
    Join,
    Nack,
    Part,
    Ping,
    PingReq,
    Root,
    State,
    Want,
)

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
INCARNATIONS = st.integers(0, INCARNATION_MAX)
COUNTERS = st.integers(0, COUNTER_MAX)
IDS = st.integers(1, (1 << 64) - 1)
HOSTS = st.one_of(
    st.ip_addresses(v=4).filter(lambda ip: not ip.is_unspecified),
    st.ip_addresses(v=6).filter(lambda ip: not ip.is_unspecified and ip.ipv4_mapped is None),
)


def _address(ip: IPv4Address | IPv6Address, port: int) -> Address:
    return Address(str(ip), port)


ADDRESSES = st.builds(_address, HOSTS, st.integers(1, 65_535))
PARTS: st.SearchStrategy[Part] = st.one_of(
    st.builds(Ping, U32, U64, U32),
    st.builds(Ack, U32),
    st.builds(PingReq, U32, U64, ADDRESSES),
    st.builds(Nack, U32),
    st.builds(Claim, IDS, U32, INCARNATIONS, st.sampled_from(State), ADDRESSES, U64),
    st.builds(Fact, IDS, U32, COUNTERS, st.binary(max_size=64), st.binary(max_size=1_000)),
    st.builds(Hot, IDS, U32, COUNTERS, st.binary(max_size=255)),
    st.builds(Root, U64),
    st.builds(Buckets, st.tuples(*[U32] * BUCKETS)),
    st.builds(Digest, U64, st.lists(st.tuples(U64, U64), max_size=20).map(tuple)),
    st.builds(Want, st.lists(U64, max_size=20).map(tuple)),
    st.just(Join()),
)
