"""What an operator has said of a node: on its disk before it is told, and gone by itself once a drain is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from node import duty, facts
from node.duty import Duty
from storage.errors import DamagedFileError, FormatError
from tests.unit.node.peers import on_trio
from tests.unit.node.test_members import pair


@on_trio
async def test_an_order_is_on_the_disk_told_and_known_after_a_restart(tmp_path: Path) -> None:
    _, members, _ = pair()
    path = tmp_path / "duty"
    mine = Duty(path, members, duty.load(path))
    changes: list[bool] = []
    mine.changed = lambda: changes.append(mine.resting)
    assert (mine.order, mine.resting, mine.rests("a")) == ("", False, False)
    await mine.set("maintenance")
    assert duty.load(path) == "maintenance"
    assert (mine.rests("a"), mine.maintained("a"), changes) == (True, True, [True])
    await mine.set("maintenance")
    assert changes == [True], "it is so already"
    assert members.get("a").order == "maintenance"  # type: ignore[union-attr]
    await mine.set("")
    assert (duty.load(path), changes) == ("", [True, False])


@on_trio
async def test_what_the_disk_does_not_take_is_not_told(tmp_path: Path) -> None:
    _, members, _ = pair()
    mine = Duty(tmp_path / "missing" / "duty", members, "")
    with pytest.raises(OSError, match="missing"):
        await mine.set("draining")
    assert not mine.resting
    assert not members.get("a").order  # type: ignore[union-attr]


@on_trio
async def test_others_rest_as_they_say(tmp_path: Path) -> None:
    _, members, b = pair()
    mine = Duty(tmp_path / "duty", members, "")
    assert not mine.rests("b")
    b.set_fact(facts.DUTY, b"draining")
    assert mine.rests("b")
    assert not mine.maintained("b")
    assert not mine.rests("nobody")


@on_trio
async def test_a_drain_ends_when_the_node_has_left_and_holds_nothing_and_maintenance_does_not(
    tmp_path: Path,
) -> None:
    _, members, _ = pair()
    mine = Duty(tmp_path / "duty", members, "draining")
    await mine.end_drain(member=True, holds=False)
    await mine.end_drain(member=False, holds=True)
    assert mine.resting
    await mine.end_drain(member=False, holds=False)
    assert not mine.resting
    await mine.set("maintenance")
    await mine.end_drain(member=False, holds=False)
    assert mine.resting


@on_trio
async def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    _, members, _ = pair()
    path = tmp_path / "duty"
    await Duty(path, members, "").set("draining")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"draining", b"drainING"))
    with pytest.raises(DamagedFileError):
        duty.load(path)
    path.write_bytes(duty.checked.encode({"format": 1, "order": "sleeping"}))
    with pytest.raises(DamagedFileError):
        duty.load(path)
    path.write_bytes(duty.checked.encode({"format": 2, "order": ""}))
    with pytest.raises(FormatError):
        duty.load(path)
