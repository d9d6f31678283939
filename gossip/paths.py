"""Which members are to be reached over TCP, because UDP to them does not get through. Pure.

Laws:
* a member is in doubt from an ack that came over a stream until one that comes by UDP. An ack is what counts: it shows
  that UDP works both ways, where other packets show one way only;
* three acks in a row over streams, over 3 s or more, and all goes over TCP for a minute; then UDP is tried again, and has
  three probes' time to show that it works.
"""

from __future__ import annotations

from gossip.config import UdpMode
from gossip.messages import Address

ACKS = 3
SILENT_S = 3.0
RETRY_S = 60.0


class _Doubt:
    __slots__ = ("acks", "since", "until")

    def __init__(self, since: float) -> None:
        self.since, self.acks, self.until = since, 0, 0.0


class Paths:
    """At most `doubts_max` members in doubt: past it the first one gets a new chance with UDP."""

    def __init__(self, mode: UdpMode, doubts_max: int) -> None:
        self._mode, self._doubts_max = mode, doubts_max
        # Only what is in doubt: where UDP works this is empty, and costs nothing.
        self._doubts: dict[Address, _Doubt] = {}

    def __bool__(self) -> bool:
        """Whether anybody is in doubt, so that acks are worth reporting."""
        return bool(self._doubts)

    def on_stream_ack(self, address: Address, now: float) -> bool:
        """An ack of `address` came over a stream. Whether it goes over TCP only from now on, and did not before."""
        if self._mode != "auto":
            return False
        doubt = self._doubts.get(address)
        if doubt is None:
            if len(self._doubts) >= self._doubts_max:
                del self._doubts[next(iter(self._doubts))]
            doubt = self._doubts[address] = _Doubt(now)
        doubt.acks += 1
        if now < doubt.until or doubt.acks < ACKS or now - doubt.since < SILENT_S:
            return False
        doubt.until = now + RETRY_S
        return True

    def on_udp_ack(self, address: Address) -> None:
        self._doubts.pop(address, None)

    def by_stream(self, address: Address, now: float) -> bool:
        """Whether packets to `address` go over TCP."""
        if self._mode != "auto":
            return self._mode == "off"
        doubt = self._doubts.get(address)
        if doubt is None or not doubt.until:
            return False
        if now < doubt.until:
            return True
        del self._doubts[address]
        return False

    def blocked(self, now: float) -> list[Address]:
        return [address for address, doubt in self._doubts.items() if now < doubt.until]
