"""`deadline-travels` (docs/fan-out.md) over a real link: what nobody wants any more ends at the peer."""

from __future__ import annotations

from typing import Any

import outcome
import pytest
import trio

from node.frames import READS
from node.peerlink import PeerTimeoutError, RemoteError
from node.peerlistener import Later
from node.pending import Pending
from router.ports import NodeError
from tests.unit.node.peers import linked, on_trio, until


class Work(Pending[Any]):
    """A search that is under way at the peer."""

    taken_back = False

    def abandon(self) -> None:
        self.taken_back = True


class Peer:
    """Handlers whose work is settled by the test."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.ended: list[str] = []
        self.handlers: dict[str, Any] = {"search": self.search, "get": self.get, "write": self.write}

    def search(self, peer: str, body: Any) -> Later:
        work = Work()
        self.works.append(work)

        def begin(done: Any) -> Work:
            work.tell(done)
            return work

        return Later(begin, lambda value: [value])

    async def get(self, peer: str, body: Any) -> Any:
        return await self._sleep("get")

    async def write(self, peer: str, body: Any) -> Any:
        return await self._sleep("write")

    async def _sleep(self, op: str) -> Any:
        try:
            await trio.sleep(0.2)
        except trio.Cancelled:
            self.ended.append(f"{op} cancelled")
            raise
        self.ended.append(f"{op} done")


@on_trio
async def test_an_answer_that_comes_later_and_an_error_too() -> None:
    peer = Peer()
    async with linked(peer.handlers) as (link, listener):
        calls = [link.begin("search", None, 2.0) for _ in range(2)]
        await until(lambda: len(peer.works) == 2)
        peer.works[0].settle(outcome.Value("found"))
        assert await calls[0].wait() == ["found"]
        peer.works[1].settle(outcome.Error(NodeError("overloaded", "not now", 70)))
        with pytest.raises(RemoteError) as caught:
            await calls[1].wait()
        assert (caught.value.code, caught.value.retry_after_ms) == ("overloaded", 70)
        assert listener.statistics().peers == {"a": 0}


@on_trio
async def test_a_read_that_is_taken_back_ends_at_the_peer_and_a_write_goes_on() -> None:
    assert {"search", "get"} < READS
    peer = Peer()
    async with linked(peer.handlers) as (link, listener):
        search = link.begin("search", None, 2.0)
        with trio.move_on_after(0.05):
            await link.call("get", None, 2.0)
        with trio.move_on_after(0.05):
            await link.call("write", None, 2.0)
        search.cancel()
        search.cancel()
        await until(lambda: peer.works[0].taken_back)
        await until(lambda: len(peer.ended) == 2)
        assert peer.ended == ["get cancelled", "write done"]
        await until(lambda: listener.statistics().peers == {"a": 0})
        assert listener.statistics().cancelled == 2
        assert link.statistics().cancelled == 2
        # Ids that nobody knows, or whose answer is on its way, change nothing.
        link.begin("search", None, 2.0)
        await until(lambda: len(peer.works) == 2)
        peer.works[1].settle(outcome.Value(1))
        assert not peer.works[1].taken_back


@on_trio
async def test_what_runs_for_a_peer_that_goes_away_is_taken_back() -> None:
    peer = Peer()
    async with linked(peer.handlers) as (link, _):
        link.begin("search", None, 2.0)
        await until(lambda: len(peer.works) == 1)
        assert link._conn is not None
        link._conn.close("gone")
        await until(lambda: peer.works[0].taken_back)


@on_trio
async def test_of_a_call_that_times_out_the_peer_is_told_nothing_for_it_knows() -> None:
    peer = Peer()
    async with linked(peer.handlers) as (link, _):
        with pytest.raises(PeerTimeoutError):
            await link.call("search", None, 0.05)
        assert link.statistics().cancelled == 0


@on_trio
async def test_bytes_of_reads_are_counted_and_no_others() -> None:
    peer = Peer()
    async with linked(peer.handlers | {"who": lambda peer, body: peer}) as (link, _):
        await link.call("who", None, 2.0)
        assert link.statistics().read_bytes_out == link.statistics().read_bytes_in == 0
        call = link.begin("search", b"q" * 1_000, 2.0)
        await until(lambda: len(peer.works) == 1)
        peer.works[0].settle(outcome.Value(b"h" * 2_000))
        await call.wait()
        assert 1_000 < link.statistics().read_bytes_out < 1_050
        assert 2_000 < link.statistics().read_bytes_in < 2_050
