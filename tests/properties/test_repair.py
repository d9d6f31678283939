"""Whatever replicas differ in, what node/repair.py decides makes them equal, brings nothing back and loses nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from node.repair import Steps, decide
from storage.buckets import Seen
from storage.records import Version

NAMES = ("a", "b", "c")
FLOOR, PLACE = Version(1, 10), Version(2, 40)
VERSIONS = st.builds(Version, st.integers(1, 2), st.integers(1, 20))
# A delete has no row that could be damaged.
SEEN = st.builds(Seen, VERSIONS, st.integers(0, 1), st.just(True), st.booleans()) | st.builds(
    Seen, VERSIONS, st.just(9), st.just(False), st.just(True)
)
Held = dict[int, Seen]


def carry_out(steps: Steps, held: dict[str, Held], primary: str) -> None:
    """What the shell does, on values."""

    def spread(id_: int, one: Seen) -> None:
        for view in held.values():
            if id_ not in view or view[id_].version < one.version:
                view[id_] = one

    def put_aside(id_: int, version: Version) -> None:
        for view in held.values():
            if id_ in view and view[id_].version == version:
                del view[id_]

    for id_ in steps.write:
        spread(id_, held[primary][id_])
    for source, ids in steps.take.items():
        for id_ in ids:
            one = held[source][id_]
            if id_ not in held[primary] and one.version <= FLOOR:
                put_aside(id_, one.version)
            else:
                spread(id_, one)
    for (name, source), ids in steps.mend.items():
        for id_ in ids:
            held[name][id_] = held[source][id_]
    for id_ in steps.aside:
        put_aside(id_, held[primary][id_].version)
    for name, ids in steps.drop.items():
        for id_ in ids:
            del held[name][id_]
    if steps.purge:
        for view in held.values():
            for id_ in [id_ for id_, one in view.items() if not one.alive and one.version <= FLOOR]:
                del view[id_]


@settings(max_examples=500, deadline=None)
@given(
    st.fixed_dictionaries({name: st.dictionaries(st.integers(0, 2), SEEN, max_size=3) for name in NAMES}),
    st.integers(1, 3),
)
def test_all_end_equal_nothing_comes_back_nothing_is_lost(held: dict[str, Held], count: int) -> None:
    """`repair-by-log`."""
    held = {name: dict(held[name]) for name in NAMES[:count]}
    newest: Held = {}
    for view in held.values():
        for id_, one in view.items():
            newest[id_] = max(newest.get(id_, one), one, key=lambda seen: (seen.version, not seen.alive))
    before = {name: dict(view) for name, view in held.items()}
    for _ in range(5):
        steps = decide(held, "a", FLOOR, PLACE, 100)
        if not steps.any:
            break
        carry_out(steps, held, "a")
    unmendable = set(steps.lost)
    for id_ in set(newest) - unmendable:
        assert len({view.get(id_) for view in held.values()}) == 1, (id_, held)
    for id_, one in newest.items():
        firsts = {
            view[id_].content for view in before.values() if id_ in view and view[id_].version == one.version
        }
        if id_ in unmendable or len(firsts) > 1:
            continue
        for view in held.values():
            if not one.alive:
                assert id_ not in view or not view[id_].alive, "a delete was outweighed"
            elif one.version > FLOOR:
                assert view[id_].version == one.version, "what the newest says is lost"


def test_no_more_than_asked_for_is_decided_at_once() -> None:
    row = Seen(Version(1, 11), 1, True, True)
    steps = decide({"a": dict.fromkeys(range(10), row), "b": {}}, "a", FLOOR, PLACE, 4)
    assert steps.write == [0, 1, 2, 3]


def test_what_came_after_the_named_place_is_left_to_the_log() -> None:
    late = Seen(Version(2, 41), 1, True, True)
    assert not decide({"a": {1: late}, "b": {}}, "a", FLOOR, PLACE, 4).any
