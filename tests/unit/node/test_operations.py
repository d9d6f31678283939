"""What operators ask: events by number and as they come, members forgotten, keys changed only where it is safe."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from gossip.errors import KeyringError
from gossip.keyring import KeyView
from gossip.messages import State
from node import facts
from node.history import EVENTS_MAX, History
from node.keyrings import Keyrings
from node.operations import Operations
from node.peerlink import PeerGoneError, RemoteError
from router.errors import RequestError
from router.operating import ForgetNode, Keyring
from tests.unit.node.peers import on_trio
from tests.unit.node.test_members import pair


@on_trio
async def test_events_are_numbered_and_named_when_they_are_read() -> None:
    hub, members, _ = pair()
    history = History(members, wall=lambda: 1_000.0)
    hub.join(3)
    found = await history.read(0, 0.0)
    assert [(one["kind"], one["node"]) for one in found["events"]] == [("joined", f"{3:016x}")]
    hub.nodes[-1].set_fact(facts.NODE, facts.pack_node(members.own))
    hub.put(2, "down", state=State.DOWN)
    found = await history.read(found["next"], 0.0)
    assert [(one["sequence"], one["kind"], one["node"]) for one in found["events"]] == [(2, "down", "b")]
    assert found["next"] == 2
    assert await history.read(2, 0.0) == {"events": [], "next": 2, "lost": 0}
    # A number from an earlier start of this node: from the beginning.
    assert (await history.read(99, 0.0))["next"] == 2


@on_trio
async def test_the_ring_forgets_and_says_how_many() -> None:
    hub, members, _ = pair()
    history = History(members)
    for _ in range(EVENTS_MAX + 5):
        hub.put(2, "refuted")
    found = await history.read(2, 0.0)
    assert (len(found["events"]), found["lost"], found["next"]) == (EVENTS_MAX, 3, EVENTS_MAX + 5)


@on_trio
async def test_a_reader_waits_for_what_comes_and_a_node_that_stops_lets_it_go() -> None:
    _, members, b = pair()
    history = History(members)
    answers: list[dict[str, Any]] = []

    async def read(after: int) -> None:
        answers.append(await history.read(after, 60.0))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0)
            await trio.testing.wait_all_tasks_blocked()
            b.set_fact(b"node", facts.pack_node(members.own))  # no event for operators
            await trio.testing.wait_all_tasks_blocked()
            assert not answers
            b.set_fact(facts.DEGRADED, b"a slow disk")
        (found,) = answers
        assert [(one["kind"], one["reason"]) for one in found["events"]] == [("degraded", "a slow disk")]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 1)
            await trio.testing.wait_all_tasks_blocked()
            history.close()
        assert answers[1]["events"] == []
        await read(1)


class FakeParts:
    name, boot = "a", 1

    def __init__(self, members: Any) -> None:
        self.members = members


@on_trio
async def test_only_the_dead_are_forgotten() -> None:
    hub, members, _ = pair()
    operations = Operations(FakeParts(members), History(members), None, None)  # type: ignore[arg-type]
    for name, code in (("nobody", "unknown_node"), ("b", "refused"), ("a", "refused")):
        with pytest.raises(RequestError) as caught:
            operations.handle(ForgetNode(name))
        assert caught.value.code == code
    hub.put(2, "down", state=State.DOWN)
    assert operations.handle(ForgetNode("b")) == {"node": "b", "forgotten": f"{2:016x}"}
    assert "b" not in members
    await trio.lowlevel.checkpoint()


class FakeKeys:
    """A keyring; the first key is the primary. Implements `node.keyrings.Keys`."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def list_keys(self) -> list[KeyView]:
        return [KeyView(name, primary=i == 0, derived=False) for i, name in enumerate(self.names)]

    async def install_key(self, secret: bytes) -> str:
        await trio.lowlevel.checkpoint()
        self.names.append(secret.hex()[:4])
        return self.names[-1]

    async def use_key(self, fingerprint: str) -> None:
        await trio.lowlevel.checkpoint()
        self._known(fingerprint)
        self.names.remove(fingerprint)
        self.names.insert(0, fingerprint)

    async def remove_key(self, fingerprint: str) -> None:
        await trio.lowlevel.checkpoint()
        self._known(fingerprint)
        self.names.remove(fingerprint)

    def _known(self, fingerprint: str) -> None:
        if fingerprint not in self.names:
            raise KeyringError("unknown_key", f"no key {fingerprint}")


class FakeLink:
    """Calls the other node's handler, as its listener would."""

    def __init__(self, keyrings: Keyrings | None) -> None:
        self.keyrings = keyrings

    async def call(self, op: str, body: Any, timeout_s: float) -> Any:
        assert op == "keyring"
        if self.keyrings is None:
            raise PeerGoneError("b", "connection refused", sent=False)
        try:
            return await self.keyrings.handle_peer("a", body)
        except KeyringError as error:
            raise RemoteError(error.code, error.message) from error


class FakeLinks:
    def __init__(self) -> None:
        self.links: dict[str, FakeLink] = {}

    async def add(self, name: str) -> FakeLink:
        await trio.lowlevel.checkpoint()
        return self.links[name]


def ask(action: Any, key: bytes = b"", fingerprint: str = "") -> Keyring:
    return Keyring(action, key, fingerprint, None)


def keyrings_of_two() -> tuple[Any, FakeKeys, FakeKeys, Keyrings, FakeLinks]:
    hub, members, _ = pair()
    links = FakeLinks()
    a, b = FakeKeys("k1"), FakeKeys("k1")
    here = Keyrings(a, members, links)  # type: ignore[arg-type]
    links.links["b"] = FakeLink(Keyrings(b, members, links))  # type: ignore[arg-type]
    return hub, a, b, here, links


@on_trio
async def test_a_key_is_rotated_on_all_nodes_step_by_step() -> None:
    _, a, b, keyrings, _ = keyrings_of_two()
    reply = await keyrings.apply(ask("install", bytes.fromhex("aabb" + "00" * 30)))
    assert [one["node"] for one in reply["nodes"]] == ["a", "b"]
    assert a.names == b.names == ["k1", "aabb"]
    with pytest.raises(RequestError, match="may still seal with k1"):
        await keyrings.apply(ask("remove", fingerprint="k1"))
    await keyrings.apply(ask("use", fingerprint="aabb"))
    assert a.names == b.names == ["aabb", "k1"]
    reply = await keyrings.apply(ask("remove", fingerprint="k1"))
    assert a.names == b.names == ["aabb"]
    assert reply["nodes"][1] == {
        "node": "b",
        "keys": [{"fingerprint": "aabb", "primary": True, "derived": False}],
    }


@on_trio
async def test_use_is_refused_while_an_alive_node_could_not_read() -> None:
    hub, a, b, keyrings, links = keyrings_of_two()
    a.names.append("k2")
    with pytest.raises(RequestError, match="b would not be able to read") as caught:
        await keyrings.apply(ask("use", fingerprint="k2"))
    assert caught.value.code == "refused"
    b.names.append("k2")
    links.links["b"].keyrings = None  # alive and silent: nobody knows what it can read
    with pytest.raises(RequestError, match="b would not be able to read"):
        await keyrings.apply(ask("use", fingerprint="k2"))
    assert a.names == ["k1", "k2"]
    hub.put(2, "down", state=State.DOWN)  # the dead are not waited for
    await keyrings.apply(ask("use", fingerprint="k2"))
    assert a.names == ["k2", "k1"]


@on_trio
async def test_what_one_node_refuses_is_told_beside_what_others_did() -> None:
    _, a, b, keyrings, links = keyrings_of_two()
    a.names.append("k2")
    reply = await keyrings.apply(ask("remove", fingerprint="k2"))
    assert reply["nodes"][1] == {"node": "b", "error": "unknown_key", "message": "no key k2"}
    assert a.names == b.names == ["k1"]
    links.links["b"].keyrings = None
    reply = await keyrings.apply(ask("list"))
    assert reply["nodes"][1]["error"] == "unavailable"
