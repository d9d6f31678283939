"""A witness of one shard: a vote without data. Pure; docs/ownership.md has the laws.

* It is the machine of elections that no placement of its own makes stand: it promises, and its lease binds it, as any voter's do.
* `witness-memory`: in the place of a log it has the newest epoch that it was told to remember, because a majority of the voters'
  disks has it or one of two is gone. Whoever's log ends before that epoch gets no promise: else a voter that a change has left
  behind could lead again with its help.
* `memory-on-disk`: what it remembers is fsynced before it is told; candidates are judged by it from when it is being written.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from node.election import Ask, Effect, Election, ElectionConfig, Message, Stand
from node.pulls import Beat, Beaten
from storage.records import Version

# So often in a lease a witness beats: the primary's lease lives by its echo.
BEATS = 4
# Of one that no placement names.
IDLE_S = 5.0


class Remember(NamedTuple):
    """Write and fsync this epoch, then call `on_remembered` with it."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Kept:
    """What a witness has on its disk. id: made with the first of it; one that has lost it has another, and no vote."""

    id: int
    promised: int = 0
    remembered: int = 0


class Vote:
    """One shard's. Messages and promises are those of `election`; `beat` and its answer are what a stream is to others."""

    def __init__(
        self,
        config: ElectionConfig,
        name: str,
        kept: Kept,
        *,
        random: Random,
        now: float,
        owes: bool,
    ) -> None:
        """owes: it may have promised its silence to a primary before this process started."""
        self.id, self.remembered = kept.id, kept.remembered
        self._beat_s = config.lease_s / BEATS
        self._remembering = kept.remembered
        # Who leads in which epoch, as far as we have heard.
        self.hint: tuple[int, str] = (0, "")
        self.named = False
        # When to beat next.
        self.beat_at = now
        # The newest stamp of the primary that we follow, and in which epoch it was sent.
        self._echo: tuple[int, float] | None = None
        self.election = Election(
            config,
            name,
            voters=(),
            promised=kept.promised,
            last=lambda: Version(self._remembering, 0),
            random=random,
            now=now,
            owes=owes,
        )

    def hear(self, epoch: int, primary: str, now: float) -> None:
        """Somebody says who leads; the greatest epoch counts, and of that a name more than none."""
        if epoch > self.hint[0] or (epoch == self.hint[0] and not self.hint[1]):
            self.hint, self.beat_at = (epoch, primary), now

    def on_message(self, sender: str, message: Message, now: float) -> list[Effect]:
        """What a candidate asks, whose placement names this vote by its id; other messages are not for a witness."""
        if not isinstance(message, Ask | Stand) or message.to != self.id:
            return []
        return self.election.on_message(sender, message, now, named=True)

    # -- the heartbeat ------------------------------------------------------------------------------------------------

    def beat(self, now: float) -> Beat:
        """What the primary is to hear now. The next one is sent at `beat_at`."""
        election = self.election
        self.beat_at = now + self._beat_s
        echo = self._echo[1] if self._echo is not None and self._echo[0] == election.epoch else None
        promised = max(election.promised, self.remembered)
        return Beat(self.id, election.epoch, promised, self.remembered, echo)

    def on_beaten(self, primary: str, answer: Beaten, now: float) -> list[Effect | Remember]:
        """The primary's answer, at once as good as a stream's: its stamp binds us."""
        election = self.election
        # It has no log whose last epoch would bind it.
        if not election.takes(answer.epoch) or answer.epoch < election.epoch:
            return []
        followed = self._echo is not None and self._echo[0] == answer.epoch
        effects: list[Effect | Remember] = [*election.on_stream(primary, answer.epoch, now)]
        self._echo = (answer.epoch, answer.stamp)
        self.hint = max(self.hint, (answer.epoch, primary))
        self.named = answer.named
        # Its lease begins with our first echo.
        self.beat_at = now + (IDLE_S if not answer.named else self._beat_s if followed else 0.0)
        if answer.remember and answer.epoch > self._remembering:
            self._remembering = answer.epoch
            effects.append(Remember(answer.epoch))
        return effects

    def on_remembered(self, epoch: int, now: float) -> None:
        """That is on the disk; the primary waits to hear it."""
        self.remembered = max(self.remembered, epoch)
        self.beat_at = now

    def on_remember_failed(self) -> None:
        """It could not be written. The primary goes on telling."""
        self._remembering = self.remembered
