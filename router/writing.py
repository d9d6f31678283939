"""Writes: grouped by shard, sent to the shards' primaries, retried under the same write_id, never guessed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import trio

from router import requests
from router.errors import RequestError, known
from router.ports import Change, Cluster, NodeError, NodeGoneError, WriteAsk, WriteReply
from router.ring import shard_of
from storage.records import Operation

RETRY_S = 0.05
# A primary that has not answered for so long may be one no more; the same write_id makes it safe to ask another.
TRY_S = 2.5
NO_PRIMARY_S = 5.0
# What another try may settle: the primary changes, or is busy with the same write.
RETRIED = frozenset(
    {
        "no_primary",
        "no_lease",
        "outcome_unknown",
        "ack_timeout",
        "deadline_exceeded",
        "shutting_down",
        "unavailable",
    }
)

Error = tuple[str, str, int | None]


class Writer:
    """Takes parsed put and delete requests to the primaries."""

    def __init__(self, cluster: Cluster, deadline_s: float) -> None:
        self._cluster = cluster
        self._deadline_s = deadline_s

    async def put(self, request: requests.Put) -> dict[str, Any]:
        rows = zip(request.ids, request.vectors, request.classes, request.metadata, strict=True)
        changes = [
            Change(Operation.PUT, request.kind, id_, vector.tobytes(), classes, metadata)
            for id_, vector, classes, metadata in rows
        ]
        return await self._write(changes, request)

    async def delete(self, request: requests.Delete) -> dict[str, Any]:
        changes = [Change(Operation.DELETE, request.kind, id_, b"", (), b"") for id_ in request.ids]
        return await self._write(changes, request)

    async def _write(self, changes: list[Change], request: requests.Put | requests.Delete) -> dict[str, Any]:
        """One message per primary. All shards or an error that says how many took it; a retry settles the rest."""
        ack, write_id = request.ack, request.write_id or secrets.token_bytes(16)
        by_shard: dict[int, list[Change]] = {}
        for change in changes:
            by_shard.setdefault(shard_of(change.id, self._cluster.shard_count), []).append(change)
        limit_s = request.timeout_ms / 1000 if request.timeout_ms else self._deadline_s
        asks = [WriteAsk(shard, some, ack, write_id) for shard, some in by_shard.items()]
        replies = await _Try(self._cluster, trio.current_time() + limit_s).settle(asks)
        errors = [reply for reply in replies if reply.error]
        good = sorted(reply for reply in replies if not reply.error)
        if errors:
            code, message, retry_after_ms = _worst(errors)
            if len(by_shard) > 1:
                message += (
                    f" ({len(good)} of {len(by_shard)} shards took their part; "
                    "send the same again with the same write_id to settle the rest)"
                )
            raise RequestError(known(code), message, retry_after_ms=retry_after_ms)
        return {
            "written": len(changes),
            "session": [[r.shard, r.epoch, r.sequence] for r in good],
            "write_id": write_id,
        }


@dataclass(slots=True)
class _Part:
    """One shard's part of a write, and what is known of it so far."""

    ask: WriteAsk
    # A try may have been carried out whose answer we do not have.
    doubtful: bool = False
    # The last `ack_timeout`: a primary has it on its disk.
    written: Error | None = None
    tries: int = 0
    # The last refusal: code, message, retry_after_ms.
    error: Error = ("no_primary", "no primary has been tried", None)
    hint: str = ""
    asked: str = ""


class _Try:
    """One write on its way to the primaries of its shards, through elections and broken links, until its deadline."""

    def __init__(self, cluster: Cluster, deadline: float) -> None:
        self._cluster, self._deadline = cluster, deadline
        # Without a primary and without doubt there is nothing to wait for longer than an election takes.
        self._patience = min(deadline, trio.current_time() + NO_PRIMARY_S)
        self._replies: list[WriteReply] = []

    async def settle(self, asks: list[WriteAsk]) -> list[WriteReply]:
        """The primaries' outcome for each ask, in any order."""
        groups = self._grouped([_Part(ask) for ask in asks])
        if len(groups) == 1:  # no tasks for what needs none
            ((primary, parts),) = groups.items()
            left = await self._send(primary, parts)
            if not left:
                return self._replies
            groups = {primary: left}
        async with trio.open_nursery() as nursery:
            for primary, parts in groups.items():
                nursery.start_soon(self._go_on, primary, parts, nursery)
        return self._replies

    async def _go_on(self, primary: str, parts: list[_Part], nursery: trio.Nursery) -> None:
        """Tries that group; what is left of it goes on in groups of its own, so that none waits for another."""
        left = parts if parts[0].tries else await self._send(primary, parts)
        while left:
            await trio.sleep(
                max(0.0, min(RETRY_S * min(4, left[0].tries), self._deadline - trio.current_time()))
            )
            (primary, left), *others = self._grouped(left).items()
            for other, mine in others:
                nursery.start_soon(self._go_on_at, other, mine, nursery)
            left = await self._send(primary, left)

    async def _go_on_at(self, primary: str, parts: list[_Part], nursery: trio.Nursery) -> None:
        left = await self._send(primary, parts)
        if left:
            await self._go_on(primary, left, nursery)

    def _grouped(self, parts: list[_Part]) -> dict[str, list[_Part]]:
        groups: dict[str, list[_Part]] = {}
        for part in parts:
            part.asked = self._whom(part)
            groups.setdefault(part.asked, []).append(part)
        return groups

    def _whom(self, part: _Part) -> str:
        """Whom to ask next: whoever is said to lead; when that one has just failed us, its other voters in turn."""
        cluster, shard = self._cluster, part.ask.shard
        primary = cluster.primary(shard)
        if not part.tries:
            return primary
        voters = cluster.placement(shard).voters
        if part.error[0] == "ack_timeout" and primary == part.asked:
            return primary  # it has the records and waits on
        turn = part.tries % len(voters)
        for name in (part.hint, primary, *voters[turn:], *voters[:turn]):
            if name and name != part.asked and cluster.alive(name):
                return name
        return part.asked

    async def _send(self, primary: str, parts: list[_Part]) -> list[_Part]:
        """One message; what is settled goes to the replies, the rest is returned."""
        now = trio.current_time()
        left_s = min(self._deadline - now, TRY_S)
        asks = [part.ask for part in parts]
        replies: list[WriteReply] = []
        try:
            if left_s > 0:
                replies = await self._cluster.node(primary).write(asks, left_s)
        except NodeGoneError as error:
            self._note(parts, ("no_primary", f"the primary {primary} cannot be reached", None), error.sent)
        except NodeError as error:
            late = error.code == "deadline_exceeded"
            self._note(parts, (error.code, error.message, error.retry_after_ms), late)
        by_shard = {reply.shard: reply for reply in replies}
        left: list[_Part] = []
        for part in parts:
            part.tries += 1
            reply = by_shard.get(part.ask.shard)
            if reply is not None and reply.error is None:
                self._replies.append(reply)
                continue
            if reply is not None and reply.error is not None:
                part.error, part.hint = reply.error, reply.primary
                part.doubtful = part.doubtful or reply.error[0] == "outcome_unknown"
                part.written = reply.error if reply.error[0] == "ack_timeout" else part.written
            if part.error[0] in RETRIED and trio.current_time() < self._until(part):
                left.append(part)
            else:
                self._replies.append(WriteReply(part.ask.shard, 0, 0, _final(part)))
        return left

    def _until(self, part: _Part) -> float:
        if part.doubtful or part.written is not None or part.error[0] not in ("no_primary", "no_lease"):
            return self._deadline
        return self._patience

    @staticmethod
    def _note(parts: list[_Part], error: Error, doubtful: bool) -> None:
        for part in parts:
            part.error, part.hint = error, ""
            part.doubtful = part.doubtful or doubtful


def _final(part: _Part) -> Error:
    """A refusal of a later try, when an earlier one may have been carried out, does not prove absence.

    `ack_timeout` stays, whoever has refused since: it says that the records are written.
    """
    code, message, retry_after_ms = part.error
    if code in ("ack_timeout", "outcome_unknown"):
        return part.error
    if part.written is not None:
        return part.written
    if not part.doubtful:
        return part.error
    return (
        "outcome_unknown",
        f"the write may have been carried out before this: {message}; send the same again with the same write_id to learn "
        "or settle the outcome",
        retry_after_ms,
    )


def _worst(errors: list[WriteReply]) -> tuple[str, str, int | None]:
    """An unknown outcome outranks a refusal: it is what the app must act on."""
    known = [reply.error for reply in errors if reply.error]
    return next((error for error in known if error[0] == "outcome_unknown"), known[0])
