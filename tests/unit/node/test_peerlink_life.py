"""The life of a peer link: who is let in, drops, reconnects, silence."""

from __future__ import annotations

import re
import socket
import time
from typing import Any

import pytest
import trio

from node.config import Address
from node.peerlink import (
    PeerGoneError,
    PeerLimits,
    PeerLink,
    PeerListener,
    RemoteError,
)
from tests.unit.node.peers import ANY, HANDLERS, QUICK, hello, linked, on_trio, until


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": "other"}, "other_cluster: .*different cluster"),
        ({"cluster_id": "1e" * 16}, "other_cluster: .*another cluster of the same name"),
        ({"shard_count": 100}, "different shard_count"),
        ({"dim": 1024}, "different dim"),
        ({"metric": "dot"}, "different metric"),
        ({"node": "a"}, 'two nodes are named "a"'),
        ({"format_min": 9, "format_max": 9}, "no common format"),
    ],
)
@on_trio
async def test_strangers_are_refused_and_told_why(changes: dict[str, Any], said: str) -> None:
    ours, theirs = hello("a", cluster_id="0f" * 16), hello(**{"node": "b"} | changes)
    async with linked(mine=ours, theirs=theirs, connect=False) as (link, listener):
        await until(lambda: re.search(said, link.statistics().last_error))
        assert listener.statistics().refused_hellos >= 1
        with pytest.raises(PeerGoneError, match=said) as caught:
            await link.call("echo", 1, 1.0)
        assert not caught.value.sent


@on_trio
async def test_unknown_names_and_wrong_addresses_are_refused() -> None:
    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY, known={"c"})
        address = await nursery.start(listener.run)
        stranger = PeerLink(lambda: address, hello("a"))
        lost = PeerLink(lambda: address, hello("c"), expect="d")
        await nursery.start(stranger.run)
        await nursery.start(lost.run)
        await until(lambda: "not heard of" in stranger.statistics().last_error)
        await until(lambda: 'expected "d", found "b"' in lost.statistics().last_error)
        nursery.cancel_scope.cancel()


@on_trio
async def test_a_drop_tells_every_waiter_and_the_link_comes_back() -> None:
    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY)
        with trio.fail_after(10):
            address = await nursery.start(listener.run)
            link = PeerLink(lambda: address, hello("a"), expect="b")
            await nursery.start(link.run)
            await link.wait_connected()
            told: list[bool] = []

            async def ask() -> None:
                with pytest.raises(PeerGoneError) as caught:
                    await link.call("slow", 60_000, 60.0)
                told.append(caught.value.sent)

            async with trio.open_nursery() as askers:
                for _ in range(5):
                    askers.start_soon(ask)
                await until(lambda: listener.statistics().peers == {"a": 5})
                for session in listener._peers.values():
                    session.conn.close("the test pulls the plug")
            assert told == [True] * 5
            await link.wait_connected()
            assert await link.call("echo", 7, 1.0) == 7
            assert link.statistics().connects == 2
        nursery.cancel_scope.cancel()


@on_trio
async def test_a_peer_that_was_down_is_found_when_it_comes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with trio.open_nursery() as nursery:
        link = PeerLink(lambda: Address("127.0.0.1", port), hello("a"))
        await nursery.start(link.run)
        with pytest.raises(PeerGoneError):
            await link.call("echo", 1, 1.0)
        await until(lambda: link.statistics().failed_connects >= 2)
        listener = PeerListener(HANDLERS, hello("b"), listen=Address("127.0.0.1", port))
        await nursery.start(listener.run)
        with trio.fail_after(5):
            await link.wait_connected()
        assert await link.call("echo", 1, 1.0) == 1
        nursery.cancel_scope.cancel()


@on_trio
async def test_idle_links_live_by_heartbeats() -> None:
    async with linked(limits=QUICK) as (link, listener):
        await trio.sleep(1.0)
        assert link.statistics().connects == 1
        assert listener.statistics().accepted == 1
        assert await link.call("echo", 1, 1.0) == 1


@on_trio
async def test_a_newer_process_replaces_an_older_one() -> None:
    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY)
        address = await nursery.start(listener.run)
        old = PeerLink(lambda: address, hello("a", boot=1))
        await nursery.start(old.run)
        await old.wait_connected()
        new = PeerLink(lambda: address, hello("a", boot=2))
        await nursery.start(new.run)
        await new.wait_connected()
        await until(lambda: "a newer process" in old.statistics().last_error)
        assert await new.call("echo", 1, 1.0) == 1
        nursery.cancel_scope.cancel()


@on_trio
async def test_a_stall_of_ours_is_not_the_peers_silence() -> None:
    async with linked(limits=QUICK) as (link, _):
        for _ in range(3):
            time.sleep(0.6)  # noqa: ASYNC251 - the stall is what is tested
            await trio.sleep(0.02)
        assert await link.call("echo", 1, 1.0) == 1
        assert link.statistics().connects == 1


@on_trio
async def test_an_error_that_is_not_utf8_gets_through() -> None:
    def badly(peer: str, body: Any) -> Any:
        error = OSError("file \udcff")
        error.code = "damaged"  # type: ignore[attr-defined]
        raise error

    async with linked({"badly": badly}) as (link, _):
        with pytest.raises(RemoteError, match=r"file \?") as caught:
            await link.call("badly", None, 1.0)
        assert caught.value.code == "damaged"


@on_trio
async def test_a_listener_takes_only_so_many_connections() -> None:
    limits = PeerLimits(connections=1)
    async with linked(listener_limits=limits) as (link, listener):
        other = await trio.open_tcp_stream(*(link.address or ANY))
        async with other:
            with trio.fail_after(2):
                assert await other.receive_some(10) == b""
        assert listener.statistics().refused_connections == 1
        assert await link.call("echo", 1, 1.0) == 1


@on_trio
async def test_a_peer_that_moves_is_found_at_once_and_a_lost_connection_is_told() -> None:
    lost: list[str] = []
    async with trio.open_nursery() as nursery:
        with trio.fail_after(10):
            first = PeerListener(HANDLERS, hello("b"), listen=ANY)
            places: list[Address | None] = [None]
            link = PeerLink(lambda: places[-1], hello("a"), expect="b", lost=lambda: lost.append("b"))
            await nursery.start(link.run)
            await until(lambda: "not known yet" in link.statistics().last_error)
            places.append(await nursery.start(first.run))
            link.look_again()
            await link.wait_connected()
            # It has moved: the old connection is left, and nobody is told that it was lost.
            second = PeerListener(HANDLERS, hello("b", boot=2), listen=ANY)
            places.append(await nursery.start(second.run))
            link.look_again()
            await until(lambda: link.connected and link.address == places[-1])
            assert await link.call("echo", 1, 1.0) == 1
            assert lost == []
            link.look_again()  # nothing has changed: nothing happens
            for session in second._peers.values():
                session.conn.close("the test pulls the plug")
            await until(lambda: lost == ["b"])
        nursery.cancel_scope.cancel()


@on_trio
async def test_gossip_comes_in_by_the_peer_port_and_a_closed_node_lets_nobody_else_in() -> None:
    heard: list[bytes] = []

    async def gossip(stream: trio.abc.Stream) -> None:
        heard.append(bytes(await stream.receive_some(10)))

    async with trio.open_nursery() as nursery:
        listener = PeerListener(HANDLERS, hello("b"), listen=ANY, gossip=gossip)
        listener.closed = "b is starting"
        with trio.fail_after(10):
            address = await nursery.start(listener.run)
            async with await trio.open_tcp_stream(*address) as stream:
                await stream.send_all(b"GMCOgosshello")
                assert await stream.receive_some(10) == b""
            assert heard == [b"hello"]
            link = PeerLink(lambda: address, hello("a"))
            await nursery.start(link.run)
            await until(lambda: "b is starting" in link.statistics().last_error)
            listener.closed = ""
            link.look_again()
            await link.wait_connected()
        nursery.cancel_scope.cancel()
