"""The table of transitions in docs/gossip.md, row by row, and what a claim may never do."""

from __future__ import annotations

import pytest

from gossip.codec import encode
from gossip.config import INCARNATION_MAX, GossipConfig
from gossip.effects import Effect, Superseded
from gossip.membership import CLEARED_MAX
from gossip.messages import Ack, Address, Claim, Fact, Hot, Ping, State
from tests.unit.gossip.machines import HOME, ME, One, alive, home, kinds, said, sent

X, A, B, C, D = 30, 40, 50, 60, 70
ALIVE, SUSPECT, DOWN, LEFT = State


def suspected(*, incarnation: int = 0, by: int = A) -> One:
    one = One(20, X, A, B, C, D)
    one.tell(said(SUSPECT, X, by, incarnation))
    assert one.state(X) is SUSPECT
    return one


def buried() -> One:
    one = suspected()
    one.tell(said(DOWN, X, B))
    assert one.state(X) is DOWN
    return one


def departed() -> One:
    one = One(20, X, A, B, C, D)
    one.tell(said(LEFT, X, X))
    assert one.state(X) is LEFT
    return one


def ping(one: One, effects: list[Effect]) -> Ping:
    return sent(effects, Ping, home(X))[-1]


# Unknown


@pytest.mark.parametrize(
    ("said_of_it", "state", "events"),
    [
        (alive(X), ALIVE, ["joined"]),
        (said(SUSPECT, X, A), SUSPECT, ["joined", "suspected"]),
        (said(DOWN, X, A), DOWN, []),
        (said(LEFT, X, X), None, []),
    ],
)
def test_unknown(said_of_it: Claim, state: State | None, events: list[str]) -> None:
    one = One(20)
    effects = one.tell(said_of_it)
    assert one.state(X) is state
    assert kinds(effects, X) == events


def test_an_unknown_one_who_is_down_is_tried_and_returns() -> None:
    """`tried-forever`."""
    one = One(20)
    one.tell(said(DOWN, X, A))
    assert any(part.target == X for part in sent(one.run(20), Ping, home(X)))
    assert kinds(one.tell(alive(X, 1)), X) == ["returned"]


# Alive


def test_alive_and_a_greater_incarnation_takes_the_address() -> None:
    one = One(20, X)
    moved = Address("10.9.9.9", 7500)
    assert kinds(one.tell(alive(X, 1)._replace(address=moved))) == ["moved"]
    assert next(view.address for view in one.machine.members() if view.id == X) == moved
    assert kinds(one.tell(alive(X, 0))) == []


def test_alive_and_accused_is_suspect_and_hears_of_it() -> None:
    one = One(20, X)
    effects = one.tell(said(SUSPECT, X, A))
    assert kinds(effects) == ["suspected"]
    assert sent(effects, Claim, home(X))[0].state is SUSPECT


@pytest.mark.parametrize("incarnation", [0, 1])
def test_alive_and_declared_dead_is_hearsay(incarnation: int) -> None:
    """Nobody has accused it to us: it is not dead, also when the incarnation is one that we had not heard of."""
    one = One(20, X, A, B)
    effects = one.tell(said(DOWN, X, A, incarnation))
    assert one.state(X) is SUSPECT
    assert kinds(effects) == ["suspected"]
    # It is told, and nobody else.
    assert sent(effects, Claim, home(X)) == [said(SUSPECT, X, ME, incarnation)]
    later = one.run(0.9)
    others = [part for to in (20, A, B) for part in sent(later, Claim, home(to))]
    assert all(part.id != X or part.state is ALIVE for part in others)
    assert kinds(one.tell(alive(X, incarnation + 1))) == ["refuted"]


def test_hearsay_of_the_next_incarnation_is_hearsay_again() -> None:
    one = One(20, X, A, B)
    one.tell(said(DOWN, X, A))
    one.tell(said(DOWN, X, A, 1))
    assert one.state(X) is SUSPECT
    assert "down" not in kinds(one.run(0.95), X)
    assert "down" in kinds(one.run(0.6), X)


@pytest.mark.parametrize("incarnation", [0, 1])
def test_suspect_and_given_up_by_an_operator_is_not_gone(incarnation: int) -> None:
    one = suspected()
    one.tell(said(LEFT, X, B, incarnation))
    assert one.state(X) in (ALIVE, SUSPECT)


def test_hearsay_that_is_not_refuted_is_for_our_own_burst_to_decide() -> None:
    one = One(20, X, A, B)
    one.tell(said(DOWN, X, A))
    assert "down" not in kinds(one.run(0.95), X)
    assert kinds(one.run(0.6), X) == ["down"]


def test_hearsay_while_our_own_burst_runs_ends_with_the_burst() -> None:
    """As when a process is killed: all have lost their links to it, and one of them is first to be sure."""
    one = One(20, X, A, B)
    one.machine.on_link_lost(X, one.now)
    one.run(0.2)
    one.tell(said(DOWN, X, A))
    assert one.state(X) is SUSPECT
    assert kinds(one.run(0.3), X) == ["down"]


def test_hearsay_and_an_accusation_make_a_suspicion_that_is_passed_on() -> None:
    one = One(20, X, A, B)
    one.tell(said(DOWN, X, A))
    one.tell(said(SUSPECT, X, B))
    later = one.run(0.3)
    told = [part for to in (20, A, B) for part in sent(later, Claim, home(to))]
    assert said(SUSPECT, X, B) in told


@pytest.mark.parametrize("incarnation", [0, 1])
def test_alive_and_left_by_its_own_word(incarnation: int) -> None:
    one = One(20, X)
    assert kinds(one.tell(said(LEFT, X, X, incarnation))) == ["left"]


@pytest.mark.parametrize("incarnation", [0, 1])
def test_alive_and_given_up_by_an_operator_is_alive_and_hears_of_it(incarnation: int) -> None:
    one = One(20, X)
    effects = one.tell(said(LEFT, X, A, incarnation))
    assert one.state(X) is ALIVE
    assert kinds(effects) == []
    assert sent(effects, Claim, home(X))


# Suspect


def test_suspect_and_refuted() -> None:
    assert kinds(suspected().tell(alive(X, 1))) == ["refuted"]


def test_suspect_and_alive_of_the_same_incarnation_says_nothing() -> None:
    one = suspected()
    one.tell(alive(X))
    assert one.state(X) is SUSPECT


def test_suspect_and_accused_by_more_is_declared_sooner() -> None:
    alone, confirmed = suspected(), suspected()
    for by in (B, C, D):
        assert kinds(confirmed.tell(said(SUSPECT, X, by))) == []

    def death(one: One) -> float:
        began = one.now
        while one.state(X) is not DOWN:
            one.run(0.05)
        return one.now - began

    assert death(confirmed) + 1 < death(alone) < 8


def test_suspect_and_the_same_accuser_again_is_no_confirmation() -> None:
    one = suspected()
    for _ in range(5):
        one.tell(said(SUSPECT, X, A))
    assert "down" not in kinds(one.run(3.0), X)


def test_suspect_and_declared_dead_is_down() -> None:
    assert kinds(suspected().tell(said(DOWN, X, B))) == ["down"]


def test_suspect_and_left() -> None:
    assert kinds(suspected().tell(said(LEFT, X, X))) == ["left"]


def test_a_round_trip_clears_and_the_same_accusers_do_not_revive_it() -> None:
    one = suspected()
    probe = ping(one, one.run(3.0))
    assert kinds(one.tell(Ack(probe.seq), sender=X)) == ["refuted"]
    assert kinds(one.tell(said(SUSPECT, X, A))) == []
    assert kinds(one.tell(said(DOWN, X, A))) == []
    assert kinds(one.tell(said(SUSPECT, X, C))) == ["suspected"]


def test_those_who_were_cleared_are_remembered_up_to_a_bound() -> None:
    one = One(20, X, A, B)
    for by in range(1_000, 1_000 + 3 * CLEARED_MAX):
        one.tell(said(SUSPECT, X, by))
        one.machine._table.vouch(one.machine._table.members[X], one.now)
    assert len(one.machine._table.members[X].cleared) <= CLEARED_MAX + 5


# Down


@pytest.mark.parametrize("state", [ALIVE, SUSPECT, DOWN])
def test_down_and_old_news(state: State) -> None:
    one = buried()
    assert kinds(one.tell(said(state, X, C))) == []
    assert one.state(X) is DOWN


def test_down_and_alive_again() -> None:
    assert kinds(buried().tell(alive(X, 1))) == ["returned"]
    assert kinds(buried().tell(alive(X, 0, boot=2))) == ["restarted"]


@pytest.mark.parametrize("by", [X, A])
def test_down_and_left_by_its_own_word_or_an_operators(by: int) -> None:
    assert kinds(buried().tell(said(LEFT, X, by))) == ["left"]


def test_an_operator_gives_up_only_who_is_down() -> None:
    one = buried()
    assert kinds(one.machine.forget(A, one.now)) == []
    assert kinds(one.machine.forget(X, one.now)) == ["left"]
    assert one.machine.forget(999, one.now) == []


# Left


@pytest.mark.parametrize("state", list(State))
def test_left_and_old_news(state: State) -> None:
    one = departed()
    assert kinds(one.tell(said(state, X, C))) == []
    assert one.state(X) is LEFT


def test_left_and_alive_again() -> None:
    assert kinds(departed().tell(alive(X, 0, boot=2))) == ["joined"]
    assert kinds(departed().tell(alive(X, 1))) == ["returned"]


def test_who_left_is_forgotten_an_hour_after_its_last_leave() -> None:
    one = One(X, config=GossipConfig(left_keep_s=10.0))
    one.tell(said(LEFT, X, X))
    one.run(6)
    one.tell(alive(X, 0, boot=2))
    one.tell(said(LEFT, X, X, boot=2))
    one.run(6)
    assert one.state(X) is LEFT
    one.run(5)
    assert one.state(X) is None


def test_a_leave_that_repair_brings_is_still_its_own_word() -> None:
    one, other = departed(), One(20, X)
    claims = [
        part
        for part in one.machine._repair._parts(one.machine._items.everything())
        if isinstance(part, Claim) and part.id == X
    ]
    assert kinds(other.tell(*claims)) == ["left"]


# Bounds


def test_members_beyond_the_bound_are_refused_but_those_who_left_make_room() -> None:
    one = One(20, X, A, config=GossipConfig(members_max=3))
    one.tell(alive(B))
    assert one.state(B) is None
    assert one.machine.statistics()["refused"] == 1
    one.tell(said(LEFT, X, X))
    one.tell(alive(B))
    assert (one.state(B), one.state(X)) == (ALIVE, None)
    one.run(5_000)  # no timer of the forgotten one does harm
    one.tell(Fact(B, 1, 1, b"name", b"b"), Fact(A, 1, 1, b"name", b"a"), Fact(20, 1, 1, b"name", b"s"))
    assert [one.machine.facts(id) for id in (A, B, 20)] == [{b"name": b"a"}, {b"name": b"b"}, {b"name": b"s"}]


# Ourselves


@pytest.mark.parametrize("state", [SUSPECT, DOWN, LEFT])
def test_of_us_anything_but_alive_is_refuted(state: State) -> None:
    one = One(20)
    effects = one.tell(Claim(ME, 1, 3, state, HOME, A))
    assert one.incarnation == 4
    assert alive_claims(effects + one.run(0.2)) >= {4}
    assert one.machine.statistics()["health"] == 1


def alive_claims(effects: list[Effect]) -> set[int]:
    return {part.incarnation for part in sent(effects, Claim) if part.id == ME and part.state is ALIVE}


def test_of_us_in_a_later_boot_stops_us() -> None:
    """`supersede`."""
    one = One(20, boot=4)
    assert Superseded(5) in one.tell(Claim(ME, 5, 0, ALIVE, HOME, ME))
    assert Superseded(6) in one.tell(Ping(1, 0, 0), sender=ME, boot=6)


def test_pushed_to_the_last_incarnation_we_stay_there_and_go_on() -> None:
    """Whoever can seal can push us there; what we say then must still be what others can read."""
    one = One(20)
    for _ in range(3):
        effects = one.tell(Claim(ME, 1, INCARNATION_MAX, SUSPECT, HOME, A))
        effects += one.machine.set_address(Address("10.9.9.9", 1_000 + one.incarnation % 7), one.now)
        effects += one.run(0.5)
        for claim in sent(effects, Claim):
            encode(ME, 1, [claim])
    assert one.incarnation == INCARNATION_MAX


def test_versions_for_repair_are_in_the_order_of_news() -> None:
    one = One(20, X)
    versions = []
    for claim in (
        alive(X, 1),
        said(LEFT, X, X, 1),
        alive(X, INCARNATION_MAX),
        said(LEFT, X, X, INCARNATION_MAX),
        alive(X, 0, boot=2),
    ):
        one.tell(claim)
        versions.append(one.machine._table.members[X].version)
    assert versions == sorted(set(versions))


def test_a_leave_is_final_whatever_is_said() -> None:
    one = One(20, A)
    effects = one.machine.leave(one.now)
    assert {part.state for part in sent(effects, Claim)} == {LEFT}
    one.tell(Claim(ME, 1, 5, SUSPECT, HOME, A))
    assert one.incarnation == 0
    assert sent(one.tell(Ping(1, ME, 0)), Ack) == []


# Facts and their origins


def test_facts_of_nobody_are_not_kept() -> None:
    """They would be passed on forever: nobody is left who could leave and take them along."""
    one = departed()
    one.tell(Fact(999, 1, 1, b"name", b"ghost"), Hot(998, 1, 1, b"x"))
    assert one.machine.facts(999) == {}
    assert one.machine.hot(998) == b""
    assert one.machine.statistics()["unannounced"] == 2


def test_facts_of_a_former_boot_come_too_late_and_those_of_a_later_one_too_early() -> None:
    one = One(20)
    one.tell(alive(X, boot=2))
    one.tell(Fact(X, 1, 9, b"name", b"old"), Hot(X, 1, 9, b"old"))
    assert (one.machine.facts(X), one.machine.hot(X)) == ({}, b"")
    one.tell(Fact(X, 2, 1, b"name", b"new"))
    one.tell(Fact(X, 3, 1, b"name", b"forged"))
    assert one.machine.facts(X) == {b"name": b"new"}


def test_what_others_keep_of_us_but_we_have_not_said_is_outbid() -> None:
    """As after our data directory was set back: the same boot, but lower counters."""
    one = One(20)
    one.machine.set_fact(b"name", b"now", one.now)
    one.machine.set_hot(b"now", one.now)
    one.run(0.5)
    effects = one.tell(
        Fact(ME, 1, 50, b"name", b"then"), Fact(ME, 1, 60, b"gone", b"x"), Hot(ME, 1, 70, b"then")
    )
    effects += one.run(0.3)
    assert set(sent(effects, Fact)) == {Fact(ME, 1, 51, b"name", b"now"), Fact(ME, 1, 61, b"gone", b"")}
    assert set(sent(effects, Hot)) == {Hot(ME, 1, 71, b"now")}
    assert one.machine.facts(ME) == {b"name": b"now"}
    # Our own echo is no news.
    assert sent(one.tell(Fact(ME, 1, 51, b"name", b"now")), Fact) == []
    one.machine.set_fact(b"name", b"later", one.now)
    assert one.machine._facts._origins[ME].entries[b"name"][0] == 62


def test_the_largest_fact_is_told_beside_hot_ones() -> None:
    """`hot-apart`: Half of a packet has no room for it, and hot facts ask for the other half all the time."""
    origins = range(100, 130)
    one = One(20, A, B, C, *origins)
    one.machine.set_fact(b"k" * 64, bytes(1_000), one.now)
    came: list[Effect] = []
    for number in range(1, 8):
        one.tell(*[Hot(id, 1, number, bytes(255)) for id in origins])
        came += one.run(0.1)
    assert len(sent(came, Fact)) >= 3
    assert len(sent(came, Hot)) >= 20
