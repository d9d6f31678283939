"""The bodies of pulls and their answers: what goes in comes out, and rubbish is told as such."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.election import EPOCH_MAX
from node.pulls import (
    BYTES_MAX,
    FORK,
    NOT_PRIMARY,
    STREAM,
    WAIT_MS_MAX,
    Answer,
    Forked,
    NotPrimary,
    Pull,
    Streamed,
    read_answer,
    read_pull,
)
from node.replication import Fork
from storage.records import Fingerprint, Version

U64 = st.integers(0, (1 << 64) - 1)
EPOCHS = st.integers(0, EPOCH_MAX - 1)
TIMES = st.floats(allow_nan=False, allow_infinity=False)
PULLS = st.builds(
    Pull, U64, U64, EPOCHS, EPOCHS, st.builds(Fingerprint, U64, U64, U64), st.none() | TIMES,
    st.integers(0, BYTES_MAX), st.integers(0, WAIT_MS_MAX),
)  # fmt: skip
ANSWERS = st.one_of(
    st.builds(Streamed, EPOCHS, TIMES, U64, U64, st.binary(max_size=50), U64),
    st.builds(Forked, EPOCHS, TIMES, st.builds(Fork, st.builds(Version, U64, U64))),
    st.builds(NotPrimary, EPOCHS, st.text(max_size=20)),
)
RUBBISH = st.recursive(
    st.none() | st.booleans() | U64 | st.integers(-5, -1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=15,
)  # fmt: skip


def over_the_wire(body: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(body))


@given(PULLS)
def test_a_pull_comes_back(pull: Pull) -> None:
    assert read_pull(over_the_wire(pull.body())) == pull


def test_a_stream_of_a_build_that_does_not_say_what_is_on_a_quorum_is_read() -> None:
    assert read_answer([STREAM, 1, 2.0, 3, 4, b""]) == Streamed(1, 2.0, 3, 4, b"", 0)


@given(ANSWERS)
def test_an_answer_comes_back(answer: Answer) -> None:
    assert read_answer(over_the_wire(answer.body())) == answer


def test_what_a_pull_asks_for_has_a_bound() -> None:
    body = Pull(1, 2, 3, 4, Fingerprint(5, 6, 7), None, 1 << 40, 1 << 40).body()
    read = read_pull(body)
    assert (read.max_bytes, read.wait_ms) == (BYTES_MAX, WAIT_MS_MAX)


@given(RUBBISH | st.lists(RUBBISH, min_size=8, max_size=8))
def test_rubbish_is_no_pull(body: Any) -> None:
    try:
        read = read_pull(body)
    except (TypeError, ValueError):
        return
    assert read_pull(over_the_wire(read.body())) == read


@given(
    RUBBISH
    | st.tuples(st.sampled_from([STREAM, FORK, NOT_PRIMARY]), RUBBISH, RUBBISH)
    | st.tuples(st.sampled_from([STREAM, FORK]), U64, TIMES | RUBBISH, RUBBISH)
    | st.tuples(st.just(STREAM), U64, TIMES, RUBBISH, RUBBISH, RUBBISH)
)
def test_rubbish_is_no_answer(body: Any) -> None:
    try:
        read = read_answer(body)
    except (TypeError, ValueError):
        return
    assert read_answer(over_the_wire(read.body())) == read


@pytest.mark.parametrize("stamp", [float("nan"), float("inf"), -float("inf"), "1", True])
def test_a_stamp_is_a_time(stamp: object) -> None:
    """An infinite echo would be a lease for ever."""
    with pytest.raises(TypeError):
        read_answer([STREAM, 1, stamp, 0, 0, b""])
    with pytest.raises(TypeError):
        read_pull([0, 1, 1, 1, [0, 0, 0], stamp, 10, 10])


def test_an_epoch_has_a_higher_one() -> None:
    """A primary stands above the epoch that a pull names; beyond u64 it could neither promise nor tell it."""
    with pytest.raises(ValueError, match="no epoch"):
        read_pull([0, 1, 1, (1 << 64) - 1, [0, 0, 0], None, 10, 10])
    with pytest.raises(ValueError, match="no epoch"):
        read_answer([NOT_PRIMARY, (1 << 64) - 1, "a"])
