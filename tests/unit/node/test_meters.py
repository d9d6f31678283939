"""What is counted on the way of a request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import trio

from node.meters import Distribution, Meters, MinuteUsers
from node.metrics import LABEL_VALUES_MAX, _caches, _Node
from router.errors import RequestError
from router.requests import Get, Limits, Recommend, Request, parse
from router.wire import Columns, Reply

LIMITS = Limits(dim=4)


def recommend(user_id: int = 1) -> Request:
    return parse("recommend", {"user_id": user_id}, LIMITS)


def reply(missing: list[int] | None = None) -> Reply:
    hits = Columns(np.arange(3, dtype=np.uint64), np.ones(3, np.float32), None)
    return {"hits": hits, "coverage": {"answered": 1, "total": 1, "missing": missing or []}}


def test_a_distribution_counts_each_value_once() -> None:
    one = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        one.observe(value)
    assert one.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert one.sum == 14.0


def test_users_are_counted_by_whole_minutes() -> None:
    users = MinuteUsers()
    for user_id in range(10_000):
        users.add(user_id, 61.0)
        users.add(user_id, 119.0)
    users.add((1 << 64) - 1, 119.0)
    assert users.estimate(119.9) == 0.0
    assert users.estimate(120.0) == pytest.approx(10_001, rel=0.06)
    users.add(5, 130.0)
    users.add(5, 131.0)
    assert users.estimate(180.0) == pytest.approx(1, abs=0.01)
    assert users.estimate(300.0) == 0.0


def test_questions_are_counted_with_what_came_of_them() -> None:
    meters = Meters()

    async def later(found: Reply | Exception) -> Reply:
        await trio.lowlevel.checkpoint()
        if isinstance(found, Exception):
            raise found
        return found

    async def main() -> None:
        at_once = meters.ask(recommend(), lambda request: reply())
        assert isinstance(at_once, dict)
        found = meters.ask(recommend(), lambda request: later(reply([1])))
        assert not isinstance(found, dict)
        await found
        for error, code in ((RequestError("overloaded", "x"), "overloaded"), (KeyError("x"), "internal")):
            found = meters.ask(recommend(), lambda request, error=error: later(error))  # type: ignore[misc]
            assert not isinstance(found, dict)
            with pytest.raises(type(error)):
                await found
            assert meters.inference["recommend", code] == 1

        def refuse(request: Request) -> Reply:
            raise RequestError("unavailable", "x")

        with pytest.raises(RequestError):
            meters.ask(recommend(), refuse)

    trio.run(main)
    assert meters.inference["recommend", "ok"] == 1
    assert meters.inference["recommend", "partial"] == 1
    assert meters.inference["recommend", "unavailable"] == 1
    assert sum(meters.latency["recommend"].counts) == 5
    assert meters.served == 6


def test_what_is_no_question_passes_by() -> None:
    meters = Meters()
    request = parse("get", {"kind": "item", "ids": []}, LIMITS)
    assert isinstance(request, Get)
    assert meters.ask(request, lambda request: {"records": []}) == {"records": []}
    assert meters.inference == {}
    assert isinstance(recommend(), Recommend)


def test_methods_that_we_do_not_know_share_a_label() -> None:
    meters = Meters()
    for method in ("GET", "PROPFIND", "MKCOL"):
        meters.http_answered("/healthz", method, 200, 0.001)
    assert meters.http == {("/healthz", "GET", 200): 1, ("/healthz", "other", 200): 2}


def test_caches_that_are_there_have_a_ratio() -> None:
    def samples(tree: dict[str, Any]) -> dict[str, float]:
        found = [one for family in _caches(tree) for one in family.samples]
        return {"/".join([one.name, *one.labels.values()]): one.value for one in found}

    assert samples({}) == {"redis_commands_processed_total": 0}
    numbers = {"hits": 3, "misses": 1}
    tree = {"cache": {"l0": numbers, "l1": None, "flights": {}}, "redis": {}}
    assert samples(tree) == {"cache_hit_ratio/l0": 0.75, "redis_commands_processed_total": 0}
    tree = {"cache": {"l0": numbers, "l1": {"hits": 0, "misses": 0}}, "redis": {"gets": 5, "puts": 2}}
    assert samples(tree)["cache_hit_ratio/l1"] == 0.0
    assert samples(tree)["redis_commands_processed_total"] == 7


def test_nodes_and_regions_are_labels_and_bounded() -> None:
    node = _Node(lambda: None, Meters())  # type: ignore[arg-type, return-value]
    peer = {
        "in_flight": 1,
        "answers": 5,
        "errors": 0,
        "timeouts": 0,
        "mean_ms": 1.5,
        "p95_ms": 2.5,
        "open": False,
    }
    families = {family.name: family for family in node._peers({"b-1": peer, "c": peer})}
    assert families["gmco_peer_answers"].type == "counter"
    for name in ("in_flight", "mean_ms", "p95_ms", "open"):
        assert families[f"gmco_peer_{name}"].type == "gauge"
    assert [one.labels for one in families["gmco_peer_mean_ms"].samples] == [{"node": "b-1"}, {"node": "c"}]
    (out, back) = node._read_bytes({"eu>us": {"out": 3, "in": 4}}).samples
    assert (out.labels, out.value) == ({"regions": "eu>us", "way": "out"}, 3)
    assert (back.labels, back.value) == ({"regions": "eu>us", "way": "in"}, 4)
    many = {f"n{i}": peer for i in range(LABEL_VALUES_MAX + 2)}
    assert all(len(family.samples) == LABEL_VALUES_MAX for family in node._peers(many))
    assert node._left_out == 2
