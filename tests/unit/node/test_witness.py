"""A vote without data: what it promises, what binds it, what it remembers, and what is on its disk before."""

from __future__ import annotations

from random import Random

from node.election import Ask, Effect, ElectionConfig, Persist, Promise, Refuse, Stand, Succeed, Tell, Would
from node.pulls import Beat, Beaten, NotPrimary, read_beat, read_beaten
from node.witness import BEATS, IDLE_S, Kept, Remember, Vote
from storage.records import Version

L = ElectionConfig().lease_s
ID = 77


def vote(kept: Kept | None = None, *, now: float = 0.0, owes: bool = False) -> Vote:
    return Vote(ElectionConfig(), "w", kept or Kept(ID), random=Random(1), now=now, owes=owes)


def stand(epoch: int, last: int = 1, released: int = 0) -> Stand:
    return Stand(epoch, Version(last, 5), released, ID)


def answers(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Tell)]


def test_it_promises_whoever_names_it_once_that_is_on_the_disk() -> None:
    one = vote()
    assert answers(one.on_message("a", Ask(2, Version(1, 0), 0, ID), 1.0)) == [Would(2)]
    assert one.on_message("a", stand(2), 1.0) == [Persist(2)]
    assert one.election.on_persisted(2, 1.1) == [Tell("a", Promise(2))]
    (refused,) = answers(one.on_message("b", stand(2), 1.2))
    assert isinstance(refused, Refuse)
    assert refused.reason == "promised"
    # Another vote's, another kind's, and a hand-over are not for it; and it never stands.
    assert one.on_message("b", stand(3)._replace(to=ID + 1), 1.2) == []
    assert one.on_message("b", Promise(3), 1.2) == []
    assert one.on_message("b", Succeed(2), 1.2) == []
    assert one.election.on_timer(1e9) == []


def test_a_primarys_stamp_binds_it_as_any_voter_and_a_lease_given_up_does_not() -> None:
    one = vote()
    one.on_beaten("a", Beaten(1, 500.0, False, True), 10.0)
    (refused,) = answers(one.on_message("b", stand(2), 10.0 + L - 0.01))
    assert isinstance(refused, Refuse)
    assert refused.reason == "lease"
    assert one.on_message("b", stand(2, released=1), 10.0 + L - 0.01) == [Persist(2)]
    assert vote(now=10.0, owes=True).on_message("b", stand(2), 10.0 + L - 0.01) != [Persist(2)], "start-wait"
    assert vote(now=10.0, owes=True).on_message("b", stand(2), 10.0 + L) == [Persist(2)]


def test_what_it_remembers_refuses_those_who_lack_it_and_is_told_once_on_the_disk() -> None:
    """`witness-memory`."""
    one = vote()
    assert one.on_message("b", stand(4, last=2), 1.0) == [Persist(4)], "it holds no log to compare"
    one = vote()
    assert one.on_beaten("a", Beaten(3, 500.0, True, True), 1.0) == [Remember(3)]
    assert one.beat(1.0).remembered == 0
    later = 2.0 + L
    for while_written in (True, False):
        (refused,) = answers(one.on_message("b", stand(4, last=2), later))
        assert isinstance(refused, Refuse)
        assert refused.reason == "log"
        if while_written:
            one.on_remembered(3, later)
    assert one.beat(later).remembered == 3
    assert one.on_message("b", stand(4, last=3), later) == [Persist(4)]
    again = vote(Kept(ID, promised=4, remembered=3), owes=True)
    assert answers(again.on_message("b", stand(5, last=2), later))[0].reason == "log"  # type: ignore[attr-defined]
    one.on_beaten("a", Beaten(4, 500.0, True, True), later)
    one.on_remember_failed()
    assert one.on_beaten("a", Beaten(4, 500.1, True, True), later) == [Remember(4)], "it is told again"


def test_it_takes_no_stamp_below_its_promise_and_tells_of_the_promise() -> None:
    one = vote(Kept(ID, promised=5))
    assert one.on_beaten("a", Beaten(4, 1.0, True, True), 1.0) == []
    assert one.on_message("b", stand(6), 1.0) == [Persist(6)], "nothing has bound it"
    assert vote(Kept(ID, promised=5)).beat(1.0) == Beat(ID, 0, 5, 0, None)


def test_it_echoes_stamps_of_the_epoch_that_it_follows_as_often_as_a_lease_needs() -> None:
    one = vote()
    one.hear(1, "a", 1.0)
    assert one.beat_at == 1.0
    assert one.beat(1.0).echo is None
    one.on_beaten("a", Beaten(1, 500.0, False, True), 1.0)
    assert one.beat_at == 1.0, "the lease begins with the first echo"
    assert one.beat(1.0).echo == 500.0
    one.on_beaten("a", Beaten(1, 500.1, False, True), 1.1)
    assert one.beat_at == 1.1 + L / BEATS
    one.on_beaten("b", Beaten(2, 9.0, False, False), 2.0)
    assert one.beat(2.0) == Beat(ID, 2, 0, 0, 9.0)
    one.on_beaten("b", Beaten(2, 9.1, False, False), 2.0)
    assert one.beat_at == 2.0 + IDLE_S, "no placement names it"
    one.hear(1, "z", 3.0)
    assert one.hint == (2, "b")
    assert one.on_beaten("a", Beaten(1, 600.0, True, True), 3.0) == [], "nothing below what it follows"
    assert one.beat(3.0).epoch == 2


def test_beats_travel() -> None:
    for beat in (Beat(ID, 3, 4, 2, None), Beat(ID, 3, 4, 2, 1.5)):
        assert read_beat([*beat.body(), "a newer build says more"]) == beat
    for answer in (Beaten(3, 1.5, False, False), Beaten(3, 1.5, True, True), NotPrimary(3, "b")):
        assert read_beaten(answer.body()) == answer
    for rubbish in ([], [3], [3, 1, "x", False, True], [0, 1, 1.0, 5, 0, b""], [3, 1, 1.0, 0, True]):
        try:
            read_beaten(rubbish)
        except (TypeError, ValueError):
            continue
        raise AssertionError(rubbish)


def test_of_one_epoch_a_name_is_taken_after_none_and_no_other_after_that() -> None:
    one = vote()
    one.hear(7, "", 1.0)
    one.hear(7, "b", 2.0)
    assert (one.hint, one.beat_at) == ((7, "b"), 2.0)
    one.hear(7, "c", 3.0)
    one.hear(7, "", 3.0)
    assert (one.hint, one.beat_at) == ((7, "b"), 2.0)
