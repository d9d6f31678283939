"""The HTTP port of real daemons: answers, readiness, metrics, the schema held against it, and attacks."""

from __future__ import annotations

import http.client
import json
import random
import re
import resource
import socket
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import gmco
from tests.processes.cluster import Daemon, cluster

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, of what it imports
    import schemathesis
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

DIM = 16
BIG = (1 << 64) - 1
ORIGIN = "https://app.example"
HTTP = f'[http]\norigins = ["{ORIGIN}"]\nidle_s = 60'


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    with cluster(tmp_path_factory.mktemp("http"), more=HTTP) as daemons:
        rng = random.Random(1)
        items = [
            gmco.Item(i, [rng.gauss(0, 1) for _ in range(DIM)], (i % 3,), {"title": f"film {i}"})
            for i in [*range(1, 100), BIG]
        ]
        with gmco.connect_blocking([daemons[0].url], timeout_s=10.0) as client:
            client.put_items(items, ack="all")
            client.put_users([gmco.User(i, items[i].vector, (), {}) for i in range(20)], ack="all")
            client.put_users([gmco.User(BIG, items[-1].vector, (), {})], ack="all")
        yield daemons


def port_of(daemon: Daemon) -> int:
    found = urllib.parse.urlsplit(daemon.status()["http"]).port
    assert found is not None
    return found


def ask(
    port: int, target: str, body: Any = None, **headers: str
) -> tuple[int, Any, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        if body is None:
            connection.request("GET", target, headers=headers)
        else:
            headers = {"Content-Type": "application/json", **headers}
            connection.request("POST", target, json.dumps(body), headers)
        response = connection.getresponse()
        raw = response.read()
    finally:
        connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(raw) if is_json else raw.decode(), response


def test_every_node_answers_as_over_the_websocket(nodes: list[Daemon]) -> None:
    vector = [0.5] * DIM
    with gmco.connect_blocking([nodes[0].url], timeout_s=5.0) as client:
        wanted = {
            "/recommend?user_id=7&k=5&require_all=1": client.recommend(7, 5, require_all=[1]),
            f"/recommend?user_id={BIG}&k=5": client.recommend(BIG, 5),
            "/similar?positive=1,2&negative=3&k=5": client.similar(positive=[1, 2], negative=[3], k=5),
            "/search": client.search(vector, 5),
        }
    for daemon in nodes:
        port = port_of(daemon)
        for target, answer in wanted.items():
            body = {"vector": vector, "k": 5} if target == "/search" else None
            status, found, _ = ask(port, target, body)
            assert status == 200
            hits = [(int(hit["media_id"]), hit["score"], hit["metadata"]) for hit in found["hits"]]
            assert hits == [(hit.media_id, hit.score, hit.metadata) for hit in answer.hits]
            assert found["coverage"]["answered"] == found["coverage"]["total"]
        status, found, _ = ask(port, "/recommend/batch", {"user_id": 7, "media_ids": [1, 2, BIG, 5_000]})
        assert {int(hit["media_id"]) for hit in found["hits"]} == {1, 2, BIG}
        assert found["unknown"] == [5_000]


def test_errors_have_their_code_and_status(nodes: list[Daemon]) -> None:
    port = port_of(nodes[1])
    for target, status, code in (
        ("/recommend?user_id=555", 404, "unknown_user"),
        ("/recommend?user_id=1&k=0", 400, "out_of_range"),
        ("/similar?media_id=555", 404, "unknown_item"),
        ("/nothing", 404, "unknown_path"),
    ):
        found_status, found, _ = ask(port, target)
        assert (found_status, found["error"]["code"]) == (status, code)
    status, found, _ = ask(port, "/search", {"vector": [1.0]})
    assert (status, found["error"]["code"], found["error"]["field"]) == (400, "wrong_dimension", "vector")
    assert ask(port, "/recommend?user_id=1", Origin="https://evil.example")[0] == 403
    response = ask(port, "/recommend?user_id=1", Origin=ORIGIN)[2]
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_a_node_says_when_it_is_ready_and_when_not(nodes: list[Daemon], tmp_path: Path) -> None:
    for daemon in nodes:
        assert ask(port_of(daemon), "/readyz")[:2] == (200, {"status": "ready", "reasons": []})
    with cluster(tmp_path, 1) as (alone,):
        pass
    # Formed by two, of which there is one: it waits, is alive, and says what for.
    config = alone.config.read_text().replace("bootstrap = 1", "bootstrap = 2")
    alone.config.write_text(config.replace("seeds = []", 'seeds = ["127.0.0.1:9"]'))
    alone = Daemon("other", tmp_path, alone.config.read_text().replace('"node-1"', '"other"'), alone.app_port)
    alone.start(wait=False)
    try:
        deadline = time.monotonic() + 20
        while True:
            with suppress(gmco.GmcoError):
                port = port_of(alone)
                break
            assert time.monotonic() < deadline, alone.tail()
            time.sleep(0.05)
        assert ask(port, "/healthz")[0] == 200
        status, found, _ = ask(port, "/readyz")
        assert status == 503
        assert found["reasons"][0].startswith("recovered: waiting")
        status, found, _ = ask(port, "/recommend?user_id=1")
        assert (status, found["error"]["code"]) == (503, "unavailable")
        assert ask(port, "/metrics")[0] == 200
    finally:
        alone.kill()


SAMPLE = re.compile(r'([a-z_A-Z0-9:]+)(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [-+.e0-9]+(Inf)?')


def test_metrics_count_what_was_asked(nodes: list[Daemon]) -> None:
    """`counted-once`."""
    port = port_of(nodes[2])

    def value(sample: str) -> float:
        time.sleep(1.1)  # the text is kept for a second
        lines = [line for line in ask(port, "/metrics")[1].splitlines() if line.startswith(sample + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0

    counted = 'http_requests_total{method="GET",route="/recommend",status="200"}'
    before = value(counted)
    for _ in range(5):
        ask(port, "/recommend?user_id=7&k=3")
    with gmco.connect_blocking([nodes[2].url], timeout_s=5.0) as client:
        client.recommend(7, 3)
    assert value(counted) == before + 5
    _, text, response = ask(port, "/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples), [x for x in samples if not SAMPLE.fullmatch(x)]
    assert len(samples) == len({line.rsplit(" ", 1)[0] for line in samples})
    names = {SAMPLE.fullmatch(line)[1] for line in samples}  # type: ignore[index]
    for name in (
        "inference_request_total", "inference_latency_seconds_bucket", "inference_batch_size_bucket",
        "embedding_lookup_time_seconds_bucket", "http_requests_total", "http_request_duration_seconds_bucket",
        "redis_commands_processed_total", "shard_health_status", "recommendations_served_total", "unique_users_per_minute",
        "gmco_gossip_udp_packets_in_total", "gmco_replica_items", "gmco_actor_crashes_total", "gmco_http_connections",
        "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in names
    assert 'shard_health_status{shard="0"} 1.0' in samples
    assert "gmco_metrics_left_out 0.0" in samples


def no_bug(context: Any, response: Any, case: Any) -> None:
    """503 and 504 are declared: a session may name what is not there yet, and a millisecond is little time."""
    assert response.status_code != 500


def allowed_is_taken(context: Any, response: Any, case: Any) -> None:
    """What the schema lets through is refused only for what no schema can say: of two fields together, of a vector as a whole,
    and that 1.0, which JSON Schema calls an integer, is none."""
    if response.status_code == 400:
        error = response.json()["error"]
        assert (
            error["code"] in ("bad_request", "missing_field", "zero_vector", "bad_vector")
            or "not a floating-point number" in error["message"]
        ), error
    assert response.status_code in (200, 400, 404, 503, 504)


PATIENCE_MS = 1_000


def hurry(case: Any) -> None:
    """A session that names what is never written is waited for as long as the asker says: up to a minute, else."""
    for fields in (case.query, case.body):
        if isinstance(fields, dict):
            given = fields.get("timeout_ms")
            if isinstance(given, int | float) and given > PATIENCE_MS:
                fields["timeout_ms"] = PATIENCE_MS


def test_the_schema_is_what_a_node_takes_and_gives(nodes: list[Daemon]) -> None:
    """`true-schema`."""
    port = port_of(nodes[0])
    schema = schemathesis.openapi.from_dict(ask(port, "/openapi.json")[1])
    checks = [
        no_bug,
        allowed_is_taken,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    paths = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        paths.add(operation.path)

        @given(case=operation.as_strategy())
        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def answered_as_said(case: Any) -> None:
            hurry(case)
            case.call_and_validate(base_url=f"http://127.0.0.1:{port}", checks=checks, timeout=10)

        answered_as_said()
    assert paths >= {"/recommend", "/recommend/batch", "/search", "/similar", "/readyz", "/metrics"}


# ---- Attacks ----

ATTACKERS = 1_000
RSS_GROWTH_BYTES_MAX = 64 << 20


def _rss(daemon: Daemon) -> int:
    assert daemon.process is not None
    pages = int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _dial(port: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", port), timeout=10)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one


def _served(port: int) -> float:
    """Seconds until somebody else's question is answered."""
    begun = time.monotonic()
    status, found, _ = ask(port, "/recommend?user_id=7&k=3")
    assert (status, len(found["hits"])) == (200, 3)
    return time.monotonic() - begun


def test_attackers_stay_within_their_bounds_and_others_are_served(nodes: list[Daemon]) -> None:
    daemon, rng = nodes[0], random.Random(5)
    port = port_of(daemon)
    before = _rss(daemon)
    took = [_served(port)]
    with ExitStack() as stack:
        idle = [stack.enter_context(_dial(port)) for _ in range(ATTACKERS)]
        took.append(_served(port))
        for place, one in enumerate(idle):
            with suppress(OSError):
                match place % 5:
                    case 0:
                        one.sendall(b"GET /recommend?user_id=1 HTTP/1.1\r\nHost: ")  # and nothing more
                    case 1:
                        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000)  # a giant head
                    case 2:
                        one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 20 + rng.randbytes(500))
                        one.shutdown(socket.SHUT_WR)
                    case 3:
                        one.sendall(
                            b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
                            + bytes(50_000)
                        )
                    case _:
                        pass  # idle
            if place % 100 == 0:
                took.append(_served(port))
        # Who asks and does not read.
        for _ in range(20):
            deaf = stack.enter_context(_dial(port))
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.settimeout(0.2)
            with suppress(OSError):
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400)
        took.append(_served(port))
        # More than there is room for: those that have waited longest go.
        more = [stack.enter_context(_dial(port)) for _ in range(400)]
        took.append(_served(port))
        assert more
        counted = daemon.status()["counters"]["http"]
        assert counted["connections"] <= 1_024
        assert counted["bodies_bytes"] <= 64 << 20
        assert counted["failed"] == counted["internal"] == 0
        assert counted["refused"] >= ATTACKERS // 5
        assert _rss(daemon) - before < RSS_GROWTH_BYTES_MAX
    took.append(_served(port))
    assert max(took) < 5.0, took
    # Their clients are gone, which is noticed at once where we read and within 10 s where we write; the rest is slack.
    deadline = time.monotonic() + 30
    while daemon.status()["counters"]["http"]["connections"] > 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert daemon.status()["counters"]["http"]["bodies_bytes"] == 0


def test_a_stop_answers_what_was_asked(tmp_path: Path) -> None:
    with cluster(tmp_path, 1) as (daemon,):
        port = port_of(daemon)
        kept = _dial(port)
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert kept.recv(4_096).startswith(b"HTTP/1.1 200")
        assert daemon.stop() == 0
        assert kept.recv(4_096) == b""
        kept.close()
        with pytest.raises(OSError):
            _dial(port)
