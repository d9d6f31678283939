"""The node's log: one JSON object per line on stderr, or a console format for people."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Literal, TextIO

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["json", "console"] = "json",
    *,
    node: str = "",
    stream: TextIO | None = None,
) -> None:
    """Sets up structlog for the process; every line carries `node`. Call once, before actors start."""
    out = stream or sys.stderr
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if format == "json":
        # Tracebacks as one string: a line stays a line.
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=out.isatty()))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    if node:
        structlog.contextvars.bind_contextvars(node=node)


class Every:
    """Lets an event through at most once per `seconds` and counts what it held back.

    if (held := full.due()) is not None:
        log.warning("mailbox_full", held_back=held)
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._next = float("-inf")
        self._held_back = 0

    def due(self) -> int | None:
        """How many were held back since the last one that passed, or None when this one is held back too."""
        now = self._clock()
        if now < self._next:
            self._held_back += 1
            return None
        self._next = now + self._seconds
        held, self._held_back = self._held_back, 0
        return held


def every(seconds: float, clock: Callable[[], float] = time.monotonic) -> Every:
    """A rate limit for one kind of log line; keep it beside the logger."""
    return Every(seconds, clock)
