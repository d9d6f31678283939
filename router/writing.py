"""Writes: grouped by shard, sent to the shards' primaries, retried under the same write_id, never guessed."""

from __future__ import annotations

import secrets
from typing import Any

import trio

from router import requests
from router.errors import RequestError, known
from router.ports import Change, Cluster, NodeError, NodeGoneError, WriteAsk, WriteReply
from router.ring import shard_of
from storage.records import Operation

RETRY_S = 0.1


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
        asks: dict[str, list[WriteAsk]] = {}
        for shard, some in by_shard.items():
            primary = self._cluster.placement(shard).primary
            asks.setdefault(primary, []).append(WriteAsk(shard, some, ack, write_id))
        replies: list[WriteReply] = []
        deadline = trio.current_time() + (
            request.timeout_ms / 1000 if request.timeout_ms else self._deadline_s
        )

        async def one(primary: str, mine: list[WriteAsk]) -> None:
            replies.extend(await self._to_primary(primary, mine, deadline))

        if len(asks) == 1:
            await one(*next(iter(asks.items())))
        else:
            async with trio.open_nursery() as nursery:
                for primary, mine in asks.items():
                    nursery.start_soon(one, primary, mine)
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

    async def _to_primary(self, primary: str, asks: list[WriteAsk], deadline: float) -> list[WriteReply]:
        """The primary's outcome for each ask; a broken link is tried again, because write_ids make that safe."""
        sent = False
        while True:
            left = deadline - trio.current_time()
            try:
                if left > 0:
                    replies = await self._cluster.node(primary).write(asks, left)
                    return _doubtful(replies) if sent else replies
            except NodeGoneError as error:
                sent = sent or error.sent
                # A node that is down for good is not worth the whole deadline when nothing was sent.
                if not sent:
                    return _all(
                        asks,
                        "no_primary",
                        f"the primary {primary} is down: its shards answer reads and refuse writes",
                    )
            except NodeError as error:
                if error.code == "deadline_exceeded":
                    sent, left = True, 0
                elif not sent:
                    return _all(asks, error.code, error.message, error.retry_after_ms)
            if left <= 0:
                return _all(
                    asks,
                    "outcome_unknown",
                    f"the link to the primary {primary} broke before it answered; send the same again with the same "
                    "write_id to learn or settle the outcome",
                )
            await trio.sleep(min(RETRY_S, left))


def _all(
    asks: list[WriteAsk], code: str, message: str, retry_after_ms: int | None = None
) -> list[WriteReply]:
    return [WriteReply(ask.shard, 0, 0, (code, message, retry_after_ms)) for ask in asks]


def _doubtful(replies: list[WriteReply]) -> list[WriteReply]:
    """Refusals of a second try, when a first one may have been carried out: a refusal now does not prove absence.

    `ack_timeout` stays: it says that the records are written.
    """
    text = "a first try may have been carried out before this refusal: "
    return [
        reply._replace(error=("outcome_unknown", text + reply.error[1], reply.error[2]))
        if reply.error and reply.error[0] != "ack_timeout"
        else reply
        for reply in replies
    ]


def _worst(errors: list[WriteReply]) -> tuple[str, str, int | None]:
    """An unknown outcome outranks a refusal: it is what the app must act on."""
    known = [reply.error for reply in errors if reply.error]
    return next((error for error in known if error[0] == "outcome_unknown"), known[0])
