"""Real daemons end at each named point (docs/testing.md, *Crash points*) while shards move and clients write, and start again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gmco
from storage.crash_points import POINTS
from tests.processes.cluster import Daemon, cluster, free_ports, member, put_down
from tests.processes.ledger import DIM, TIMEOUT_S, Writer, replicas_differ

SHARDS = 3
# Small logs and early graphs, so that checkpoints are made and replicas come by snapshots.
STORAGE = f"dim = {DIM}\ncheckpoint_bytes = 65536\ngraph_rows_min = 20"
SETTLE_S = 60.0
# Those at which a tail is cut need one: a test of their own.
CUTS = [point for point in POINTS if point.startswith("cut.")]


class Scene:
    """Three daemons that begin, and a fourth that joins: shard 0 goes to and fro between it and another."""

    def __init__(self, daemons: list[Daemon], armed: Path) -> None:
        self.daemons, self.armed = daemons, armed
        self.env = {"GMCO_CRASH_AT": f"@{armed}"}
        self.urls = [daemon.url for daemon in daemons]

    def ask(self, what: Callable[[gmco.BlockingClient], Any]) -> Any:
        with gmco.connect_blocking(self.urls, timeout_s=TIMEOUT_S) as client:
            return what(client)

    def arm(self, point: str) -> None:
        """Whoever comes there first ends."""
        fresh = self.armed.with_suffix(".new")
        fresh.write_text(point)
        fresh.rename(self.armed)

    def revive(self) -> int:
        """Whoever has ended starts again. How many there were."""
        ended = [daemon for daemon in self.daemons if not daemon.running]
        for daemon in ended:
            assert daemon.process is not None
            assert daemon.process.returncode == -signal.SIGKILL, daemon.tail()
            daemon.start(wait=False, env=self.env)
        return len(ended)

    def send(self) -> None:
        """Shard 0 to where it is not. Raises GmcoError while nobody leads it."""

        def order(client: gmco.BlockingClient) -> None:
            led = [
                row for row in client.shards()["replicas"] if row["role"] == "primary" and not row["shard"]
            ]
            if not led:
                raise gmco.Unavailable("no_primary", "nobody leads shard 0 now")
            (target,) = {daemon.name for daemon in self.daemons}.difference(led[0]["voters"])
            client.moves("move", {"shard": 0, "source": sorted(led[0]["voters"])[0], "target": target})

        self.ask(order)


def why_not_placed(client: gmco.BlockingClient) -> str:
    found = client.moves()
    return str(found) if found["moves"] or found["unknown"] or found["silent"] else ""


def why_not_alike(client: gmco.BlockingClient) -> str:
    return why_not_placed(client) or replicas_differ(client)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("points")
    with cluster(folder, 3, storage=STORAGE, shard_count=SHARDS) as daemons:
        ports, seeds = free_ports(2), [daemons[0].peer_port]
        fourth = member(folder, "node-4", ports, seeds, bootstrap=0, storage=STORAGE, shard_count=SHARDS)
        try:
            scene = Scene([*daemons, fourth], folder / "armed")
            for daemon in daemons:
                daemon.stop()
            for daemon in scene.daemons:
                daemon.start(wait=False, env=scene.env)
            for daemon in scene.daemons:
                daemon.wait_ready()
            with gmco.connect_blocking([daemons[0].url], timeout_s=TIMEOUT_S) as client:
                items = [gmco.Item(i, [1.0] + [float(i)] * (DIM - 1)) for i in range(900_000, 900_300)]
                client.put_items(items, ack="all")
                client.cluster("join", {"node": "node-4"})
                client.cluster("commit", {"hash": client.cluster("plan")["hash"]})
            settle(scene, why_not_alike)
            yield scene
        finally:
            put_down([fourth])


def settle(scene: Scene, why_not: Callable[[gmco.BlockingClient], str]) -> int:
    """Until there is no reason why not; how many have ended on the way there."""
    deadline = time.monotonic() + SETTLE_S
    ended = 0
    why = ""
    while time.monotonic() < deadline:
        ended += scene.revive()
        try:
            why = scene.ask(why_not)
        except gmco.GmcoError as error:
            why = str(error)
        if not why and not scene.revive():
            return ended
        time.sleep(0.3)
    raise AssertionError(f"{why}\n" + "\n".join(daemon.tail() for daemon in scene.daemons))


@pytest.mark.parametrize("point", [point for point in POINTS if point not in CUTS])
def test_whoever_ends_there_starts_again_and_everything_is_as_wished(scene: Scene, point: str) -> None:
    stop = threading.Event()
    # Keys of their own: what those of another point wrote is still there.
    numbers = [10 * POINTS.index(point) + i for i in (1, 2)]
    writers = [Writer(scene.urls, number, stop, ["quorum"]) for number in numbers]
    for writer in writers:
        writer.start()
    ended = 0
    try:
        deadline = time.monotonic() + SETTLE_S
        while not all(writer.writes for writer in writers):
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.05)
        scene.arm(point)
        deadline = time.monotonic() + SETTLE_S
        sent, why = False, ""
        while not ended or not sent:
            assert time.monotonic() < deadline, f"nobody came to {point} (sent: {sent}): {why}"
            ended += scene.revive()
            if not ended or not sent:
                try:
                    # Once more: who still had its replica from before has passed no snapshot.
                    if not sent or not scene.ask(why_not_placed):
                        scene.send()
                    sent = True
                except gmco.GmcoError as error:
                    why = str(error)  # nobody leads yet, or who was asked has just ended
            time.sleep(0.2)
        settle(scene, why_not_placed)
    finally:
        stop.set()
        for writer in writers:
            writer.join(2 * TIMEOUT_S)
    settle(scene, why_not_alike)
    scene.ask(lambda client: [writer.check_end(client) for writer in writers])
    assert [problem for writer in writers for problem in writer.problems] == []


@pytest.mark.parametrize("point", CUTS)
def test_whoever_ends_while_its_tail_is_cut_gives_it_back(tmp_path: Path, point: str) -> None:
    with cluster(tmp_path, 3, storage=f"dim = {DIM}", shard_count=1) as daemons:
        with gmco.connect_blocking([d.url for d in daemons], timeout_s=TIMEOUT_S) as client:
            client.put_items([gmco.Item(1, [1.0] * DIM)], ack="all")
            (name,) = [row["node"] for row in client.shards()["replicas"] if row["role"] == "primary"]
        first = next(daemon for daemon in daemons if daemon.name == name)
        others = [daemon for daemon in daemons if daemon is not first]
        for other in others:
            other.signal(signal.SIGSTOP)
        with gmco.connect_blocking([first.url], timeout_s=1.0) as client:
            # The first goes to those whose pulls wait here already; they read it when they go on.
            for ids in (range(2, 25), range(25, 50)):
                client.put_items([gmco.Item(i, [float(i)] * DIM) for i in ids], ack="primary")
        first.kill()
        for other in others:
            other.signal(signal.SIGCONT)
        with gmco.connect_blocking([other.url for other in others], timeout_s=30.0) as client:
            client.put_items([gmco.Item(99, [9.0] * DIM)], ack="quorum")
        first.start(wait=False, env={"GMCO_CRASH_AT": point})
        assert first.wait(60) == -signal.SIGKILL, first.tail()
        first.start()
        deadline = time.monotonic() + SETTLE_S
        with gmco.connect_blocking([d.url for d in daemons], timeout_s=TIMEOUT_S) as client:
            while (why := replicas_differ(client)) or None in (
                found := client.get_items([*range(1, 50), 99])
            ):
                assert time.monotonic() < deadline, why or found
                time.sleep(0.2)
