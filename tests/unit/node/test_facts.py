"""Facts and the hot vector: what goes in comes out, what does not fit is refused or left out, garbage is told."""

from __future__ import annotations

import itertools

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.facts import (
    HOT_BYTES_MAX,
    LAG_UNIT_MS,
    VALUE_BYTES_MAX,
    FactError,
    Health,
    Held,
    Load,
    NodeFact,
    log_byte,
    log_value,
    pack_hot,
    pack_layout,
    pack_node,
    pack_primaries,
    pack_shards,
    shards_fingerprint,
    unpack_hot,
    unpack_layout,
    unpack_node,
    unpack_primaries,
    unpack_shards,
    view_of,
)
from router.layout import Layout, Member, place

FACT = NodeFact(
    name="n1",
    region="eu",
    zone="a",
    host="h1",
    capacity=2,
    app="ws://10.0.0.1:7400",
    version="1.0",
    shard_count=12,
    replication=3,
    dim=16,
    metric="cosine",
    class_width=256,
    bootstrap=3,
)


def layout(count: int) -> Layout:
    members = tuple(Member(name=f"node-{i:04}", region="eu-west", zone=f"z{i % 3}") for i in range(count))
    targets = tuple(one.voters for one in place(members, 100, 3))
    return Layout(version=1, shard_count=100, replication=3, members=members, targets=targets)


def test_a_nodes_fact_survives_and_a_newer_one_is_read() -> None:
    assert unpack_node(pack_node(FACT)) == FACT
    newer = {**msgpack.unpackb(pack_node(FACT)), "gpus": 4}
    assert unpack_node(msgpack.packb(newer)) == FACT


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x90", msgpack.packb({"name": 3}), b"\x93" * 2_000])
def test_a_fact_that_is_none_is_told(value: bytes) -> None:
    with pytest.raises(FactError):
        unpack_node(value)


@pytest.mark.parametrize("count", [1, 3, 25, 100, 300])
def test_a_layout_travels_in_as_many_pieces_as_it_needs(count: int) -> None:
    facts = pack_layout(layout(count))
    assert all(len(value) <= VALUE_BYTES_MAX for value in facts.values())
    assert (len(facts) == 1) == (count <= 25)
    assert unpack_layout(facts) == layout(count)
    for key in facts:
        assert unpack_layout({k: v for k, v in facts.items() if k != key}) is None


def test_pieces_of_two_layouts_never_make_one() -> None:
    old, new = pack_layout(layout(100)), pack_layout(layout(101))
    assert len(old) == len(new) > 2
    for chosen in itertools.product((old, new), repeat=len(old)):
        mixed = {key: source[key] for key, source in zip(old, chosen, strict=True)}
        found = unpack_layout(mixed)
        assert found == (layout(100) if mixed == old else layout(101) if mixed == new else None)


def test_a_forged_or_too_large_layout_is_told() -> None:
    facts = dict(pack_layout(layout(3)))
    good = facts[b"layout"]
    for bad in (good[:-1], good[:5], b"x" * 8 + good[8:], good.replace(b"node-0001", b"node-0002")):
        with pytest.raises(FactError):
            unpack_layout({b"layout": bad})
    with pytest.raises(FactError, match="2000 members"):
        pack_layout(layout(2_000))


@given(st.lists(st.tuples(st.integers(0, 65_535), st.booleans()), max_size=400))
def test_shards_and_lags_fit_their_bytes_and_go_together(pairs: list[tuple[int, bool]]) -> None:
    held = [Held(*pair) for pair in pairs]
    packed = pack_shards(held)
    assert len(packed) <= VALUE_BYTES_MAX
    assert unpack_shards(packed) == held[:248]
    value = pack_hot(packed, Load(3, 12.5, 0), Health.DISK, [50.0 * shard for shard, _ in held])
    assert len(value) <= HOT_BYTES_MAX
    hot = unpack_hot(value)
    assert hot is not None
    assert (hot.fingerprint, hot.health) == (shards_fingerprint(packed), Health.DISK)
    assert len(hot.lags) == len(held[:248])
    assert hot.load.batch_ms == pytest.approx(12.5, rel=0.05)


@given(st.dictionaries(st.integers(0, 65_535), st.integers(1, 1 << 40), max_size=300))
def test_primaries_fit_their_bytes_and_come_back(led: dict[int, int]) -> None:
    packed = pack_primaries(led)
    assert len(packed) <= VALUE_BYTES_MAX
    kept = {shard: min(epoch, 0xFFFFFFFF) for shard, epoch in sorted(led.items())[:166]}
    assert unpack_primaries(packed) == kept


@given(st.binary(max_size=40))
def test_of_primaries_garbage_is_told(value: bytes) -> None:
    try:
        assert all(type(part) is int for pair in unpack_primaries(value).items() for part in pair)
    except FactError:
        assert (len(value) - 1) % 6


def test_sixty_four_shards_fit() -> None:
    held = [Held(i, i % 3 == 0) for i in range(64)]
    assert len(pack_hot(pack_shards(held), Load(), Health(0), [0.0] * 64)) == 71


@given(st.floats(0, 3.6e7))
def test_the_log_scale_is_within_five_percent(lag_ms: float) -> None:
    shown = log_value(log_byte(lag_ms, LAG_UNIT_MS), LAG_UNIT_MS)
    assert abs(shown - lag_ms) <= 0.05 * lag_ms + LAG_UNIT_MS / 20


def test_the_scale_has_its_ends() -> None:
    assert log_byte(0, LAG_UNIT_MS) == log_byte(-5, LAG_UNIT_MS) == 0
    assert log_byte(2_000, LAG_UNIT_MS) == 61
    assert log_byte(1e30, LAG_UNIT_MS) == 255
    assert log_value(254, LAG_UNIT_MS) > 365 * 86_400_000


def test_other_schemas_are_skipped_and_views_are_sets() -> None:
    assert unpack_hot(b"\x02" + bytes(20)) is None
    assert unpack_hot(b"") is None
    assert unpack_shards(b"\x02abc") == []
    assert unpack_primaries(b"\x02abc") == unpack_primaries(b"") == {}
    assert view_of(["b", "a"]) == view_of(["a", "b"]) != view_of(["a"])
    assert len(view_of(["a"])) == 8
