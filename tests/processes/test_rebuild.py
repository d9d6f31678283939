"""A host that stays away is replaced, one in maintenance is not, and one that is back gets its place again."""

from __future__ import annotations

import time
from pathlib import Path

import gmco
from tests.processes.cluster import Daemon, cluster
from tests.processes.ledger import TIMEOUT_S
from tests.processes.test_orders import STORAGE, level, loaded, ok, rows, wait

AFTER_S = 3.0


def voters(daemon: Daemon) -> dict[int, set[str]]:
    """Of each shard that has a primary now, as that says."""
    return {row["shard"]: set(row["voters"]) for row in rows(daemon) if row["role"] == "primary"}


def moving(daemon: Daemon) -> bool:
    with gmco.connect_blocking([daemon.url], timeout_s=TIMEOUT_S) as client:
        found = client.moves()
        return bool(found["moves"] or found["unknown"] or found["silent"])


def test_who_stays_away_is_replaced_unless_it_is_in_maintenance_and_comes_back(tmp_path: Path) -> None:
    settings = f"rebuild_after_s = {AFTER_S}\nprefer_first = false"
    with cluster(tmp_path, 4, storage=STORAGE, shard_count=4, settings=settings) as daemons:
        one, *others, last = daemons
        wait(lambda: len(voters(one)) == 4 and not moving(one))
        wished = voters(one)
        assert sum(len(names) for names in wished.values()) == 12
        with loaded([one, *others], [one]):
            ok(one, "maintenance", "node-4", "on")
            last.kill()
            one.wait_states({"node-4": "down"}, 20)
            time.sleep(2 * AFTER_S)
            assert voters(one) == wished, "it is to come back"
            last.start()
            ok(one, "maintenance", "node-4", "off")

            last.kill()
            rest = {"node-1", "node-2", "node-3"}
            wait(lambda: list(voters(one).values()) == [rest] * 4 and not moving(one))
            last.start()
            wait(lambda: voters(one) == wished and not moving(one))
        wait(lambda: level(one))
