"""Shards of ids, and the ring."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh64

from router.ring import Ring, shard_of, shards_of


@given(st.integers(0, 2**64 - 1), st.integers(1, 1_000))
def test_shard_is_the_documented_hash(id_: int, shard_count: int) -> None:
    assert shard_of(id_, shard_count) == xxh64(str(id_).encode()).intdigest() % shard_count


def test_known_values() -> None:
    # Frozen: another answer would send every stored record to a wrong shard.
    assert [shard_of(id_, 12) for id_ in (0, 1, 42, 2**64 - 1)] == [8, 0, 5, 11]
    assert xxh64(b"0").intdigest() % 100 == shard_of(0, 100)


@given(st.lists(st.integers(0, 2**64 - 1)), st.integers(1, 100))
def test_many_are_as_one(ids: list[int], shard_count: int) -> None:
    assert shards_of(ids, shard_count) == [shard_of(id_, shard_count) for id_ in ids]


def test_shards_are_even() -> None:
    counts = [0] * 12
    for shard in shards_of(range(120_000), 12):
        counts[shard] += 1
    # 10,000 expected, standard deviation 96: five of them.
    assert all(abs(count - 10_000) < 480 for count in counts)


def test_walk_meets_every_name_once_whatever_the_order() -> None:
    weights = {f"n{i}": 1 + i % 3 for i in range(10)}
    walk = Ring(weights).walk("key")
    assert sorted(walk) == sorted(weights)
    assert Ring(dict(reversed(weights.items()))).walk("key") == walk


def test_a_new_name_takes_keys_only_for_itself() -> None:
    before = Ring({f"n{i}": 1 for i in range(9)})
    after = Ring({f"n{i}": 1 for i in range(10)})
    for key in range(500):
        old, new = before.walk(str(key)), after.walk(str(key))
        assert [name for name in new if name != "n9"] == old


def test_weight_is_in_proportion() -> None:
    ring = Ring({"small": 1, "big": 3})
    first = [ring.walk(str(key))[0] for key in range(4_000)]
    assert first.count("big") / len(first) == pytest.approx(0.75, abs=0.08)
