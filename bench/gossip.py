"""Gossip in virtual time beside a model of memberlist's LAN defaults: `python -m bench.gossip [--quick] [--only NAME]`.

Whole clusters of the pure machines in one process (tests/simulation/). Each figure's peer runs in the same simulator with
the same seed. The full run takes about half an hour on one core; `--quick` asks fewer and smaller questions.
"""

from __future__ import annotations

import gc
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import arguments, figure, say
from tests.simulation import scenarios
from tests.simulation.scenarios import MEMBERLIST, OURS, quantile

SEED = 20_261_124
MODEL = "model of memberlist's LAN defaults"


def detect(name: str, count: int, crashes: int, target: str, *, loss: float, peer_crashes: int) -> None:
    ours = scenarios.detection(OURS, count, crashes, SEED, loss=loss)
    peer = scenarios.detection(MEMBERLIST, count, peer_crashes, SEED, loss=loss, gap_s=2.0)
    middle, worst = quantile(ours.delays_s, 0.5), max(ours.delays_s)
    say(
        f"{name}: median {middle:.2f} s, worst {worst:.2f} s, false deaths {ours.false_deaths}, unknown {ours.unknown}"
    )
    figure(
        name,
        quantile(ours.delays_s, 0.99) if not ours.unknown else math.inf,
        "s, p99 until all know",
        peer=MODEL,
        peer_value=quantile(peer.delays_s, 0.99),
        target=target,
        n=crashes,
    )


def fact(name: str, count: int, changes: int, peer_changes: int, target: str) -> None:
    ours = scenarios.fact_delay(OURS, count, changes, SEED)
    peer = scenarios.fact_delay(MEMBERLIST, count, peer_changes, SEED)
    figure(
        name,
        ours,
        "s, until 99.99% know",
        peer=MODEL,
        peer_value=peer if math.isfinite(peer) else None,
        target=target,
        n=changes,
    )


def false_deaths(name: str, loss: float, hours: float, peer_hours: float, target: str) -> None:
    ours = scenarios.false_deaths(OURS, 100, hours, SEED, loss=loss)
    peer = scenarios.false_deaths(MEMBERLIST, 100, peer_hours, SEED, loss=loss)
    # The greatest rate under which so few events would still be seen in one of 20 runs (Poisson, one-sided 95%).
    bound = _poisson_bound(ours)
    say(f"{name}: 95% bound {bound / hours:.3f} per node-hour; the peer {peer} in {peer_hours:g} node-hours")
    per_100 = 100 / hours
    figure(
        name,
        ours * per_100,
        f"false deaths in 100 node-hours (95% bound {bound * per_100:.1f})",
        peer=MODEL,
        peer_value=peer * 100 / peer_hours,
        target=target,
        n=round(hours),
    )


def _poisson_bound(seen: int) -> float:
    low, high = 0.0, 100.0 + 10 * seen
    for _ in range(60):
        mean = (low + high) / 2
        term = below = math.exp(-mean)
        for i in range(1, seen + 1):
            term *= mean / i
            below += term
        low, high = (mean, high) if below > 0.05 else (low, mean)
    return low


def main() -> None:
    options = arguments(__doc__ or "")
    quick = options.quick

    def wants(name: str) -> bool:
        return options.only is None or options.only in name

    gc.disable()  # a simulated cluster is a million objects that all live on
    detections = [
        ("gossip.detect_100", 100, "<= 3.5 s", 0.0),
        ("gossip.detect_100_loss20", 100, "<= 4 s", 0.2),
        ("gossip.detect_1000", 1000, "<= 4.5 s", 0.0),
        ("gossip.detect_1000_loss20", 1000, "<= 5 s", 0.2),
    ]
    for name, count, target, loss in detections:
        if wants(name) and not (quick and count > 100):
            # The model at 1,000 nodes costs minutes a crash.
            crashes, peer_crashes = (10, 5) if quick else (33, 20) if count == 100 else (60, 6)
            detect(name, count, crashes, target, loss=loss, peer_crashes=peer_crashes)
            gc.collect()
    for name, count, target in (("gossip.fact_100", 100, "<= 1.0 s"), ("gossip.fact_1000", 1000, "<= 1.2 s")):
        if wants(name) and not (quick and count > 100):
            fact(name, count, 20 if quick else 100, 10 if quick else 20, target)
            gc.collect()
    hours = 1 if quick else 100
    for name, loss, target in (
        ("gossip.false_deaths_loss20", 0.2, "0 in 100 node-hours"),
        ("gossip.false_deaths_loss30", 0.3, "<= 1 in 100 node-hours"),
    ):
        if wants(name):
            false_deaths(name, loss, hours, 1 if quick else 20, target)
            gc.collect()
    if wants("gossip.false_deaths_stalls"):
        seconds = 15 if quick else 120
        ours = scenarios.stall_deaths(OURS, 100, seconds, SEED)
        peer = scenarios.stall_deaths(MEMBERLIST, 100, seconds, SEED)
        figure("gossip.false_deaths_stalls", ours, "healthy nodes accused to death", peer=MODEL, peer_value=peer,
               target="0", n=100)  # fmt: skip
        gc.collect()
    redis = "Redis Cluster, as its users report (cited, not measured)"
    seconds = 10 if quick else 60
    if wants("gossip.bytes_idle"):
        figure("gossip.bytes_idle", scenarios.traffic(100, seconds, SEED) / 1000, "KB/s per node", peer=redis,
               peer_value=87, target="<= 1 KB/s", n=100)  # fmt: skip
    if wants("gossip.bytes_busy"):
        busy = scenarios.traffic(100, seconds / 2, SEED, replicas=20) / 1000
        figure(
            "gossip.bytes_busy", busy, "KB/s per node", peer=redis, peer_value=87, target="<= 15 KB/s", n=100
        )
    if wants("gossip.heal"):
        split_s = 60.0 if quick else 3_600.0
        sizes = ((3, 0.34), (10, 0.5)) if quick else ((3, 0.34), (20, 0.5), (100, 0.3))
        healed = [scenarios.heal(count, split_s, SEED, share=share) for count, share in sizes]
        say(f"gossip.heal: {[(count, round(one.seconds, 2)) for (count, _), one in zip(sizes, healed, strict=True)]}, "
            f"false deaths {sum(one.false_deaths for one in healed)}")  # fmt: skip
        figure("gossip.heal", max(one.seconds for one in healed), "s, worst of the sizes", peer="serf's retries (documented)",
               peer_value=30, target="<= 10 s", n=len(sizes))  # fmt: skip


if __name__ == "__main__":
    main()
