"""What replicas compare: digests at a DIGEST mark, entries of a bucket, and a content that is put right."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.batch import Batch
from storage.buckets import MARKS_KEPT, differing
from storage.errors import DamagedError
from storage.records import ID_MAX, Kind, Mark, Operation, Version
from tests.unit.storage.replica_writer import Writer, vector

BOTH = (Kind.ITEM, Kind.USER)


def put(id_: int) -> tuple[Operation, Kind, int, bytes, tuple[int, ...], bytes]:
    return Operation.PUT, Kind.ITEM, id_, vector(id_), (), b"m"


def test_a_digest_mark_means_its_place_whatever_batch_it_came_in(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    writer.put(1, 2, 3)
    wanted = {kind: writer.replica.bucket_digests(kind) for kind in BOTH}
    batch = Batch(1, 3, 1)
    place = batch.add_mark(Mark.DIGEST, b"")
    batch.add([put(4)], bytes(16))
    writer.take(batch)
    assert writer.replica.digested.at(place) == wanted
    assert writer.replica.bucket_digests(Kind.ITEM) != wanted[Kind.ITEM]
    # Replayed, in columns, it is the same.
    assert writer.crash().digested.at(place) == wanted
    writer.replica.abort()


def test_few_marks_are_remembered_and_none_that_was_cut(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    places = [Version(1, writer.mark(Mark.DIGEST).sequence) for _ in range(MARKS_KEPT + 2)]
    known = [place for place in places if writer.replica.digested.at(place) is not None]
    assert known == places[2:]
    writer.replica.cut(places[-2].sequence)
    assert writer.replica.digested.at(places[-1]) is None
    assert writer.replica.digested.at(places[-2]) is not None
    writer.replica.abort()


def test_a_listing_has_the_entries_of_its_buckets_wherever_they_are(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    ids = [1, 2, 257, 513, 769]
    writer.put(*ids)
    writer.replica.checkpoint()
    writer.put(513, 1025)
    writer.write((Kind.ITEM, 257))
    seen, end = writer.replica.listing(Kind.ITEM, {1}, -1, 100)
    assert end == ID_MAX
    assert list(seen) == [1, 257, 513, 769, 1025]
    assert [one.alive for one in seen.values()] == [True, False, True, True, True]
    assert all(one.intact for one in seen.values())
    assert seen[513].version == Version(1, 6)
    paged, after = {}, -1
    while after < ID_MAX:
        page, after = writer.replica.listing(Kind.ITEM, {1}, after, 2)
        paged |= page
    assert paged == seen
    writer.replica.abort()


def test_copies_bring_the_same_entries_and_mend_puts_a_content_right(tmp_path: Path) -> None:
    one, other = Writer(tmp_path / "a"), Writer(tmp_path / "b")
    one.put(1, 2)
    one.write((Kind.ITEM, 2))
    other.put(1, seed=5)
    other.write((Kind.ITEM, 7), (Kind.ITEM, 2))
    records = one.replica.copies(Kind.ITEM, [1, 2, 3])
    assert [(record.id, record.operation) for record in records] == [
        (1, Operation.PUT),
        (2, Operation.DELETE),
    ]
    assert other.replica.mend(records[0])
    assert other.replica.get(Kind.ITEM, 1) == one.replica.get(Kind.ITEM, 1)
    assert not other.replica.mend(records[0]._replace(version=Version(9, 9))), "no entry of that version"
    mine = {kind: one.replica.bucket_digests(kind) for kind in BOTH}
    theirs = {kind: other.replica.bucket_digests(kind) for kind in BOTH}
    assert differing(mine, theirs) == {Kind.ITEM: [7]}
    other.replica.checkpoint()
    assert other.reopen().get(Kind.ITEM, 1) == one.replica.get(Kind.ITEM, 1)
    for writer in (one, other):
        writer.replica.abort()


def test_a_listing_verifies_rows_and_entries(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    writer.put(1, 2)
    space = writer.replica._spaces[Kind.ITEM]
    with space.file.path.open("r+b") as raw:
        raw.seek(space.file.offset(0))
        raw.write(b"\xff")
    seen, _ = writer.replica.listing(Kind.ITEM, {1, 2}, -1, 100)
    assert [one.intact for one in seen.values()] == [False, True]
    assert [record.id for record in writer.replica.copies(Kind.ITEM, [1, 2])] == [2]
    entry = bytearray(space.layers[0][2])
    entry[10] ^= 1
    space.layers[0][2] = bytes(entry)
    with pytest.raises(DamagedError):
        writer.replica.listing(Kind.ITEM, {1, 2}, -1, 100)
    writer.replica.abort()
