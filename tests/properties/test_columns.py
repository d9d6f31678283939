"""Records applied in columns leave the same bytes as one by one: log, rows, entries, write_ids, digests, views."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from node.changefeed import change_of, changes_of
from storage.arrival import arrival
from storage.batch import Batch
from storage.bulk import offsets, verified
from storage.records import Kind, Mark, Operation, Record, Version, decode
from storage.replica import Replica
from storage.tombstones import encode_floor
from tests.unit.storage.replica_writer import CONFIG, vector

KINDS = st.sampled_from([Kind.ITEM, Kind.USER])
IDS = st.integers(0, 30) | st.sampled_from([256, (1 << 64) - 1])
CLASSES = st.lists(st.integers(0, 63), max_size=3, unique=True).map(lambda ids: tuple(sorted(ids)))
PUT = st.tuples(
    st.just(Operation.PUT), KINDS, IDS, st.integers(0, 50).map(vector), CLASSES, st.binary(max_size=5)
)
DELETE = st.tuples(st.just(Operation.DELETE), KINDS, IDS, st.just(b""), st.just(()), st.just(b""))
WRITE = st.tuples(st.lists(PUT | DELETE, min_size=1, max_size=12), st.integers(0, 2))
# A client's write; a mark; a record of before that is offered again, by its place as a part of the log; a new epoch.
STEP = WRITE | st.sampled_from([Mark.PURGE, Mark.DIGEST]) | st.floats(0, 1) | st.just("epoch")


def log_of(steps: list[Any]) -> list[tuple[bytes, Record]]:
    log: list[tuple[bytes, Record]] = []
    epoch = 1
    for step in steps:
        batch = Batch(epoch, len(log), 1_000 + len(log))
        if step == "epoch":
            epoch += 1
            batch = Batch(epoch, len(log), 1_000 + len(log))
            batch.add_mark(Mark.EPOCH, b"placement %d" % epoch)
        elif isinstance(step, tuple):
            batch.add(step[0], bytes([step[1]]) * 16)
        elif isinstance(step, float):
            old = [record for _, record in log if record.kind is not Kind.NONE]
            if not old:
                continue
            # As if its newer version had never been: older than what is there, or the same.
            batch.add_again(old[min(len(old) - 1, int(step * len(old)))])
        else:
            floor = Version(1, len(log) // 2)
            batch.add_mark(step, encode_floor(floor) if step is Mark.PURGE else b"")
        log += zip(batch.blobs, batch.records, strict=True)
    return log


def contents(replica: Replica) -> Any:
    view = replica.view
    places = [record.sequence for record in replica_records(replica) if record.id == Mark.DIGEST]
    return {
        "log": replica.read_log(0, 1 << 30),
        "position": (replica.position, replica.epoch_starts, replica.placement, replica.purge_floor),
        "digests": [replica.bucket_digests(kind) for kind in (Kind.ITEM, Kind.USER)],
        "digested": [replica.digested.at(Version(1, place)) for place in places],
        "entries": {kind: list(replica._table.scan(kind)) for kind in (Kind.ITEM, Kind.USER)},
        "write_ids": replica._table.write_ids(),
        "rows": {kind: bytes(space.file.raw[: space.rows * 2 * CONFIG.dim]) for kind, space in replica._spaces.items()},
        "tombstones": replica.tombstones,
        "view": (view.rows, view.alive_rows, view.alive.tolist()),
        "arrays": (view.ids[: view.rows].tolist(), view.masks[: view.rows].tolist()),
        "counts": {k: v for k, v in replica.statistics().items() if k in ("items", "users", "dead", "user_rows", "write_ids")},
    }  # fmt: skip


def replica_records(replica: Replica) -> list[Record]:
    data = replica.read_log(0, 1 << 30)
    return [decode(data, at) for at in offsets(data)]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(STEP, min_size=1, max_size=20),
    cuts=st.lists(st.floats(0, 1), max_size=4),
    checkpoint=st.booleans(),
)
def test_columns_leave_what_records_leave(steps: list[Any], cuts: list[float], checkpoint: bool) -> None:
    log = log_of(steps)
    borders = sorted({0, len(log), *(round(cut * len(log)) for cut in cuts)})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        found = []
        for way in ("records", "columns", "arrival"):
            replica = Replica.open(Path(directory) / way, shard=3, node_id="n1", config=CONFIG)
            for low, high in pairwise(borders):
                part = log[low:high]
                data = b"".join([blob for blob, _ in part])
                came = arrival(data)
                assert came is not None
                if way == "records":
                    replica.append([blob for blob, _ in part], came.rows)
                    replica.apply([record for _, record in part])
                else:
                    replica.append_run(came.run, came.rows)
                    replica.apply(came.records if way == "arrival" else verified(data, offsets(data)))
                if checkpoint:
                    replica.checkpoint()
            before = contents(replica)
            replica.checkpoint()
            found.append([before | {"entries": None, "write_ids": None}, contents(replica)])
            replica.abort()
        assert found[0] == found[1] == found[2]


@given(st.lists(STEP, min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_columns_tell_the_caches_of_the_same_changes(steps: list[Any]) -> None:
    log = log_of(steps)
    if not log:
        return
    data = b"".join(blob for blob, _ in log)
    one_by_one = [change for _, record in log if (change := change_of(record)) is not None]
    assert changes_of(verified(data, offsets(data))) == one_by_one
