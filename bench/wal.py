"""Durable writes: 64 trio writers over 3 logs with group commit, beside plain write + fdatasync of the same batches.

python -m bench.wal [--quick]
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import trio

from bench.harness import arguments, figure, interleaved, say
from node.batching import WriteItem
from node.blocking import DedicatedThread, Runner, ThreadRunner
from node.commit import GroupCommit
from node.upkeep import EVERY_S as MAINTENANCE_S
from router.ports import Change
from storage import records, wal
from storage import segment as fmt
from storage.batch import Batch
from storage.disk import Log
from storage.records import Version

WRITERS, LOGS = 64, 3
VECTOR_BYTES, METADATA = 1_880, b"m" * 72  # with the header 2,048 bytes
SEGMENT_BYTES = 64 << 20


class Shard:
    """The log's part of `node.shard.ShardActor`, of the same pieces: group commit, batch, thread, segments ahead."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.batches: list[int] = []
        self.thread = DedicatedThread("wal")
        self.commit: GroupCommit[WriteItem, Version] = GroupCommit(self._flush)

    async def _flush(self, items: list[WriteItem]) -> list[Version]:
        batch = Batch(1, self.log.last.sequence, time.time_ns())
        results = [batch.add(changes, write_id) for changes, write_id in items]
        self.batches.append(len(batch.blobs))
        await self.thread(self.log.append, batch.blobs)
        return results

    async def maintain(self, runner: Runner) -> None:
        while True:
            if self.log.ahead_due:
                await runner(self.log.make_ahead)
            await trio.sleep(MAINTENANCE_S)


async def _write(shards: list[Shard], writers: int, each: int) -> float:
    changes = [
        Change(records.Operation.PUT, records.Kind.ITEM, i, os.urandom(VECTOR_BYTES), (), METADATA)
        for i in range(16)
    ]

    async def writer(number: int) -> None:
        commit = shards[number % len(shards)].commit
        for i in range(each):
            await commit.submit(WriteItem((changes[i % 16],), records.NO_WRITE_ID))

    maintenance = ThreadRunner("maintenance")
    async with trio.open_nursery() as loops:
        for shard in shards:
            await loops.start(shard.commit.run)
            loops.start_soon(shard.maintain, maintenance)
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(writers):
                nursery.start_soon(writer, number)
        took = time.perf_counter() - began
        loops.cancel_scope.cancel()
    for shard in shards:
        await shard.thread.aclose()
    return took


class Runs:
    """Alternates ours and the peer; the peer writes the batches that ours was last seen to make.

    The logs live on from run to run, so that their rolls and the zeros written ahead fall into the measured time.
    """

    def __init__(self, directory: Path, each: int) -> None:
        self.directory, self.each = directory, each
        self.batches: list[int] = []
        self.logs = [
            Log.open(directory / str(shard), shard=shard, segment_bytes=SEGMENT_BYTES)
            for shard in range(LOGS)
        ]

    def warm_up(self) -> None:
        """Past each log's first segment, the only one that is not made ahead."""
        while any(log.statistics()["segments"] < 2 for log in self.logs):
            self.ours()

    def ours(self) -> float:
        shards = [Shard(log) for log in self.logs]
        took = trio.run(_write, shards, WRITERS, self.each)
        # The order in time does not matter to the peer, the sizes do.
        self.batches = [size for shard in shards for size in shard.batches]
        return WRITERS * self.each / took

    def peer(self) -> float:
        path = self.directory / "peer"
        record_bytes = records.HEADER_BYTES + VECTOR_BYTES + len(METADATA)
        data = os.urandom(record_bytes * max(self.batches))
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(fd, 0, record_bytes * sum(self.batches))
        os.fsync(fd)
        offset, began = 0, time.perf_counter()
        for size in self.batches:
            offset += os.pwrite(fd, memoryview(data)[: size * record_bytes], offset)
            os.fdatasync(fd)
        took = time.perf_counter() - began
        os.close(fd)
        path.unlink()
        return sum(self.batches) / took


def scan_rate(count: int) -> float:
    """Records per second of CPU time (one thread, no I/O: neighbours do not count) through scan and decode."""
    header = fmt.SegmentHeader(0, 1, fmt.segment_bytes_for(count * 2_100, 1 << 20), 1, 0, 0)
    data = bytearray(fmt.encode_header(header))
    vector = os.urandom(VECTOR_BYTES)
    for first in range(1, count + 1, 20):
        batch = b"".join(
            records.encode(
                epoch=1,
                sequence=s,
                timestamp_ns=s,
                operation=records.Operation.PUT,
                kind=records.Kind.ITEM,
                id=s,
                vector=vector,
                metadata=METADATA,
            )
            for s in range(first, first + 20)
        )
        data += batch + fmt.encode_trailer(header, len(data), batch)
    segment = bytes(data).ljust(header.segment_bytes, b"\0")
    began = time.process_time()
    end = wal.scan(segment, last_segment=True).end
    found = sum(1 for _ in wal.replay(segment, fmt.HEADER_BYTES, end))
    assert found >= count
    return found / (time.process_time() - began)


def main() -> None:
    options = arguments(__doc__ or "")
    each, runs = (100, 5) if options.quick else (400, 9)
    root = Path(".bench")
    root.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as place:
        run = Runs(Path(place), each)
        run.warm_up()
        ours, peer = interleaved(run.ours, run.peer, runs)
        say(f"{sum(run.batches) / len(run.batches):.1f} records per batch")
        if not options.only or options.only in "wal.durable":
            figure(
                "wal.durable",
                ours,
                "records/s",
                peer="plain write + fdatasync of the same batches",
                peer_value=peer,
                target="ratio >= 0.7 and >= 10,000/s",
                n=runs,
            )
    if not options.only or options.only in "wal.scan":
        rate = sorted(scan_rate(20_000) for _ in range(runs))[runs // 2]
        figure(
            "wal.scan",
            rate,
            "records per CPU second",
            peer=None,
            peer_value=None,
            target=">= 200,000/s",
            n=runs,
        )


if __name__ == "__main__":
    main()
