"""Three replicas over real links that were made to differ behind the log's back, and a repair that makes them equal."""

from __future__ import annotations

from pathlib import Path

import trio

from node.repairer import Report
from router.ports import Change
from storage.records import Kind, Mark, Operation
from storage.replica import Replica
from storage.tombstones import encode_floor
from tests.unit.node.peers import on_trio
from tests.unit.node.voters import Site, Trio, change, three


def held(site: Site) -> object:
    replica = site.actor.replica
    return [
        [replica.bucket_digests(kind) for kind in (Kind.ITEM, Kind.USER)],
        [replica.get(Kind.ITEM, id_) for id_ in range(1, 40)],
        replica.tombstones,
    ]


async def filled(world: Trio) -> tuple[Site, Site, Site]:
    """The primary and its followers, with items 1–30, of which 30 is deleted."""
    primary = world.leaders()[0]
    await primary.actor.write([change(id_) for id_ in range(1, 31)], "all", b"1" * 16, 5.0)
    gone = Change(Operation.DELETE, Kind.ITEM, 30, b"", (), b"")
    await primary.actor.write([gone], "all", b"2" * 16, 5.0)
    await world.level()
    one, other = (site for site in world if site is not primary)
    return primary, one, other


async def repaired(primary: Site) -> Report:
    with trio.fail_after(20):
        report = await primary.repairer.repair(primary.actor, 15.0)
    assert not report.problem, report
    return report


def drop(site: Site, *ids: int) -> None:
    replica = site.actor.replica
    for id_ in ids:
        version = replica.version_of(Kind.ITEM, id_)
        assert version is not None
        assert replica.drop_row(Kind.ITEM, id_, version)


def break_row(replica: Replica, id_: int) -> None:
    """One bit of its vector flips on the disk; nobody notices before the row is read."""
    view, _ = replica.searchable
    (row,) = [
        at for at in range(view.rows) if int(view.ids[at]) == id_ and view.alive[at >> 3] >> (at & 7) & 1
    ]
    file = replica._spaces[Kind.ITEM].file
    with file.path.open("r+b") as raw:
        raw.seek(file.offset(row))
        byte = raw.read(1)[0]
        raw.seek(file.offset(row))
        raw.write(bytes([byte ^ 4]))


@on_trio
async def test_equal_replicas_are_left_alone(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        primary, *others = await filled(world)
        before = primary.actor.replica.position.sequence
        report = await repaired(primary)
        assert report.equal
        assert report.replicas == {site.name: "equal" for site in others}
        assert (report.rounds, report.sequence) == (0, before + 1)
        assert str(report) == f"equal at {before + 1}"


@on_trio
async def test_what_one_lacks_or_has_older_comes_through_the_log(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        primary, one, other = await filled(world)
        wanted = held(primary)
        drop(one, 1, 2, 3, 30)
        drop(other, 4)
        drop(primary, 5, 6)
        report = await repaired(primary)
        assert report.equal, report
        assert set(report.replicas.values()) == {"repaired"}
        assert (report.written, report.taken) == (5, 2)
        assert held(primary) == held(one) == held(other) == wanted
        # Through the log: who opens again has it, too.
        await one.stop()
        await one.start()
        await world.level()
        assert held(one) == wanted


@on_trio
async def test_a_damaged_row_takes_the_content_of_the_others(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        primary, one, other = await filled(world)
        wanted = held(other)
        for site, id_ in ((primary, 7), (one, 8)):
            break_row(site.actor.replica, id_)
        # A damaged row does not show in a digest; something else in its bucket does.
        drop(one, 7)
        drop(primary, 8)
        report = await repaired(primary)
        assert report.equal, report
        assert held(primary) == held(one) == held(other) == wanted


@on_trio
async def test_two_contents_under_one_version_the_primarys_stays_and_the_other_is_kept_aside(
    tmp_path: Path,
) -> None:
    async with three(tmp_path) as world:
        primary, one, _ = await filled(world)
        replica = one.actor.replica
        (record,) = replica.copies(Kind.ITEM, [9])
        assert replica.mend(
            record._replace(metadata=b"\x81\xa1n\x01", body_check=_check(record, b"\x81\xa1n\x01"))
        )
        assert held(one) != held(primary)
        report = await repaired(primary)
        assert (report.equal, report.mended) == (True, 1)
        assert held(one) == held(primary)
        assert [found.metadata for found in replica.quarantined()] == [b"\x81\xa1n\x01"]


def _check(record: object, metadata: bytes) -> int:
    from storage.records import Record, make

    assert isinstance(record, Record)
    return make(*record._replace(metadata=metadata)[:-1])[1].body_check


@on_trio
async def test_below_the_floor_nothing_comes_back(tmp_path: Path) -> None:
    """As if two of three had deleted 1 and purged that long ago, and one had missed it; and 30's tombstone stayed at one."""
    async with three(tmp_path) as world:
        primary, one, other = await filled(world)
        version = primary.actor.replica.version_of(Kind.ITEM, 30)
        (tombstone,) = one.actor.replica.copies(Kind.ITEM, [30])
        assert version is not None
        await primary.actor.mark(Mark.PURGE, encode_floor(version))
        await world.level()
        space = one.actor.replica._spaces[Kind.ITEM]
        with one.actor.replica._table.lookup(Kind.ITEM) as lookup:
            space.apply([tombstone], lookup)
        assert one.actor.replica.tombstones == 1
        drop(primary, 1)
        drop(other, 1)
        # And the primary alone has 2: most lack it.
        drop(one, 2)
        drop(other, 2)
        report = await repaired(primary)
        assert report.equal, report
        assert report.set_aside == 2
        assert held(primary) == held(one) == held(other)
        for site in world:
            assert site.actor.replica.tombstones == 0
            for id_ in (1, 2, 30):
                assert site.actor.replica.version_of(Kind.ITEM, id_) is None
        assert {found.id for found in primary.actor.replica.quarantined()} == {1, 2}


@on_trio
async def test_who_cannot_be_compared_is_said_and_the_others_are(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        primary, one, other = await filled(world)
        world.cut(other.name)
        drop(one, 3)
        report = await repaired(primary)
        assert report.replicas == {one.name: "repaired", other.name: "silent"}
        assert not report.equal
        assert primary.repairer.counters["not_compared"] == 1
        assert held(one) == held(primary)


@on_trio
async def test_only_the_primary_may_change_rows_of_a_follower(tmp_path: Path) -> None:
    async with three(tmp_path) as world:
        primary, one, other = await filled(world)
        version = one.actor.replica.version_of(Kind.ITEM, 1)
        assert version is not None
        epoch = primary.actor.hint[0]
        asked = [0, epoch, b"", [[int(Kind.ITEM), 1, version]]]
        try:
            await other.links[one.name].call("mend", asked, 1.0)
        except Exception as error:
            assert getattr(error, "code", "") == "no_primary"
        else:
            raise AssertionError("a stranger dropped a row")
        assert one.actor.replica.get(Kind.ITEM, 1) is not None
