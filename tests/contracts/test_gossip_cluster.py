"""Whole agents with the real machine, in one process, over UDP and over TCP alone."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from gossip.effects import Event
from gossip.machine import Machine
from gossip.messages import State
from tests.unit.gossip.agents import Host, host, on_trio, until

every_way = pytest.mark.parametrize("udp", ["auto", "off"])


@asynccontextmanager
async def node(id: int, seeds: Sequence[Host] = (), **more: Any) -> AsyncIterator[Host]:
    names = [str(seed.address) for seed in seeds]
    async with host(id, machine=Machine, seeds=names, **more) as one:
        yield one


@asynccontextmanager
async def cluster(count: int, **more: Any) -> AsyncIterator[list[Host]]:
    """So many nodes that know of each other through the first."""
    async with AsyncExitStack() as stack:
        hosts: list[Host] = []
        for id in range(1, count + 1):
            hosts.append(await stack.enter_async_context(node(id, hosts[:1], **more)))
        ids = list(range(1, count + 1))
        await until(lambda: all(alive(one) == ids for one in hosts))
        yield hosts


def alive(one: Host) -> list[int]:
    return [member.id for member in one.agent.members() if member.state == State.ALIVE]


def state(one: Host, id: int) -> State | None:
    return next((member.state for member in one.agent.members() if member.id == id), None)


def clean(hosts: Sequence[Host]) -> bool:
    """Nothing of theirs was dropped or too large."""
    seen = [one.agent.statistics() for one in hosts]
    return not any(one.oversized or one.dropped or one.watch_errors for one in seen)


@every_way
@on_trio
async def test_three_find_each_other_and_their_facts(udp: str) -> None:
    async with cluster(3, udp=udp) as hosts:
        for one in hosts:
            one.agent.set_fact(b"zone", b"z%d" % one.agent.id)
            one.agent.set_hot(b"h%d" % one.agent.id)
        for one in hosts:
            for id in (1, 2, 3):
                await until(
                    lambda one=one, id=id: (
                        one.agent.facts(id).get(b"zone") == b"z%d" % id and one.agent.hot(id) == b"h%d" % id
                    )
                )
        hosts[1].agent.set_fact(b"zone", b"")
        await until(lambda: not any(b"zone" in one.agent.facts(2) for one in hosts))
        assert clean(hosts)


@every_way
@on_trio
async def test_one_that_dies_is_down_within_five_seconds_and_comes_back_with_its_next_boot(udp: str) -> None:
    async with cluster(2, udp=udp) as hosts:
        events: list[Event] = []
        hosts[0].agent.watch.append(events.append)
        async with node(3, hosts[:1], udp=udp) as third:
            await until(lambda: alive(third) == alive(hosts[0]) == alive(hosts[1]) == [1, 2, 3])
        died = trio.current_time()
        await until(lambda: state(hosts[0], 3) == state(hosts[1], 3) == State.DOWN)
        assert trio.current_time() - died < 5
        down = next(event for event in events if event.kind == "down")
        assert (down.id, down.boot) == (3, 1)
        async with node(3, hosts[1:], udp=udp, boot=2) as third:
            await until(lambda: alive(third) == alive(hosts[0]) == alive(hosts[1]) == [1, 2, 3])


@every_way
@on_trio
async def test_one_that_hangs_is_down_within_five_seconds(udp: str) -> None:
    """Its kernel still takes connections and packets, as that of a stopped process does."""
    async with cluster(2, udp=udp) as hosts:
        async with node(3, hosts[:1], udp=udp) as third:
            await until(lambda: alive(third) == alive(hosts[0]) == alive(hosts[1]) == [1, 2, 3])
        with socket.create_server(third.address), socket.socket(type=socket.SOCK_DGRAM) as mute:
            mute.bind(third.address)
            hung = trio.current_time()
            await until(lambda: state(hosts[0], 3) == state(hosts[1], 3) == State.DOWN, 10)
            assert trio.current_time() - hung < 5


@every_way
@on_trio
async def test_one_that_leaves_is_gone_without_a_suspicion(udp: str) -> None:
    async with cluster(2, udp=udp) as hosts:
        events: list[Event] = []
        hosts[0].agent.watch.append(events.append)
        async with node(3, hosts[:1], udp=udp) as third:
            await until(lambda: alive(third) == alive(hosts[0]) == alive(hosts[1]) == [1, 2, 3])
            await third.agent.leave()
        await until(lambda: alive(hosts[0]) == alive(hosts[1]) == [1, 2])
        assert [event.kind for event in events if event.id == 3 and event.kind != "fact"] == [
            "joined",
            "left",
        ]


@every_way
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        pytest.param({"keys": [b"o" * 32]}, "unknown_key", id="keys"),
        pytest.param({"cluster": "books"}, "other_cluster", id="ids"),
    ],
)
@on_trio
async def test_two_clusters_that_share_their_seeds_stay_two(
    udp: str, more: dict[str, Any], reason: str
) -> None:
    async with cluster(2, udp=udp) as ours, AsyncExitStack() as stack:
        theirs: list[Host] = []
        for id in (11, 12):
            theirs.append(await stack.enter_async_context(node(id, [*ours, *theirs], udp=udp, **more)))
        await until(lambda: all(alive(one) == [11, 12] for one in theirs))
        await trio.sleep(1.5)
        assert all([member.id for member in one.agent.members()] == [1, 2] for one in ours)
        assert all([member.id for member in one.agent.members()] == [11, 12] for one in theirs)
        assert set(ours[0].agent.statistics().dropped) == {reason}


@on_trio
async def test_a_node_that_udp_does_not_reach_is_a_member_like_others() -> None:
    async with cluster(2) as hosts:
        events: list[Event] = []
        for one in hosts:
            one.agent.watch.append(events.append)
        async with node(3, hosts[:1], udp="off") as mute:
            await until(lambda: alive(mute) == alive(hosts[0]) == alive(hosts[1]) == [1, 2, 3])
            mute.agent.set_fact(b"zone", b"z3")
            await until(lambda: all(one.agent.facts(3).get(b"zone") == b"z3" for one in hosts))
            await until(lambda: all(one.agent.statistics().by_stream == 1 for one in hosts), 15)
            assert not [event for event in events if event.kind == "down"]


@every_way
@on_trio
async def test_the_older_of_two_processes_with_one_id_hears_of_it(udp: str) -> None:
    async with cluster(3, udp=udp) as hosts, node(2, hosts[:1], udp=udp, boot=5):
        with trio.fail_after(10):
            await hosts[1].agent.superseded.wait()
        assert hosts[1].agent.superseded_by == 5


@on_trio
async def test_a_rotation_of_keys_disturbs_nobody() -> None:
    async with cluster(3) as hosts:
        events: list[Event] = []
        for one in hosts:
            one.agent.watch.append(events.append)
        old = hosts[0].agent.list_keys()[0].fingerprint
        for one in hosts:
            new = await one.agent.install_key(b"n" * 32)
        for one in hosts:
            await one.agent.use_key(new)
            await trio.sleep(0.3)
        for one in hosts:
            await one.agent.remove_key(old)
            await trio.sleep(0.3)
        assert not events
        assert clean(hosts)
