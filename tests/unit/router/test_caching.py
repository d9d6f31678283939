"""The caches around a coordinator: docs/caching.md, law by law, in virtual time."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import trio

from router.caching import covers, without
from router.errors import RequestError
from router.wire import Columns, Kept
from tests.unit.router.cachelab import Lab, play


def _vector(reply: dict[str, Any]) -> float:
    return float(reply["hits"].scores[0])


def _of(lab: Lab, user_id: int = 1) -> float:
    return float(np.frombuffer(lab.users[user_id].vector, np.float16)[0])


def test_a_hit_is_answered_at_once_and_is_what_was_computed() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        first = await lab.ask()
        assert type(first) is Kept
        assert lab.at_once() is first
        assert lab.at_once(timeout_ms=3.0) is first
        assert lab.at_once(2) is None
        await lab.ask(k=4)
        assert lab.searches == 2

    play(scene)


def test_errors_partial_and_stale_answers_are_not_kept() -> None:
    async def scene() -> None:
        lab = Lab(store=True)
        for _ in range(2):
            with pytest.raises(RequestError, match="unknown_user"):
                await lab.ask()
        lab.write_user(1)
        lab.failed = {0: "damaged"}
        assert (await lab.ask())["coverage"]["missing"] == [0]
        lab.failed, lab.age_ms = {}, 5_000
        assert (await lab.ask())["stale_ms"] == 5_000
        assert not lab.kept
        assert not isinstance(await lab.ask(), Kept)
        lab.age_ms = 0
        assert isinstance(await lab.ask(), Kept)

    play(scene)


def test_identical_requests_are_computed_once_and_others_beside_them() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        async with trio.open_nursery() as nursery:
            for i in range(60):
                nursery.start_soon(lab.ask, 1, 3 + i % 2)
        assert lab.searches == 2
        assert lab.caches.statistics()["flights"]["shared"] == 58

    play(scene)


def test_an_unknown_user_is_told_to_all_who_wait_and_to_nobody_later() -> None:
    async def scene() -> None:
        lab = Lab()
        codes: list[str] = []

        async def ask() -> None:
            try:
                await lab.ask()
            except RequestError as error:
                codes.append(error.code)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert codes == ["unknown_user"] * 20
        assert lab.looked_up == 1
        lab.write_user(1)
        await lab.ask()

    play(scene)


def test_who_is_cancelled_hands_on_and_who_waits_keeps_its_own_deadline() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        lab.delay_s = 0.1
        whole: list[float] = []
        late: list[float] = []
        began = trio.current_time()

        async def ask(timeout_ms: float) -> None:
            try:
                reply = await lab.ask(timeout_ms=timeout_ms)
            except RequestError as error:
                assert error.code in ("deadline_exceeded", "unavailable")
                late.append(trio.current_time() - began)
            else:
                assert reply["coverage"]["missing"] == []
                whole.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as leader:
                async with trio.open_nursery() as inner:
                    inner.start_soon(ask, 5_000.0)
                    await trio.sleep(0.15)
                    nursery.start_soon(ask, 5_000.0)
                    nursery.start_soon(ask, 5_000.0)
                    nursery.start_soon(ask, 100.0)
                    await trio.sleep(0.01)
                    leader.cancel()
        # Whoever of the three went on: the short one has not waited past its time, the others got a whole answer, once.
        assert [round(at, 2) for at in late] == [0.25]
        assert len(whole) == 2
        assert max(whole) < 0.6
        assert lab.caches.statistics()["flights"]["handed_on"] >= 2

    play(scene)


def test_what_had_less_time_is_not_good_enough_for_who_has_more() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        lab.delay_s = 0.02
        lab.failed = {0: "deadline_exceeded"}
        answers: list[dict[str, Any]] = []

        async def ask(timeout_ms: float) -> None:
            answers.append(await lab.ask(timeout_ms=timeout_ms))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, 60.0)
            await trio.sleep(0.01)
            nursery.start_soon(ask, 5_000.0)
            await trio.sleep(0.04)
            lab.failed = {}
        assert [one["coverage"]["missing"] for one in answers] == [[0], []]

    play(scene)


def test_a_write_through_this_node_is_seen_at_once() -> None:
    async def scene() -> None:
        lab = Lab(store=True)
        lab.write_user(1)
        before = _vector(await lab.ask())
        reply = await lab.put_users(2, 1, 3)
        assert _vector(await lab.ask()) == _of(lab) != before
        assert reply["written"] == 3
        # All three are kept: their versions are known exactly, not as those of the last of the write.
        for user in (1, 2, 3):
            await lab.ask(user)
            assert lab.at_once(user) is not None

    play(scene)


def test_who_asks_after_a_write_does_not_join_who_asked_before_it() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        lab.delay_s = 0.1
        seen: list[float] = []

        async def ask() -> None:
            seen.append(_vector(await lab.ask()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.05)
            await lab.put_users(1)
            await ask()
        assert seen[-1] == _of(lab)
        assert _vector(await lab.ask()) == _of(lab)

    play(scene)


def test_a_lagging_replica_does_not_fill_the_caches_with_what_was_before_a_write() -> None:
    async def scene() -> None:
        lab = Lab(store=True)
        lab.write_user(1)
        lab.lag()
        lab.age_ms = 900
        lab.write_user(1)
        await lab.ask()  # begun after the change was told, answered from before it
        assert not lab.kept
        lab.old, lab.age_ms = None, 0
        assert _vector(await lab.ask()) == _of(lab)
        assert len(lab.kept) == 2

    play(scene)


def test_ones_own_write_is_read_from_a_replica_that_has_it_or_without_an_error() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        lab.lag()
        await lab.put_users(1)
        assert not isinstance(await lab.ask(), Kept)  # nobody has it: an answer all the same, not kept
        lab.old = None
        assert _vector(await lab.ask()) == _of(lab)

    play(scene)


def test_a_deleted_item_is_gone_at_once_however_the_replicas_lag() -> None:
    async def scene() -> None:
        lab = Lab(store=True)
        lab.write_user(1)
        assert 1 in (await lab.ask())["hits"].ids
        lab.lag()
        lab.age_ms = 500
        await lab.delete_items(1)
        for _ in range(2):
            assert 1 not in (await lab.ask())["hits"].ids
        lab.old, lab.age_ms = None, 0
        await trio.sleep(5)
        assert (await lab.ask())["hits"].ids.tolist() == [2, 3, 4]

    play(scene)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_delete_that_is_told_ends_what_holds_the_item(when: str) -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        lab.delay_s = 0.1
        if when == "after":
            await lab.ask()
        if when == "before":
            lab.lag()  # and still brings the item, to who asks after the news
            lab.age_ms = 300
            lab.caches.item_deleted(2)
        async with trio.open_nursery() as nursery:
            if when != "after":
                nursery.start_soon(lab.ask)
                await trio.sleep(0.15)
            if when != "before":
                lab.items.discard(2)
                lab.caches.item_deleted(2)
        assert lab.at_once() is None

    play(scene)


def test_nothing_kept_is_used_while_a_primary_is_silent_and_it_is_afterwards() -> None:
    async def scene() -> None:
        lab = Lab(store=True)
        lab.write_user(1)
        await lab.ask()
        lab.is_current = False
        lab.write_user(1, told=False)  # nobody could tell
        assert _vector(await lab.ask()) == _of(lab)
        searches = lab.searches
        assert _vector(await lab.ask()) == _of(lab)
        assert lab.searches == searches  # L1's answer, revalidated
        assert lab.caches.statistics()["l1"]["revalidated"] >= 2
        lab.is_current = True
        assert lab.at_once() is not None

    play(scene)


def test_after_a_drop_nothing_from_before_is_used() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        lab.delay_s = 0.1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lab.ask, 1, 3)
            await trio.sleep(0.05)
            lab.write_user(1, told=False)
            lab.caches.drop_all()
        assert _vector(await lab.ask()) == _of(lab)

    play(scene)


def test_a_session_is_answered_from_l0_only_when_the_entry_reaches_as_far() -> None:
    async def scene() -> None:
        lab = Lab()
        lab.write_user(1)
        await lab.ask()
        await lab.ask(session=((0, 1, 5),))
        assert lab.searches == 2
        await lab.ask(session=((0, 1, 4),))
        assert lab.searches == 2
        await lab.ask(session=((0, 1, 4), (1, 1, 1)))
        assert lab.searches == 3

    play(scene)
    assert covers(((0, 1, 5),), ())
    assert not covers(((0, 1, 5),), ((0, 2, 1),))


def test_l1_answers_what_another_node_computed() -> None:
    async def scene() -> None:
        one, other = Lab(store=True), Lab(store=True)
        one.write_user(1)
        other.users, other.kept = one.users, one.kept
        mine = await one.ask()
        theirs = await other.ask()
        assert (other.searches, other.looked_up) == (0, 0)
        assert isinstance(theirs, Kept)
        assert theirs["hits"].ids.tolist() == mine["hits"].ids.tolist()
        assert theirs["coverage"] == mine["coverage"]
        # Another question of the same user: the vector is known, too.
        await other.ask(k=5)
        assert (other.searches, other.looked_up) == (1, 0)

    play(scene)


def test_what_l1_has_from_before_a_change_is_not_used() -> None:
    async def scene() -> None:
        for trusted in (True, False):
            lab = Lab(store=True, l0_bytes=0)
            lab.write_user(1)
            await lab.ask()
            lab.trusted = trusted
            lab.write_user(1, told=trusted)  # untrusted: nobody has told us, we have to look
            assert _vector(await lab.ask()) == _of(lab)
            lab.items.discard(1)
            if trusted:
                lab.caches.item_deleted(1)
            assert 1 not in (await lab.ask())["hits"].ids
            searches = lab.searches
            await lab.ask()
            assert lab.searches == searches + trusted * 0

    play(scene)


def test_rubbish_and_slowness_in_l1_make_no_difference() -> None:
    async def scene() -> None:
        lab = Lab(store=True, l0_bytes=0)
        lab.write_user(1)
        await lab.ask()
        good = dict(lab.kept)
        for rubbish in (b"", b"x" * 500, good.popitem()[1][:-1]):
            lab.kept = dict.fromkeys(lab.kept, rubbish)
            assert _vector(await lab.ask()) == _of(lab)
        lab.store_delay_s = 60.0
        began = trio.current_time()
        assert _vector(await lab.ask(timeout_ms=400)) == _of(lab)
        assert trio.current_time() - began < 0.4

    play(scene)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_no_answer_is_older_than_what_this_node_was_told(seed: int) -> None:
    async def scene() -> None:
        rng = random.Random(seed)
        lab = Lab(store=True, l0_bytes=20_000)
        for user in (1, 2, 3):
            lab.write_user(user)
        told = {user: lab.users[user].version for user in (1, 2, 3)}
        by_vector = {float(np.frombuffer(r.vector, np.float16)[0]): r.version for r in lab.users.values()}
        deleted: set[int] = set()
        answers = 0

        async def ask() -> None:
            nonlocal answers
            user = rng.choice([1, 2, 3])
            least, gone = told[user], set(deleted)
            reply = await lab.ask(user, rng.choice([2, 3]))
            answers += 1
            assert by_vector[_vector(reply)] >= least
            assert not gone & set(reply["hits"].ids.tolist())

        async with trio.open_nursery() as nursery:
            for _ in range(400):
                dice = rng.random()
                lab.delay_s = rng.choice([0.0, 0.01, 0.05])
                if dice < 0.1:
                    user = rng.choice([1, 2, 3])
                    version = lab.write_user(user)
                    told[user] = version
                    by_vector[_of(lab, user)] = version
                elif dice < 0.13 and lab.items:
                    gone = min(lab.items)
                    lab.items.discard(gone)
                    lab.caches.item_deleted(gone)
                    deleted.add(gone)
                elif dice < 0.14:
                    lab.caches.drop_all()
                elif dice < 0.17:
                    lab.trusted = not lab.trusted
                elif dice < 0.19:
                    lab.is_current = not lab.is_current
                else:
                    nursery.start_soon(ask)
                await trio.sleep(rng.choice([0.0, 0.003, 0.03]))
        assert answers > 200
        assert lab.caches.statistics()["l0"]["hits"] > 0
        assert lab.caches.statistics()["l1"]["hits"] > 0

    play(scene)


def test_hits_without_some() -> None:
    columns = Columns(np.array([1, 2, 3], np.uint64), np.array([3, 2, 1], np.float32), [b"a", b"b", b"c"])
    left = without(columns, {2})
    assert left.ids.tolist() == [1, 3]
    assert left.metadata == [b"a", b"c"]
    assert without(columns, {9}) is columns
