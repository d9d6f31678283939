"""`founded-once`: who may promise a shard's first epoch, after moves, after losing a disk, and after a crash in between."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node import founders, inforce
from node.founders import Founders, Noting
from router.layout import Layout, Member
from router.planning import first_layout
from storage.errors import DamagedFileError, ForeignDataError
from tests.unit.node.peers import linked, on_trio

NAMES = ("a", "b", "c")
ONE = first_layout([Member(name=name) for name in NAMES], 4, 3, "")


class Seen:
    """As Members: `led` is what others tell of their shards."""

    def __init__(self, own: str, led: dict[int, int] | None = None) -> None:
        self.own = SimpleNamespace(name=own)
        self.one = SimpleNamespace(name="b", fact=object(), alive=True, led=led or {})

    def all(self) -> list[Any]:
        return [self.one]

    others = all

    def primary(self, shard: int) -> str:
        return self.one.name if shard in self.one.led else ""


async def find(path: Path, layout: Layout, seen: Seen, links: Any = None) -> Founders:
    _, found = await inforce.find(path, "c1", layout, seen, links, lambda _text: None)  # type: ignore[arg-type]
    return found


def test_the_file_says_what_was_written_and_is_refused_when_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "founders"
    assert founders.load(path, "c1").founds == frozenset(), "written before anything is founded"
    founders.save(Founders(path, "c1", [1, 3], [2]))
    again = founders.load(path, "c1")
    assert (again.founds, again.founded) == ({1, 3}, {2})
    with pytest.raises(ForeignDataError):
        founders.load(path, "c2")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DamagedFileError):
        founders.load(path, "c1")


@on_trio
async def test_who_begins_with_the_first_layout_founds_its_shards_and_after_a_restart_as_well(
    tmp_path: Path,
) -> None:
    found = await find(tmp_path, ONE, Seen("a"))
    assert found.founds == {0, 1, 2, 3}
    await found.leave(2)
    again = await find(tmp_path, ONE, Seen("a"))
    assert again.founds == {0, 1, 3}
    assert again.founded == {2}


@on_trio
async def test_a_crash_before_the_placements_were_written_takes_nothing_from_it(tmp_path: Path) -> None:
    await find(tmp_path, ONE, Seen("a"))
    (tmp_path / "placements").unlink()
    assert (await find(tmp_path, ONE, Seen("a"))).founds == {0, 1, 2, 3}


@on_trio
async def test_on_a_new_disk_it_founds_nothing_that_anybody_knows_to_be_led(tmp_path: Path) -> None:
    assert (await find(tmp_path, ONE, Seen("a", {1: 7}))).founds == {0, 2, 3}


@on_trio
async def test_after_moves_the_others_tell_what_was_founded_once_whoever_leads_now(tmp_path: Path) -> None:
    """All founders have a new disk, and those who hold the shard now are down: one who never held it knows."""
    placements = [[shard, 1, ["a", "b", "c"]] for shard in range(4)]
    later = Layout(
        version=9, shard_count=4, replication=3, members=ONE.members, targets=(NAMES,) * 4, base=ONE.hash
    )
    async with linked({"placements": lambda peer, body: [placements, [0, 1]]}) as (link, _):

        async def add(name: str) -> Any:
            await trio.lowlevel.checkpoint()
            return link

        found = await find(tmp_path, later, Seen("a"), SimpleNamespace(add=add))
    assert found.founds == {2, 3}
    assert found.founded == {0, 1}


@on_trio
async def test_what_is_led_anywhere_is_noted_for_those_who_come_later(tmp_path: Path) -> None:
    found = await find(tmp_path, ONE, Seen("a"))
    async with trio.open_nursery() as nursery:
        shards = {3: SimpleNamespace(founding=False), 0: SimpleNamespace(founding=True)}
        await nursery.start(Noting(found, Seen("a", {1: 7}), shards).run)  # type: ignore[arg-type]
        with trio.fail_after(5):
            while not found.founded:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    again = founders.load(tmp_path / "founders", "c1")
    assert again.founded == {1, 3}
    assert again.founds == {0, 1, 2, 3}, "its own replicas are those that it began as a founder"


def test_what_an_operator_has_removed_by_hand_is_not_founded_again(tmp_path: Path) -> None:
    found = Founders(tmp_path / "founders", "c1", [0, 1, 2], [0, 1])
    assert found.may([0]) == {0, 2}, "0 is here, 1 was and is not, 2 is still to be founded"
