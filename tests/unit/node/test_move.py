"""Moves, step by step: from any placement to any target, whoever is alive, never below the voters that are needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.move import Bring, BringWitness, Done, HandOver, Place, Sight, Step, Wait, next_step
from node.placement import Placement

IDS = {name: number for number, name in enumerate("abcdef", 1)}


def placed(voters: str, learners: str = "") -> Placement:
    return Placement(tuple((n, IDS[n]) for n in voters), tuple((n, IDS[n]) for n in learners))


def step(
    placement: Placement,
    target: str,
    *,
    own: str = "a",
    dead: str = "",
    level: str = "abcdef",
    brought: str = "",
    without: str = "",
) -> Step:
    sight = Sight(
        own,
        lambda n: n not in dead,
        lambda n: n in level,
        {n: IDS[n] for n in brought},
        lambda n: n not in without,
    )
    return next_step(placement, tuple(target), sight)


def test_a_replica_comes_learns_votes_and_then_the_old_one_goes() -> None:
    assert step(placed("abc"), "abd") == Bring("d")
    (learns,) = [step(placed("abc"), "abd", brought="d")]
    assert isinstance(learns, Place)
    assert learns.placement == placed("abc", "d")
    assert isinstance(step(placed("abc", "d"), "abd", level="abc"), Wait)
    votes = step(placed("abc", "d"), "abd")
    assert isinstance(votes, Place)
    assert votes.placement == placed("abcd")
    goes = step(placed("abcd"), "abd")
    assert isinstance(goes, Place)
    assert goes.placement == placed("abd")
    assert step(placed("abd"), "abd") == Done()


def test_a_dead_voter_goes_before_its_successor_comes() -> None:
    goes = step(placed("abc", "d"), "abd", dead="c")
    assert isinstance(goes, Place)
    assert goes.placement == placed("ab", "d")
    comes = step(goes.placement, "abd", dead="c")
    assert isinstance(comes, Place)
    assert comes.placement == placed("abd")


def test_who_leads_hands_over_before_it_goes_itself() -> None:
    assert step(placed("abcd"), "bcd") == HandOver("b")
    assert isinstance(step(placed("abcd"), "bcd", level="a"), Wait)


def test_a_learner_that_is_not_wanted_any_more_goes() -> None:
    undone = step(placed("abc", "d"), "abc")
    assert isinstance(undone, Place)
    assert undone.placement == placed("abc")


def test_a_dead_node_is_not_asked_for_a_replica() -> None:
    assert isinstance(step(placed("abc"), "abd", dead="d"), Wait)


def test_a_voter_whose_replica_is_gone_gets_one_again() -> None:
    """A node with a new disk begins only what it founded: who leads must say what else it is to hold."""
    assert step(placed("abc"), "abc", without="c", level="ab") == Bring("c")
    assert step(placed("abc"), "abc", without="c", dead="c") == Done()
    assert step(placed("abc", "d"), "abd", without="d", level="abc") == Bring("d")


def test_no_step_leaves_the_shard_without_a_majority() -> None:
    assert isinstance(step(placed("abc"), "ab", dead="b"), Wait)
    assert isinstance(step(placed("abc"), "ab", level="ac"), Wait)


@given(
    st.permutations("abcdef").map(lambda names: names[:3]),
    st.permutations("abcdef").map(lambda names: names[:3]),
    st.sets(st.sampled_from("abcdef"), max_size=2),
    st.booleans(),
)
def test_every_move_ends_changes_one_voter_at_a_time_and_keeps_a_majority(
    first: list[str], target: list[str], dead: set[str], level: bool
) -> None:
    placement, own = placed("".join(first)), next((n for n in first if n not in dead), "")
    wanted = "".join(target)
    if 2 * len(dead & set(first)) > len(first):
        return  # nobody leads
    brought = ""
    for _ in range(40):
        done = step(
            placement, wanted, own=own, dead="".join(dead), level="abcdef" if level else own, brought=brought
        )
        if isinstance(done, Bring):
            assert done.name not in dead
            brought += done.name
        elif isinstance(done, HandOver):
            assert done.to in placement.names
            assert done.to not in dead
            own = done.to
        elif isinstance(done, Place):
            before, after = set(placement.names), set(done.placement.names)
            assert len(before ^ after) <= 1, "one at a time"
            assert after, "never nobody"
            assert own in after, "who leads stays until it has handed over"
            placement = done.placement
        else:
            break
    else:
        raise AssertionError("it never ends")
    if level and not dead & set(target):
        assert set(placement.names) == set(target)
        assert done == Done()


def sighted(*, rests: str = "", dead: str = "", level: str = "abcdef", first: bool = False) -> Sight:
    alive = lambda n: n not in dead  # noqa: E731
    return Sight("a", alive, lambda n: n in level, {}, lambda _n: True, lambda n: n in rests, first)


def test_who_rests_leads_only_while_nobody_else_can() -> None:
    assert next_step(placed("abc"), tuple("abc"), sighted(rests="a")) == HandOver("b")
    assert next_step(placed("abc"), tuple("abc"), sighted(rests="ab")) == HandOver("c")
    assert next_step(placed("abc"), tuple("abc"), sighted(rests="a", dead="b", level="a")) == Done()
    # Also in the midst of a move.
    assert next_step(placed("abc"), tuple("bcd"), sighted(rests="a")) == HandOver("b")
    # And it is not chosen by one who has to go, while another is there.
    assert next_step(placed("abcd"), tuple("bcd"), sighted(rests="b")) == HandOver("c")
    assert next_step(placed("abcd"), tuple("bcd"), sighted(rests="bcd")) == HandOver("b")


def test_a_shard_goes_back_to_its_preferred_primary_once_that_is_fit_and_nothing_is_to_be_moved() -> None:
    assert next_step(placed("abc"), tuple("bac"), sighted()) == Done()
    assert next_step(placed("abc"), tuple("bac"), sighted(first=True)) == HandOver("b")
    assert next_step(placed("abc"), tuple("abc"), sighted(first=True)) == Done()
    assert next_step(placed("abc"), tuple("bad"), sighted(first=True)) == Bring("d")


# -- witnesses -------------------------------------------------------------------------------------------------------------


def witnessed(
    placement: Placement,
    target: str,
    witness: str,
    *,
    dead: str = "",
    level: str = "abcdef",
    votes: str = "",
    heard: bool = True,
    own: str = "a",
    brought: str = "",
) -> Step:
    sight = Sight(
        own,
        lambda n: n not in dead,
        lambda n: n in level,
        {n: IDS[n] for n in brought},
        lambda _n: True,
        votes={n: 10 * IDS[n] for n in votes},
        witness_heard=heard,
    )
    return next_step(placement, tuple(target), sight, witness)


def with_witness(voters: str, witness: str, learners: str = "") -> Placement:
    return placed(voters, learners).witnessed((witness, 10 * IDS[witness]))


def test_a_witness_comes_once_the_data_is_where_it_is_wished() -> None:
    assert witnessed(placed("ab"), "ab", "c") == BringWitness("c")
    assert witnessed(placed("ab"), "ac", "d") == Bring("c")
    comes = witnessed(placed("ab"), "ab", "c", votes="c")
    assert isinstance(comes, Place)
    assert comes.placement == with_witness("ab", "c")
    assert witnessed(comes.placement, "ab", "c") == Done()
    assert witnessed(placed("ab"), "ab", "c", dead="c") == Done()
    # Also while a replica is waited for; but it holds no data meanwhile.
    assert witnessed(placed("ab", "d"), "ad", "c", level="ab") == BringWitness("c")
    assert isinstance(witnessed(placed("ab", "d"), "ad", "b", level="ab"), Wait)
    assert witnessed(placed("abd"), "abd", "") == Done()


def test_it_goes_when_a_third_replica_votes_and_not_before() -> None:
    assert isinstance(witnessed(with_witness("ab", "c", "d"), "abd", "", level="ab"), Wait)
    joins = witnessed(with_witness("ab", "c", "d"), "abd", "")
    assert isinstance(joins, Place)
    assert joins.placement == with_witness("abd", "c")
    goes = witnessed(joins.placement, "abd", "")
    assert isinstance(goes, Place)
    assert goes.placement == placed("abd")


def test_one_that_is_to_hold_data_gives_its_vote_back_first() -> None:
    goes = witnessed(with_witness("ab", "c", "c"), "abc", "")
    assert isinstance(goes, Place)
    assert goes.placement == placed("ab", "c")
    # Where a voter is dead it goes before, or nobody could be elected in between.
    goes = witnessed(with_witness("ab", "c", "c"), "ac", "", dead="b")
    assert isinstance(goes, Place)
    assert goes.placement == with_witness("a", "c", "c")


def test_another_takes_its_place_and_one_that_has_lost_its_vote_gets_a_new_one() -> None:
    goes = witnessed(with_witness("ab", "c"), "ab", "d", dead="c")
    assert isinstance(goes, Place)
    assert goes.placement == placed("ab")
    assert witnessed(with_witness("ab", "c"), "ab", "d", dead="cd") == Done()
    silent = with_witness("ab", "c")
    assert witnessed(silent, "ab", "c", heard=False) == BringWitness("c")
    assert witnessed(silent, "ab", "c", heard=False, votes="c") == Done(), "the same vote: only silent"
    anew = witnessed(silent.witnessed(("c", 5)), "ab", "c", heard=False, votes="c")
    assert isinstance(anew, Place)
    assert anew.placement == silent


@given(
    st.permutations("abcdef"), st.permutations("abcdef"), st.sets(st.sampled_from("abcdef"), max_size=1),
    st.integers(2, 3),
)  # fmt: skip
def test_every_move_with_a_witness_ends_and_changes_one_vote_at_a_time(
    first: list[str], wish: list[str], dead: set[str], replicas: int
) -> None:
    placement = with_witness("".join(first[:2]), first[2])
    target, witness = "".join(wish[:replicas]), wish[replicas] if replicas == 2 else ""
    own = next(n for n in first[:2] if n not in dead)
    brought, votes = "", ""
    for _ in range(60):
        done = witnessed(
            placement,
            target,
            witness,
            own=own,
            dead="".join(dead),
            level="abcdef",
            votes=votes,
            brought=brought,
        )
        if isinstance(done, Bring):
            brought += done.name
        elif isinstance(done, BringWitness):
            votes += done.name
        elif isinstance(done, HandOver):
            own = done.to
        elif isinstance(done, Place):
            before, after = set(placement.electors), set(done.placement.electors)
            assert len(before ^ after) <= 1, "one vote at a time"
            assert len(done.placement.electors) == len(after), "nobody votes twice"
            there = [n for n in after if n not in dead]
            assert 2 * len(there) > len(after), "never without a majority"
            placement = done.placement
        else:
            break
    else:
        raise AssertionError("it never ends")
    if not dead:
        assert (set(placement.names), placement.witness_name) == (set(target), witness)
