"""What is known of changes, against a list of all that happened: nothing stale is ever admitted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.changes import KEEP_S, Changes
from router.ownwrites import KEEP_S as OWN_S
from router.ownwrites import OwnWrites
from router.ring import shard_of

STEP = st.tuples(st.sampled_from(["user", "item", "drop", "expire", "ticket"]), st.integers(0, 5))


@settings(deadline=None)
@given(st.lists(STEP, max_size=80))
def test_nothing_from_before_a_change_is_admitted(steps: list[tuple[str, int]]) -> None:
    changes = Changes(0.0, users_max=3, items_max=3)
    users: dict[int, tuple[tuple[int, int], float]] = {}
    items: dict[int, tuple[int, float]] = {}
    tickets = [(changes.ticket(1.0), 0)]
    drops = 0
    dropped_at = 0.0
    now = 1.0
    for number, (what, id_) in enumerate(steps):
        now += 40.0
        if what == "user":
            users[id_] = ((1, number), now)
            changes.user(id_, (1, number), now)
        elif what == "item":
            items[id_] = (number, now)
            changes.item(id_, now)
        elif what == "drop":
            changes.drop(now)
            drops, dropped_at = drops + 1, now
        elif what == "expire":
            changes.expire(now)
        else:
            tickets.append((changes.ticket(now), number))
        for ticket, began in tickets:
            for item, (at_number, _) in items.items():
                if at_number >= began and changes.admits_items([item], ticket.deletes):
                    raise AssertionError(f"item {item} was deleted after the ticket")
            if drops and dropped_at >= ticket.at:
                assert not changes.admits_answer([], ticket.at)
            for item, (_, at) in items.items():
                if at >= ticket.at:
                    assert not changes.admits_answer([item], ticket.at)
        # Whatever was forgotten lies before `complete_since`.
        for user, (version, at) in users.items():
            if at > changes.complete_since:
                assert not changes.admits_user(user, (0, 0))
                assert changes.admits_user(user, version)
        for item, (_, at) in items.items():
            if at > changes.complete_since:
                assert not changes.never_deleted([item])


def test_memory_is_bounded_in_time() -> None:
    changes = Changes(0.0)
    changes.user(1, (1, 1), 10.0)
    changes.item(2, 10.0)
    changes.expire(10.0 + KEEP_S + 1)
    assert changes.statistics()["users_known"] == changes.statistics()["items_known"] == 0
    assert changes.complete_since == 11.0


def test_own_writes_get_the_versions_that_the_log_gave_them() -> None:
    own = OwnWrites(4)
    ids = list(range(1, 30))
    shards = [shard_of(i, 4) for i in ids]
    # As a primary does it: each shard's changes in order, without gaps, up to the token.
    places = dict.fromkeys(range(4), 100)
    true: dict[int, tuple[int, int]] = {}
    for id_, shard in zip(ids, shards, strict=True):
        places[shard] += 1
        true[id_] = (7, places[shard])
    session = tuple((shard, 7, places[shard]) for shard in set(shards))
    assert own.users(ids, session, 0.0) == true
    assert own.token(ids[0], 1.0) == ((shards[0], 7, places[shards[0]]),)
    assert own.token(ids[0], OWN_S + 0.1) == ()
    assert own.users([1], (), 0.0) == {1: None}


def test_deleted_items_are_gone_for_a_while_or_until_put_again() -> None:
    own = OwnWrites(4)
    own.deleted([1, 2], 0.0)
    own.put([2])
    assert list(own.gone(1.0)) == [1]
    assert not own.gone(OWN_S + 0.1)
