"""The replay window against the plainest model: a set of what was taken."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip.errors import DroppedError
from gossip.keyring import Keyring
from gossip.replays import WINDOW, Replays

COUNTERS = st.lists(st.one_of(st.integers(0, 5_000), st.integers(900, 1_100)), max_size=200)


def taken(replays: Replays, *packet: int) -> bool | str:
    try:
        replays.check(*packet)
    except DroppedError as dropped:
        return dropped.reason
    return True


@given(COUNTERS)
def test_each_counter_once_and_none_from_before_the_window(counters: list[int]) -> None:
    replays, seen = Replays(8), set[int]()
    for counter in counters:
        fresh = counter not in seen and counter > max(seen, default=0) - WINDOW
        assert taken(replays, 1, 1, 7, counter) == (True if fresh else "replayed")
        if fresh:
            seen.add(counter)


@given(st.permutations(range(WINDOW)))
def test_any_order_within_the_window_is_fine(order: list[int]) -> None:
    replays = Replays(8)
    for counter in order:
        replays.check(1, 1, 7, counter)
    assert all(taken(replays, 1, 1, 7, counter) == "replayed" for counter in order)


def test_only_the_newest_boot_and_its_newest_session() -> None:
    replays = Replays(8)
    replays.check(1, 3, 500, 9)
    assert taken(replays, 1, 2, 500, 10) == "old_boot"
    replays.check(1, 3, 501, 0)
    assert taken(replays, 1, 3, 500, 11) == "replayed"
    replays.check(1, 4, 1, 0)
    assert taken(replays, 1, 3, 501, 1) == "old_boot"
    replays.check(2, 1, 500, 9)  # senders are apart


def test_sessions_go_round() -> None:
    replays = Replays(8)
    replays.check(1, 1, (1 << 64) - 1, 0)
    replays.check(1, 1, 0, 0)
    assert taken(replays, 1, 1, (1 << 64) - 1, 1) == "replayed"


def test_the_session_that_a_keyring_begins_is_taken_as_the_newer() -> None:
    keyring = Keyring("films", [], random_bytes=random.Random(3).randbytes)
    replays = Replays(8)
    packets = [keyring.open(keyring.seal(b"")) for _ in range(2)]
    keyring._counter = 1 << 32
    packets += [keyring.open(keyring.seal(b"")) for _ in range(2)]
    for opened in packets:
        replays.check(1, 1, opened.session, opened.counter)
    for opened in packets:
        assert taken(replays, 1, 1, opened.session, opened.counter) == "replayed"


def test_the_table_is_bounded() -> None:
    replays = Replays(4)
    for sender in range(1, 100):
        replays.check(sender, 1, 1, 1)
    assert len(replays) == 4
    with pytest.raises(DroppedError):
        replays.check(99, 1, 1, 1)
