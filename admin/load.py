"""Loading many records: pipelined, as fast as the cluster lets us, and resumable.

Rules:
* Batch n is the good rows among row numbers [n · batch_rows, (n+1) · batch_rows). Its write_id follows from the file's
  contents and n alone, so a batch that is sent again after a break is answered, not applied twice.
* At most `window` batches are under way. Pushback halves the window, an answered batch gives one back.
* The state file names the first batch that is not known to be written; everything before it is.
* With several batches under way the order among rows of the same id is not kept: a file should name an id once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio
from xxhash import xxh3_128_digest

import gmco
from admin.sources import BadRow, Kind, Row, Source, Unit

STATE_VERSION = 1
SAVE_EVERY_S = 0.5
CALL_TIMEOUT_S = 10.0
PAUSE_S = 0.25
BAD_ROWS_KEPT = 20  # shown to people; the rest is only counted
# After these the same write may be sent again: with its write_id it is applied once.
_BUSY = ("overloaded", "indexing", "unavailable", "shutting_down", "no_primary")
_OPEN = ("deadline_exceeded", "ack_timeout", "outcome_unknown")
RETRY = frozenset({*_BUSY, *_OPEN})
_ROW_FIELD = re.compile(r"^(?:items|users)\[(\d+)\]")


class BadRowError(ValueError):
    """A row cannot be loaded, and the caller wants to know rather than skip it."""

    def __init__(self, row: BadRow, unit: Unit) -> None:
        super().__init__(f"{unit} {row.place}: {row.reason}")
        self.row = row


class Writer(Protocol):
    """What of `gmco.Client` the loader uses."""

    async def put_items(
        self, items: Sequence[gmco.Item], ack: gmco.Ack, write_id: bytes, *, timeout_s: float
    ) -> gmco.Written: ...

    async def put_users(
        self, users: Sequence[gmco.User], ack: gmco.Ack, write_id: bytes, *, timeout_s: float
    ) -> gmco.Written: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """`give_up_s`: how long the cluster may refuse or be away without one batch written."""

    kind: Kind = "items"
    ack: gmco.Ack = "primary"
    batch_rows: int = 256
    window: int = 8
    skip_bad: bool = False
    give_up_s: float = 60.0
    dim: int | None = None  # None: that of the first good row


@dataclass(kw_only=True, slots=True)
class LoadProgress:
    """Where a load stands. `next_batch`: everything before it is written."""

    next_batch: int = 0
    written: int = 0
    bad: int = 0
    rows_done: int = 0
    retries: int = 0
    pushbacks: int = 0
    note: str = ""
    bad_rows: list[BadRow] = field(default_factory=list)


class StateFile:
    """`FILE.gmco-load`: where to go on. A state of another file, kind or batch size does not count."""

    def __init__(self, path: Path, source: Source, options: LoadOptions) -> None:
        """Nothing is read or written yet."""
        self.path = path
        self._key = {
            "version": STATE_VERSION,
            "digest": source.digest,
            "kind": options.kind,
            "batch_rows": options.batch_rows,
        }

    def read(self) -> LoadProgress:
        """The saved progress, or a fresh one."""
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            if {name: state.get(name) for name in self._key} != self._key:
                return LoadProgress()
            return LoadProgress(
                next_batch=int(state["next_batch"]),
                written=int(state["written"]),
                bad=int(state["bad"]),
                rows_done=int(state["rows_done"]),
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return LoadProgress()

    def write(self, progress: LoadProgress) -> None:
        """Whole or not at all: a torn state file would make the next load start over. Of nothing written there is none."""
        if not progress.written:
            self.remove()
            return
        counts = {name: asdict(progress)[name] for name in ("next_batch", "written", "bad", "rows_done")}
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text(json.dumps({**self._key, **counts}), encoding="utf-8")
        os.replace(beside, self.path)

    def remove(self) -> None:
        """After the last batch, or before the first."""
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Batch:
    number: int
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    rows_end: int  # row numbers below this are in this batch or an earlier one


def write_id(digest: str, kind: Kind, batch_rows: int, number: int) -> bytes:
    """The 16 bytes under which batch `number` is written, the same in every run."""
    return xxh3_128_digest(f"gmco-load\0{digest}\0{kind}\0{batch_rows}\0{number}".encode())


def batches(source: Source, options: LoadOptions, first: int) -> Iterator[_Batch]:
    """The file's batches from number `first` on; empty ones, too, so that numbers follow row numbers."""
    size, dim, number = options.batch_rows, options.dim, first
    good: list[Row] = []
    bad: list[BadRow] = []
    for row in source.read(first * size):
        while row.number >= (number + 1) * size:
            yield _Batch(number, tuple(good), tuple(bad), (number + 1) * size)
            number, good, bad = number + 1, [], []
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        dim = dim or len(row.vector)
        if len(row.vector) == dim:
            good.append(row)
        else:
            bad.append(BadRow(row.number, f"vector of {len(row.vector)} numbers where the others have {dim}"))
    if good or bad:
        yield _Batch(number, tuple(good), tuple(bad), source.rows or (number + 1) * size)


class Loader:
    """One load. `changed` is called after every batch and every note, at most a few hundred times a second."""

    def __init__(
        self,
        client: Writer,
        source: Source,
        options: LoadOptions,
        state: StateFile | None = None,
        *,
        progress: LoadProgress | None = None,
        changed: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> None:
        """`state` None: nothing is saved. `progress` None: from the start."""
        self._client = client
        self._source = source
        self._options = options
        self._state = state
        self._changed = changed
        self.progress = progress or LoadProgress()
        # Written, but an earlier one is not. Without the rows: there may be many while one batch is stuck.
        self._ready: dict[int, tuple[int, tuple[BadRow, ...], int]] = {}
        self._window = trio.CapacityLimiter(options.window)
        self._saved_at = -SAVE_EVERY_S
        self._moved_at = 0.0

    async def run(self) -> LoadProgress:
        """Loads the rest of the file. Raises BadRowError or GmcoError; what was written stays and is in the state."""
        self._moved_at = trio.current_time()
        bad: BadRow | None = None
        try:
            async with trio.open_nursery() as nursery:
                todo = batches(self._source, self._options, self.progress.next_batch)
                # Reading and decoding in a thread, or a slow disk would stop the connection's pings.
                while (batch := await trio.to_thread.run_sync(next, todo, None)) is not None:
                    if batch.bad and not self._options.skip_bad:
                        bad = batch.bad[0]
                        break  # what is under way before it is still written
                    await self._window.acquire_on_behalf_of(batch.number)
                    nursery.start_soon(self._send, batch)
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        finally:
            if self._state is not None:
                self._state.write(self.progress)
        if bad is not None:
            raise BadRowError(bad, self._source.unit)
        if self._state is not None:
            self._state.remove()
        return self.progress

    async def _send(self, batch: _Batch) -> None:
        try:
            rows, refused = list(batch.rows), list(batch.bad)
            while rows:
                try:
                    await self._put(batch.number, rows)
                    break
                except gmco.BadRequest as error:
                    place = _ROW_FIELD.match(error.field or "")
                    if place is None or int(place[1]) >= len(rows):
                        raise
                    bad = BadRow(rows.pop(int(place[1])).number, f"{error.code}: {error.message}")
                    if not self._options.skip_bad:
                        raise BadRowError(bad, self._source.unit) from error
                    refused.append(bad)
            self._done(batch.number, (len(rows), tuple(refused), batch.rows_end))
        finally:
            self._window.release_on_behalf_of(batch.number)

    async def _put(self, number: int, rows: Sequence[Row]) -> None:
        """Until it is written, or the cluster has written nothing for `give_up_s`."""
        options = self._options
        id = write_id(self._source.digest, options.kind, options.batch_rows, number)
        while True:
            try:
                if options.kind == "items":
                    items = [gmco.Item(r.id, r.vector, r.classes, r.metadata) for r in rows]
                    await self._client.put_items(items, options.ack, id, timeout_s=CALL_TIMEOUT_S)
                else:
                    users = [gmco.User(r.id, r.vector, r.classes, r.metadata) for r in rows]
                    await self._client.put_users(users, options.ack, id, timeout_s=CALL_TIMEOUT_S)
            except gmco.GmcoError as error:
                if error.code not in RETRY or trio.current_time() - self._moved_at > options.give_up_s:
                    raise
                self._pushed_back(error)
                await trio.sleep((error.retry_after_ms or 0) / 1000 + PAUSE_S)
            else:
                self._moved_at = trio.current_time()
                self._window.total_tokens = min(options.window, self._window.total_tokens + 1)
                return

    def _pushed_back(self, error: gmco.GmcoError) -> None:
        self.progress.retries += 1
        if isinstance(error, gmco.Overloaded):
            self.progress.pushbacks += 1
        self._window.total_tokens = max(1, int(self._window.total_tokens) // 2)
        self.progress.note = f"{error.code}: sending slower"
        self._changed(self.progress)

    def _done(self, number: int, counts: tuple[int, tuple[BadRow, ...], int]) -> None:
        """Counts a batch once every earlier one is written, so that the state is true whenever we stop."""
        progress = self.progress
        self._ready[number] = counts
        while (entry := self._ready.pop(progress.next_batch, None)) is not None:
            written, bad, rows_end = entry
            progress.next_batch += 1
            progress.written += written
            progress.bad += len(bad)
            progress.bad_rows.extend(bad[: max(0, BAD_ROWS_KEPT - len(progress.bad_rows))])
            progress.rows_done = rows_end
            progress.note = ""
        if self._state is not None and trio.current_time() - self._saved_at > SAVE_EVERY_S:
            self._saved_at = trio.current_time()
            self._state.write(progress)
        self._changed(progress)


def first_cause(error: BaseException) -> BaseException:
    """The one exception to report of a group: Ctrl-C before all others, then the first that is not a cancellation."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_cause(one) for one in error.exceptions]
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            return leaf
    return leaves[0]


@dataclass(frozen=True, slots=True)
class RowsSource:
    """Rows that are in memory already, as the demo makes them."""

    digest: str
    all_rows: Sequence[Row]
    unit: Unit = "row"

    @property
    def rows(self) -> int | None:
        """How many."""
        return len(self.all_rows)

    def read(self, start: int) -> Iterator[Row | BadRow]:
        """From number `start` on."""
        return iter(self.all_rows[start:])


def summary(progress: LoadProgress, elapsed_s: float) -> dict[str, Any]:
    """For `--output json`. `row` counts from 1, lines of a file, too."""
    return {
        "written": progress.written,
        "bad": progress.bad,
        "bad_rows": [{"row": bad.place, "reason": bad.reason} for bad in progress.bad_rows],
        "rows_done": progress.rows_done,
        "retries": progress.retries,
        "pushbacks": progress.pushbacks,
        "elapsed_s": round(elapsed_s, 3),
    }
