"""Parameters of gossip. Times in seconds; the defaults and where they come from: docs/gossip.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PACKET_BYTES_MAX = 1_200
FACT_VALUE_BYTES_MAX = 1_000
FACT_KEY_BYTES_MAX = 64
FACT_KEYS_MAX = 64
FACT_BYTES_MAX = 16 << 10
HOT_BYTES_MAX = 255
# Repair packs a claim's boot, incarnation and state, or a fact's boot and counter, into one version of 64 bits.
INCARNATION_MAX = (1 << 30) - 1
COUNTER_MAX = (1 << 32) - 1

# auto: UDP, and TCP to those whom UDP does not reach. off: no UDP socket is opened. on: UDP, TCP for large exchanges only.
UdpMode = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GossipConfig:
    """One set for the whole cluster; a node with other values works, but detects at its own pace."""

    probe_s: float = 0.25
    # After the ping; the last of them also asks relays and TCP, see `indirect_s`.
    repings_s: tuple[float, ...] = (0.15, 0.3, 0.5, 0.7)
    indirect_s: float = 0.3
    probe_deadline_s: float = 1.0
    relays: int = 3
    suspicion_min_s: float = 1.0
    suspicion_max_s: float = 6.0
    confirmations: int = 3
    # Those who only heard of a suspicion wait so much longer than those who have evidence of their own.
    bystander_s: float = 2.0
    burst_s: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    burst_deadline_s: float = 0.45
    health_max: int = 8
    late_s: float = 0.1
    rumour_s: float = 0.1
    fanout: int = 3
    rumour_sends: float = 6.0
    hot_sends: int = 3
    hot_bytes_per_s: int = 12_000
    cold_bytes_per_s: int = 64_000
    repair_s: float = 5.0
    retry_min_s: float = 1.0
    retry_max_s: float = 5.0
    left_keep_s: float = 3_600.0
    members_max: int = 4_096
    udp: UdpMode = "auto"

    def sends(self, members: int) -> int:
        """How often one node tells one rumour, in a cluster of so many."""
        return math.ceil(self.rumour_sends * math.log10(members + 1))

    def suspicion_s(self, confirmations: int, members: int) -> float:
        """How long a suspicion lasts with so many confirmations by others (Lifeguard, section IV-B)."""
        k = min(self.confirmations, members - 2)
        if k < 1 or confirmations >= k:
            return self.suspicion_min_s
        span = self.suspicion_max_s - self.suspicion_min_s
        return self.suspicion_max_s - span * math.log(confirmations + 1) / math.log(k + 1)
