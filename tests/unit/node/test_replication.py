"""The primary's picture of its voters, and the follower's next step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.fork import EpochStarts
from node.placement import Placement
from node.replication import (
    SLACK_MS,
    WAIT_MS,
    Diverged,
    Fork,
    LookUp,
    Matched,
    Progress,
    PullAgain,
    Refuse,
    Take,
    follower_lag_ms,
    on_stream,
)
from storage.records import EMPTY, Fingerprint, Version


def record(sequence: int, history: int = 0) -> Fingerprint:
    """The record at `sequence` of one of several histories; of all logs, the empty one is the same."""
    return Fingerprint(1, sequence, 1_000 * history + sequence) if sequence else EMPTY


STARTS = EpochStarts([(1, 1)])


def progress_of(voters: tuple[str, ...]) -> Progress:
    return Progress("a", Placement(tuple((name, 1) for name in voters)), epoch=1, began=1)


def name(progress: Progress, follower: str, named: Fingerprint) -> Matched | Diverged | Fork:
    """A pull by a voter, with a look-up in a primary's log of history 0 where one is asked for."""
    step: Matched | LookUp | Fork | Diverged = progress.pulled(follower, named, STARTS)
    if isinstance(step, LookUp):
        step = progress.found(follower, named, record(named.sequence))
    if isinstance(step, Matched):
        progress.count(follower, named.sequence)
    return step


def test_quorum_is_the_middle_and_all_the_least() -> None:
    progress = progress_of(("a", "b", "c"))
    progress.durable(10, 0.0)
    assert (progress.reached("primary"), progress.reached("quorum"), progress.reached("all")) == (10, 0, 0)
    name(progress, "b", record(7))
    assert (progress.reached("quorum"), progress.reached("all")) == (7, 0)
    name(progress, "c", record(3))
    assert (progress.reached("quorum"), progress.reached("all")) == (7, 3)
    assert [progress.holders(n) for n in (3, 7, 8, 11)] == [3, 2, 1, 0]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 50))), st.integers(1, 5))
def test_reached_is_what_that_many_disks_hold(pulls: list[tuple[str, int]], count: int) -> None:
    voters = tuple("abcde"[:count])
    progress = progress_of(voters)
    progress.durable(50, 0.0)
    for voter, sequence in pulls:
        if voter != "a":
            name(progress, voter, record(sequence))
    quorum = progress.reached("quorum")
    assert progress.holders(quorum) * 2 > count
    assert progress.holders(quorum + 1) * 2 <= count
    assert progress.holders(progress.reached("all")) == count
    assert progress.reached("all") <= quorum


def test_a_stranger_and_an_old_pull_change_nothing() -> None:
    progress = progress_of(("a", "b", "c"))
    progress.durable(100, 0.0)
    name(progress, "z", record(100))
    name(progress, "b", record(5))
    name(progress, "b", record(2))
    assert progress.positions == {"a": 100, "b": 5}


def test_a_position_counts_only_when_its_record_is_ours() -> None:
    progress = progress_of(("a", "b", "c"))
    progress.durable(10, 0.0)
    assert progress.pulled("b", record(7), STARTS) == LookUp()
    assert progress.holders(7) == 1, "nothing counts before the look-up"
    for other in (record(7, history=1), record(7)._replace(epoch=2)):
        assert isinstance(progress.found("b", other, record(7)), Diverged)
        assert progress.holders(7) == 1
    assert progress.found("b", record(7), record(7)) == Matched()
    assert progress.holders(7) == 1, (
        "whether it is counted is for whoever knows which replica asks, in which epoch"
    )
    progress.count("b", 7)
    assert progress.holders(7) == 2


def test_an_idle_follower_and_an_empty_one_need_no_look_up() -> None:
    progress = progress_of(("a", "b"))
    progress.durable(10, 0.0)
    assert progress.pulled("b", EMPTY, STARTS) == Matched()
    assert progress.pulled("b", record(7), STARTS) == LookUp()
    progress.found("b", record(7), record(7))
    assert progress.pulled("b", record(7), STARTS) == Matched()
    assert progress.pulled("b", record(7, history=1), STARTS) == LookUp(), (
        "the same place is not the same record"
    )


def test_a_follower_that_parts_takes_back_what_it_named_before() -> None:
    progress = progress_of(("a", "b"))
    progress.durable(10, 0.0)
    name(progress, "b", record(9))
    assert progress.reached("all") == 9
    assert isinstance(name(progress, "b", record(4, history=1)), Diverged)
    assert progress.reached("all") == 0
    assert name(progress, "b", record(11)) == Fork(Version(1, 10)), (
        "a record of ours that we do not have: cut it"
    )
    assert progress.reached("all") == 0


def test_a_log_that_has_left_ours_is_told_where() -> None:
    """Ours has epoch 1 up to 5 and epoch 3 from 6 to 10."""
    starts = EpochStarts([(1, 1), (3, 6)])
    progress = progress_of(("a", "b"))
    progress.durable(10, 0.0)
    for named, at in (
        (Fingerprint(1, 8, 0), Version(1, 5)),
        (Fingerprint(2, 9, 0), Version(1, 5)),
        (Fingerprint(2, 4, 0), Version(1, 4)),
        (Fingerprint(3, 12, 0), Version(3, 10)),
    ):
        assert progress.pulled("b", named, starts) == Fork(at)
    for named in (Fingerprint(1, 5, 0), Fingerprint(3, 6, 0)):
        assert progress.pulled("b", named, starts) == LookUp()
    assert progress.holders(1) == 1


@given(st.lists(st.tuples(st.sampled_from("bcd"), st.integers(0, 12), st.integers(0, 2)), max_size=40))
def test_log_matching(pulls: list[tuple[str, int, int]]) -> None:
    """`log-matching`."""
    progress = progress_of(tuple("abcd"))
    progress.durable(10, 0.0)
    best = dict.fromkeys("bcd", 0)
    for follower, sequence, history in pulls:
        ours = sequence <= 10 and record(sequence, history) == record(sequence)
        step = name(progress, follower, record(sequence, history))
        assert isinstance(step, Matched if ours else Diverged if sequence <= 10 else Fork)
        if ours:
            best[follower] = max(best[follower], sequence)
        elif sequence <= 10:
            best[follower] = 0
        assert progress.positions == {"a": 10} | {
            one: at for one, at in best.items() if one in progress.positions
        }
        assert all(best[one] == 0 for one in "bcd" if one not in progress.positions)


def test_lag_counts_from_when_the_primary_passed_the_position() -> None:
    progress = progress_of(("a", "b"))
    progress.durable(1, 1.0)
    progress.durable(2, 3.0)
    assert progress.lag_ms(1, 4.0) == 1_000
    assert progress.lag_ms(0, 4.0) == 3_000
    assert progress.lag_ms(2, 4.0) == 0


def test_a_follower_takes_only_what_follows_its_log() -> None:
    """`no-gaps`."""
    last = Version(1, 5)

    def step(**change: int | None) -> object:
        reply: dict[str, int | None] = {"primary_last": 9, "first": 6, "count": 3, **change}
        return on_stream(last=last, **reply)  # type: ignore[arg-type]

    assert isinstance(step(), Take)
    assert isinstance(step(first=None, count=0, primary_last=5), PullAgain)
    assert isinstance(step(first=7), Refuse)
    assert isinstance(step(first=5), Refuse)
    assert isinstance(step(count=5), Refuse)
    assert isinstance(step(primary_last=4, first=None, count=0), Refuse)


def test_a_long_poll_is_no_lag_and_everything_else_is() -> None:
    def lag(silent_ms: int, *, following: bool = True, behind: int = 0, old_ms: int = 0) -> int:
        return follower_lag_ms(following=following, behind=behind, old_ms=old_ms, silent_ms=silent_ms)

    bound = WAIT_MS + SLACK_MS
    assert [lag(0), lag(WAIT_MS), lag(bound)] == [0, 0, 0]
    assert lag(bound + 1) == bound + 1, "silent for longer than a poll lasts"
    assert lag(300, following=False) == 300, "the stream is cut"
    assert lag(300, behind=2, old_ms=70) == 370
    assert bound < 2_000, "routing must hear of it before it looks away"


def witnessed(former: Placement | None = None) -> Progress:
    placement = Placement((("a", 1), ("b", 1)), witness=("w", 9))
    if former is not None:
        placement = placement.after(former)
    return Progress("a", placement, epoch=4, began=7)


def test_a_witness_is_no_disk() -> None:
    progress = witnessed()
    progress.durable(10, 0.0)
    progress.remember("w", 9, 4)
    assert (progress.reached("primary"), progress.reached("quorum"), progress.reached("all")) == (10, 0, 0)
    assert progress.holders(10) == 1
    progress.count("w", 10)
    assert progress.reached("quorum") == 0, "whatever it may claim"
    progress.count("b", 9)
    assert (progress.reached("quorum"), progress.on_majority, progress.established) == (9, True, True)


def test_nothing_is_on_a_quorum_before_those_left_behind_can_elect_nobody() -> None:
    """b was taken out while it was away; it and the witness would be a majority of what it knows of."""
    former = Placement((("a", 1), ("b", 1)), witness=("w", 9))
    progress = Progress("a", Placement((("a", 1),), witness=("w", 9)).after(former), epoch=4, began=7)
    progress.durable(10, 0.0)
    assert (progress.on_majority, progress.reached("quorum"), progress.reached("all")) == (True, 0, 0)
    assert not progress.established
    progress.remember("w", 8, 4)
    progress.remember("w", 9, 3)
    assert progress.reached("quorum") == 0, "another vote's memory, and of another epoch"
    progress.remember("w", 9, 4)
    assert (progress.reached("quorum"), progress.established) == (10, True)


def test_of_two_disks_one_that_is_gone_is_made_up_for_by_the_witnesss_memory() -> None:
    progress = witnessed()
    progress.durable(10, 0.0)
    assert not progress.stuck(4 * 1.5, 1.5), "not for a short absence"
    assert progress.stuck(4 * 1.5 + 0.1, 1.5)
    assert not progress.established
    progress.remember("w", 9, 4)
    assert progress.established
    assert progress.reached("quorum") == 0, "for changes of the placement, not for what is written"
    assert not progress_of(("a", "b", "c")).stuck(1e9, 1.5)
