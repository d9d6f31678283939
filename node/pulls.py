"""The bodies of a pull and of its answers, as they travel between nodes. Pure.

pull    [shard, replica id, epoch that the asker follows, epoch below which it takes nothing, its last record [epoch, sequence,
        checksum], echo | nil, max bytes, wait ms]
        max bytes 0: by one that fetches a snapshot; it names no record, and is answered at once, without any
answer  [STREAM, epoch, stamp, primary's last, lag ms, raw records, up to which sequence its log is known to be on a quorum]
        [FORK, epoch, stamp, [epoch, sequence] at or before which the logs part]
        [NOT_PRIMARY, epoch, name]   of the primary that the answerer knows, or 0 and ""
beat    [id of the vote, epoch that the witness follows, epoch below which it takes nothing, epoch that it remembers, echo | nil]
answer  [BEATEN, epoch, stamp, whether the witness is to remember the epoch, whether the placement names that vote]
        or NOT_PRIMARY
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from node.election import EPOCH_MAX
from node.replication import Fork
from storage.records import Fingerprint, Version

STREAM, FORK, NOT_PRIMARY, BEATEN = 0, 1, 2, 3
BYTES_MAX = 4 << 20
WAIT_MS_MAX = 5_000


@dataclass(frozen=True, slots=True)
class Pull:
    """echo: the newest stamp of this epoch's primary that the asker has received, by that primary's clock; None for none."""

    shard: int
    replica: int
    epoch: int
    promised: int
    named: Fingerprint
    echo: float | None
    max_bytes: int
    wait_ms: int

    def body(self) -> list[Any]:
        return [
            self.shard, self.replica, self.epoch, self.promised, self.named, self.echo, self.max_bytes, self.wait_ms,
        ]  # fmt: skip


def read_pull(body: Any) -> Pull:
    """Raises TypeError, ValueError."""
    shard, replica, epoch, promised, (at, sequence, check), echo, max_bytes, wait_ms = body
    named = Fingerprint(_number(at), _number(sequence), _number(check))
    bounds = min(_number(max_bytes), BYTES_MAX), min(_number(wait_ms), WAIT_MS_MAX)
    stamp = None if echo is None else _stamp(echo)
    return Pull(_number(shard), _number(replica), _epoch(epoch), _epoch(promised), named, stamp, *bounds)


def _number(value: Any) -> int:
    """What counts something. Raises TypeError, ValueError."""
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is not a number")
    if value < 0:
        raise ValueError(f"{value} is below 0")
    return value


def _epoch(value: Any) -> int:
    """One that a higher one can follow. Raises TypeError, ValueError."""
    if _number(value) >= EPOCH_MAX:
        raise ValueError(f"{value} is no epoch")
    return int(value)


def _stamp(value: Any) -> float:
    """A time by somebody's monotonic clock. Raises TypeError, ValueError."""
    if type(value) not in (float, int) or not math.isfinite(value):
        raise TypeError(f"{value!r:.40} is not a time")
    return float(value)


@dataclass(frozen=True, slots=True)
class Streamed:
    """records: raw, after the record that the pull named."""

    epoch: int
    stamp: float
    primary_last: int
    lag_ms: int
    records: bytes
    # Up to which sequence the primary's log is known to be on a quorum; 0: nothing is said.
    settled: int = 0

    def body(self) -> list[Any]:
        return [
            STREAM, self.epoch, self.stamp, self.primary_last, self.lag_ms, self.records, self.settled,
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Forked:
    epoch: int
    stamp: float
    fork: Fork

    def body(self) -> list[Any]:
        return [FORK, self.epoch, self.stamp, self.fork.at]


@dataclass(frozen=True, slots=True)
class NotPrimary:
    """Who leads in which epoch, as far as the answerer knows."""

    epoch: int
    primary: str

    def body(self) -> list[Any]:
        return [NOT_PRIMARY, self.epoch, self.primary]


Answer = Streamed | Forked | NotPrimary


def read_answer(body: Any) -> Answer:
    """Raises TypeError, ValueError."""
    kind, epoch, *rest = body
    epoch = _epoch(epoch)
    if kind == STREAM:
        stamp, last, lag_ms, records, *more = rest
        settled = _number(more[0]) if more else 0
        if type(records) is not bytes:
            raise TypeError("streamed records are not bytes")
        return Streamed(epoch, _stamp(stamp), _number(last), _number(lag_ms), records, settled)
    if kind == FORK:
        stamp, (at, sequence) = rest
        return Forked(epoch, _stamp(stamp), Fork(Version(_number(at), _number(sequence))))
    if kind == NOT_PRIMARY:
        (primary,) = rest
        if type(primary) is not str:
            raise TypeError("the name of a primary is not a string")
        return NotPrimary(epoch, primary)
    raise ValueError(f"an answer to a pull of kind {kind!r}")


# -- of witnesses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beat:
    """What a witness says in the place of a pull: it holds no log, so it names no record. echo: as in a pull."""

    id: int
    epoch: int
    promised: int
    remembered: int
    echo: float | None

    def body(self) -> list[Any]:
        return [self.id, self.epoch, self.promised, self.remembered, self.echo]


def read_beat(body: Any) -> Beat:
    """Raises TypeError, ValueError."""
    id_, epoch, promised, remembered, echo, *_ = body
    stamp = None if echo is None else _stamp(echo)
    return Beat(_number(id_), _epoch(epoch), _epoch(promised), _epoch(remembered), stamp)


@dataclass(frozen=True, slots=True)
class Beaten:
    """remember: the epoch is one that no later primary may lack. named: the vote counts."""

    epoch: int
    stamp: float
    remember: bool
    named: bool

    def body(self) -> list[Any]:
        return [BEATEN, self.epoch, self.stamp, self.remember, self.named]


def read_beaten(body: Any) -> Beaten | NotPrimary:
    """Raises TypeError, ValueError."""
    kind, epoch, *rest = body
    if kind != BEATEN:
        answer = read_answer(body)
        if not isinstance(answer, NotPrimary):
            raise ValueError(f"an answer to a beat of kind {kind!r}")
        return answer
    stamp, remember, named, *_ = rest
    if type(remember) is not bool or type(named) is not bool:
        raise TypeError("what a witness is told of its vote is true or false")
    return Beaten(_epoch(epoch), _stamp(stamp), remember, named)
