"""What must not end a process without a word: each function here is run by test_native.py in a process of its own.

LMDB and the row files are mapped memory. A thread that reads what another has just unmapped gets no exception.
"""

from __future__ import annotations

import faulthandler
import gc
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from storage.errors import DamagedError, ReplicaStoppedError, StorageError
from storage.records import Kind
from storage.table import Table, TableState
from storage.view import ClassConstraint
from tests.unit.storage.replica_writer import DIM, Writer, vector

STATE = TableState(node_id="n", shard=0, dim=8, metric="cosine")
KEYS = [i.to_bytes(8, "big") for i in range(20_000)]


def filled(folder: Path, map_bytes: int = 1 << 30) -> Table:
    table = Table.open(folder / "table", map_bytes=map_bytes)
    table.commit(STATE, {Kind.ITEM: dict.fromkeys(range(len(KEYS)), b"x" * 200)})
    return table


class Beside:
    """Runs `work` again and again in threads until it raises StorageError or the block is left."""

    def __init__(self, work: Callable[[], object], threads: int = 3) -> None:
        self.errors: list[BaseException] = []
        self._work, self._done = work, threading.Event()
        self._begun = threading.Barrier(threads + 1)
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        try:
            self._work()
            self._begun.wait()
            while not self._done.is_set():
                self._work()
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Beside:
        for thread in self._threads:
            thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        assert all(isinstance(error, StorageError) for error in self.errors), self.errors


def close_beside_readers(folder: Path) -> None:
    for _ in range(20):
        table = filled(folder)
        with Beside(lambda table=table: table.find_many(Kind.ITEM, KEYS)) as readers:  # type: ignore[misc]
            table.close(seal=False)
        assert all(isinstance(error, ReplicaStoppedError) for error in readers.errors)


def close_and_growth_beside_a_copy(folder: Path) -> None:
    for turn in range(5):
        table = filled(folder, 8 << 20)
        numbers = iter(range(1_000_000))

        def copy(table: Table = table, turn: int = turn) -> None:
            target = folder / f"{turn}-{next(numbers)}"  # noqa: B023 - one thread, one turn
            table.copy(target)
            shutil.rmtree(target)

        with Beside(copy, threads=1):
            for size in (400, 800, 1_600):  # each outgrows the map
                table.commit(STATE, {Kind.ITEM: dict.fromkeys(range(len(KEYS)), b"y" * size)})
            table.close(seal=False)
        shutil.rmtree(folder / "table")


def scans_that_are_left_lying(folder: Path) -> None:
    lying = []
    for turn in range(50):
        table = filled(folder / str(turn))
        scan = table.scan(Kind.ITEM)
        next(scan)
        table.commit(STATE, {Kind.ITEM: {1: b"not held up by the scan"}})
        table.close(seal=False)
        with suppress(ReplicaStoppedError):
            lying.append(list(scan))
        lying.append(scan)  # type: ignore[arg-type]
        if turn % 2:
            shutil.rmtree(folder / str(turn))
        if turn % 10 == 9:
            lying.clear()
            gc.collect()


def searches_beside_swaps_and_a_close(folder: Path) -> None:
    writer = Writer(folder / "shard-003")
    writer.put(*range(300))
    query = np.frombuffer(vector(1), np.float16).reshape(1, DIM)

    def search() -> None:
        view, engine = writer.replica.searchable
        hits = engine.search(view, query, 300, [ClassConstraint()])[0]
        writer.replica.metadata([int(id) for id in hits.ids])
        writer.replica.get(Kind.ITEM, 5)

    with Beside(search) as searches:
        for turn in range(15):
            writer.put(*range(300), seed=turn)
            writer.replica.checkpoint()
            job = writer.replica.begin_compaction(Kind.ITEM)
            job.run()
            writer.replica.finish_compaction(job)
        assert not searches.errors
        held = writer.replica.searchable
        writer.replica.close()
        shutil.rmtree(folder / "shard-003")
        assert len(held[1].search(held[0], query, 300, [ClassConstraint()])[0].ids) == 300


def opens_that_fail(folder: Path) -> None:
    kept = []
    for turn in range(20):
        writer = Writer(folder / str(turn) / "shard-003")
        writer.put(*range(50))
        writer.replica.checkpoint()
        writer.replica.abort()
        rows = next(writer.directory.glob("items-*.f16"))
        good = rows.read_bytes()
        harmed = bytearray(good)
        harmed[4096 + 3] ^= 0xFF
        rows.write_bytes(harmed)
        try:
            writer.open()
        except DamagedError as error:
            kept.append(error)  # and with its traceback every frame of the open
        else:
            raise AssertionError("a changed row was not found")
        rows.write_bytes(good)
        writer.open()
        assert writer.replica.get(Kind.ITEM, 3) is not None
        writer.replica.close()
    del kept
    gc.collect()


if __name__ == "__main__":
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as scratch:
        globals()[sys.argv[1]](Path(scratch))
