"""Real daemons and `gmco`: a shard moved, a move cancelled, a node drained, maintenance; clients see nothing of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gmco
from tests.processes.cluster import ROOT, Daemon, cluster, free_ports, member, put_down
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, replicas_differ

SHARDS = 6
STORAGE = f"dim = {DIM}"


def run_gmco(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "admin.cli", *arguments, "--node", daemon.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def ok(daemon: Daemon, *arguments: str) -> str:
    done = run_gmco(daemon, *arguments)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr, daemon.tail())
    return done.stdout


@contextlib.contextmanager
def loaded(daemons: list[Daemon], reach: list[Daemon]) -> Iterator[None]:
    """While clients write and read through `daemons`; in the end nothing is lost, and no request has failed."""
    stop = threading.Event()
    writers = [Writer([d.url for d in daemons], number, stop, ["primary", "quorum"]) for number in (1, 2)]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        stop.set()
        for writer in writers:
            writer.join(2 * TIMEOUT_S)
    with gmco.connect_blocking([d.url for d in reach], timeout_s=TIMEOUT_S) as client:
        for writer in writers:
            writer.check_end(client)
            assert (writer.problems, writer.failed_reads, writer.failed_writes) == ([], [], 0)
    assert sum(writer.writes for writer in writers) > 50, "the writers hardly wrote"


@contextlib.contextmanager
def four(folder: Path, more: str = "") -> Iterator[list[Daemon]]:
    """Three with all shards, and a member that came later and so holds some of them."""
    with cluster(folder, 3, storage=STORAGE, shard_count=SHARDS, more=more) as daemons:
        fourth = member(
            folder, "node-4", free_ports(2), [daemons[0].peer_port], bootstrap=0, storage=STORAGE,
            shard_count=SHARDS, more=more,
        )  # fmt: skip
        try:
            fourth.start()
            yield [*daemons, fourth]
        finally:
            put_down([fourth])


def rows(daemon: Daemon) -> list[dict[str, Any]]:
    with gmco.connect_blocking([daemon.url], timeout_s=TIMEOUT_S) as client:
        found: list[dict[str, Any]] = client.shards()["replicas"]
        return found


def holders(daemon: Daemon, shard: int) -> set[str]:
    return {row["node"] for row in rows(daemon) if row["shard"] == shard}


def led(daemon: Daemon) -> dict[int, str]:
    return {row["shard"]: row["node"] for row in rows(daemon) if row["role"] == "primary"}


def wait(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.1)


def level(daemon: Daemon) -> bool:
    with gmco.connect_blocking([daemon.url], timeout_s=TIMEOUT_S) as client:
        return not replicas_differ(client)


def test_a_shard_is_moved_by_hand_a_node_is_drained_and_comes_back(tmp_path: Path) -> None:
    with four(tmp_path) as daemons:
        one, *_, fourth = daemons
        ok(one, "cluster", "join", "node-4")
        assert "node-4" in ok(one, "cluster", "plan")
        ok(one, "cluster", "revert")
        refused = run_gmco(one, "shard", "move", "0", "--from", "node-2", "--to", "node-4")
        assert (refused.returncode, refused.stderr[:14]) == (4, "error[refused]"), refused
        assert "not a member" in refused.stderr
        with loaded(daemons[:3], [one]):
            ok(one, "cluster", "join", "node-4", "--capacity", "1")
            made = json.loads(ok(one, "cluster", "plan", "--output", "json"))
            ok(one, "cluster", "commit", made["hash"])
            wait(lambda: not json.loads(ok(one, "shard", "moves", "--output", "json"))["moves"])

            shard = next(n for n in range(SHARDS) if "node-4" not in holders(one, n))
            said = run_gmco(
                one, "shard", "move", str(shard), "--from", "node-2", "--to", "node-4", "--output", "json"
            )
            assert said.returncode == 0, said.stderr
            *stages, done = [json.loads(line) for line in said.stdout.splitlines()]
            assert set(done["wished"]) == {"node-1", "node-3", "node-4"}
            # A small shard may have moved before anybody looked.
            assert {stage["shard"] for stage in stages} <= {shard}
            assert holders(one, shard) == {"node-1", "node-3", "node-4"}
            # Asked for again it is done already; and nothing is on its way that could be cancelled.
            ok(one, "shard", "move", str(shard), "--from", "node-2", "--to", "node-4")
            assert run_gmco(one, "shard", "cancel", str(shard)).returncode == 4

            told = ok(one, "drain", "node-4", "--dry-run")
            assert "node-4 leaves" in told
            ok(one, "drain", "node-4")
            assert {row["node"] for row in rows(one)} == {"node-1", "node-2", "node-3"}
            wait(lambda: fourth.status()["duty"] == "", 10)
            assert "balanced already" in ok(one, "rebalance")
            wait(lambda: level(one))


def test_a_move_can_be_cancelled_while_it_waits_and_goes_on_without_its_command(tmp_path: Path) -> None:
    with four(tmp_path) as daemons:
        one, *_, fourth = daemons
        ok(one, "cluster", "join", "node-4")
        ok(one, "cluster", "commit", json.loads(ok(one, "cluster", "plan", "--output", "json"))["hash"])
        wait(lambda: not json.loads(ok(one, "shard", "moves", "--output", "json"))["moves"])
        shard = next(n for n in range(SHARDS) if "node-4" not in holders(one, n))
        fourth.kill()
        one.wait_states({"node-4": "down"}, 20)
        arguments = f"shard move {shard} --from node-2 --to node-4 --node {one.url}".split()
        command = subprocess.Popen(
            [sys.executable, "-m", "admin.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        wait(lambda: json.loads(ok(one, "shard", "moves", "--output", "json"))["moves"])
        table = ok(one, "shard", "moves")
        assert "queued" in table
        assert "node-4" in table
        time.sleep(1.0)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=20)
        assert command.returncode == 130
        assert "the move goes on" in said
        assert f"gmco shard cancel {shard}" in said
        assert "node-2" in ok(one, "shard", "cancel", str(shard))
        assert not json.loads(ok(one, "shard", "moves", "--output", "json"))["moves"]
        assert holders(one, shard) == {"node-1", "node-2", "node-3"}


def test_a_node_in_maintenance_leads_nothing_until_it_is_off_and_then_what_it_is_preferred_for(
    tmp_path: Path,
) -> None:
    settings = "prefer_first_s = 2"
    with cluster(tmp_path, 3, storage=STORAGE, shard_count=SHARDS, settings=settings) as daemons:
        one, two, _ = daemons
        # Each leads what it is preferred for.
        wait(lambda: sorted(led(one).values()) == ["node-1"] * 2 + ["node-2"] * 2 + ["node-3"] * 2)
        preferred = {shard for shard, node in led(one).items() if node == "node-2"}
        with loaded(daemons, [one]):
            assert "2 shards have another primary" in ok(one, "maintenance", "node-2", "on")
            assert "node-2" not in led(one).values()
            assert "maintenance" in ok(one, "nodes")
            # It knows it after a restart, too, and the others keep their hands off.
            two.stop()
            two.start()
            assert two.status()["duty"] == "maintenance"
            time.sleep(4.0)
            assert "node-2" not in led(one).values()
            assert len(rows(one)) == 3 * SHARDS
            ok(one, "maintenance", "node-2", "off")
            wait(lambda: {s for s, n in led(one).items() if n == "node-2"} == preferred)
        wait(lambda: level(one))
