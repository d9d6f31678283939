"""The shell of one replica's election, beside voters that say what a test wants: what counts, and what ends when."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from node.election import Ask, Refuse, Tell, Would
from node.failover import Failover
from node.placement import Placement
from node.replicator import Replicator
from node.shard import ShardActor
from router.ports import NodeError
from storage.arrival import Arrival, arrival
from storage.batch import Batch
from storage.errors import DiskFullError
from storage.records import Kind, Mark
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import ABSENT, BRISK, Willing, change, leading, running


@on_trio
async def test_what_a_wrong_replica_says_counts_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        wrong, epoch = 0xBAD, 50
        told: list[list[Any]] = []

        class Noted(Willing):
            def __getitem__(self, name: str) -> Any:
                class Link:
                    async def call(self, op: str, body: Any, timeout_s: float) -> None:
                        await trio.lowlevel.checkpoint()
                        told.extend(body)

                return Link()

        failover._links = Noted(["b", "c"], {})  # type: ignore[assignment]
        assert actor.reign is not None
        reign, election = actor.reign, actor.election
        for kind, fields in (
            ("ask", [epoch, [9, 9], 0]),
            ("stand", [epoch, [9, 9], 9]),
            ("refuse", [epoch, 77, "promised", 0.0]),
            ("succeed", [9]),
        ):
            failover.on_peer("b", [[0, wrong, kind, *fields]])
        await trio.sleep(0.05)
        assert actor.reign is reign
        assert (election.promised, election.seen) == (1, 1)
        assert [message[2:4] + message[5:6] for message in told if message[2] != "leads"] == [
            ["refuse", epoch, "learner"]
        ] * 2
        # Nor do its answers open anything, where those of the replicas that are named do.
        named = dict(actor.placement.voters)
        actor.act(actor, election.renew(trio.current_time()))
        for kind in ("would", "promise"):
            for name in ("b", "c"):
                failover.on_peer(name, [[0, wrong, kind, 2]])
            await trio.sleep(0.02)
            assert (election.promised, actor.leads) == ((1, False) if kind == "would" else (2, False))
            for name in ("b", "c"):
                failover.on_peer(name, [[0, named[name], kind, 2]])
            with trio.fail_after(2):
                while not (election.promised == 2 if kind == "would" else actor.leads):
                    await trio.sleep(0.005)


@on_trio
async def test_a_write_that_waits_for_a_hand_over_goes_on_as_soon_as_it_is_given_up(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        actor.election.on_echo("b", trio.current_time() + 100.0)  # a lease for the length of this test
        assert actor.reign is not None
        actor.reign.progress.count("c", 0)
        async with trio.open_nursery() as nursery:

            async def hand_over() -> None:
                with pytest.raises(NodeError):
                    await failover.hand_over(actor, "c", 0.2)

            nursery.start_soon(hand_over)
            await trio.sleep(0.02)
            await actor.write([change(1)], "primary", b"1" * 16, 0.5)


@on_trio
async def test_a_successor_whose_log_has_parted_meanwhile_is_no_successor(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        assert actor.reign is not None
        progress = actor.reign.progress
        progress.count("c", 0)
        async with trio.open_nursery() as nursery:

            async def hand_over() -> None:
                with pytest.raises(NodeError) as caught:
                    await failover.hand_over(actor, "c", 0.2)
                assert caught.value.code == "no_successor"

            nursery.start_soon(hand_over)
            await trio.sleep(0.02)
            progress.positions.pop("c")  # as `Progress.found` does
            actor._tell()


@on_trio
async def test_a_placement_that_was_not_opened_is_not_opened_later(tmp_path: Path) -> None:
    """To let a voter in a primary stands again. When another wins, what it meant to open must be forgotten."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        links = failover._links
        failover._links = {}  # type: ignore[assignment]  # nobody hears that it stands
        actor.election.on_echo("c", trio.current_time())
        assert actor.reign is not None
        actor.reign.progress.count("c", actor.replica.position.sequence)
        failover.readmit(actor, "b", 0x111)
        await trio.sleep(0.02)
        assert not actor.leads
        # c leads epoch 2 and lets b in under yet another id; we follow it.
        newer = actor.placement.replaced("b", 0x222)
        assert actor.election.takes(5)
        actor.act(actor, actor.election.on_stream("c", 5, trio.current_time()))
        assert await actor.follow(5, epoch_record(5, actor.replica.position.sequence, newer.pack()))
        assert actor.placement == newer
        failover._links = links
        await leading(actor)
        assert actor.placement == newer


@on_trio
async def test_a_placement_whose_voters_did_not_promise_is_not_opened_by_a_later_election(
    tmp_path: Path,
) -> None:
    """`overlap`: between the settled epoch and the one that changes the voters no other may lie. Another may have led
    meanwhile, and changed them in ways that this log does not tell."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        links = failover._links
        failover._links = {}  # type: ignore[assignment]  # nobody hears that it stands
        actor.election.on_echo("c", trio.current_time())
        assert actor.reign is not None
        actor.reign.progress.count("c", actor.replica.position.sequence)
        before = actor.placement
        assert failover.change(actor, Placement(before.voters[::2]))
        await trio.sleep(0.02)
        assert not actor.leads
        failover._links = links
        await leading(actor)
        assert actor.placement == before


@on_trio
async def test_an_epoch_that_others_may_have_led_before_changes_no_voters(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        before = actor.placement
        await settle(actor)
        actor.election.seen += 3  # so far somebody has promised, perhaps to one who then led
        assert failover.change(actor, Placement(before.voters[::2]))
        await leading(actor)
        assert actor.placement == before
        await settle(actor)
        assert failover.change(actor, Placement(before.voters[::2]))
        await leading(actor)
        assert actor.placement.names == ("a", "c")


@on_trio
async def test_a_candidate_claims_only_what_is_on_its_disk(tmp_path: Path) -> None:
    """`log-compared`: what is being written may fail for want of room. Who had won by it would lead with a
    shorter log than it had said, and than those that voted for it have."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        actor.act(actor, actor.election.on_leader(9, trio.current_time()))
        actor.act(actor, actor.election.on_stream("b", 9, trio.current_time()))
        before, refuse = actor.replica.position, trio.Event()

        async def full(*_: Any) -> None:
            await refuse.wait()
            raise DiskFullError("no room")

        async def follow() -> None:
            with pytest.raises(DiskFullError):
                await actor.follow(9, epoch_record(9, before.sequence, actor.placement.pack()))

        actor._log_runner = full  # type: ignore[assignment]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked()
            now = trio.current_time() + 9.0
            told = [one.message for one in actor.election.on_timer(now) if isinstance(one, Tell)]
            assert [ask.last for ask in told if isinstance(ask, Ask)] == [before, before]
            (answer,) = actor.election.on_message("c", Ask(50, before), now)
            assert isinstance(answer, Tell)
            assert isinstance(answer.message, Refuse), "who is asked counts what may be there"
            refuse.set()


@on_trio
async def test_a_replica_whose_log_is_not_to_be_trusted_does_not_stand(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c")) as actor:
        actor.diverged = True
        actor.act(actor, actor.election.on_leader(9, trio.current_time()))
        deadline = actor.election.next_deadline
        await trio.sleep(deadline - trio.current_time() + 0.3)
        assert not actor.leads
        assert actor.election.next_deadline == deadline, "nor has it tried"


async def settle(actor: ShardActor) -> None:
    assert actor.reign is not None
    actor.election.on_echo("c", trio.current_time())
    actor.reign.progress.count("c", actor.replica.position.sequence)


@on_trio
async def test_a_voter_alone_takes_a_second_one_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        began = trio.current_time()
        assert failover.change(actor, Placement((*actor.placement.voters, ("b", 0xB))))
        await leading(actor)
        assert actor.placement.names == ("a", "b")
        assert trio.current_time() - began < BRISK.candidacy_s, "not only when it has waited in vain"


@on_trio
async def test_a_voter_is_asked_by_its_replica_and_votes_when_it_is_named(tmp_path: Path) -> None:
    """It may have been admitted while it was cut off: its own log then says that it is none."""
    async with running(tmp_path, ("a", "b", "c")) as actor:
        failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
        told: list[Any] = []

        class Noted(Willing):
            def __getitem__(self, name: str) -> Any:
                class Link:
                    async def call(self, op: str, body: Any, timeout_s: float) -> None:
                        await trio.lowlevel.checkpoint()
                        told.extend([name, *message] for message in body)

                return Link()

        failover._links = Noted(["b", "c"], {})  # type: ignore[assignment]
        # A new disk, as its log sees it: the placement names another replica of a.
        newer = actor.placement.replaced("a", 0x999)
        actor.act(actor, actor.election.on_leader(5, trio.current_time()))
        actor.act(actor, actor.election.on_stream("c", 5, trio.current_time()))
        assert await actor.follow(5, epoch_record(5, actor.replica.position.sequence, newer.pack()))
        actor.election._bound_until = 0.0
        mine, theirs = actor.replica.replica_id, ABSENT["b"]
        for to in (0x999, mine):
            failover.on_peer("b", [[0, theirs, "ask", 6, [5, 99], 0, to]])
            await trio.sleep(0.02)
        assert [message[3] for message in told if message[3] in ("refuse", "would")] == ["refuse", "would"]


@on_trio
async def test_the_only_voter_whose_promises_are_gone_writes_again_when_it_is_forced_to(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as actor:
        await actor.write([change(1)], "primary", b"1" * 16, 2.0)
    (tmp_path / "promises").unlink()
    async with running(tmp_path, lead=False) as actor:
        await trio.sleep(0.3)
        assert not actor.leads, "it cannot know what it has promised"
        follower = Replicator(actor, {}, Random(1))  # type: ignore[arg-type]
        assert "no vote" not in follower.state
        follower._state = "primary silent"
        assert "no vote" in follower.state, "and says so"
        actor.act(actor, actor.election.force(1_001, trio.current_time()))
        await leading(actor)
        await actor.write([change(2)], "primary", b"2" * 16, 2.0)
        assert actor.placement.is_voter("a", actor.replica.replica_id)
        for id_ in (1, 2):
            assert actor.replica.get(Kind.ITEM, id_) is not None


@on_trio
async def test_messages_go_on_after_a_crash_in_the_midst_of_sending(tmp_path: Path) -> None:
    async with running(tmp_path, ("a", "b", "c"), lead=False) as actor:
        other = Failover("a", {0: actor}, None, Hanging())  # type: ignore[arg-type]
        for told in (1, 2):
            with trio.move_on_after(0.02):
                async with trio.open_nursery() as nursery:
                    await nursery.start(other.run)
                    other.act(actor, [Tell("b", Would(told))])
                    # As a crash: the sender has been started and does not get to the end.
                    nursery.cancel_scope.cancel()
        with trio.move_on_after(0.05):
            async with trio.open_nursery() as nursery:
                await nursery.start(other.run)
                other.act(actor, [Tell("b", Would(3))])
                await trio.sleep(0.02)
                nursery.cancel_scope.cancel()
        assert [message[2:] for message in Hanging.sent if message[2] == "would"][-1:] == [["would", 3]]


class Hanging(dict[str, Any]):
    sent: ClassVar[list[Any]] = []

    def __missing__(self, name: str) -> Hanging:
        return self

    async def call(self, op: str, body: Any, timeout_s: float) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.extend(body)


def epoch_record(epoch: int, after: int, placement: bytes) -> Arrival:
    batch = Batch(epoch, after, 1)
    batch.add_mark(Mark.EPOCH, placement)
    came = arrival(b"".join(batch.blobs))
    assert came is not None
    return came


FIELD = st.one_of(
    st.none(), st.integers(-3, 3), st.integers(0, (1 << 64) - 1), st.text(max_size=3), st.floats(),
    st.lists(st.integers(0, (1 << 64) - 1), max_size=3), st.binary(max_size=3),
)  # fmt: skip
MESSAGE = st.builds(
    lambda shard, replica, kind, fields: [shard, replica, kind, *fields],
    st.just(0) | FIELD,
    st.sampled_from([0xB, 0xC]) | FIELD,
    st.sampled_from(["ask", "would", "stand", "promise", "refuse", "succeed", "leads"]) | FIELD,
    st.lists(FIELD, max_size=4),
)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(MESSAGE, max_size=4), max_size=8), st.booleans())
def test_rubbish_from_a_peer_never_ends_the_actor(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[list[Any]]], founding: bool
) -> None:
    async def main() -> None:
        path = tmp_path_factory.mktemp("rubbish")
        async with running(path, ("a", "b", "c"), lead=not founding) as actor:
            failover: Failover = actor.act.__self__  # type: ignore[attr-defined]
            for batch in batches:
                failover.on_peer("b", batch)
                await trio.lowlevel.checkpoint()
            await trio.sleep(0.06)

    trio.run(main)
