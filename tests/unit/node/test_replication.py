"""The primary's picture of its voters, and the follower's next step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.replication import Diverged, Progress, PullAgain, Refuse, Take, on_pull_reply
from storage.records import Version


def test_quorum_is_the_middle_and_all_the_least() -> None:
    progress = Progress("a", ("a", "b", "c"))
    progress.durable(10, 0.0)
    assert (progress.reached("primary"), progress.reached("quorum"), progress.reached("all")) == (10, 0, 0)
    progress.named("b", 7)
    assert (progress.reached("quorum"), progress.reached("all")) == (7, 0)
    progress.named("c", 3)
    assert (progress.reached("quorum"), progress.reached("all")) == (7, 3)
    assert [progress.count(n) for n in (3, 7, 8, 11)] == [3, 2, 1, 0]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 50))), st.integers(1, 5))
def test_reached_is_what_that_many_disks_hold(pulls: list[tuple[str, int]], count: int) -> None:
    voters = tuple("abcde"[:count])
    progress = Progress("a", voters)
    for voter, sequence in pulls:
        if voter == "a":
            progress.durable(sequence, 0.0)
        else:
            progress.named(voter, sequence)
    quorum = progress.reached("quorum")
    assert progress.count(quorum) * 2 > count
    assert progress.count(quorum + 1) * 2 <= count
    assert progress.count(progress.reached("all")) == count
    assert progress.reached("all") <= quorum


def test_a_stranger_and_an_old_pull_change_nothing() -> None:
    progress = Progress("a", ("a", "b", "c"))
    progress.named("z", 100)
    progress.named("b", 5)
    progress.named("b", 2)
    assert progress.positions == {"b": 5}


def test_lag_counts_from_when_the_primary_passed_the_position() -> None:
    progress = Progress("a", ("a", "b"))
    progress.durable(1, 1.0)
    progress.durable(2, 3.0)
    assert progress.lag_ms(1, 4.0) == 1_000
    assert progress.lag_ms(0, 4.0) == 3_000
    assert progress.lag_ms(2, 4.0) == 0


def test_a_follower_takes_only_what_follows_its_log() -> None:
    last = Version(1, 5)

    def step(**change: int | None) -> object:
        reply: dict[str, int | None] = {"reply_epoch": 1, "primary_last": 9, "first": 6, "count": 3, **change}
        return on_pull_reply(epoch=1, last=last, **reply)  # type: ignore[arg-type]

    assert isinstance(step(), Take)
    assert isinstance(step(first=None, count=0, primary_last=5), PullAgain)
    assert isinstance(step(first=7), Refuse)
    assert isinstance(step(first=5), Refuse)
    assert isinstance(step(reply_epoch=0), Refuse)
    assert isinstance(step(count=5), Refuse)
    assert isinstance(step(primary_last=4, first=None, count=0), Diverged)
