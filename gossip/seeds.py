"""Seeds: whom a node asks first. Their names are looked up again and again, because addresses behind names change."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

import structlog
import trio

from gossip.messages import Address

SEEDS_MAX = 64
# A resolver that hangs must not keep the other names from being looked up.
RESOLVE_S = 5.0
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Seed:
    host: str
    port: int
    # Of a host that needs no looking up.
    address: Address | None

    @classmethod
    def parse(cls, text: str) -> Seed:
        """ "host:port", "10.0.0.1:7402", "[::1]:7402". Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ValueError(
                f'the seed "{text}" is not host:port; write for instance node-1:7402 or [::1]:7402'
            )
        if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
            raise ValueError(f'the seed "{text}": an IPv6 address stands in brackets, as in [::1]:7402')
        host = host.strip("[]")
        return cls(host, int(port), canonical(host, int(port)))


def canonical(host: str, port: int) -> Address | None:
    """The address, when `host` is one that packets can carry; None when it is a name, has a scope, or is unspecified."""
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if ip.version == 6 else None
    ip = mapped or ip
    if "%" in host or ip.is_unspecified:
        return None
    return Address(str(ip), port)


class Seeds:
    """The addresses behind `names`. Those of a name that cannot be looked up at the moment stay as they were."""

    def __init__(self, names: Iterable[str]) -> None:
        """Raises ValueError."""
        self._seeds = [Seed.parse(name) for name in names]
        self._found: dict[Seed, list[Address]] = {
            seed: [seed.address] if seed.address else [] for seed in self._seeds
        }

    @property
    def has_names(self) -> bool:
        """Whether looking up again can change anything."""
        return any(seed.address is None for seed in self._seeds)

    @property
    def addresses(self) -> list[Address]:
        """Without repetition, in the order of the names."""
        return list(dict.fromkeys(address for seed in self._seeds for address in self._found[seed]))[
            :SEEDS_MAX
        ]

    async def resolve(self) -> list[Address]:
        """Looks up all names at once, and returns `addresses` then."""
        async with trio.open_nursery() as nursery:
            for seed in self._seeds:
                if seed.address is None:
                    nursery.start_soon(self._resolve, seed)
        return self.addresses

    async def _resolve(self, seed: Seed) -> None:
        found: list[Address] = []
        with trio.move_on_after(RESOLVE_S):
            try:
                for *_, place in await trio.socket.getaddrinfo(seed.host, seed.port, type=socket.SOCK_DGRAM):
                    address = canonical(str(place[0]), seed.port)
                    if address is not None:
                        found.append(address)
            except (OSError, UnicodeError) as error:
                log.debug("gossip_seed_unknown", seed=f"{seed.host}:{seed.port}", reason=str(error))
        if found:
            self._found[seed] = found
