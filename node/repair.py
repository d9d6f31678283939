"""What replicas of one shard that differ do about it. Pure (docs/replication.md, "Repair").

Laws:
* `repair-by-log`: what one replica has and another lacks gets a place in the log, under its own version. Outside the log only
  a content is put right under a version that is there, and a row dropped that was put aside.
* `greater-wins` and `tombstones-stay` hold: a delete is spread like any other record, and is never outweighed by an older row.
* `below-floor`: at or below the purge floor a tombstone that some lack goes everywhere; a live record that the primary or most
  of the compared lack may have been deleted: it is put aside, not spread.
* What is newer than the named place is left to the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from storage.buckets import Seen
from storage.records import Version

# By node, the entries of some buckets by id.
Views = Mapping[str, Mapping[int, Seen]]


@dataclass(slots=True)
class Steps:
    """Ids of one kind. write: by the primary, again. take: by the primary, from that node. mend: (who, from whom) → whose
    content is wrong under a version that is right. aside: rows of the primary that may have been deleted. drop: rows older
    than a delete of which the primary knows nothing. purge: a tombstone is not everywhere. lost: nobody has an intact copy."""

    write: list[int] = field(default_factory=list)
    take: dict[str, list[int]] = field(default_factory=dict)
    mend: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    aside: list[int] = field(default_factory=list)
    drop: dict[str, list[int]] = field(default_factory=dict)
    purge: bool = False
    lost: list[int] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.write or self.take or self.mend or self.aside or self.drop or self.purge)


def decide(views: Views, primary: str, floor: Version, place: Version, limit: int) -> Steps:
    """views: of the replicas that differed at `place`, the primary's taken last; of at most `limit` ids that differ."""
    steps = Steps()
    differ = 0
    for id_ in sorted(set().union(*views.values())):
        seen = {name: view[id_] for name, view in views.items() if id_ in view}
        if len(seen) == len(views) and len(set(seen.values())) == 1 and next(iter(seen.values())).intact:
            continue
        if max(one.version for one in seen.values()) > place:
            continue
        differ += 1
        if differ > limit:
            break
        _decide_one(steps, id_, seen, list(views), primary, floor)
    return steps


def _decide_one(
    steps: Steps, id_: int, seen: Mapping[str, Seen], names: Sequence[str], primary: str, floor: Version
) -> None:
    newest = max(one.version for one in seen.values())
    sound = [name for name, one in seen.items() if one.version == newest and one.intact]
    if not sound:
        steps.lost.append(id_)
        return
    source = primary if primary in sound else min(sound)
    right = seen[source]
    for name, one in seen.items():
        if one.version == newest and (not one.intact or one.content != right.content):
            steps.mend.setdefault((name, source), []).append(id_)
    behind = [name for name in names if name not in seen or seen[name].version < newest]
    if not behind:
        return
    purged = newest <= floor
    older = [name for name in behind if name in seen and seen[name].alive]
    if not right.alive and purged:
        steps.purge = True
        if primary not in seen:
            # Nothing to write it over: the primary has forgotten the delete, and rightly.
            for name in older:
                steps.drop.setdefault(name, []).append(id_)
            return
        if not older:
            return
    if primary in behind:
        steps.take.setdefault(source, []).append(id_)
    elif right.alive and purged and 2 * sum(name not in seen for name in names) > len(names):
        steps.aside.append(id_)
    else:
        steps.write.append(id_)
