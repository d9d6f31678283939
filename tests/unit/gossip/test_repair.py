"""Two machines that know different things, mended packet by packet."""

from __future__ import annotations

import pytest

from gossip.codec import PARTS_BYTES_MAX, size_of
from gossip.effects import Effect, Send
from gossip.errors import FactError, GossipError
from gossip.messages import Buckets, Claim, Digest, Fact, Hot, Join, Root, State, Want
from tests.unit.gossip.machines import ME, One, alive, home, said, sent

X, A = 30, 40


def with_facts(*origins: int, keys: int = 3, size: int = 40) -> One:
    one = One(20, *origins)
    for id in origins:
        one.tell(*[Fact(id, 1, key + 1, b"key-%d" % key, bytes(size)) for key in range(keys)])
        one.tell(Hot(id, 1, 1, bytes(20)))
    return one


def root(one: One) -> int:
    return one.machine._items.root()


def cold(one: One) -> tuple[int, ...]:
    """Hashes of all that both can come to agree on: each has its own claim for itself, under one id in this test."""
    return one.machine._items.hashes()


def exchange(left: One, right: One) -> list[Effect]:
    """`left` asks with its root; all that goes between them until nobody answers."""
    log: list[Effect] = []
    todo = [(right, [left.machine._repair.root()])]
    while todo:
        to, parts = todo.pop(0)
        back = left if to is right else right
        answers = [
            one for one in to.tell(*parts, sender=20) if isinstance(one, Send) and one.address == home(20)
        ]
        log += answers
        todo += [(back, list(one.parts)) for one in answers if any(type(p) in STEPS for p in one.parts)]
    return log


STEPS = (Root, Buckets, Digest, Want, Claim, Fact, Hot)


def test_equal_roots_are_the_end_of_it() -> None:
    left, right = with_facts(X), with_facts(X)
    assert sent(exchange(left, right), Buckets) == []


def test_both_sides_end_with_what_either_knew() -> None:
    left, right = with_facts(X), with_facts(A)
    log = exchange(left, right)
    assert cold(left) == cold(right)
    assert right.machine.facts(X) == left.machine.facts(X) != {}
    assert right.machine.hot(X) == bytes(20)
    assert all(
        sum(map(size_of, one.parts)) <= PARTS_BYTES_MAX
        for one in log
        if isinstance(one, Send) and not one.stream
    )


def test_only_what_differs_is_sent() -> None:
    left, right = with_facts(X, A), with_facts(X, A)
    left.tell(Fact(X, 1, 9, b"key-1", b"new"))
    log = exchange(left, right)
    assert sent(log, Fact) == [Fact(X, 1, 9, b"key-1", b"new")]
    assert root(left) == root(right)


def test_claims_go_before_the_facts_of_their_origins() -> None:
    one = with_facts(X, A)
    parts = [part for effect in one.tell(Join()) if isinstance(effect, Send) for part in effect.parts]
    kinds = [type(part) for part in parts if isinstance(part, (Claim, Fact, Hot))]
    assert kinds == sorted(kinds, key=lambda kind: kind is not Claim)


def test_suspicion_is_not_spread_by_repair() -> None:
    one = with_facts(X)
    one.tell(said(State.SUSPECT, X, A))
    claims = [
        part
        for part in one.machine._repair._parts(one.machine._items.everything())
        if isinstance(part, Claim)
    ]
    assert {part.state for part in claims} == {State.ALIVE}


def test_much_goes_over_a_stream_and_little_in_packets() -> None:
    little, much = with_facts(X), with_facts(*range(100, 140))
    assert not any(one.stream for one in little.tell(Join()) if isinstance(one, Send))
    assert any(one.stream for one in much.tell(Join()) if isinstance(one, Send))


def test_an_item_that_is_wanted_many_times_is_sent_once() -> None:
    one = with_facts(X, keys=1, size=1_000)
    item = next(item for item, _ in one.machine._items.digest((1 << 64) - 1))
    parts = [p for e in one.tell(Want((item,) * 140)) if isinstance(e, Send) for p in e.parts]
    assert len([p for p in parts if isinstance(p, (Claim, Fact, Hot))]) == 1


def test_unknown_items_and_empty_digests_are_answered_with_little() -> None:
    one = with_facts(X)
    assert sent(one.tell(Want((1, 2, 3))), Fact) == []
    wanted = sent(one.tell(Digest(1, ((48 * 5, 7), (48 * 6, 7)))), Want)
    assert [set(part.items) for part in wanted] == [{48 * 5, 48 * 6}]


def test_facts_that_come_before_their_claim_are_asked_for_with_it() -> None:
    one, teller = One(20), with_facts(X)
    for number in range(300):
        one.tell(Fact(X, 1, 1, b"key-%d" % (number % 3), bytes(40)), Fact(A, 1, 1, b"%d" % number, b""))
    wants = sent(one.run(0.06), Want, home(20))
    assert len(wants) == 1
    assert len(wants[0].items) <= 101
    one.tell(*[part for e in teller.tell(wants[0]) if isinstance(e, Send) for part in e.parts])
    assert one.machine.facts(X) == teller.machine.facts(X) != {}
    # Those of a former boot are not asked for, nor those of who has left.
    one.tell(alive(X, boot=2))
    one.tell(Fact(X, 1, 1, b"key", b""), said(State.LEFT, X, X, boot=2), Fact(X, 2, 1, b"key", b""))
    assert sent(one.run(0.1), Want) == []


def test_ghosts_do_not_go_from_node_to_node() -> None:
    """One has forgotten who left, the other not yet: the facts must not come back and stay."""
    left, right = with_facts(X), with_facts(X)
    for one in (left, right):
        one.tell(said(State.LEFT, X, X))
        assert one.machine.facts(X) == {}
    right.tell(Fact(X, 1, 1, b"key-0", b"late"))
    left.machine._table._forget(left.machine._table.members[X])
    exchange(left, right)
    assert left.machine.facts(X) == {}
    right.machine._table._forget(right.machine._table.members[X])
    exchange(left, right)
    exchange(right, left)
    assert root(left) == root(right)
    assert left.machine.facts(X) == right.machine.facts(X) == {}


def test_a_fact_over_a_bound_is_one_of_gossips_errors() -> None:
    one = One()
    assert issubclass(FactError, GossipError)
    for key, value in ((b"", b"x"), (b"k" * 65, b"x"), (b"k", bytes(1_001))):
        with pytest.raises(FactError):
            one.machine.set_fact(key, value, one.now)
    with pytest.raises(FactError):
        one.machine.set_hot(bytes(256), one.now)
    for number in range(64):
        one.machine.set_fact(b"%d" % number, b"x", one.now)
    with pytest.raises(FactError):
        one.machine.set_fact(b"one more", b"x", one.now)
    assert len(one.machine.facts(ME)) == 64
