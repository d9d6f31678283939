"""Clients that write and read while things break, and what must hold of the history that they record.

Each writer has keys of its own and writes each of them in order, so for a key there is one truth: the value found in the end
is one that was sent, and not older than the last that was acknowledged.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import gmco

DIM = 16
KEYS = 40
TIMEOUT_S = 15.0
# Elections, catching up and offering again included.
SETTLE_S = 60.0


@dataclass(slots=True)
class Key:
    """sent: the greatest value that may be there. acknowledged: the least that must be; deleted counts as a value."""

    sent: int = 0
    acknowledged: int = 0
    # value → whether it is a delete
    deletes: set[int] = field(default_factory=set)
    session: tuple[tuple[int, int, int], ...] = ()
    # Of what ack=quorum or all said: session reads are guaranteed across failovers only for these.
    read_at_least: int = 0


class Writer(threading.Thread):
    """Puts, deletes and reads its own keys until told to stop. `problems`: what must not have happened."""

    def __init__(self, urls: Sequence[str], number: int, stop: threading.Event, acks: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.urls, self.number, self.stop_event, self.acks = list(urls), number, stop, list(acks)
        self.random = random.Random(number)
        self.keys: dict[int, Key] = {number * 1_000 + i: Key() for i in range(KEYS)}
        self.problems: list[str] = []
        self.writes = self.reads = self.failed_writes = 0
        self.failed_reads: list[str] = []
        self.gaps: list[float] = []

    def run(self) -> None:
        self.random.shuffle(self.urls)
        try:
            with gmco.connect_blocking(self.urls, timeout_s=TIMEOUT_S) as client:
                last = time.monotonic()
                while not self.stop_event.is_set():
                    id_ = self.random.choice(list(self.keys))
                    if self.random.random() < 0.3:
                        self._read(client, id_)
                    elif self._write(client, id_):
                        now = time.monotonic()
                        self.gaps.append(now - last)
                        last = now
        except BaseException as error:
            self.problems.append(f"writer {self.number} ended: {error!r}")
            raise

    def _write(self, client: gmco.BlockingClient, id_: int) -> bool:
        key = self.keys[id_]
        key.sent += 1
        value, ack = key.sent, self.random.choice(self.acks)
        delete = self.random.random() < 0.1
        if delete:
            key.deletes.add(value)
        try:
            if delete:
                written = client.delete_items([id_], ack=ack)
            else:
                vector = [self.random.uniform(-1, 1) for _ in range(DIM)]
                written = client.put_items([gmco.Item(id_, vector, (), {"value": value})], ack=ack)
        except gmco.GmcoError:
            self.failed_writes += 1
            return False
        key.acknowledged = value
        if ack != "primary":
            key.read_at_least, key.session = value, tuple(written.session)
        self.writes += 1
        return True

    def _read(self, client: gmco.BlockingClient, id_: int) -> None:
        key = self.keys[id_]
        try:
            (found,) = client.get_items([id_], session=key.session)
        except gmco.GmcoError as error:
            self.failed_reads.append(f"{error.code}: {error}")
            return
        self.reads += 1
        self._check(id_, found, key.read_at_least, "read-your-writes")

    def _check(self, id_: int, found: gmco.Record | None, least: int, law: str) -> None:
        key = self.keys[id_]
        if found is None:
            later = [value for value in key.deletes if value >= least]
            if least and not later:
                self.problems.append(f"{law}: {id_} is gone, {least} was acknowledged")
            return
        value = found.metadata["value"]
        if value < least:
            self.problems.append(f"{law}: {id_} has {value}, {least} was acknowledged")
        if value > key.sent or value in key.deletes:
            self.problems.append(f"{law}: {id_} has {value}, which nobody wrote")

    def check_end(self, client: gmco.BlockingClient) -> None:
        """After everything has healed: nothing acknowledged is lost, and what was deleted stays deleted."""
        ids = list(self.keys)
        for id_, found in zip(ids, client.get_items(ids), strict=True):
            self._check(id_, found, self.keys[id_].acknowledged, "acknowledged")


def replicas_differ(client: gmco.BlockingClient) -> str:
    """Why not all replicas hold the same yet; empty when they do."""
    found = client.shards()
    by_shard: dict[int, set[tuple[int, int, str, str]]] = {}
    for row in found["replicas"]:
        by_shard.setdefault(row["shard"], set()).add(
            (row["epoch"], row["sequence"], row["digests"]["items"], row["digests"]["users"])
        )
    if found["silent"]:
        return f"{found['silent']} did not answer"
    leaders = {row["shard"] for row in found["replicas"] if row["role"] == "primary"}
    if leaders != set(by_shard):
        return f"shards {set(by_shard) - leaders} have no primary"
    apart = {shard: sorted(states) for shard, states in by_shard.items() if len(states) > 1}
    return f"replicas differ: {apart}" if apart else ""


def wait_alike(client: gmco.BlockingClient) -> None:
    """Until all replicas hold the same; fails when they do not in a while."""
    deadline = time.monotonic() + SETTLE_S
    while why := replicas_differ(client):
        assert time.monotonic() < deadline, why
        time.sleep(0.1)
