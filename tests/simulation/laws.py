"""The laws of docs/ownership.md, checked at each step against what all hosts have really done and really hold."""

from __future__ import annotations

from collections.abc import Sequence

from node.placement import Placement
from storage.records import Version
from tests.simulation.stores import Rec, Store

Who = tuple[str, int]  # a host's name and the id of its replica


class Laws:
    def __init__(self) -> None:
        self.violations: list[str] = []
        # Epochs that were opened without a majority, because an operator said so.
        self.forced: set[int] = set()
        # epoch → who opened it, under which placement.
        self.opened: dict[int, str] = {}
        self.placements: dict[int, Placement] = {}
        # epoch → who has promised it; who has had its record on the disk.
        self._promised: dict[int, set[Who]] = {}
        self._logged: dict[int, set[Who]] = {}
        # who → the greatest epoch in which it promised or was counted.
        self._acted: dict[Who, int] = {}
        self._greatest: dict[Who, int] = {}
        # Replicas that are no more: by a dismissal, or with their disk; and ids of the latter.
        self.wiped: set[Who] = set()
        self.destroyed: set[int] = set()
        # Since which forced epoch (0: since the beginning) → the newest that has acknowledged anything.
        self._newest_acknowledged: dict[int, int] = {}
        # key → the greatest version of a delete that a quorum has acknowledged.
        self.deleted: dict[str, Version] = {}
        # (write_id, version) of what was offered again when something newer had long taken its place.
        self.superseded: set[tuple[int, Version]] = set()
        # write_ids of what was put aside: below the floor, and nobody knows whether it was deleted.
        self.aside: set[int] = set()
        self.dismissed = 0

    def broken(self, law: str, what: str) -> None:
        self.violations.append(f"{law}: {what}")

    # -- epochs -----------------------------------------------------------------------------------------------------

    def on_promise(self, who: Who, epoch: int, last_epoch: int) -> None:
        """Told, to others or to itself. last_epoch: of its log."""
        least = max(self._greatest.get(who, 0), last_epoch)
        if epoch < least:
            self.broken("promise-binds", f"{who[0]} promises {epoch} after {least}")
        self._greatest[who] = max(least, epoch)
        self._promised.setdefault(epoch, set()).add(who)
        self._act(who, epoch)

    def on_open(self, name: str, epoch: int, before: Placement | None, at: int, new: Placement) -> None:
        """before: the placement that it stood under, of epoch `at`; None: the shard is founded."""
        first = self.opened.setdefault(epoch, name)
        if first != name:
            self.broken("one-primary", f"epoch {epoch} opened by {first} and {name}")
        self.placements[epoch] = new
        if epoch in self.forced:
            return
        yes = self._promised.get(epoch, set())
        if before is None:
            if not set(new.votes) <= yes:
                self.broken("founding", f"epoch {epoch} founded by {sorted(yes)} for {new.votes}")
            return
        if not _majority(before.votes, yes):
            self.broken("overlap", f"{epoch} under {before.electors} opened by {sorted(yes)}")
        if new.votes == before.votes:
            return
        staying = [one for one in new.votes if one in before.votes]
        if not _majority(staying, yes):
            self.broken("overlap", f"{epoch} under {new.electors} opened by {sorted(yes)}")
        if len(set(new.electors) ^ set(before.electors)) > 1:
            self.broken("overlap", f"{epoch} changes {before.electors} to {new.electors}")
        if epoch != at + 1 or not self.established(at):
            self.broken("overlap", f"{epoch} is not right above a settled one, {at}, and changes it")

    def on_disk(self, who: Who, epoch: int) -> None:
        """The record that opens that epoch is in its log; of a witness: it remembers it."""
        self._logged.setdefault(epoch, set()).add(who)

    def on_count(self, who: Who, epoch: int) -> None:
        """As a voter of the primary of that epoch."""
        self._act(who, epoch)

    def on_pull(self, who: Who) -> None:
        """It names what it has, to be counted."""
        if who in self.wiped:
            self.broken("learners-silent", f"{who[0]} goes by the id of a replica that is gone")

    def _act(self, who: Who, epoch: int) -> None:
        self._acted[who] = max(epoch, self._acted.get(who, 0))

    # -- moves ------------------------------------------------------------------------------------------------------

    def settled(self, epoch: int) -> bool:
        placement, knows = self.placements[epoch], self._logged.get(epoch, set())
        return _majority(placement.voters, knows) and placement.sealed(knows)

    def established(self, epoch: int) -> bool:
        """Nobody who lacks it can win any more."""
        placement, knows = self.placements[epoch], self._logged.get(epoch, set())
        enough = _majority(placement.voters, knows) or placement.remembered(knows)
        return enough and placement.sealed(knows)

    def in_force(self) -> list[Placement]:
        """The last one that a majority of its voters has had, and all that were opened after it."""
        found = []
        for epoch in sorted(self.placements, reverse=True):
            found.append(self.placements[epoch])
            if self.settled(epoch):
                break
        return found

    def on_wipe(self, who: Who, epoch: int) -> None:
        """Dismissed by the primary of that epoch."""
        self.wiped.add(who)
        self.dismissed += 1
        if who in self.placements[epoch].voters + self.placements[epoch].learners:
            self.broken("dismissal", f"{who[0]} is wiped, the placement of {epoch} names it")
        if not self.settled(epoch):
            self.broken("dismissal", f"{who[0]} is wiped, {epoch} is not on a quorum")
        if self._acted.get(who, 0) > epoch:
            self.broken("dismissal", f"{who[0]} is wiped by {epoch}, it has acted in {self._acted[who]}")

    # -- tails ------------------------------------------------------------------------------------------------------

    def on_held(self, rec: Rec, store: Store, name: str) -> None:
        """Offered again and not taken: its log must have it, or something newer of that key, be it only in a side file yet."""
        self.superseded.add((rec.write_id, rec.version))
        logged = any(one.version == rec.version for one in store.log)
        newer = (one for side in (store.log, *store.files.sides.values()) for one in side)
        if not logged and not any(one.key == rec.key and one.version > rec.version for one in newer):
            self.broken("lost", f"{name} takes {rec.key} {tuple(rec.version)} for held")

    # -- writes -----------------------------------------------------------------------------------------------------

    def on_acknowledge(self, epoch: int, by: str) -> None:
        """`lease`: once a later primary has acknowledged anything, no earlier one does; but where a primary was forced, those
        who do not know of it go on."""
        since = self.forced_before(epoch)
        newest = self._newest_acknowledged.get(since, 0)
        if epoch < newest:
            self.broken("lease", f"{by} acknowledges in {epoch}, {newest} has done so before")
        self._newest_acknowledged[since] = max(epoch, newest)

    def forced_before(self, epoch: int) -> int:
        """The last forced epoch at or below that one; 0: none."""
        return max((one for one in self.forced if one <= epoch), default=0)

    def overruled(self, epoch: int) -> bool:
        """Whether a primary above that epoch was forced."""
        return any(one > epoch for one in self.forced)


def _majority(voters: Sequence[Who], of: set[Who]) -> bool:
    return len(of & set(voters)) > len(voters) // 2
