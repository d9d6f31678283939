"""What an operator has said of this node, and what this node has said of itself since: on its disk, and told by gossip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog
import trio

from node import checked, facts
from node.failover import Failover
from node.members import Members
from storage.errors import DamagedFileError, FormatError
from storage.files import write_atomically

log = structlog.get_logger(__name__)

FORMAT = 1
# "": as ever. draining: it is about to leave. maintenance: it is worked at, and comes back.
Order = Literal["", "draining", "maintenance"]
ORDERS: tuple[Order, ...] = ("", "draining", "maintenance")


def load(path: Path) -> Order:
    """Raises DamagedFileError, FormatError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    try:
        fields = checked.decode(data)
        if fields["format"] != FORMAT:
            raise FormatError(f"{path} has format {fields['format']}, this build knows {FORMAT}")
        order = ORDERS[ORDERS.index(fields["order"])]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(path, error, "remove it, and give the order again") from error
    return order


async def open_duty(path: Path, members: Members, failover: Failover) -> Duty:
    """What this node was told, perhaps before it started; `failover` goes by it from now on. Raises StorageError, OSError."""
    duty = Duty(path, members, await trio.to_thread.run_sync(load, path))
    failover.rests = duty.rests
    duty.changed = lambda: failover.be_reluctant(duty.resting)
    duty.changed()
    return duty


class Duty:
    """Who rests leads nothing while another can, and is asked for nothing while another replica is there."""

    def __init__(self, path: Path, members: Members, order: Order) -> None:
        self.order: Order = order
        self._path, self._members = path, members
        self._lock = trio.Lock()
        # Called with each change.
        self.changed: Callable[[], None] = lambda: None
        self._tell()

    @property
    def resting(self) -> bool:
        return bool(self.order)

    def rests(self, name: str) -> bool:
        """Of any node, ourselves included."""
        if name == self._members.own.name:
            return self.resting
        known = self._members.get(name)
        return known is not None and bool(known.order)

    def maintained(self, name: str) -> bool:
        """Of any node: nobody takes its place."""
        known = self._members.get(name)
        own = name == self._members.own.name
        return (self.order if own else known.order if known is not None else "") == "maintenance"

    async def set(self, order: Order) -> None:
        """On disk, then told. Raises OSError."""
        async with self._lock:
            if order == self.order:
                return
            data = checked.encode({"format": FORMAT, "order": order})
            await trio.to_thread.run_sync(write_atomically, self._path, data)
            self.order = order
            log.warning("duty", order=order or "as ever")
            self._tell()
            self.changed()

    async def end_drain(self, *, member: bool, holds: bool) -> None:
        """A node that has left and holds nothing any more is as any other: it may come again. Raises OSError."""
        if self.order == "draining" and not member and not holds:
            await self.set("")

    def _tell(self) -> None:
        self._members.gossip.set_fact(facts.DUTY, self.order.encode())
        self._members.refresh()
