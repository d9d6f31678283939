"""How far moves are, from what nodes tell."""

from __future__ import annotations

from typing import Any

from node.progress import overview

WISHED = [["a", "b", "d"]]


def row(node: str, **more: Any) -> dict[str, Any]:
    return {
        "shard": 0,
        "node": node,
        "role": "replica",
        "epoch": 3,
        "sequence": 100,
        "state": "following",
        "snapshot": None,
        "voters": ["a", "b", "c"],
        "learners": [],
        "target": [],
        "layout": 2,
        "move": "",
    } | more


def primary(**more: Any) -> dict[str, Any]:
    return row("a", role="primary", **({"target": WISHED[0], "move": "d learns"} | more))


def stage(*rows: dict[str, Any], version: int = 2) -> tuple[Any, ...]:
    (one,) = overview(rows, version, WISHED).moves
    return one.source, one.target, one.stage, one.percent


def test_a_move_goes_through_its_stages() -> None:
    rest = [row("b"), row("c")]
    assert stage(primary(), *rest) == ("c", "d", "queued", None)
    copying = row(
        "d",
        sequence=0,
        state="fetching snapshot 25% of 4 MB",
        snapshot={"bytes": 1_000_000, "total_bytes": 4_000_000, "bytes_per_s": 500_000},
    )
    (one,) = overview([primary(learners=["d"]), *rest, copying], 2, WISHED).moves
    assert (one.stage, one.percent, one.bytes_per_s, one.eta_s) == ("copying", 25.0, 500_000, 6.0)
    assert stage(primary(learners=["d"]), *rest, row("d", sequence=75)) == ("c", "d", "catching up", 75.0)
    voters = ["a", "b", "c", "d"]
    assert stage(primary(voters=voters), *rest, row("d")) == ("c", None, "voting", None)
    assert stage(primary(voters=WISHED[0]), *rest, row("d")) == ("c", None, "removing", None)
    assert overview([primary(voters=WISHED[0]), row("b"), row("d")], 2, WISHED).moves == ()


def test_a_primary_that_has_not_heard_of_our_layout_will_follow_it() -> None:
    old = primary(layout=1, target=["a", "b", "c"])
    assert stage(old, row("b"), row("c")) == ("c", "d", "queued", None)


def test_who_stands_in_for_the_gone_is_as_the_primary_says() -> None:
    assert stage(primary(target=["a", "b", "e"]), row("b")) == ("c", "e", "queued", None)


def test_a_shard_that_nobody_leads_is_unknown_not_done() -> None:
    found = overview([row("b"), row("c")], 2, WISHED)
    assert (found.moves, found.unknown) == ((), (0,))


def test_of_two_who_say_that_they_lead_the_greater_epoch_counts() -> None:
    old = row("c", role="primary", target=["a", "b", "c"], epoch=2)
    new = primary(voters=WISHED[0])
    assert overview([old, new, row("b"), row("d")], 2, WISHED).moves[0].stage == "removing"
