"""The log's newest records in memory against a list: whatever was appended and cut, what it gives is what was written."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from storage.tail import Tail

APPEND = st.lists(st.integers(1, 40), min_size=1, max_size=6)
STEP = APPEND | st.floats(0, 1)


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(STEP, max_size=12), bytes_max=st.integers(1, 120), most=st.integers(0, 150))
def test_it_gives_what_was_written(steps: list[list[int] | float], bytes_max: int, most: int) -> None:
    tail, log = Tail(5, bytes_max), list[bytes]()
    for step in steps:
        if isinstance(step, float):
            del log[round(step * len(log)) :]
            tail.cut(5 + len(log))
            continue
        blobs = [bytes([len(log) + n]) * size for n, size in enumerate(step)]
        tail.extend(b"".join(blobs), list(accumulate(map(len, blobs[:-1]), initial=0)))
        log += blobs
        if len(blobs[-1]) <= bytes_max:
            assert tail.first <= 5 + len(log), "the last one fits"
    kept = 5 + len(log) - tail.first + 1
    assert tail.bytes == sum(map(len, log[len(log) - kept :])) <= bytes_max
    for after in range(5 + len(log) + 1):
        found = tail.after(after, most)
        if after + 1 < tail.first:
            assert found is None
            continue
        wanted, size = [], 0
        for blob in log[after - 5 :]:
            size += len(blob)
            if wanted and size > most:
                break
            wanted.append(blob)
        assert found == b"".join(wanted)
