"""What the demo may not do: delete a stranger's files, share a directory, leave processes behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from admin.cluster import MARK, ClusterError, LocalCluster, choose_ports, config_toml, own_directory
from admin.demo import main, percentile


def test_a_strangers_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ClusterError, match="not a demo's"), own_directory(tmp_path):
        pass
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_what_an_earlier_demo_left_is_removed_and_so_is_ours(tmp_path: Path) -> None:
    place = tmp_path / "demo"
    (place / "node-1").mkdir(parents=True)
    (place / MARK).touch()
    with own_directory(place):
        assert [entry.name for entry in place.iterdir()] == [MARK]
        (place / "node-1.log").touch()
    assert not place.exists()


def test_two_demos_do_not_share_a_directory(tmp_path: Path) -> None:
    with own_directory(tmp_path / "demo") as place:
        (place / "data").touch()
        with pytest.raises(ClusterError, match="another demo"), own_directory(place):
            pass
        assert (place / "data").exists()


def test_taken_ports_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        # The first choice is a port that we hold, so the result does not hang on who else uses 7400.
        monkeypatch.setattr("admin.cluster.PORT_FIRST", port)
        ports = choose_ports(3)
    numbers = [port for one in ports for port in (one.app, one.http, one.peer)]
    assert len(set(numbers)) == 9
    assert port not in numbers


def test_each_configuration_names_one_other_node_and_together_they_reach_all() -> None:
    ports = choose_ports(3)
    reached = set()
    for index in range(3):
        config = tomllib.loads(config_toml(index, ports, "demo-1", 12))
        assert config["node"]["name"] == f"node-{index + 1}"
        assert config["listen"]["app_port"] == ports[index].app
        (seed,) = config["cluster"]["seeds"]
        assert seed != f"127.0.0.1:{ports[index].peer}"
        reached.add(seed)
    assert len(reached) == 3
    assert "seeds" not in tomllib.loads(config_toml(0, ports[:1], "demo-1", 12))["cluster"]


def test_a_node_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path)
    (tmp_path / "node-1.toml").write_text("[nonsense]")
    cluster.start("node-1")
    cluster._processes["node-1"].wait(20)
    with pytest.raises(ClusterError, match=r"node-1 ended with exit code 2\n.*nonsense"):
        cluster.check()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_parent_that_is_killed() -> None:
    code = (
        "import subprocess, sys, time\n"
        "from admin.cluster import die_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],\n"
        "                         preexec_fn=die_with_parent(), start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    end = time.monotonic() + 10
    while time.monotonic() < end and _running(child):
        time.sleep(0.02)
    alive = _running(child)
    if alive:
        os.kill(child, signal.SIGKILL)
    assert not alive


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie waits for whoever adopted it


@pytest.mark.parametrize("once", [True, False])
def test_a_demo_that_fails_ends_with_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], once: bool
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(once=once, directory=tmp_path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"demo failed: {tmp_path} exists and is not a demo's; give another --dir"


def test_percentile_is_nearest_rank() -> None:
    assert percentile([], 0.5) == 0
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(list(range(100)), 0.99) == 99
