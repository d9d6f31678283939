"""Points by name at which a test has this process end, as if the power had gone: `GMCO_CRASH_AT=move.after_bring gmco-node …`.

`GMCO_CRASH_AT=@FILE`: at the point that stands in that file, once there is one. Whoever comes there first removes the file, so of
several processes just one ends.

What the disk has been told survives, as with `kill -9`; nobody gets a chance to say good-bye. Which points there are, `POINTS`
says; docs/testing.md, what each is for.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

POINTS = (
    "move.after_bring",
    "move.after_learner",
    "move.after_snapshot",
    "move.after_voter",
    "move.after_removed",
    "failover.after_promise",
    "failover.after_open",
    "checkpoint.before_commit",
    "cut.after_side_file",
    "cut.after_checkpoint",
    "cut.after_log",
)
# Read once: points are passed often.
_AT = os.environ.get("GMCO_CRASH_AT", "")
_FILE = Path(_AT[1:]) if _AT.startswith("@") else None
if _AT and _FILE is None and _AT not in POINTS:
    raise SystemExit(f"GMCO_CRASH_AT={_AT}: there is no such point; there are {', '.join(POINTS)}")


def reached(point: str) -> None:
    """Ends the process when it is to end here."""
    assert point in POINTS
    if point == _AT or (_FILE is not None and _told(_FILE, point)):
        os.kill(os.getpid(), signal.SIGKILL)


def _told(file: Path, point: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        if file.read_text() == point:
            file.unlink()
            return True
    return False
