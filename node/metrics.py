"""The text of /metrics: what `Meters` count and what the parts' `statistics()` say, under names that stay (docs/http.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from node.meters import Distribution, Meters
from node.status import Parts, counters, own_status

# Values that each label may take, and counters that parts may have: past it they are left out, and that is counted.
LABEL_VALUES_MAX = 1_024
COUNTERS_MAX = 1_024
# However often it is asked for, the text is made so often.
KEEP_S = 1.0
LEVEL_MS = 2_000
# What parts count goes up, but for these, which are how things are now.
GAUGES = frozenset({
    "connections", "idle", "in_flight", "bodies_bytes", "open_in", "open_out", "by_stream", "receive_buffer_bytes",
    "members", "down", "health", "incarnation", "rumours", "waiting", "put_bytes_waiting", "bytes", "entries", "open",
    "users_known", "items_known", "mean_ms", "p95_ms", "breakers_open", "current", "silent_shards",
})  # fmt: skip
REPLICA_NUMBERS = ("items", "users", "fresh", "lag", "lag_ms", "epoch", "sequence")
# Parts that count by node or by pair of regions: these are labels, not names.
LABELLED = frozenset({"peers", "read_bytes"})
PEER_NUMBERS = ("in_flight", "answers", "errors", "timeouts", "mean_ms", "p95_ms", "open")
CONTENT_TYPE = CONTENT_TYPE_LATEST
_NOT_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


class MetricsPage:
    """`text` is what Prometheus reads."""

    def __init__(self, parts: Callable[[], Parts], meters: Meters) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Node(parts, meters))
        ProcessCollector(registry=self._registry)
        self._meters = meters
        self._made_at = float("-inf")
        self._text = b""

    def text(self) -> bytes:
        now = self._meters.now()
        if now - self._made_at >= KEEP_S:
            self._text = generate_latest(self._registry)
            self._made_at = now
        return self._text


class _Node(Collector):
    def __init__(self, parts: Callable[[], Parts], meters: Meters) -> None:
        self._parts, self._meters = parts, meters
        self._left_out = 0

    def collect(self) -> Iterator[Metric]:
        """A scrape's families, one consistent moment: it runs on the event loop and never waits."""
        parts, self._left_out = self._parts(), 0
        yield from self._questions()
        yield from self._http()
        tree = counters(parts)
        yield from _caches(tree)
        yield self._shard_health(parts)
        yield from self._counters({key: part for key, part in tree.items() if key not in LABELLED})
        yield from self._peers(tree["peers"])
        yield self._read_bytes(tree["read_bytes"])
        yield from self._replicas(parts)
        yield from self._actors(parts)
        said = "Label values and counters that were left out because there are too many."
        yield GaugeMetricFamily("gmco_metrics_left_out", said, value=self._left_out)

    def _questions(self) -> Iterator[Metric]:
        meters = self._meters
        asked = CounterMetricFamily(
            "inference_request", "Questions answered as coordinator.", labels=["op", "outcome"]
        )
        for (op, outcome), count in sorted(meters.inference.items()):
            asked.add_metric([op, outcome], count)
        yield asked
        yield _histogram(
            "inference_latency_seconds", "From the parsed request to its answer.", "op", meters.latency
        )
        yield _histogram(
            "inference_batch_size", "Queries in a batch of the search lane.", "", {"": meters.batches}
        )
        yield _histogram(
            "embedding_lookup_time_seconds", "One look-up of records here.", "", {"": meters.lookups}
        )
        yield CounterMetricFamily("recommendations_served", "Hits given to recommend.", value=meters.served)
        yield GaugeMetricFamily(
            "unique_users_per_minute",
            "Users asked for in the last whole minute, about.",
            value=meters.users.estimate(meters.now()),
        )

    def _http(self) -> Iterator[Metric]:
        answered = CounterMetricFamily(
            "http_requests", "Answers of the HTTP port.", labels=["route", "method", "status"]
        )
        for (route, method, status), count in sorted(self._meters.http.items()):
            answered.add_metric([route, method, str(status)], count)
        yield answered
        yield _histogram(
            "http_request_duration_seconds",
            "From a whole request to its answer.",
            "route",
            self._meters.http_seconds,
        )

    def _shard_health(self, parts: Parts) -> Metric:
        family = GaugeMetricFamily(
            "shard_health_status",
            "1: a replica that is alive, well and level; 0.5: only others; 0: none.",
            labels=["shard"],
        )
        cluster = parts.cluster
        if cluster is None:
            return family
        # Each node is looked at once, whatever the number of its shards.
        seen: dict[str, tuple[bool, Mapping[int, int]] | None] = {}
        for shard in range(self._fit(cluster.shard_count)):
            best = 0.0
            for name in cluster.placement(shard).voters:
                if name not in seen:
                    seen[name] = (cluster.avoid(name), cluster.lags_ms(name)) if cluster.alive(name) else None
                sight = seen[name]
                if sight is not None:
                    well = not sight[0] and sight[1].get(shard, 0) <= LEVEL_MS
                    best = max(best, 1.0 if well else 0.5)
            family.add_metric([str(shard)], best)
        return family

    def _counters(self, tree: Mapping[str, Any]) -> Iterator[Metric]:
        flat = list(_flat(tree, "gmco"))
        self._left_out += max(0, len(flat) - COUNTERS_MAX)
        for name, last, value in flat[:COUNTERS_MAX]:
            kind = GaugeMetricFamily if last in GAUGES else CounterMetricFamily
            yield kind(name, f"{name.removeprefix('gmco_')}, as gmco status counts it.", value=value)

    def _peers(self, peers: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
        shown = sorted(peers.items())[: self._fit(len(peers))]
        for name in PEER_NUMBERS:
            kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            family = kind(f"gmco_peer_{name}", f"{name} of each node as asked from here.", labels=["node"])
            for node, numbers in shown:
                family.add_metric([node], numbers[name])
            yield family

    def _read_bytes(self, pairs: Mapping[str, Mapping[str, int]]) -> Metric:
        said = "Bytes of reads asked of other nodes, by own>other region, there (out) and back (in)."
        family = CounterMetricFamily("gmco_read_bytes", said, labels=["regions", "way"])
        for regions, numbers in sorted(pairs.items())[: self._fit(len(pairs))]:
            for way in ("out", "in"):
                family.add_metric([regions, way], numbers[way])
        return family

    def _replicas(self, parts: Parts) -> Iterator[Metric]:
        rows = own_status(parts)["shards"]
        rows = rows[: self._fit(len(rows))]
        for name in REPLICA_NUMBERS:
            family = GaugeMetricFamily(
                f"gmco_replica_{name}", f"{name} of each replica here.", labels=["shard"]
            )
            for row in rows:
                family.add_metric([str(row["shard"])], row[name])
            yield family
        leads = GaugeMetricFamily("gmco_replica_leads", "1 where this node is the primary.", labels=["shard"])
        for row in rows:
            leads.add_metric([str(row["shard"])], row["role"] == "primary")
        yield leads

    def _actors(self, parts: Parts) -> Iterator[Metric]:
        actors = parts.supervisor.statistics()
        actors = actors[: self._fit(len(actors))]
        crashes = CounterMetricFamily("gmco_actor_crashes", "Crashes since the start.", labels=["actor"])
        boxes = {
            name: GaugeMetricFamily(f"gmco_mailbox_{name}", f"{name} of each mailbox.", labels=["actor"])
            for name in ("capacity", "waiting", "in_work", "taken", "refused")
        }
        for actor in actors:
            crashes.add_metric([actor.name], actor.crashes)
            if actor.mailbox is not None:
                numbers = asdict(actor.mailbox)
                for name, family in boxes.items():
                    family.add_metric([actor.name], numbers[name])
        yield crashes
        yield from boxes.values()

    def _fit(self, count: int) -> int:
        self._left_out += max(0, count - LABEL_VALUES_MAX)
        return min(count, LABEL_VALUES_MAX)


def _histogram(name: str, said: str, label: str, by: Mapping[str, Distribution]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, said, labels=[label] if label else [])
    for value, one in sorted(by.items()):
        family.add_metric([value] if label else [], one.buckets(), one.sum)
    return family


def _caches(tree: Mapping[str, Any]) -> Iterator[Metric]:
    """tree: what the parts count. A level that is not there has no ratio."""
    ratio = GaugeMetricFamily("cache_hit_ratio", "Hits of all look-ups since the start.", labels=["level"])
    for level in ("l0", "l1"):
        numbers = tree.get("cache", {}).get(level)
        if numbers is not None:
            looked = numbers["hits"] + numbers["misses"]
            ratio.add_metric([level], numbers["hits"] / looked if looked else 0.0)
    yield ratio
    redis = tree.get("redis", {})
    said = "Keys asked for and values set by the L1 cache; many share a round trip."
    yield CounterMetricFamily(
        "redis_commands_processed", said, value=redis.get("gets", 0) + redis.get("puts", 0)
    )


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, float]]:
    """Name, last part of it, and number of each leaf."""
    for key, value in tree.items():
        name = f"{prefix}_{_NOT_A_NAME.sub('_', str(key))}"
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, int | float):
            yield name, str(key), value
