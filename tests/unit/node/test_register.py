"""One acceptor, one proposer, step by step."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from node.register import (
    NEVER,
    Accept,
    Accepted,
    Ballot,
    Done,
    Learn,
    Learned,
    Prepare,
    Promise,
    Proposer,
    Refuse,
    Reply,
    Reserve,
    Slot,
    Stale,
    Tell,
    answer,
)
from router.layout import Layout, Member


def layout(version: int, names: str, base: str = "", capacity: int = 1) -> Layout:
    members = tuple(Member(name=name, id=f"{name}1", capacity=capacity) for name in names)
    return Layout(
        version=version, shard_count=1, replication=1, members=members, targets=((names[0],),), base=base
    )


ONE = layout(1, "abc")
TWO = layout(2, "abcd", ONE.hash)
OTHER = layout(2, "ab", ONE.hash)


def test_an_acceptor_promises_and_accepts_nothing_below() -> None:
    """`promise-binds`."""
    slot, reply = answer(Slot(ONE), "a", "a1", Prepare(ONE, Ballot(2, "x")))
    assert reply == Promise(Ballot(2, "x"), None)
    for ask in (Prepare(ONE, Ballot(1, "z")), Accept(ONE, Ballot(1, "z"), TWO)):
        same, reply = answer(slot, "a", "a1", ask)
        assert (same, reply) == (slot, Refuse(Ballot(1, "z"), Ballot(2, "x"), "promised"))
    slot, reply = answer(slot, "a", "a1", Accept(ONE, Ballot(2, "x"), TWO))
    assert reply == Accepted(Ballot(2, "x"))
    slot, reply = answer(slot, "a", "a1", Prepare(ONE, Ballot(3, "b")))
    assert reply == Promise(Ballot(3, "b"), (Ballot(2, "x"), TWO))


def test_a_later_base_is_gone_by_and_an_earlier_one_is_told_so() -> None:
    """`forward-only`."""
    slot = Slot(ONE, Ballot(9, "x"), (Ballot(9, "x"), TWO))
    after, reply = answer(slot, "a", "a1", Prepare(TWO, Ballot(1, "b")))
    assert after == Slot(TWO, Ballot(1, "b"))
    assert reply == Promise(Ballot(1, "b"), None)
    same, reply = answer(after, "a", "a1", Accept(ONE, Ballot(99, "b"), OTHER))
    assert (same, reply) == (after, Stale(TWO))
    same, reply = answer(after, "a", "a1", Learn(ONE))
    assert (same, reply) == (after, Learned(ONE.hash))


def test_strangers_new_disks_and_other_layouts_are_refused() -> None:
    """`same-disk`."""

    def reason(name: str, id_: str, base: Layout) -> str:
        slot, reply = answer(Slot(ONE), name, id_, Prepare(base, Ballot(1, "x")))
        assert slot == Slot(ONE)
        assert isinstance(reply, Refuse)
        return reply.reason

    assert reason("d", "d1", ONE) == "not_a_member"
    assert reason("a", "a2", ONE) == "new_disk"
    assert reason("a", "a1", replace(ONE, replication=2, targets=(("a", "b"),))) == "other_layout"
    # A new disk learns, and does not count.
    slot, reply = answer(Slot(), "a", "a2", Learn(TWO))
    assert (slot, reply) == (Slot(TWO), Refuse(NEVER, NEVER, "new_disk"))


def proposer(deadline: float = 10.0) -> Proposer:
    made = Proposer("a", ONE, TWO, counter=4, random=Random(1), deadline=deadline)
    assert made.start(0.0) == [Reserve(5)]
    told = made.on_reserved(0.0)
    assert told == [Tell(name, Prepare(ONE, Ballot(5, "a"))) for name in "abc"]
    return made


def replies(made: Proposer, names: str, reply: Reply, now: float = 0.0) -> list[object]:
    return [effect for name in names for effect in made.on_reply(name, reply, now)]


MINE = Ballot(5, "a")


def test_committed_takes_both_majorities() -> None:
    """`both-majorities`."""
    made = proposer()
    assert not replies(made, "aa", Promise(MINE, None)), "one voter twice is one voter"
    assert replies(made, "b", Promise(MINE, None)) == [Tell(name, Accept(ONE, MINE, TWO)) for name in "abc"]
    assert replies(made, "bc", Accepted(MINE)) == [Tell(name, Learn(TWO)) for name in "abcd"]
    assert not replies(made, "ab", Learned(TWO.hash)), "two of four are no majority"
    assert replies(made, "d", Learned(TWO.hash)) == [Done("committed", TWO)]


def test_what_is_found_is_completed_and_then_it_is_a_conflict() -> None:
    """`read-first`."""
    made = proposer()
    replies(made, "a", Promise(MINE, (Ballot(1, "z"), TWO)))
    told = replies(made, "b", Promise(MINE, (Ballot(2, "c"), OTHER)))
    assert told == [Tell(name, Accept(ONE, MINE, OTHER)) for name in "abc"]
    assert replies(made, "ab", Accepted(MINE))[-1] == Done("conflict", OTHER)


def test_stale_tells_what_has_become_of_it() -> None:
    assert replies(proposer(), "a", Stale(OTHER)) == [Done("conflict", OTHER)]
    # Somebody has completed ours: a majority of its members must go by it before it is said.
    assert replies(proposer(), "a", Stale(TWO)) == [Tell(name, Learn(TWO)) for name in "abcd"]
    assert replies(proposer(), "a", Stale(layout(3, "abcd", TWO.hash))) == [Done("committed", TWO)]
    assert replies(proposer(), "a", Stale(layout(3, "ab", OTHER.hash))) == [Done("conflict")]
    made = proposer()
    replies(made, "ab", Promise(MINE, None))
    assert replies(made, "a", Stale(layout(9, "ab", "0" * 16))) == [Done("unknown")]


def test_it_never_guesses() -> None:
    """`never-guess`."""
    made = proposer(deadline=2.0)
    assert made.on_timer(2.0) == [Done("unavailable")]
    made = proposer(deadline=2.0)
    replies(made, "ab", Promise(MINE, None))
    replies(made, "a", Accepted(MINE))
    assert made.on_timer(2.0) == [Done("unknown")]


def test_a_greater_ballot_makes_it_wait_and_go_above() -> None:
    made = proposer()
    assert not replies(made, "b", Refuse(MINE, Ballot(41, "z"), "promised"), now=0.5)
    assert 0.55 <= made.next_deadline <= 0.8
    assert made.on_timer(1.5) == [Reserve(42)]
    # Answers to the earlier ballot count no more.
    made.on_reserved(1.5)
    assert not replies(made, "abc", Promise(MINE, None), now=1.6)
