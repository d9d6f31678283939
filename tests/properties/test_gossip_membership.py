"""What claims, timers and packets in any order can do to a member table."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.config import GossipConfig
from gossip.effects import Effect, Send, Superseded
from gossip.machine import Machine
from gossip.messages import Address, Claim, Part, Ping, State

ME, OTHER, THIRD = 10, 20, 30
HOME = Address("10.0.0.1", 7402)
THERE = Address("10.0.0.2", 7402)
CLAIMS = st.builds(
    Claim,
    id=st.just(OTHER),
    boot=st.integers(1, 2),
    incarnation=st.integers(0, 2),
    state=st.sampled_from(State),
    address=st.just(THERE),
    by=st.sampled_from([OTHER, THIRD, 40, 50]),
)


def machine(seed: int = 1) -> Machine:
    one = Machine(GossipConfig(), id=ME, boot=5, address=HOME, random=Random(seed), now=0.0)
    one.start([], 0.0)
    return one


def tell(one: Machine, now: float, *parts: Part) -> list[Effect]:
    return one.on_packet(THIRD, 1, Address("10.0.0.3", 7402), parts, now)


def rank(one: Machine) -> tuple[int, int] | None:
    found = [(m.boot, m.incarnation) for m in one.members() if m.id == OTHER]
    return found[0] if found else None


@given(st.lists(CLAIMS, max_size=10))
def test_boot_and_incarnation_never_go_back(claims: list[Claim]) -> None:
    one = machine()
    seen: tuple[int, int] | None = None
    for step, claim in enumerate(claims):
        tell(one, step * 0.01, claim)
        now = rank(one)
        if seen is not None and now is not None:
            assert now >= seen
        seen = now or seen


@given(st.lists(CLAIMS, max_size=10), st.lists(CLAIMS, max_size=6))
def test_old_news_never_wakes_the_dead(before: list[Claim], after: list[Claim]) -> None:
    """`no-resurrection`."""
    one = machine()
    for claim in before:
        tell(one, 0.0, claim)
    # Whatever came before, three accusers and a declaration bury this incarnation.
    for by in (40, 50, 60):
        tell(one, 0.1, Claim(OTHER, 2, 5, State.SUSPECT, THERE, by))
    tell(one, 0.2, Claim(OTHER, 2, 5, State.DOWN, THERE, 40))
    assert one.member_state(OTHER) is State.DOWN
    for claim in after:
        tell(one, 0.3, claim)
    assert one.member_state(OTHER) in (State.DOWN, State.LEFT)
    tell(one, 0.4, Claim(OTHER, 2, 6, State.ALIVE, THERE, OTHER))
    assert one.member_state(OTHER) is State.ALIVE


@given(st.lists(CLAIMS, max_size=10), st.randoms(use_true_random=False))
def test_two_who_heard_the_same_in_other_orders_agree_on_the_incarnation(
    claims: list[Claim], random: Random
) -> None:
    """`order`."""
    # An unknown member that has left is not remembered, so news begin with its life.
    first = Claim(OTHER, 1, 0, State.ALIVE, THERE, OTHER)
    shuffled = list(claims)
    random.shuffle(shuffled)
    one, two = machine(1), machine(2)
    for claim in [first, *claims]:
        tell(one, 0.0, claim)
    for claim in [first, *shuffled]:
        tell(two, 0.0, claim)
    ours, theirs = one._table.members[OTHER], two._table.members[OTHER]
    assert (ours.boot, ours.incarnation) == (theirs.boot, theirs.incarnation)


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([State.SUSPECT, State.DOWN, State.LEFT]))
def test_what_is_said_of_us_is_refuted_once_and_only_by_a_greater_incarnation(
    boot: int, said: int, state: State
) -> None:
    """`own-word`."""
    one = machine()
    effects = tell(one, 0.0, Claim(ME, boot, said, state, HOME, THIRD))
    mine = next(m for m in one.members() if m.id == ME)
    if boot > 5:
        assert Superseded(boot) in effects
        return
    assert mine.incarnation == (said + 1 if boot == 5 else 0)
    tell(one, 0.0, Claim(ME, boot, said, state, HOME, 40))
    assert next(m for m in one.members() if m.id == ME).incarnation == mine.incarnation


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 0.4),
            st.one_of(CLAIMS, st.builds(Ping, st.integers(0, 9), st.just(ME), st.integers(0, 9))),
        ),
        max_size=40,
    )
)
def test_any_history_keeps_packets_within_their_bound_and_time_going(
    history: list[tuple[float, Part]],
) -> None:
    """`bounded`."""
    from gossip.codec import PARTS_BYTES_MAX, size_of

    one, now, timers = machine(), 0.0, 0
    for wait, part in history:
        until = now + wait
        effects: list[Effect] = []
        while one.next_deadline <= until:
            now = max(now, one.next_deadline)
            effects += one.on_timer(now)
            timers += 1
            assert timers <= 4_000, "a timer that sets itself for now, again and again"
        now = until
        effects += tell(one, now, part)
        for effect in effects:
            if isinstance(effect, Send) and not effect.stream:
                assert sum(map(size_of, effect.parts)) <= PARTS_BYTES_MAX
