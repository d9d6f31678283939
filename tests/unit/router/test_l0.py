"""L0's bounds, and its replies' packed forms."""

from __future__ import annotations

import json
import random

import msgpack
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.l0 import L0, Entry
from router.wire import Columns, Kept, encode_reply


def _reply(k: int = 2, metadata: bytes = b"\x80") -> Kept:
    columns = Columns(np.arange(k, dtype=np.uint64), np.ones(k, np.float32), [metadata] * k)
    return Kept({"hits": columns, "coverage": {"answered": 4, "total": 4, "missing": []}})


def _entry(user: int, context: str = "a", version: tuple[int, int] = (1, 1), k: int = 2) -> Entry:
    return Entry((user, context), _reply(k), version=version, ids=list(range(k)), count=0, session=())


def test_a_kept_reply_goes_out_as_any_other() -> None:
    kept = _reply()
    for id_ in (1, -5, 2**64 - 1, "x", "ö" * 40):
        whole = {"id": id_, **kept}
        assert msgpack.unpackb(kept.part(id_, False)) == msgpack.unpackb(encode_reply(whole, False))
        assert json.loads(kept.part(id_, True)) == json.loads(encode_reply(whole, True))


def test_entries_expire_within_the_jitter_and_not_all_at_once() -> None:
    l0 = L0(1 << 20, 300.0, random.Random(1).random)
    for user in range(200):
        l0.put(_entry(user), 0.0)
    assert all(l0.get((user, "a"), 269.9) for user in range(200))
    left = [sum(l0.get((user, "a"), at) is not None for user in range(200)) for at in (285.0, 300.0, 315.0)]
    assert 180 > left[0] > left[1] > left[2] > 10
    assert not any(l0.get((user, "a"), 330.0) for user in range(200))
    assert (len(l0), l0.bytes) == (0, 0)


def test_packed_forms_count_when_they_are_made() -> None:
    l0 = L0(1 << 20, 300.0, random.random)
    entry = _entry(1)
    l0.put(entry, 0.0)
    before = l0.bytes
    made = entry.reply.part(1, False)
    assert before < l0.bytes <= before + len(made)
    l0.put(_entry(1), 0.0)
    entry.reply.part(1, True)  # of one that has been replaced: nobody's bytes
    assert l0.bytes == before


def test_a_user_is_dropped_below_a_version_only() -> None:
    l0 = L0(1 << 20, 300.0, random.random)
    l0.put(_entry(1, "a", (1, 5)), 0.0)
    l0.put(_entry(1, "b", (2, 1)), 0.0)
    l0.put(_entry(2, "a", (1, 1)), 0.0)
    l0.drop_user(1, below=(2, 1))
    assert l0.get((1, "a"), 1.0) is None
    assert l0.get((1, "b"), 1.0) is not None
    l0.drop_user(1)
    assert len(l0) == 1


def test_one_that_is_too_large_is_not_kept() -> None:
    l0 = L0(10_000, 300.0, random.random)
    l0.put(_entry(1, k=200), 0.0)
    assert len(l0) == 0
    assert l0.statistics()["too_large"] == 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from("ab"), st.integers(0, 4)), max_size=60))
def test_bytes_are_those_of_the_entries_and_the_least_used_go(steps: list[tuple[int, str, int]]) -> None:
    l0 = L0(16_000, 300.0, random.Random(3).random)
    used: list[tuple[int, str]] = []
    for now, (user, context, what) in enumerate(steps):
        key = (user, context)
        if what == 0:
            l0.drop_user(user)
        elif what == 1:
            entry = l0.get(key, float(now))
            if entry is not None:
                entry.reply.part(1, json=bool(now % 2))
                used = [one for one in used if one != key] + [key]
        else:
            l0.put(_entry(user, context, k=what), float(now))
            used = [one for one in used if one != key] + [key]
        assert l0.bytes == sum(entry.size for entry in l0._entries.values()) <= 16_000
        there = list(l0._entries)
        assert there == [one for one in used if one in there]
        assert set(l0._of_user) == {user for user, _ in there}
