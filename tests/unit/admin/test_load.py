"""Readers and the loader, against a client that keeps what it is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trio

import gmco
from admin.load import BadRowError, Loader, LoadOptions, LoadProgress, StateFile, first_cause, write_id
from admin.sources import BadRow, Row, Source, SourceError, open_source

DIM = 8


class FakeClient:
    """Applies each write_id once, as the cluster does. `refuse(call)` may return an error for the n-th call."""

    def __init__(
        self, refuse: Callable[[int, Sequence[Any]], gmco.GmcoError | None] = lambda n, items: None
    ) -> None:
        self.stored: dict[int, Any] = {}
        self.applied: dict[bytes, list[int]] = {}
        self.calls = 0
        self.under_way = self.under_way_max = 0
        self._refuse = refuse

    async def put_items(
        self, items: Sequence[gmco.Item], ack: str, write_id: bytes, *, timeout_s: float
    ) -> gmco.Written:
        return await self._put({one.media_id: one for one in items}, items, write_id)

    async def put_users(
        self, users: Sequence[gmco.User], ack: str, write_id: bytes, *, timeout_s: float
    ) -> gmco.Written:
        return await self._put({one.user_id: one for one in users}, users, write_id)

    async def _put(self, records: dict[int, Any], given: Sequence[Any], write_id: bytes) -> gmco.Written:
        self.calls += 1
        call = self.calls  # now: while we wait, others call
        self.under_way += 1
        self.under_way_max = max(self.under_way, self.under_way_max)
        try:
            await trio.sleep(0.001)
            error = self._refuse(call, given)
            if error is not None:
                raise error
        finally:
            self.under_way -= 1
        assert write_id not in self.applied, "one batch was applied twice"
        self.applied[write_id] = list(records)
        self.stored |= records
        return gmco.Written(len(records), (), write_id)


def vectors(count: int, dim: int = DIM) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, dim)).astype(np.float16)


def write_parquet(path: Path, count: int, form: str = "fixed", **extra: list[Any]) -> Path:
    flat = vectors(count)
    columns: dict[str, Any] = {
        "fixed": pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), DIM),
        "list": pa.array([row.astype(np.float32).tolist() for row in flat], type=pa.list_(pa.float32())),
        "binary": pa.array([row.tobytes() for row in flat]),
    }
    table = {"media_id": list(range(1, count + 1)), "vector": columns[form], **extra}
    pq.write_table(pa.table(table), path, row_group_size=100)
    return path


def write_lines(path: Path, count: int, changes: dict[int, Any] | None = None) -> Path:
    lines = []
    for number, vector in enumerate(vectors(count)):
        fields = {"media_id": number + 1, "vector": vector.astype(float).tolist(), "classes": [number % 5]}
        change = (changes or {}).get(number, {})
        lines.append(change if isinstance(change, str) else json.dumps({**fields, **change}))
    path.write_text("\n".join(lines) + "\n")
    return path


def run(
    client: FakeClient, source: Source, *, state: StateFile | None = None, **options: Any
) -> LoadProgress:
    given = LoadOptions(**{"batch_rows": 10, "window": 4, **options})
    before = state.read() if state else None
    return trio.run(Loader(client, source, given, state, progress=before).run)


@pytest.mark.parametrize("form", ["fixed", "list", "binary"])
def test_parquet_in_each_form_gives_the_same_items(tmp_path: Path, form: str) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", 250, form, title=[f"t{i}" for i in range(250)], classes=[[2, 1]] * 250
    )
    client = FakeClient()
    progress = run(client, open_source(path, "items"))
    assert progress.written == progress.rows_done == 250
    assert sorted(client.stored) == list(range(1, 251))
    for id, vector in zip(range(1, 251), vectors(250), strict=True):
        item = client.stored[id]
        assert item.vector.tolist() == vector.tolist()
        assert item.metadata == {"title": f"t{id - 1}"}
        assert item.classes == (1, 2)


def test_npy_with_ids_as_users(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vectors(25))
    np.save(tmp_path / "i.npy", np.arange(25, dtype=np.uint64) + (1 << 63))
    client = FakeClient()
    run(client, open_source(tmp_path / "v.npy", "users", tmp_path / "i.npy"), kind="users")
    assert min(client.stored) == 1 << 63
    assert len(client.stored) == 25


@pytest.mark.parametrize("start", [0, 1, 99, 100, 101, 249, 250])
def test_parquet_from_any_row(tmp_path: Path, start: int) -> None:
    source = open_source(write_parquet(tmp_path / "a.parquet", 250), "items")
    rows = [row for row in source.read(start) if isinstance(row, Row)]
    assert [row.number for row in rows] == list(range(start, 250))
    assert [row.id for row in rows] == list(range(start + 1, 251))


BAD = {
    3: ({"media_id": -1}, "id must be 0"),
    4: ({"media_id": True}, "unsigned integer"),
    15: ({"vector": [1.0, float("nan")] * 4}, "NaN"),
    16: ({"vector": "abc"}, "not a list of numbers"),
    17: ({"vector": [0.0] * DIM}, "zeros"),
    28: ({"vector": [1.0] * (DIM + 1)}, "9 numbers where the others have 8"),
    29: ({"classes": ["x"]}, "classes"),
    30: ({"metadata": 5}, "metadata"),
    31: ("{", "not JSON"),
    32: ("[1]", "not a JSON object"),
}


@pytest.mark.parametrize("number", list(BAD))
def test_a_bad_row_stops_with_its_number_and_reason(tmp_path: Path, number: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", 40, {number: BAD[number][0]})
    client = FakeClient()
    with pytest.raises(BadRowError, match=f"line {number + 1}: .*{BAD[number][1]}"):
        run(client, open_source(path, "items"))
    assert len(client.stored) == number // 10 * 10  # whole batches before it


def test_skip_bad_counts_them_and_loads_the_rest(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 40, {number: change for number, (change, _) in BAD.items()})
    client = FakeClient()
    progress = run(client, open_source(path, "items"), skip_bad=True)
    assert progress.bad == len(BAD)
    assert {bad.number for bad in progress.bad_rows} == set(BAD)
    assert set(client.stored) == {n + 1 for n in range(40) if n not in BAD}


def test_a_row_that_the_cluster_refuses_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    def refuse(call: int, items: Sequence[Any]) -> gmco.GmcoError | None:
        places = [place for place, item in enumerate(items) if item.media_id == 26]
        return (
            gmco.BadRequest("out_of_range", "class too great", f"items[{places[0]}].classes")
            if places
            else None
        )

    source = open_source(write_lines(tmp_path / "a.jsonl", 40), "items")
    with pytest.raises(BadRowError, match="line 26: out_of_range"):
        run(FakeClient(refuse), source)
    client = FakeClient(refuse)
    progress = run(client, source, skip_bad=True)
    assert progress.bad_rows == [BadRow(25, "out_of_range: class too great")]
    assert len(client.stored) == 39


def test_wrong_dimension_is_found_at_the_first_row(tmp_path: Path) -> None:
    client = FakeClient()
    with pytest.raises(BadRowError, match="line 1: vector of 8 numbers where the others have 16"):
        run(client, open_source(write_lines(tmp_path / "a.jsonl", 40), "items"), dim=16)
    assert client.calls == 0


def test_rows_of_a_table_are_counted_from_1(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 40, classes=[[-1] if i == 12 else [1] for i in range(40)])
    with pytest.raises(BadRowError, match="row 13: classes"):
        run(FakeClient(), open_source(path, "items"))


def test_a_load_that_wrote_nothing_leaves_no_state_file(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "a.parquet", 40), "items")
    state = StateFile(tmp_path / "state", source, LoadOptions(batch_rows=10))
    with pytest.raises(gmco.GmcoError, match="full"):
        run(FakeClient(lambda n, items: gmco.GmcoError("disk_full", "full")), source, state=state)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]
    # Nor what an earlier one has left, when this one was to start over and could not.
    state.write(LoadProgress(next_batch=3, written=30, rows_done=30))
    given = LoadOptions(batch_rows=10)
    refusing = FakeClient(lambda n, items: gmco.GmcoError("disk_full", "full"))
    with pytest.raises(gmco.GmcoError, match="full"):
        trio.run(Loader(refusing, source, given, state, progress=LoadProgress()).run)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.parquet"]


def test_pushback_slows_down_and_nothing_is_lost(tmp_path: Path) -> None:
    refusals = {2: "overloaded", 3: "indexing", 5: "no_primary", 7: "outcome_unknown"}

    def refuse(call: int, items: Sequence[Any]) -> gmco.GmcoError | None:
        code = refusals.get(call)
        kind = gmco.Overloaded if code in ("overloaded", "indexing") else gmco.GmcoError
        return kind(code, "later", retry_after_ms=5) if code else None

    client = FakeClient(refuse)
    progress = run(client, open_source(write_parquet(tmp_path / "a.parquet", 250), "items"))
    assert (progress.written, progress.retries, progress.pushbacks) == (250, 4, 2)
    assert len(client.stored) == 250


def test_window_bounds_what_is_under_way(tmp_path: Path) -> None:
    client = FakeClient()
    run(client, open_source(write_parquet(tmp_path / "a.parquet", 250), "items"), window=3)
    assert 1 < client.under_way_max <= 3


def test_gives_up_when_the_cluster_is_away_too_long(tmp_path: Path) -> None:
    client = FakeClient(lambda n, items: gmco.Unavailable("unavailable", "nobody"))
    with pytest.raises(gmco.Unavailable):
        run(client, open_source(write_parquet(tmp_path / "a.parquet", 30), "items"), give_up_s=0.1)


def test_a_broken_load_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", 250)
    source = open_source(path, "items")
    options = LoadOptions(batch_rows=10)
    state = StateFile(tmp_path / "state", source, options)
    client = FakeClient(lambda n, items: gmco.GmcoError("internal", "broken") if n > 11 else None)
    with pytest.raises(gmco.GmcoError, match="broken"):
        run(client, source, state=state)
    saved = state.read()
    assert 0 < saved.next_batch <= 11
    assert saved.written == saved.next_batch * 10
    # Everything that the state calls done is stored: the promise of the state file.
    assert set(range(1, saved.written + 1)) <= set(client.stored)

    first, client._refuse = set(client.applied), lambda n, items: None
    client.applied.clear()
    progress = run(client, source, state=state)
    assert progress.written == 250
    assert len(client.stored) == 250
    resent = first & set(client.applied)
    assert resent <= {write_id(source.digest, "items", 10, n) for n in range(saved.next_batch, 25)}
    assert not state.path.exists()


def test_state_of_another_file_or_batch_size_does_not_count(tmp_path: Path) -> None:
    source = open_source(write_parquet(tmp_path / "a.parquet", 50), "items")
    state = StateFile(tmp_path / "state", source, LoadOptions(batch_rows=10))
    state.write(LoadProgress(next_batch=3, written=30, rows_done=30))
    assert state.read().next_batch == 3
    assert StateFile(state.path, source, LoadOptions(batch_rows=20)).read().next_batch == 0
    other = open_source(write_parquet(tmp_path / "b.parquet", 60), "items")
    assert StateFile(state.path, other, LoadOptions(batch_rows=10)).read().next_batch == 0
    state.path.write_text("{torn")
    assert state.read().next_batch == 0


def test_files_that_cannot_be_loaded_say_why(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.parquet").write_text("x")
    np.save(tmp_path / "v.npy", vectors(3))
    np.save(tmp_path / "i.npy", np.arange(4))
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    for name, ids, reason in (
        ("none.parquet", None, "no such file"),
        ("a.csv", None, "unknown format"),
        ("a.parquet", None, "not a Parquet file"),
        ("b.parquet", None, "no column media_id, vector; there are x"),
        ("v.npy", None, "give --ids"),
        ("v.npy", "i.npy", "3 vectors but 4 ids"),
        ("a.csv", "i.npy", "--ids goes with"),
    ):
        with pytest.raises(SourceError, match=reason):
            open_source(tmp_path / name, "items", tmp_path / ids if ids else None)


def test_ctrl_c_comes_before_other_causes() -> None:
    inner = BaseExceptionGroup("", [ValueError("x"), BaseExceptionGroup("", [KeyboardInterrupt()])])
    assert isinstance(first_cause(inner), KeyboardInterrupt)
