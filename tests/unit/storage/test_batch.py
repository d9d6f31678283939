"""What a batch hands to `apply` is what the log's bytes say, to the bit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.batch import Batch, Wanted
from storage.records import CLASSES_MAX, ID_MAX, Kind, Operation, Version, decode

WANTED: st.SearchStrategy[Wanted] = st.tuples(
    st.sampled_from(Operation),
    st.sampled_from(Kind),
    st.integers(0, ID_MAX),
    st.binary(max_size=64),
    st.lists(st.integers(0, CLASSES_MAX - 1), max_size=8, unique=True).map(tuple),
    st.binary(max_size=32),
)


@given(st.lists(st.tuples(st.lists(WANTED, min_size=1, max_size=3), st.binary(min_size=16, max_size=16))))
def test_blobs_decode_to_the_records(writes: list[tuple[list[Wanted], bytes]]) -> None:
    batch = Batch(7, 41, 10**18)
    sequence = 41
    for changes, write_id in writes:
        sequence += len(changes)
        assert batch.add(changes, write_id) == Version(7, sequence)
    decoded = [decode(blob) for blob in batch.blobs]
    assert decoded == batch.records
    assert [one.sequence for one in decoded] == list(range(42, sequence + 1))
    wanted = [(change, write_id) for changes, write_id in writes for change in changes]
    for one, (change, write_id) in zip(decoded, wanted, strict=True):
        operation, kind, id_, vector, classes, metadata = change
        assert one[5:8] == (operation, kind, id_)
        assert (one.vector, one.classes, one.metadata) == (vector, tuple(sorted(classes)), metadata)
        assert (one.epoch, one.version, one.write_id, one.timestamp_ns) == (
            7, Version(7, one.sequence), write_id, 10**18,
        )  # fmt: skip
        assert isinstance(one.operation, Operation)
        assert isinstance(one.kind, Kind)
