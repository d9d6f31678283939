"""Real daemons that know one seed each: stopped, moved, joined late, copied, ill, and strangers beside them."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import gmco
from tests.processes.cluster import ROOT, Daemon, cluster, free_ports, member, put_down

DIM = 16
KEY = secrets.token_hex(32)


def fill(daemon: Daemon, count: int = 100) -> None:
    rng = random.Random(1)
    items = [gmco.Item(i, [rng.gauss(0, 1) for _ in range(DIM)], (), {"n": i}) for i in range(1, count + 1)]
    with gmco.connect_blocking([daemon.url], timeout_s=10.0) as client:
        client.put_items(items, ack="all")


def coverage(daemon: Daemon) -> gmco.Coverage:
    with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
        found = client.search([1.0] * DIM, 10).coverage
        assert found is not None
        return found


def until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def kinds(daemon: Daemon, of: str) -> list[str]:
    """What has happened to a member, as this node saw it."""
    with gmco.connect_blocking([daemon.url], timeout_s=5.0) as client:
        return [event["kind"] for event in client.events().events if event["node"] == of]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    folder = tmp_path_factory.mktemp("five")
    with cluster(folder, 5, replication=1, shard_count=10) as daemons:
        fill(daemons[0])
        yield daemons


ALL = {f"node-{i}": "alive" for i in range(1, 6)}


def test_each_knows_all_and_one_layout_though_told_of_one_only(five: list[Daemon]) -> None:
    for daemon in five:
        daemon.wait_states(ALL, 10)
    hashes = {daemon.status()["layout"]["hash"] for daemon in five}
    assert len(hashes) == 1
    row = next(one for one in five[4].status()["members"] if one["name"] == "node-2")
    assert row["zone"] == "node-2"
    assert row["app"] == five[1].url
    assert row["shards"] == 2
    assert row["heard_ms"] < 10_000


def test_a_stopped_node_is_left_out_and_comes_back_by_itself(five: list[Daemon]) -> None:
    five[2].signal(signal.SIGSTOP)
    began = time.monotonic()
    for daemon in five[:2]:
        daemon.wait_states({"node-3": "down"}, 10)
    assert len(coverage(five[0]).missing) == 2
    time.sleep(max(0.0, 5.0 - (time.monotonic() - began)))
    five[2].signal(signal.SIGCONT)
    for daemon in five:
        daemon.wait_states(ALL, 15)
        until(lambda daemon=daemon: coverage(daemon).complete, 10, f"{daemon.name} does not reach all")  # type: ignore[misc]
    assert "down" in kinds(five[0], "node-3")
    # Nobody else was taken for dead meanwhile, by nobody, the stopped one included.
    for daemon in five:
        for other in ("node-1", "node-2", "node-4", "node-5"):
            assert "down" not in kinds(daemon, other), (daemon.name, other)


def test_a_node_that_comes_back_on_other_ports_is_found(five: list[Daemon]) -> None:
    moved = five[3]
    moved.kill()
    until(lambda: len(coverage(five[0]).missing) == 2, 10, "its shards are still answered for")
    peer, app = free_ports(2)
    text = moved.config.read_text().replace(f"app_port = {moved.app_port}", f"app_port = {app}")
    moved.config.write_text(text.replace(f"peer_port = {moved.peer_port}\n", f"peer_port = {peer}\n"))
    moved.app_port = app
    moved.start()
    for daemon in five:
        daemon.wait_states(ALL, 10)
        until(lambda daemon=daemon: coverage(daemon).complete, 10, f"{daemon.name} does not reach all")  # type: ignore[misc]
    row = next(one for one in five[0].status()["members"] if one["name"] == moved.name)
    assert row["address"] == f"127.0.0.1:{peer}"
    assert row["app"] == moved.url


def test_strangers_with_another_key_stay_strangers(five: list[Daemon], tmp_path: Path) -> None:
    """The same cluster id and a seed of the first, as a copied configuration would have it."""
    ports = free_ports(4)
    strangers = [
        member(
            tmp_path,
            f"other-{i + 1}",
            ports[2 * i : 2 * i + 2],
            [five[0].peer_port, ports[0]],
            bootstrap=2,
            shard_count=10,
            more=f'[gossip]\nkey = "{KEY}"',
        )
        for i in range(2)
    ]
    try:
        for daemon in strangers:
            daemon.start(wait=False)
        for daemon in strangers:
            daemon.wait_ready()
        time.sleep(3.0)
        assert set(strangers[0].states()) == {"other-1", "other-2"}
        for daemon in five:
            assert set(daemon.states()) == set(ALL)
        assert five[0].status()["counters"]["gossip"]["dropped"].get("unknown_key", 0) > 0
        fill(strangers[0], 10)
        assert coverage(five[0]).complete
    finally:
        put_down(strangers)


def test_keys_are_rotated_through_one_node_and_nobody_is_lost(five: list[Daemon]) -> None:
    with gmco.connect_blocking([five[1].url], timeout_s=10.0) as client:
        (old,) = {one["keys"][0]["fingerprint"] for one in client.keyring("list")}
        new = client.keyring("install", key=bytes.fromhex(KEY))[0]["keys"][1]["fingerprint"]
        client.keyring("use", fingerprint=new)
        time.sleep(2.0)
        with pytest.raises(gmco.GmcoError, match="would not be able to read"):
            client.keyring("use", fingerprint="00000000")
        results = client.keyring("remove", fingerprint=old)
        assert [[k["fingerprint"] for k in one["keys"]] for one in results] == [[new]] * 5
        time.sleep(2.0)
    downs = [kinds(five[0], name).count("down") for name in ALL]
    for daemon in five:
        assert daemon.states() == ALL
    five[4].stop()  # its ring is on its disk
    five[4].start()
    five[4].wait_states(ALL, 10)
    assert [kinds(five[0], name).count("down") for name in ALL] == downs, "a good-bye is no death"


def test_who_follows_events_is_told_of_a_loss_goes_on_elsewhere_and_ends_with_the_last(
    tmp_path: Path,
) -> None:
    said, told = tmp_path / "out", tmp_path / "err"
    with cluster(tmp_path / "nodes", 3) as daemons, said.open("w") as out, told.open("w") as err:
        command = [sys.executable, "-m", "admin.cli", "events", "--follow", "--node", daemons[0].url]
        command += ["--timeout", "3", "--output", "json"]
        with subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT) as follower:
            try:
                until(lambda: "joined" in said.read_text(), 20, "it shows nothing")
                daemons[0].signal(signal.SIGTERM)
                until(lambda: "lost node-1: " in told.read_text(), 2, "it does not say that its node stops")
                # Of the other two it was never told.
                until(lambda: "saw it" in told.read_text(), 5, "it does not go on at another node")
                until(lambda: '"left"' in said.read_text(), 5, "it does not show what the other saw")
                assert follower.poll() is None
                for daemon in daemons[1:]:
                    daemon.kill()
                assert follower.wait(10) == 3
            finally:
                follower.kill()
    last = told.read_text().splitlines()[-1]
    assert last.startswith("error[unavailable]: no node can be reached: ")
    for daemon in daemons:
        assert f"{daemon.url}: connection refused" in last
    assert told.read_text().count("lost node-") >= 2


def lines_of(sock: socket.socket) -> list[str]:
    found = []
    sock.setblocking(False)
    try:
        while True:
            found += sock.recv(4096).decode().splitlines()
    except BlockingIOError:
        return found


def test_it_waits_for_as_many_as_asked_and_a_late_one_only_coordinates(tmp_path: Path) -> None:
    ports = free_ports(8)
    daemons = [
        member(tmp_path, f"n{i + 1}", ports[2 * i : 2 * i + 2], ports[:1], bootstrap=3 if i < 3 else 0)
        for i in range(4)
    ]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            place = str(tmp_path / "notify")
            notified.bind(place)
            daemons[0].start(wait=False, env={"NOTIFY_SOCKET": place})
            daemons[1].start(wait=False)
            said: list[str] = []

            def waits() -> bool:
                said.extend(lines_of(notified))
                return "STATUS=waiting for 1 of 3 nodes" in said

            until(waits, 20, "it does not tell systemd what it waits for")
        assert daemons[0].status()["state"] == "waiting for 1 of 3 nodes"
        assert "READY=1" not in said
        with gmco.connect_blocking([daemons[0].url], timeout_s=2.0) as client:
            client.ping()
            with pytest.raises(gmco.Unavailable, match="waiting for 1 of 3 nodes"):
                client.search([1.0] * DIM, 1, timeout_s=1.0)
        daemons[2].start()
        for daemon in daemons[:2]:
            daemon.wait_ready()
        fill(daemons[0])
        daemons[3].start()
        status = daemons[3].status()
        assert status["shards"] == []
        assert status["layout"] == daemons[0].status()["layout"]
        assert coverage(daemons[3]).complete
        with gmco.connect_blocking([daemons[3].url], timeout_s=5.0) as client:
            client.put_items([gmco.Item(7_000, [1.0] * DIM)], ack="all")
            assert client.get_items([7_000])[0] is not None
        # All stop, and those of the layout open their shards without waiting for anybody.
        for daemon in daemons:
            assert daemon.stop() == 0, daemon.tail()
        daemons[1].start()
        assert coverage(daemons[1]).complete
    finally:
        put_down(daemons)


def test_of_two_processes_with_one_id_the_older_stops(tmp_path: Path) -> None:
    with cluster(tmp_path, 2, replication=2) as daemons:
        folder = tmp_path / "second"
        shutil.copytree(daemons[1].data, folder / "node-2")
        twin = member(folder, "node-2", free_ports(2), [daemons[0].peer_port], bootstrap=2, replication=2)
        try:
            twin.start(wait=False)
            assert daemons[1].wait(20) == 3
            last = daemons[1].tail().strip().splitlines()[-1]
            assert "error[superseded]" in last
            assert "Traceback" not in daemons[1].tail()
            twin.wait_ready()
        finally:
            put_down([twin])


def seeded(daemon: Daemon, port: int) -> None:
    """It knows that seed besides, from its next start on."""
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("seeds = [", f'seeds = ["127.0.0.1:{port}", ', 1))


def other_cluster_is_told(daemon: Daemon) -> bool:
    with contextlib.suppress(gmco.GmcoError):  # it may be busy starting
        return any(problem.startswith("other_cluster") for problem in daemon.status()["problems"])
    return False


def test_two_clusters_of_one_name_and_key_that_meet_stay_two_and_say_so(tmp_path: Path) -> None:
    with (
        cluster(tmp_path / "a", 2, replication=2) as one,
        cluster(tmp_path / "b", 2, replication=2, name="other") as two,
    ):
        both = [*one, *two]
        files = [(daemon.data / "layout").read_bytes() for daemon in both]
        assert one[0].status()["cluster_id"] != two[0].status()["cluster_id"]
        assert not any(daemon.status()["problems"] for daemon in both)
        assert two[1].stop() == 0
        seeded(two[1], one[0].peer_port)
        two[1].start()
        for daemon in (one[0], two[1]):
            until(lambda daemon=daemon: other_cluster_is_told(daemon), 30, f"{daemon.name} does not say so")  # type: ignore[misc]
        assert set(one[0].states()) == {daemon.name for daemon in one}, "nothing of the other is taken"
        assert set(two[1].states()) == {daemon.name for daemon in two}
        assert [(daemon.data / "layout").read_bytes() for daemon in both] == files
        assert "other_cluster_id" in one[0].tail()


def test_a_node_with_another_clusters_data_is_no_member(tmp_path: Path) -> None:
    """The same names in both, as on a laptop where somebody has mixed up two folders."""
    with (
        cluster(tmp_path / "a", 2, replication=2) as one,
        cluster(tmp_path / "b", 2, replication=2) as two,
    ):
        assert one[1].stop() == 0
        assert two[1].stop() == 0
        mine = one[1].data.rename(tmp_path / "kept")
        two[1].data.rename(one[1].data)
        one[1].start(wait=False)
        for daemon in (one[0], one[1]):
            until(lambda daemon=daemon: other_cluster_is_told(daemon), 30, f"{daemon.name} does not say so")  # type: ignore[misc]
        assert one[0].states()["node-2"] != "alive"
        one[1].kill()
        one[1].data.rename(two[1].data)
        mine.rename(one[1].data)
        one[1].start()
        one[0].wait_states({"node-2": "alive"}, 30)


def test_a_joiner_of_other_settings_waits_and_says_in_what_they_differ(tmp_path: Path) -> None:
    with cluster(tmp_path, 1, replication=1) as (daemon,):
        wrong = member(tmp_path, "wrong", free_ports(2), [daemon.peer_port], bootstrap=0, storage="dim = 32")
        try:
            wrong.start(wait=False)
            until(lambda: b"dim 32 here and 16 there" in wrong.log.read_bytes(), 20, "it does not say so")
            assert "config_mismatch" in wrong.status()["state"]
            assert coverage(daemon).complete
            assert wrong.stop() == 0
        finally:
            put_down([wrong])


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/uio.h>
#include <unistd.h>
static void wait_at_gate(void) { while (access(GATE, F_OK) == 0) usleep(10000); }
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int)) dlsym(RTLD_NEXT, "fdatasync");
    wait_at_gate();
    return real(fd);
}
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t, int);
    if (!real) real = (ssize_t (*)(int, const struct iovec *, int, off_t, int)) dlsym(RTLD_NEXT, "pwritev2");
    wait_at_gate();
    return real(fd, parts, count, offset, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    return pwritev2(fd, parts, count, offset, flags);
}
"""


def slow_disk(folder: Path, gate: Path) -> dict[str, str]:
    """The environment of a process whose durable writes hang for as long as `gate` exists."""
    if shutil.which("gcc") is None:
        pytest.skip("a disk that hangs is made with a small C library, and there is no gcc")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text(SHIM)
    command = ["gcc", "-shared", "-fPIC", f'-DGATE="{gate}"', "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def test_a_node_whose_disk_hangs_says_so_is_avoided_and_recovers(tmp_path: Path) -> None:
    gate = tmp_path / "hang"
    env = slow_disk(tmp_path, gate)
    with cluster(tmp_path / "nodes", 3, replication=3) as daemons:
        fill(daemons[0])
        ill = daemons[1]
        ill.stop()
        ill.start(env=env)
        for daemon in daemons:
            daemon.wait_states({f"node-{i}": "alive" for i in (1, 2, 3)}, 10)
        gate.touch()
        try:
            with gmco.connect_blocking([daemons[0].url], timeout_s=5.0) as client:
                for i in range(9_000, 9_030):  # all shards get some, each log of the ill node hangs
                    try:
                        client.put_items([gmco.Item(i, [1.0] * DIM)], timeout_s=0.2)
                    except gmco.GmcoError as error:
                        assert error.code in ("outcome_unknown", "deadline_exceeded")
            until(lambda: bool(_row(daemons[0], ill)["degraded"]), 30, "it does not say that it is ill")
            assert "has not answered for 2 s" in _row(daemons[0], ill)["degraded"]
            assert _row(daemons[0], ill)["state"] == "alive", "ill is not dead"
            assert ill.status()["degraded"]
            searches = _searches(ill)
            for _ in range(20):  # through the ill node, which avoids its own replicas
                assert coverage(ill).complete
            assert _searches(ill) == searches
        finally:
            gate.unlink()
        until(lambda: not _row(daemons[0], ill)["degraded"], 30, "it does not say that it is well")
        assert kinds(daemons[0], ill.name)[-2:] == ["degraded", "well"]


def _row(daemon: Daemon, of: Daemon) -> dict[str, object]:
    row: dict[str, object] = next(one for one in daemon.status()["members"] if one["name"] == of.name)
    return row


def _searches(daemon: Daemon) -> int:
    count: int = daemon.status()["counters"]["search"]["searches"]
    return count
