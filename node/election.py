"""Who is primary of one shard: promises, leases, epochs. Pure; one machine for each replica. docs/ownership.md has the laws.

* `promise-on-disk`: `Persist` comes before anything that rests on a promise; its consequences leave with `on_persisted`.
* `promise-binds`: no stream and no candidate of an epoch below the promised one is taken.
* `log-compared`: a candidate whose log ends before ours gets no promise.
* `own-epoch`: only `Lead` opens an epoch, and a machine that has just been made leads none, whatever its log says.
* `lease`: a voter promises nothing for `lease_s` after it received a primary's stamp; the primary may acknowledge until 0.9 of
  that after the newest stamp that a majority has echoed. Stamps are the primary's own clock, so clocks need not agree.
* A reluctant voter (its host is worked at) waits three times as long before it stands: it leads only where nobody else can.
* `start-wait`: a voter promises nothing for `lease_s` after its own start.
* A witness (node/witness.py) is this machine, too: among the voters of those who stand, with none of its own, so it never stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import NamedTuple

from storage.records import Version

# Far above what elections reach, and with room above it: epochs are u64 in logs and messages.
EPOCH_MAX = 1 << 60
# Epochs begin anew at a multiple of this when a primary is forced: none that is opened by voters who have not heard of it can be
# one of its own, however long they go on by themselves. Gossip tells epochs in 32 bits: room for some eighty forces of a shard.
FORCED_EVERY = 100_000
FORCED_DRAW = 1_000
# So much longer the others wait for a shard's first voter to open its first epoch.
FOUNDING_S = 5.0
# So much longer a reluctant voter waits, on top of the lease that all wait for.
RELUCTANCE_LEASES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ElectionConfig:
    """Seconds. rank_s: how much longer the n-th voter in the order of preference waits before it stands."""

    lease_s: float = 1.5
    lease_use: float = 0.9
    rank_s: float = 0.1
    retry_min_s: float = 0.05
    retry_max_s: float = 0.3
    candidacy_s: float = 0.5


def forced_above(epoch: int, random: Random) -> int:
    """Where epochs go on after a force, when none above `epoch` is known. Two that are forced apart, by mistake, draw different
    ones, and the lesser gives way."""
    return (epoch // FORCED_EVERY + random.randint(1, FORCED_DRAW)) * FORCED_EVERY


class Role(Enum):
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    PRIMARY = "primary"


class Stand(NamedTuple):
    """Please promise me `epoch`. last: where my log ends. released: the epoch whose primary gave way to me (0: none), so its
    lease binds nobody any more. to: the replica by which the placement in my log names you, told by the shell."""

    epoch: int
    last: Version
    released: int = 0
    to: int = 0


class Ask(NamedTuple):
    """Would you promise me `epoch`? Binds nobody. Without it a voter that is cut off raises its epoch again and again, and
    must be overtaken when it is back (Raft's PreVote)."""

    epoch: int
    last: Version
    released: int = 0
    to: int = 0


class Would(NamedTuple):
    epoch: int


class Promise(NamedTuple):
    """I take no byte of an epoch below `epoch`."""

    epoch: int


class Refuse(NamedTuple):
    """No. promised: what I have promised already; wait_s: how long a lease or my start binds me."""

    epoch: int
    promised: int
    reason: str
    wait_s: float = 0.0


class Succeed(NamedTuple):
    """From the primary of `released`: everything is in your log and I write no more; stand above it."""

    released: int


Message = Ask | Would | Stand | Promise | Refuse | Succeed


class Persist(NamedTuple):
    """Write and fsync this promise, then call `on_persisted` with it."""

    epoch: int


class Tell(NamedTuple):
    to: str
    message: Message


class Lead(NamedTuple):
    """Open the epoch: append its record, fsync, and from then on write in it. changes: under the placement that `renew` or
    `force` was asked for; without, under the present one."""

    epoch: int
    changes: bool = False


class StepDown(NamedTuple):
    """Write no more; what waits for an acknowledgement ends as `outcome_unknown`."""

    epoch: int
    reason: str


Effect = Persist | Tell | Lead | StepDown


@dataclass(slots=True)
class _Candidacy:
    """asking: nothing has been promised yet, not even by ourselves. yes: who would, or has."""

    epoch: int
    released: int
    asking: bool = True
    yes: set[str] = field(default_factory=set)
    forced: bool = False
    # Voters of the placement that the epoch is to be opened under (`overlap`): of those of them who vote already a majority must
    # promise, too. One who comes has nothing to promise; it counts from the epoch's record on.
    also: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Not when another epoch may lie between the settled one and this: its primary may have changed the voters in another
        way, and majorities of the two need not meet."""
        return self.forced or (bool(self.also) and self.epoch == self.released + 1)


class Election:
    """`last` tells where this replica's log may end, bytes that are being written included: by that it judges candidates.
    `durable` tells where it ends for certain: that it claims as a candidate (the same, when nothing is said)."""

    def __init__(
        self,
        config: ElectionConfig,
        name: str,
        *,
        voters: Iterable[str],
        promised: int,
        last: Callable[[], Version],
        random: Random,
        now: float,
        durable: Callable[[], Version] | None = None,
        founding: bool = False,
        owes: bool = True,
    ) -> None:
        """founding: no log of this shard has a placement yet, so the first epoch takes the promises of *all* its voters: one
        whose disk was replaced looks just the same. owes: this replica may have promised something before it started."""
        self._config, self.name, self._random, self._last = config, name, random, last
        self._durable = durable or last
        self.voters = tuple(voters)
        self._founding = founding
        self.role = Role.FOLLOWER
        # Whether it stands only where nobody else has; in all else it is as any other.
        self.reluctant = False
        self.promised = promised
        # The highest epoch heard of; a new one goes above it.
        self.seen = max(promised, last().epoch)
        self.primary: str | None = None
        # The epoch that we lead, or whose primary we follow.
        self.epoch = 0
        # Until when we promise nothing, and to the primary of which epoch that is owed (0: our own start).
        self._bound_until, self._bound_epoch = now + (config.lease_s if owes else 0.0), 0
        self._stand_at = self._bound_until + self._patience()
        self._persisting: int = 0
        # Who is told when the promise is on disk.
        self._promise_to: str | None = None
        self._candidacy: _Candidacy | None = None
        self._leads_since = now
        # As primary: the newest stamp of ours that each voter has echoed.
        self._echoed: dict[str, float] = {}
        self._lease_until = -math.inf
        self._resigned = False
        self._measure_lease()

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def next_deadline(self) -> float:
        if self.name not in self.voters:
            return math.inf
        if self.role is Role.PRIMARY:
            return max(self._lease_until, self._leads_since) + 2 * self._config.lease_s
        return self._stand_at

    def may_acknowledge(self, now: float) -> bool:
        """Whether the lease holds; asked after the fdatasync of what is to be acknowledged."""
        return self.role is Role.PRIMARY and not self._resigned and now < self._lease_until

    def takes(self, epoch: int) -> bool:
        """Whether a stream of `epoch` may be followed."""
        return epoch >= self.bound and self.role is not Role.PRIMARY

    @property
    def bound(self) -> int:
        """Nothing of an epoch below is taken, none up to it promised. The log's last epoch binds like a promise: others count
        on what is there."""
        return max(self.promised, self._persisting, self._last().epoch)

    @property
    def overruled(self) -> bool:
        """A primary was forced, and our log does not have its record."""
        return max(self.seen, self.bound) // FORCED_EVERY > self._last().epoch // FORCED_EVERY

    @property
    def lease_s(self) -> float:
        return self._config.lease_s

    @property
    def majority(self) -> int:
        """How many voters' promises open an epoch."""
        return len(self.voters) if self._founding else len(self.voters) // 2 + 1

    def configure(self, voters: Iterable[str], *, founding: bool = False) -> None:
        """The last placement in this replica's log names these voters."""
        self.voters, self._founding = tuple(voters), founding
        self._measure_lease()

    def _measure_lease(self) -> None:
        """By our own clock: a majority's newest echo, our own being now."""
        if self.name not in self.voters:
            self._lease_until = -math.inf
            return
        needed = len(self.voters) // 2
        if not needed:
            self._lease_until = math.inf
            return
        others = sorted((self._echoed.get(v, -math.inf) for v in self.voters if v != self.name), reverse=True)
        self._lease_until = others[needed - 1] + self._config.lease_use * self._config.lease_s

    # -- time -------------------------------------------------------------------------------------------------------

    def _patience(self) -> float:
        rank = self.voters.index(self.name) if self.name in self.voters else len(self.voters)
        if self._founding and rank:
            # All of them must be there anyway, so the one that is to lead can stand.
            return FOUNDING_S * rank
        rank_s = rank * self._config.rank_s + self._random.random() * self._config.rank_s / 2
        reluctance = (
            RELUCTANCE_LEASES * self._config.lease_s if self.reluctant and len(self.voters) > 1 else 0.0
        )
        return rank_s + reluctance

    def on_timer(self, now: float) -> list[Effect]:
        if now < self.next_deadline or self.name not in self.voters:
            return []
        if self.role is Role.PRIMARY:
            return self._step_down("no majority of the voters has answered for too long", now)
        return self._stand(now, released=0)

    # -- standing ---------------------------------------------------------------------------------------------------

    def _stand(self, now: float, released: int, also: tuple[str, ...] = ()) -> list[Effect]:
        epoch = max(self.seen, self.bound) + 1
        if self.overruled:
            # It would open epochs of that primary's, under a placement that counts no more: it comes back by following.
            self.role, self._candidacy = Role.FOLLOWER, None
            self._stand_at = now + self._config.lease_s + self._patience()
            return []
        self.role = Role.CANDIDATE
        self.primary = None
        self._candidacy = _Candidacy(epoch, released, yes={self.name}, also=also)
        config = self._config
        self._stand_at = (
            now + config.candidacy_s + self._random.uniform(config.retry_min_s, config.retry_max_s)
        )
        return self._tell_others(Ask(epoch, self._durable(), released)) + self._count(now)

    def _tell_others(self, message: Message) -> list[Effect]:
        return [Tell(voter, message) for voter in self.voters if voter != self.name]

    def _persist(self, epoch: int) -> list[Effect]:
        self._persisting = epoch
        return [Persist(epoch)]

    def on_persisted(self, epoch: int, now: float) -> list[Effect]:
        """That promise is on disk."""
        self.promised = max(self.promised, epoch)
        if epoch != self._persisting:
            return []  # a higher one is under way
        self._persisting = 0
        candidacy = self._candidacy
        if candidacy is not None and candidacy.epoch == epoch:
            candidacy.yes.add(self.name)
            if candidacy.forced:
                return self._count(now)
            return self._tell_others(Stand(epoch, self._durable(), candidacy.released)) + self._count(now)
        if self._promise_to is not None:
            to, self._promise_to = self._promise_to, None
            return [Tell(to, Promise(epoch))]
        return []

    def on_persist_failed(self, epoch: int, now: float) -> None:
        """That promise could not be written: it was not given."""
        if epoch == self._persisting:
            self._persisting, self._promise_to = 0, None
            if self.role is Role.CANDIDATE:
                self.role, self._candidacy = Role.FOLLOWER, None
            self._stand_at = now + self._config.lease_s + self._patience()

    def _count(self, now: float) -> list[Effect]:
        candidacy = self._candidacy
        assert candidacy is not None
        yes = candidacy.yes & set(self.voters)
        staying = set(candidacy.also) & set(self.voters)
        enough = len(yes) >= self.majority and (not staying or len(yes & staying) > len(staying) // 2)
        if not enough and not candidacy.forced:
            return []
        if candidacy.asking:
            candidacy.asking, candidacy.yes = False, set()
            # Who waits for a lesser promise will not be told of this one: it is ours.
            self._promise_to = None
            self.seen = max(self.seen, candidacy.epoch)
            return self._persist(candidacy.epoch)
        self.role, self.epoch, self.primary = Role.PRIMARY, candidacy.epoch, self.name
        self._candidacy = None
        self._resigned = False
        self._leads_since, self._echoed = now, {}
        self._measure_lease()
        return [Lead(self.epoch, candidacy.changes)]

    # -- messages ---------------------------------------------------------------------------------------------------

    def on_message(self, sender: str, message: Message, now: float, *, named: bool = False) -> list[Effect]:
        """named: the placement in the sender's log counts this very replica as a voter, though ours may not say so yet: who was
        admitted while it was cut off must be able to vote for those who have the record of that."""
        if isinstance(message, Ask):
            refusal = self._why_not(message, now, named)
            return [Tell(sender, Would(message.epoch) if refusal is None else refusal)]
        if isinstance(message, Stand):
            return self._on_stand(sender, message, now, named)
        if isinstance(message, Would):
            return self._on_yes(sender, message.epoch, True, now)
        if isinstance(message, Promise):
            return self._on_yes(sender, message.epoch, False, now)
        if isinstance(message, Refuse):
            return self._on_refuse(message, now)
        if self.name not in self.voters or message.released < max(self.epoch, self.promised):
            return []
        effects = self._step_down(f"{sender} hands over", now) if self.role is Role.PRIMARY else []
        return effects + self._stand(now, released=message.released)

    def _on_stand(self, sender: str, stand: Stand, now: float, named: bool) -> list[Effect]:
        refusal = self._why_not(stand, now, named)
        if refusal is not None:
            return [Tell(sender, refusal)]
        effects: list[Effect] = []
        if self.role is Role.PRIMARY:
            effects += self._step_down(f"{sender} stands for epoch {stand.epoch}", now)
        self.seen = max(self.seen, stand.epoch)
        self.role, self._candidacy = Role.FOLLOWER, None
        self.primary = None
        # A promise binds to no lease, so a candidate that fails holds nobody up: the lease begins with its stream.
        self._stand_at = now + self._config.candidacy_s + self._patience()
        self._promise_to = sender
        return effects + self._persist(stand.epoch)

    def _why_not(self, stand: Stand | Ask, now: float, named: bool) -> Refuse | None:
        promised = self.bound
        if self.name not in self.voters and not named:
            return Refuse(stand.epoch, promised, "learner")
        if stand.epoch <= promised:
            return Refuse(stand.epoch, promised, "promised")
        if stand.last < self._last():
            return Refuse(stand.epoch, promised, "log")
        if self.may_acknowledge(now):
            return Refuse(stand.epoch, promised, "lease", self._lease_until - now)
        given_up = 0 < self._bound_epoch <= stand.released
        if now < self._bound_until and not given_up:
            return Refuse(stand.epoch, promised, "lease", self._bound_until - now)
        return None

    def _on_yes(self, sender: str, epoch: int, asking: bool, now: float) -> list[Effect]:
        candidacy = self._candidacy
        if candidacy is None or candidacy.epoch != epoch or candidacy.asking is not asking:
            return []
        candidacy.yes.add(sender)
        return self._count(now)

    def _on_refuse(self, refuse: Refuse, now: float) -> list[Effect]:
        self.seen = max(self.seen, refuse.promised)
        candidacy = self._candidacy
        if candidacy is not None and candidacy.epoch == refuse.epoch and refuse.reason == "log":
            # One with a longer log is there: let it stand first.
            self._stand_at = max(self._stand_at, now + self._config.lease_s / 2 + self._patience())
        return []

    # -- the stream -------------------------------------------------------------------------------------------------

    def on_stream(self, primary: str, epoch: int, now: float) -> list[Effect]:
        """A primary's answer to a pull; asked `takes(epoch)` before anything of it is used."""
        if not self.takes(epoch):
            return []
        self.seen = max(self.seen, epoch)
        self.role, self.epoch, self.primary = Role.FOLLOWER, epoch, primary
        # A promise that is still on its way to the disk was to a candidate of that epoch, or of one before.
        self._candidacy = self._promise_to = None
        self._bind(epoch, now)
        return []

    def _bind(self, epoch: int, now: float) -> None:
        self._bound_until, self._bound_epoch = max(self._bound_until, now + self._config.lease_s), epoch
        self._stand_at = self._bound_until + self._patience()

    def on_echo(self, voter: str, stamp: float) -> None:
        """As primary: a voter's pull, in our epoch, carried this stamp of ours back."""
        self._echoed[voter] = max(stamp, self._echoed.get(voter, -math.inf))
        self._measure_lease()

    def on_higher_epoch(self, epoch: int, now: float) -> list[Effect]:
        """Somebody speaks of an epoch above ours. If its candidate has failed, only a still higher epoch brings everybody
        together again, and whoever has led should stand for it; if it has won, its voters' leases will refuse us."""
        self.seen = max(self.seen, epoch)
        if self.role is not Role.PRIMARY or epoch <= self.epoch:
            return []
        released = self.epoch
        return self._step_down(f"epoch {epoch} has been promised", now) + self._stand(now, released)

    def on_leader(self, epoch: int, now: float) -> list[Effect]:
        """Somebody has opened `epoch`. If it is above ours, that one leads, and we follow."""
        self.seen = max(self.seen, epoch)
        if self.role is not Role.PRIMARY or epoch <= self.epoch:
            return []
        return self._step_down(f"epoch {epoch} has been opened", now)

    def _step_down(self, reason: str, now: float) -> list[Effect]:
        epoch = self.epoch
        self.role, self.primary, self._candidacy = Role.FOLLOWER, None, None
        self._echoed = {}
        self._measure_lease()
        self._resigned = False
        self._stand_at = now + self._config.lease_s + self._patience()
        return [StepDown(epoch, reason)]

    def give_up(self, reason: str, now: float) -> list[Effect]:
        """As primary: this replica cannot write (its disk is full, say); let another stand."""
        return self._step_down(reason, now) if self.role is Role.PRIMARY else []

    def renew(self, now: float, also: Iterable[str] = ()) -> list[Effect]:
        """As primary of a settled epoch: stand again right above it, with our lease given up, to open one under a new placement,
        whose voters are `also`. When that fails, or an epoch may have come between, `Lead` says that nothing changes."""
        if self.role is not Role.PRIMARY:
            return []
        released = self.epoch
        return self._step_down("its placement changes", now) + self._stand(now, released, tuple(also))

    def force(self, epoch: int, now: float) -> list[Effect]:
        """Open `epoch` without anybody's promise but our own. What that can lose, docs/ownership.md says."""
        effects = self._step_down("forced elsewhere", now) if self.role is Role.PRIMARY else []
        self.role, self.primary = Role.CANDIDATE, None
        self._candidacy = _Candidacy(epoch, 0, asking=False, forced=True)
        self.seen = max(self.seen, epoch)
        self._stand_at = now + self._config.lease_s
        return [*effects, *self._persist(epoch)]

    # -- handing over -----------------------------------------------------------------------------------------------

    @property
    def resigned(self) -> bool:
        return self._resigned

    def resign(self) -> None:
        """No write is begun or acknowledged any more, so that the successor's log can become whole."""
        assert self.role is Role.PRIMARY
        self._resigned = True

    def resume(self) -> None:
        """The successor did not come level: write on."""
        self._resigned = False

    def hand_over(self, to: str, now: float) -> list[Effect]:
        """The successor has everything: it may stand at once. Only after `resign`."""
        assert self._resigned
        epoch = self.epoch
        effects = self._step_down(f"handed over to {to}", now)
        # Our own lease, which we have given up, binds us no more either.
        self._bound_until, self._bound_epoch = now, epoch
        return [*effects, Tell(to, Succeed(epoch))]
