"""Real daemons: a node joins, plans are committed from two nodes at once, minorities and majorities die, all go by one layout."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import gmco
from tests.processes.cluster import Daemon, cluster, free_ports, gmco_cluster, member, put_down

CALL_S = 20.0


def ask(daemon: Daemon, action: Any, **fields: Any) -> dict[str, Any]:
    with gmco.connect_blocking([daemon.url], timeout_s=CALL_S) as client:
        return client.cluster(action, fields)


def code_of(do: Callable[[], object]) -> str:
    with pytest.raises(gmco.GmcoError) as caught:
        do()
    return caught.value.code


def layout_of(daemon: Daemon) -> tuple[int, str]:
    layout = daemon.status()["layout"]
    return layout["version"], layout["hash"]


def wait_same(daemons: list[Daemon], version: int) -> str:
    deadline = time.monotonic() + 20
    while True:
        found = {layout_of(daemon) for daemon in daemons}
        if len(found) == 1 and (one := found.pop())[0] == version:
            return one[1]
        assert time.monotonic() < deadline, f"{found}:\n{daemons[0].tail()}"
        time.sleep(0.1)


@contextmanager
def four(folder: Path) -> Iterator[list[Daemon]]:
    """Three members with some data, and a fourth node that has come later."""
    with cluster(folder) as daemons:
        ports = free_ports(2)
        fourth = member(folder, "node-4", ports, [daemons[0].peer_port], bootstrap=0)
        with gmco.connect_blocking([daemons[0].url], timeout_s=10.0) as client:
            client.put_items([gmco.Item(i, [1.0, float(i)] * 8, (), {}) for i in range(1, 101)], ack="all")
        try:
            fourth.start()
            daemons[0].wait_states({"node-4": "alive"}, 10)
            yield [*daemons, fourth]
        finally:
            put_down([fourth])


def found(daemon: Daemon) -> None:
    """Reads are whole: nothing is moved by a layout alone."""
    with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
        assert all(item is not None for item in client.get_items(list(range(1, 101))))
        answer = client.search([1.0] * 16, 10)
        assert answer.coverage.answered == answer.coverage.total


def test_a_node_joins_by_plan_and_commit_and_two_at_once_have_one_winner(tmp_path: Path) -> None:
    with four(tmp_path) as daemons:
        one, two, _three, fourth = daemons
        assert gmco_cluster(one, "join", "node-4").stdout.startswith("staged on node-1: join node-4")
        planned = gmco_cluster(one, "plan", "--output", "json")
        made = json.loads(planned.stdout)
        assert {move["target"] for move in made["moves"]} == {"node-4"}
        assert len(made["moves"]) == 3
        assert made["bytes"] > 0
        assert made["eta_s"] > 0
        assert made["sizes_unknown"] == []
        table = gmco_cluster(one, "plan")
        assert "node-4 joins" in table.stdout
        assert f"gmco cluster commit {made['hash']}" in table.stdout
        refused = gmco_cluster(two, "commit", made["hash"])
        assert (refused.returncode, refused.stderr[:19]) == (4, "error[unknown_plan]")

        # Two nodes commit different plans at once: exactly one wins, the other is told that its plan is stale.
        ask(two, "join", node="node-4", capacity=2)
        other = ask(two, "plan")
        assert other["hash"] != made["hash"]
        outcomes: dict[str, str] = {}

        def commit(daemon: Daemon, hash_: str) -> None:
            try:
                ask(daemon, "commit", hash=hash_)
                outcomes[hash_] = "committed"
            except gmco.GmcoError as error:
                outcomes[hash_] = error.code

        threads = [
            threading.Thread(target=commit, args=pair) for pair in ((one, made["hash"]), (two, other["hash"]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes.values()) == ["committed", "stale_plan"], outcomes
        winner = next(hash_ for hash_, outcome in outcomes.items() if outcome == "committed")
        assert wait_same(daemons, 2) == winner
        loser = one if winner == other["hash"] else two
        stale = next(hash_ for hash_ in outcomes if hash_ != winner)
        assert code_of(lambda: ask(loser, "commit", hash=stale)) == "stale_plan"
        # The winner's commit, asked for again, is what it was.
        assert ask(fourth, "commit", hash=winner)["layout"]["version"] == 2
        for daemon in daemons:
            found(daemon)

        # Everybody starts again: the same layout, and the shards where they were.
        for daemon in daemons:
            assert daemon.stop() == 0, daemon.tail()
        for daemon in daemons:
            daemon.start(wait=False)
        for daemon in daemons:
            daemon.wait_ready()
        assert wait_same(daemons, 2) == winner
        found(fourth)


def test_a_minority_dies_while_it_is_committed_and_a_lost_majority_is_recovered_from(tmp_path: Path) -> None:
    with four(tmp_path) as daemons:
        one, two, three, fourth = daemons
        ask(one, "join", node="node-4")
        made = ask(one, "plan")
        killer = threading.Timer(0.005, three.kill)
        killer.start()
        assert ask(one, "commit", hash=made["hash"])["layout"]["version"] == 2
        killer.join()
        assert wait_same([one, two, fourth], 2) == made["hash"]
        three.start()
        assert wait_same(daemons, 2) == made["hash"]
        found(three)

        # A member whose disk is gone has no vote until it joins again.
        three.kill()
        shutil.rmtree(three.data)
        three.start()
        wait_same(daemons, 2)
        deadline = time.monotonic() + 20
        while ask(one, "show")["new_disks"] != ["node-3"]:
            assert time.monotonic() < deadline, one.tail()
            time.sleep(0.1)
        assert "node-3 has a new disk and no vote" in gmco_cluster(one, "show").stderr

        # A member that leaves, dead: a majority of the others is enough.
        three.kill()
        ask(two, "leave", node="node-3")
        ask(two, "commit", hash=ask(two, "plan")["hash"])
        last = wait_same([one, two, fourth], 3)

        # A majority is gone: nothing is committed any more, until an operator says so.
        two.kill()
        fourth.kill()
        one.wait_states({"node-2": "down", "node-4": "down"}, 20)
        ask(one, "set", node="node-1", capacity=3)
        assert code_of(lambda: ask(one, "commit", hash=ask(one, "plan")["hash"])) in (
            "no_majority",
            "stale_plan",
        )
        assert layout_of(one) == (3, last)
        done = gmco_cluster(one, "recover", "--force")
        assert "without node-2, node-4" in done.stderr, done
        assert layout_of(one)[0] == 1003
        assert gmco_cluster(one, "recover", "--force").returncode == 4, "one of one is a majority"
        two.start()
        wait_same([one, two], 1003)
        # It is no member any more, and can become one again.
        ask(one, "revert")
        ask(one, "join", node="node-2")
        ask(one, "commit", hash=ask(one, "plan")["hash"])
        wait_same([one, two], 1004)


def test_nodes_that_wait_are_made_a_cluster_by_init(tmp_path: Path) -> None:
    ports = free_ports(4)
    daemons = [
        member(tmp_path, f"node-{i + 1}", ports[2 * i : 2 * i + 2], ports[:1], bootstrap=0, replication=2)
        for i in range(2)
    ]
    try:
        for daemon in daemons:
            daemon.start(wait=False)
        deadline = time.monotonic() + 30
        while True:
            try:
                if daemons[0].states() == {"node-1": "alive", "node-2": "alive"}:
                    break
            except gmco.GmcoError:
                pass
            assert time.monotonic() < deadline, daemons[0].tail()
            time.sleep(0.1)
        assert code_of(lambda: ask(daemons[0], "plan")) == "refused"
        done = gmco_cluster(daemons[0], "init", "--output", "json")
        made = json.loads(done.stdout)["layout"]
        assert (made["version"], [one["name"] for one in made["members"]]) == (1, ["node-1", "node-2"])
        assert len(made["cluster_id"]) == 32
        for daemon in daemons:
            daemon.wait_ready()
        assert wait_same(daemons, 1) == made["hash"]
        assert code_of(lambda: ask(daemons[1], "init")) == "refused"
        assert "cannot fail over" in gmco_cluster(daemons[1], "show").stderr
    finally:
        put_down(daemons)
