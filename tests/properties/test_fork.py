"""Where logs part: found exactly, in as many rounds as there are epochs, whatever the two histories are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.fork import EpochStarts, cut_at, fork_of, shared_end
from storage.records import Version

# The epochs of a log's records, in order: [1, 1, 3] is a log of three records.
LOGS = st.lists(st.integers(1, 6), max_size=14).map(sorted)


def starts(log: list[int]) -> EpochStarts:
    out = EpochStarts()
    for place, epoch in enumerate(log):
        out.begin(epoch, place + 1)
    return out


def last(log: list[int]) -> Version:
    return Version(log[-1], len(log)) if log else Version(0, 0)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two logs as elections leave them: a common part, then epochs that the two do not share."""
    common = draw(LOGS)
    floor = common[-1] if common else 0
    odd = sorted(draw(st.lists(st.sampled_from([floor + 1, floor + 3, floor + 5]), max_size=8)))
    even = sorted(draw(st.lists(st.sampled_from([floor + 2, floor + 4, floor + 6]), max_size=8)))
    longer = draw(st.lists(st.just(floor), max_size=3)) if floor else []
    return common + longer + odd, common + even


@given(histories())
def test_the_fork_is_found_exactly_and_soon(pair: tuple[list[int], list[int]]) -> None:
    """`fork-exact`."""
    follower, primary = pair
    shared = 0
    while shared < min(len(follower), len(primary)) and follower[shared] == primary[shared]:
        shared += 1
    rounds = 0
    while (told := fork_of(last(follower), starts(primary), len(primary))) is not None:
        at = cut_at(told, starts(follower), len(follower))
        assert at.sequence < len(follower)
        assert at.sequence >= shared
        follower = follower[: at.sequence]
        rounds += 1
        assert rounds <= 8
    assert len(follower) == shared


@given(histories(), st.integers(0, 6))
def test_what_is_provably_shared_is_all_that_is_shared_when_no_start_is_forgotten(
    pair: tuple[list[int], list[int]], forgotten: int
) -> None:
    ours, theirs = pair
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    assert shared_end(starts(ours), len(ours), starts(theirs), len(theirs)) == shared
    known = EpochStarts(list(starts(theirs))[forgotten:])
    assert shared_end(starts(ours), len(ours), known, len(theirs)) in (0, shared)


@given(LOGS)
def test_a_log_matches_its_own_beginning(log: list[int]) -> None:
    for length in range(len(log) + 1):
        assert starts(log).matches(last(log[:length]), len(log))


@given(LOGS, st.integers(0, 14))
def test_cutting_is_as_if_never_appended(log: list[int], length: int) -> None:
    length = min(length, len(log))
    cut = starts(log)
    cut.cut(length)
    assert list(cut) == list(starts(log[:length]))
