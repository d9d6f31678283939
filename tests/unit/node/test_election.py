"""The table of docs/ownership.md, cell by cell."""

from __future__ import annotations

from random import Random

from node.election import (
    FORCED_EVERY,
    FOUNDING_S,
    Ask,
    Effect,
    Election,
    ElectionConfig,
    Lead,
    Persist,
    Promise,
    Refuse,
    Role,
    Stand,
    StepDown,
    Succeed,
    Tell,
    Would,
    forced_above,
)
from storage.records import Version

L = ElectionConfig().lease_s
END = Version(1, 5)
VOTERS = ("a", "b", "c")


def replica(name: str = "b", *, promised: int = 0, last: Version = END, now: float = 0.0) -> Election:
    return Election(
        ElectionConfig(), name, voters=VOTERS, promised=promised, last=lambda: last, random=Random(1), now=now
    )


def told(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Tell)]


def elected(now: float = 10.0) -> Election:
    """`a`, primary of its epoch, with a lease that `b` has echoed."""
    one = replica("a")
    one.on_timer(now)
    one.on_message("b", Would(2), now)
    one.on_persisted(2, now)
    assert one.on_message("b", Promise(2), now) == [Lead(2)]
    one.on_echo("b", now)
    return one


def test_a_promise_is_on_disk_before_it_is_told() -> None:
    """`promise-on-disk`."""
    one = replica()
    effects = one.on_message("a", Stand(2, Version(1, 5)), 10.0)
    assert effects == [Persist(2)]
    assert one.on_persisted(2, 10.1) == [Tell("a", Promise(2))]
    assert one.promised == 2


def test_a_candidate_promises_itself_before_it_stands() -> None:
    one = replica("a")
    assert told(one.on_timer(10.0)) == [Ask(2, Version(1, 5))] * 2
    assert one.on_message("b", Would(2), 10.0) == [Persist(2)]
    assert told(one.on_persisted(2, 10.0)) == [Stand(2, Version(1, 5))] * 2
    assert one.on_message("b", Promise(2), 10.0) == [Lead(2)]
    assert one.role is Role.PRIMARY


def test_nothing_is_promised_for_a_lease_after_the_start() -> None:
    """`start-wait`."""
    one = replica(now=100.0)
    (answer,) = told(one.on_message("a", Stand(2, Version(9, 9)), 100.0 + L - 0.01))
    assert isinstance(answer, Refuse)
    assert answer.reason == "lease"
    assert one.on_message("a", Stand(2, Version(9, 9)), 100.0 + L) == [Persist(2)]


def test_a_promise_binds_to_no_lower_epoch() -> None:
    """`promise-binds`."""
    one = replica(promised=5)
    (answer,) = told(one.on_message("a", Stand(5, Version(9, 9)), 10.0))
    assert answer == Refuse(5, 5, "promised")
    assert not one.takes(4)
    assert one.takes(5)


def test_a_promise_that_is_still_being_written_binds_already() -> None:
    one = replica()
    one.on_message("a", Stand(7, Version(1, 5)), 10.0)
    assert not one.takes(6)
    (answer,) = told(one.on_message("c", Stand(6, Version(9, 9)), 10.0))
    assert answer == Refuse(6, 7, "promised")


def test_a_log_that_ends_earlier_gets_no_promise() -> None:
    for shorter in (Version(1, 4), Version(0, 99)):
        (answer,) = told(replica().on_message("a", Stand(2, shorter), 10.0))
        assert answer == Refuse(2, 1, "log"), "and it hears of the epoch that our log is in"
    assert replica().on_message("a", Stand(2, Version(2, 1)), 10.0) == [Persist(2)]


def test_a_stream_below_the_own_log_is_not_followed() -> None:
    assert not replica(last=Version(4, 9)).takes(3)


def test_who_hears_a_primary_promises_to_nobody_until_the_lease_is_over() -> None:
    one = replica()
    one.on_stream("a", 3, 10.0)
    (answer,) = told(one.on_message("c", Stand(4, Version(9, 9)), 10.0 + L - 0.01))
    assert isinstance(answer, Refuse)
    assert one.on_message("c", Stand(4, Version(9, 9)), 10.0 + L) == [Persist(4)]


def test_a_lease_given_up_binds_nobody_but_only_that_one() -> None:
    one = replica()
    one.on_stream("a", 3, 10.0)
    assert one.on_message("c", Stand(4, Version(9, 9), released=3), 10.1) == [Persist(4)]
    other = replica()
    other.on_stream("a", 5, 10.0)
    (answer,) = told(other.on_message("c", Stand(6, Version(9, 9), released=3), 10.1))
    assert isinstance(answer, Refuse)


def test_asking_binds_nobody() -> None:
    one = replica()
    assert told(one.on_message("a", Ask(9, Version(1, 5)), 10.0)) == [Would(9)]
    assert one.promised == 0
    assert one.on_message("c", Stand(2, Version(1, 5)), 10.0) == [Persist(2)]


def test_a_primary_acknowledges_only_while_a_majority_has_echoed_its_clock() -> None:
    one = elected(now=10.0)
    assert one.may_acknowledge(10.0 + 0.9 * L - 0.01)
    assert not one.may_acknowledge(10.0 + 0.9 * L)
    one.on_echo("c", 11.0)
    assert one.may_acknowledge(11.0 + 0.9 * L - 0.01)


def test_one_that_was_just_elected_has_no_lease_yet() -> None:
    one = replica("a")
    one.on_timer(10.0)
    one.on_message("b", Would(2), 10.0)
    one.on_persisted(2, 10.0)
    one.on_message("c", Promise(2), 10.0)
    assert one.role is Role.PRIMARY
    assert not one.may_acknowledge(10.0)


def test_a_primary_without_a_majority_steps_down() -> None:
    one = elected(now=10.0)
    assert one.on_timer(10.0 + 0.9 * L) == []
    (effect,) = one.on_timer(10.0 + 2.9 * L + 0.01)
    assert isinstance(effect, StepDown)


def test_who_has_just_started_leads_nothing_whatever_its_log_says() -> None:
    """`own-epoch`."""
    one = replica("a", promised=2, last=Version(2, 9))
    assert one.role is Role.FOLLOWER
    assert not one.may_acknowledge(100.0)


def test_a_successor_stands_at_once_with_the_lease_given_up() -> None:
    one = elected(now=10.0)
    one.resign()
    assert not one.may_acknowledge(10.0)
    down, tell = one.hand_over("b", 10.0)
    assert isinstance(down, StepDown)
    assert tell == Tell("b", Succeed(2))
    successor = replica("b", promised=2)
    successor.on_stream("a", 2, 10.0)
    asks = told(successor.on_message("a", Succeed(2), 10.01))
    assert asks == [Ask(3, Version(1, 5), 2)] * 2


def test_a_primary_overtakes_an_epoch_that_somebody_was_left_with() -> None:
    one = elected(now=10.0)
    effects = one.on_higher_epoch(8, 10.1)
    assert isinstance(effects[0], StepDown)
    assert told(effects) == [Ask(9, Version(1, 5), 2)] * 2


def test_a_learner_neither_votes_nor_stands() -> None:
    one = replica("d")
    assert one.on_timer(1_000.0) == []
    (answer,) = told(one.on_message("a", Stand(2, Version(9, 9)), 10.0))
    assert answer == Refuse(2, 1, "learner")


# -- founding -------------------------------------------------------------------------------------------------------------


def founder(name: str, *, now: float = 0.0) -> Election:
    return Election(
        ElectionConfig(), name, voters=VOTERS, promised=0, last=lambda: Version(0, 0), random=Random(1), now=now,
        founding=True, owes=False,
    )  # fmt: skip


def test_the_first_epoch_takes_the_promises_of_all() -> None:
    one = founder("a")
    asks = told(one.on_timer(1.0))
    assert asks == [Ask(1, Version(0, 0))] * 2
    assert one.majority == 3
    assert one.on_message("b", Would(1), 1.0) == []
    assert one.on_message("c", Would(1), 1.0) == [Persist(1)]
    assert told(one.on_persisted(1, 1.0)) == [Stand(1, Version(0, 0))] * 2
    assert one.on_message("b", Promise(1), 1.0) == []
    assert one.on_message("b", Promise(1), 1.0) == [], "said twice counts once"
    assert one.on_message("c", Promise(1), 1.0) == [Lead(1)]


def test_of_founders_only_the_first_stands_early() -> None:
    first, second, third = (founder(name) for name in VOTERS)
    assert first.next_deadline < 0.1
    assert FOUNDING_S <= second.next_deadline < third.next_deadline
    assert second.on_timer(FOUNDING_S - 0.01) == []
    assert told(second.on_timer(second.next_deadline)) == [Ask(1, Version(0, 0))] * 2


def test_after_the_founding_a_majority_is_enough() -> None:
    one = founder("a")
    one.on_timer(1.0)
    one.on_message("b", Would(1), 1.0)
    one.on_message("c", Would(1), 1.0)
    one.on_persisted(1, 1.0)
    one.on_message("b", Promise(1), 1.0)
    one.on_message("c", Promise(1), 1.0)
    one.configure(VOTERS)
    assert one.majority == 2
    one.on_echo("b", 2.0)
    assert one.may_acknowledge(2.0)


def test_one_that_owes_nothing_may_promise_at_once_and_one_that_may_owe_something_may_not() -> None:
    assert founder("b", now=100.0).on_message("a", Stand(1, Version(0, 0)), 100.0) == [Persist(1)]
    (answer,) = told(replica(now=100.0).on_message("a", Stand(2, END), 100.0))
    assert isinstance(answer, Refuse)
    assert answer.wait_s == L


# -- voters ---------------------------------------------------------------------------------------------------------------


def test_who_is_named_no_more_neither_stands_nor_promises_and_who_is_named_again_does() -> None:
    one = replica("b")
    one.configure(("a", "c"))
    assert one.next_deadline == float("inf")
    assert one.on_timer(1_000.0) == []
    assert told(one.on_message("a", Stand(2, END), 10.0)) == [Refuse(2, 1, "learner")]
    assert one.on_message("a", Succeed(1), 10.0) == []
    assert one.takes(2), "it follows all the same"
    one.configure(VOTERS)
    assert one.on_message("a", Stand(2, END), 10.0) == [Persist(2)]


def test_a_primary_counts_the_echoes_of_the_voters_that_are_named_now() -> None:
    one = elected(now=10.0)
    one.configure(("a", "c", "d"))
    assert not one.may_acknowledge(10.0), "b votes no more"
    one.on_echo("d", 10.0)
    assert one.may_acknowledge(10.0)
    one.configure(("a",))
    assert one.may_acknowledge(1e9)
    assert one.next_deadline == float("inf")


def test_a_promise_of_one_that_does_not_vote_opens_nothing() -> None:
    one = replica("a")
    one.on_timer(10.0)
    assert one.on_message("z", Would(2), 10.0) == []
    one.on_message("b", Would(2), 10.0)
    one.on_persisted(2, 10.0)
    assert one.on_message("z", Promise(2), 10.0) == []
    assert one.on_message("b", Promise(1), 10.0) == [], "nor one for another epoch"
    assert one.on_message("b", Would(2), 10.0) == [], "nor that it would"
    assert one.on_message("b", Promise(2), 10.0) == [Lead(2)]


# -- giving up, renewing, forcing -------------------------------------------------------------------------------------------


def test_renewing_stands_above_the_own_epoch_with_the_own_lease_given_up() -> None:
    one = elected(now=10.0)
    down, *asks = one.renew(10.1)
    assert isinstance(down, StepDown)
    assert told(asks) == [Ask(3, END, 2)] * 2
    assert not one.may_acknowledge(10.1)
    assert replica("b").renew(10.0) == [], "who does not lead has nothing to renew"


def test_who_follows_a_later_epoch_tells_no_promise_that_was_still_on_its_way_to_the_disk() -> None:
    one = replica()
    assert one.on_message("a", Stand(2, END), 10.0) == [Persist(2)]
    one.on_stream("c", 3, 10.0)
    assert one.on_persisted(2, 10.1) == []


def test_who_is_named_by_the_candidates_placement_votes_before_its_own_log_says_so() -> None:
    one = replica("d")
    (refusal,) = told(one.on_message("a", Ask(2, END), 10.0))
    assert isinstance(refusal, Refuse)
    assert refusal.reason == "learner"
    assert told(one.on_message("a", Ask(2, END), 10.0, named=True)) == [Would(2)]
    assert one.on_message("a", Stand(2, END), 10.0, named=True) == [Persist(2)]
    assert one.on_persisted(2, 10.1) == [Tell("a", Promise(2))]
    # The other reasons still hold, and it does not stand itself.
    (refusal,) = told(one.on_message("b", Stand(3, Version(1, 4)), 10.2, named=True))
    assert isinstance(refusal, Refuse)
    assert refusal.reason == "log"
    assert one.on_timer(100.0) == []


def test_who_gives_up_lets_the_others_stand_first_and_may_promise_at_once() -> None:
    one = elected(now=10.0)
    (effect,) = one.give_up("its disk is full", 10.1)
    assert effect == StepDown(2, "its disk is full")
    assert one.on_timer(10.1 + L - 0.01) == []
    assert one.on_message("b", Stand(3, END), 10.2) == [Persist(3)]
    assert replica("b").give_up("nothing", 10.0) == []


def test_a_handover_that_is_given_up_leaves_a_primary() -> None:
    one = elected(now=10.0)
    one.resign()
    assert one.resigned
    assert not one.may_acknowledge(10.0)
    one.resume()
    assert not one.resigned
    assert one.may_acknowledge(10.0)
    assert one.role is Role.PRIMARY
    # And whoever has been elected anew is not resigned still.
    one.resign()
    one.on_timer(10.0 + 3 * L)
    assert not one.resigned


def test_a_forced_epoch_needs_nobody_but_the_own_disk() -> None:
    one = replica("c")
    assert one.force(1_007, 10.0) == [Persist(1_007)]
    assert one.on_persisted(1_007, 10.1) == [Lead(1_007, changes=True)]
    assert not one.may_acknowledge(10.1), "its lease still takes a majority"
    one.on_echo("a", 10.2)
    assert one.may_acknowledge(10.3)


def test_who_has_heard_of_a_forced_primary_does_not_stand_beside_it() -> None:
    """`forced-alone`: an epoch above the forced one might be one that its primary opens next, with another history."""
    forced = forced_above(7, Random(1))
    ends = [Version(1, 5)]
    one = Election(
        ElectionConfig(), "b", voters=VOTERS, promised=0, last=lambda: ends[-1], random=Random(1), now=0.0
    )
    one.on_message("a", Refuse(2, forced, "promised"), 10.0)
    assert one.on_timer(10.0) == []
    assert one.role is Role.FOLLOWER
    later = one.next_deadline
    assert later > 10.0
    # It does not keep those who have not heard of it from going on.
    assert one.on_message("a", Stand(2, Version(1, 5)), later) == [Persist(2)]
    one.on_stream("c", forced, later)
    ends.append(Version(forced, 6))
    (asked, *_) = one.on_timer(one.next_deadline)
    assert isinstance(asked, Tell)
    assert asked.message == Ask(forced + 1, Version(forced, 6))


def test_two_that_are_forced_apart_open_different_epochs() -> None:
    drawn = [forced_above(12, Random(seed)) for seed in range(8)]
    assert len(set(drawn)) >= 7
    assert all(epoch % FORCED_EVERY == 0 and epoch > 12 for epoch in drawn)
    assert forced_above(max(drawn) + 3, Random(1)) > max(drawn)


def test_what_leads_is_forced_elsewhere_only_by_stepping_down_first() -> None:
    one = elected(now=10.0)
    down, persist = one.force(1_002, 10.1)
    assert isinstance(down, StepDown)
    assert persist == Persist(1_002)


def test_a_promise_that_could_not_be_written_was_not_given() -> None:
    one = replica("b")
    one.on_message("a", Stand(2, END), 10.0)
    one.on_persist_failed(2, 10.1)
    assert one.promised == 0
    assert one.takes(1)
    assert one.on_persisted(2, 10.2) == [], "whatever comes late, nobody is told"
    # And a candidate that could not promise itself stands no more, for a while.
    two = replica("a")
    two.on_timer(10.0)
    two.on_message("b", Would(2), 10.0)
    two.on_persist_failed(2, 10.1)
    assert two.role is Role.FOLLOWER
    assert two.on_message("b", Promise(2), 10.1) == []
    assert two.next_deadline >= 10.1 + L
    asks = told(two.on_timer(two.next_deadline))
    assert asks
    assert isinstance(asks[0], Ask)


def test_an_older_promise_that_fails_takes_nothing_from_a_newer_one() -> None:
    one = replica("b")
    one.on_message("a", Stand(2, END), 10.0)
    one.on_message("c", Stand(3, END), 10.0)
    one.on_persist_failed(2, 10.1)
    assert one.on_persisted(3, 10.2) == [Tell("c", Promise(3))]


def test_a_primary_whose_epoch_is_opened_does_not_hear_what_is_not_above_it() -> None:
    one = elected(now=10.0)
    assert one.on_higher_epoch(2, 10.0) == []
    assert one.on_higher_epoch(1, 10.0) == []
    assert one.role is Role.PRIMARY


def test_an_echo_that_comes_late_takes_nothing_away() -> None:
    one = elected(now=10.0)
    one.on_echo("b", 9.0)
    assert one.may_acknowledge(10.0 + 0.9 * L - 0.01)


def test_a_reluctant_voter_stands_only_when_the_others_have_not_for_three_leases() -> None:
    one, other = replica("b"), replica("c")
    one.reluctant = True
    for voter in (one, other):
        voter.on_stream("a", 2, 10.0)
    assert other.next_deadline < 10.0 + 1.5 * L
    assert 10.0 + 3 * L <= one.next_deadline < 10.0 + 3.5 * L
    assert one.on_timer(10.0 + 2.9 * L) == []
    assert told(one.on_timer(10.0 + 3.5 * L)) == [Ask(3, END)] * 2
    # It votes as ever, and leads at once when the primary asks it to.
    again = replica("b")
    again.reluctant = True
    again.on_stream("a", 2, 10.0)
    assert again.on_message("c", Stand(3, END), 10.0 + L) == [Persist(3)]
    again = replica("b")
    again.reluctant = True
    again.on_stream("a", 2, 10.0)
    assert told(again.on_message("a", Succeed(2), 10.0)) == [Ask(3, END, 2)] * 2


def test_who_votes_alone_is_never_reluctant() -> None:
    one = Election(
        ElectionConfig(), "a", voters=["a"], promised=0, last=lambda: END, random=Random(1), now=0.0
    )
    one.reluctant = True
    one.on_stream("a", 2, 10.0)
    assert one.next_deadline < 10.0 + 1.5 * L


def test_a_promise_that_was_given_up_for_an_own_candidacy_is_told_to_nobody() -> None:
    one = replica()
    assert one.on_message("a", Stand(2, END), 10.0) == [Persist(2)]  # and the disk is slow
    (ask, *_) = [effect.message for effect in one.on_timer(20.0) if isinstance(effect, Tell)]
    assert isinstance(ask, Ask)
    assert one.on_message("c", Would(ask.epoch), 20.0) == [Persist(ask.epoch)]
    one.on_stream("c", ask.epoch, 20.1)  # it was faster
    assert one.on_persisted(ask.epoch, 20.2) == [], (
        "a's log was compared for another epoch, and we are bound now"
    )


def test_a_primary_to_which_a_later_one_hands_over_steps_down_first() -> None:
    one = elected()
    effects = one.on_message("c", Succeed(7), 10.1)
    assert effects[0] == StepDown(2, "c hands over")
