"""Addresses ↔ their bytes in packets: family (1: 4 or 6), the address, port (2). Pure."""

from __future__ import annotations

import struct
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from gossip.messages import Address

# As many as a cluster can have members, twice. Text costs 2 µs, a hit 0.1.
_ADDRESSES_KEPT = 8_192
_PORT = struct.Struct("<H")


@lru_cache(_ADDRESSES_KEPT)
def packed_address(address: Address) -> bytes:
    """Raises ValueError for what no packet may hold, so that no node can be made to tell others of it."""
    host, port = address
    ip = IPv6Address(host) if ":" in host else IPv4Address(host)
    family = ip.version
    if str(ip) != host or "%" in host:
        raise ValueError(f"{host} is not the canonical form of an address")
    packed = bytes((family,)) + ip.packed + _PORT.pack(port)
    if address_of(packed) is None:
        raise ValueError(f"{address} cannot be a node's address")
    return packed


@lru_cache(_ADDRESSES_KEPT)
def address_of(packed: bytes) -> Address | None:
    """Family, address and port, whole → the address; None when it can be nobody's."""
    (port,) = _PORT.unpack_from(packed, len(packed) - 2)
    ip = IPv4Address(packed[1:-2]) if packed[0] == 4 else IPv6Address(packed[1:-2])
    # An IPv4 address in IPv6 clothes would be a second name of one place.
    if not port or ip.is_unspecified or (ip.version == 6 and ip.ipv4_mapped is not None):
        return None
    return Address(str(ip), port)
