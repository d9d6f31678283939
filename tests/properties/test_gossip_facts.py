"""Merging facts is a join: commutative, associative, idempotent; and hashes of buckets follow the content alone."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gossip.buckets import COUNT, HOT_FROM, ItemTable
from gossip.facts import Facts
from gossip.messages import Fact, Hot

ME = 99
ORIGINS = st.integers(1, 3)
BOOTS = st.integers(1, 3)
COUNTERS = st.integers(1, 4)
KEYS = st.sampled_from([b"a", b"b", b"c"])
VALUES = st.sampled_from([b"", b"x", b"yy"])
FACTS = st.builds(Fact, ORIGINS, BOOTS, COUNTERS, KEYS, VALUES)
HOTS = st.builds(Hot, ORIGINS, BOOTS, COUNTERS, VALUES)
NEWS = st.lists(st.one_of(FACTS, HOTS), max_size=12)


def known(news: Sequence[Fact | Hot]) -> tuple[Facts, ItemTable]:
    items = ItemTable()
    facts = Facts(ME, 1, items, origins_max=10)
    for one in news:
        if isinstance(one, Fact):
            facts.merge(one)
        else:
            facts.merge_hot(one)
    return facts, items


def state(news: Sequence[Fact | Hot]) -> list[object]:
    facts, items = known(news)
    # Equal counters with other values are a broken writer: values converge, and the hash knows only the counter.
    return [(id, dict(facts.view(id)), facts.hot(id)) for id in (1, 2, 3)] + [items.hashes()]


@given(NEWS, st.randoms(use_true_random=False))
def test_the_order_of_news_does_not_matter(news: list[Fact | Hot], random: object) -> None:
    shuffled = list(news)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert state(news) == state(shuffled)


@given(NEWS, NEWS)
def test_merging_what_is_known_changes_nothing(news: list[Fact | Hot], more: list[Fact | Hot]) -> None:
    assert state(news + more) == state(news + more + news + more)
    assert state(news + more) == state(more + news)


@given(NEWS, NEWS)
def test_buckets_find_exactly_what_differs(ours: list[Fact | Hot], theirs: list[Fact | Hot]) -> None:
    (our_facts, our_items), (their_facts, their_items) = known(ours), known(theirs)
    mask = our_items.differing(their_items.hashes())
    newer, wanted = our_items.compare(mask, their_items.digest(mask))
    for part in (our_facts.part(ref) for ref in newer):
        assert part is not None
        their_facts.merge(part) if isinstance(part, Fact) else their_facts.merge_hot(part)
    for part in (their_facts.part(ref) for ref in their_items.refs(wanted)):
        assert part is not None
        our_facts.merge(part) if isinstance(part, Fact) else our_facts.merge_hot(part)
    # One exchange levels both, but for boots that only one of them has seen: the next exchange does those.
    mask = our_items.differing(their_items.hashes())
    newer, wanted = our_items.compare(mask, their_items.digest(mask))
    for part in (our_facts.part(ref) for ref in newer):
        assert part is not None
        assert (
            not (their_facts.merge(part) if isinstance(part, Fact) else their_facts.merge_hot(part)) or newer
        )


@given(st.lists(HOTS, min_size=1, max_size=8))
def test_hot_vectors_stay_out_of_the_cold_buckets(hots: list[Hot]) -> None:
    """`hot-apart`."""
    _, items = known(hots)
    assert items.hashes()[:HOT_FROM] == (0,) * HOT_FROM
    assert len(items.hashes()) == COUNT


@given(NEWS)
def test_nothing_merged_changes_our_own(news: list[Fact | Hot]) -> None:
    """`own-word`."""
    facts = Facts(1, 2, ItemTable(), origins_max=10)
    facts.set(b"a", b"mine")
    facts.set_hot(b"hot")
    for one in news:
        facts.merge(one) if isinstance(one, Fact) else facts.merge_hot(one)
    assert facts.view(1) == {b"a": b"mine"}
    assert facts.hot(1) == b"hot"
