"""write_ids: runs are counted, age and number are bounded, and chunks at rest say the same after a restart."""

from __future__ import annotations

import random

from storage.records import Kind, Operation, Record, Version
from storage.write_ids import WriteIds

S = 10**9


def record(sequence: int, name: int, at_s: int) -> Record:
    version = Version(1, sequence)
    write_id = name.to_bytes(16, "big")
    return Record(1, sequence, version, at_s * S, write_id, Operation.DELETE, Kind.ITEM, 1, b"", (), b"", 0)


def test_a_run_that_goes_on_lives_as_long_as_its_last_record() -> None:
    ids = WriteIds(keep_s=10, count_max=100)
    ids.apply([record(1, 7, 0), record(2, 8, 0)])
    ids.apply([record(3, 7, 8)])
    ids.apply([record(4, 9, 15)])
    assert ids.get((8).to_bytes(16, "big")) is None
    assert ids.get((7).to_bytes(16, "big")) == (Version(1, 3), 2)
    ids.apply([record(5, 9, 30)])
    assert ids.get((7).to_bytes(16, "big")) is None
    assert (len(ids), ids.refused) == (1, 0)


def test_the_bound_puts_out_the_oldest_and_counts_them() -> None:
    ids = WriteIds(keep_s=10, count_max=3)
    ids.apply([record(n, n, 1) for n in range(1, 8)])
    assert (len(ids), ids.refused) == (3, 4)
    assert ids.get((4).to_bytes(16, "big")) is None
    assert ids.get((5).to_bytes(16, "big")) == (Version(1, 5), 1)


def test_chunks_at_rest_agree_with_memory_whatever_happens() -> None:
    """Random batches, checkpoints that fail or not, restarts: what is known is what a plain dict says."""
    rng = random.Random(4)
    for _ in range(40):
        ids, table, model = (
            WriteIds(keep_s=20, count_max=1000),
            dict[bytes, bytes](),
            dict[bytes, tuple[int, int, int]](),
        )
        sequence, now = 0, 0
        for _ in range(60):
            now += rng.choice([0, 0, 1, 5])
            batch = []
            for _ in range(rng.randrange(1, 5)):
                sequence += 1
                batch.append(record(sequence, rng.randrange(1, 30), now))
            pending = list(batch)
            if (
                rng.random() < 0.5
            ):  # what came before a checkpoint is in the chunk, what came after is replayed
                ids.apply(batch)
                pending = []
            for one in batch:
                last, count, at = model.get(one.write_id, (0, 0, now))
                expired = at < now - 20
                model[one.write_id] = (one.sequence, 1 if expired else count + 1, now)
            changes, kept = ids.freeze(), rng.random() < 0.8
            ids.thaw(kept=kept)
            if kept:
                for key, value in changes.items():
                    if value is None:
                        table.pop(key, None)
                    else:
                        table[key] = value
                assert ids.chunks == len(table)
                if rng.random() < 0.3:
                    ids = WriteIds(keep_s=20, count_max=1000)
                    ids.load(sorted(table.items()))
            ids.apply(pending)
            for write_id, (last, count, at) in model.items():
                found = ids.get(write_id)
                if at < now - 20:
                    assert found is None
                elif found is None or found[0] != Version(1, last):
                    raise AssertionError((write_id, found, last))
                else:
                    assert found[1] >= count


def test_a_cut_takes_back_what_the_tail_added_also_at_rest() -> None:
    """Random records, cuts, checkpoints and restarts: counts are those of the records that are left."""
    rng = random.Random(5)
    for _ in range(60):
        ids, table, log = WriteIds(keep_s=1000, count_max=1000), dict[bytes, bytes](), list[Record]()
        for now in range(30):
            name = rng.randrange(1, 12)
            batch = [record(len(log) + 1 + place, name, now) for place in range(rng.randrange(1, 5))]
            ids.apply(batch)
            log += batch
            if rng.random() < 0.4:
                at = rng.randrange(len(log) + 1)
                ids.cut(log[at:])
                if rng.random() < 0.2:
                    ids.apply(log[at:])  # the cut was refused
                else:
                    del log[at:]
            if rng.random() < 0.5:
                changes = ids.freeze()
                kept = rng.random() < 0.8
                ids.thaw(kept=kept)
                for key, value in changes.items() if kept else ():
                    if value is None:
                        table.pop(key, None)
                    else:
                        table[key] = value
                if kept and rng.random() < 0.5:
                    ids = WriteIds(keep_s=1000, count_max=1000)
                    ids.load(sorted(table.items()))
            for name in range(1, 12):
                write_id = name.to_bytes(16, "big")
                runs = [one.sequence for one in log if one.write_id == write_id]
                found = ids.get(write_id)
                assert (found[1] if found else 0) == len(runs)
        ids.apply([record(len(log) + 1, 99, 5000)])
        assert len(ids) == 1


def test_what_is_left_of_a_run_ends_before_its_cut() -> None:
    ids, name = WriteIds(keep_s=10, count_max=100), (7).to_bytes(16, "big")
    run = [record(sequence, 7, 1) for sequence in range(1, 6)]
    ids.apply(run)
    ids.cut(run[3:])
    assert ids.get(name) == (Version(1, 3), 3)
    ids.apply([one._replace(epoch=2, sequence=9 + place) for place, one in enumerate(run[3:])])
    assert ids.get(name) == (Version(1, 5), 5)  # offered again
    ids.cut(run)
    assert ids.get(name) is None
