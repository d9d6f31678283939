"""What all commands of `gmco` share: their options, their exit codes, a client, and errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Annotated, NoReturn, TypeVar

import trio
import typer

import gmco
from admin.load import BadRowError, first_cause
from admin.sources import SourceError

EXIT_OURS, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_REFUSED, EXIT_BAD_ROW = 1, 2, 3, 4, 5
EXIT_NOT_FOUND, EXIT_TIMEOUT, EXIT_NOT_COMPARED, EXIT_INTERRUPTED = 6, 7, 8, 130

T = TypeVar("T")


class Output(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"


Nodes = Annotated[
    list[str], typer.Option("--node", envvar="GMCO_NODES", help="URL of a node; repeat for several.")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Tables for people or JSON.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for the whole call.")]
# Named, because typer wants a list as a default; nobody changes it.
DEFAULT_NODES = ["ws://127.0.0.1:7400"]


def fail(code: str, message: str, exit_code: int) -> NoReturn:
    """One line on stderr, and the exit code."""
    print(f"error[{code}]: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)


def exit_code_of(error: gmco.GmcoError) -> int:
    """The exit code for an error of the cluster."""
    if isinstance(error, gmco.Unavailable):
        return EXIT_UNREACHABLE
    if isinstance(error, gmco.BadRequest):
        return EXIT_USAGE
    if isinstance(error, gmco.NotFound):
        return EXIT_NOT_FOUND
    if isinstance(error, gmco.DeadlineExceeded):
        return EXIT_TIMEOUT
    return EXIT_REFUSED


def with_client(nodes: list[str], timeout_s: float, work: Callable[[gmco.Client], Awaitable[T]]) -> T:
    """`run` of `work` with a client."""

    async def connected() -> T:
        async with gmco.connect(nodes, timeout_s=timeout_s) as client:
            return await work(client)

    return run(connected)


def run(work: Callable[[], Awaitable[T]], *, interrupted: str = "stopped by Ctrl-C") -> T:
    """Every error ends the command with its line and exit code. interrupted: what is said after Ctrl-C."""
    try:
        return trio.run(work)
    except BaseException as group:
        error = first_cause(group)
        if isinstance(error, gmco.GmcoError):
            where = f" (field {error.field})" if error.field else ""
            fail(error.code, error.message + where, exit_code_of(error))
        if isinstance(error, BadRowError):
            fail("bad_row", f"{error}; correct it or give --skip-bad", EXIT_BAD_ROW)
        if isinstance(error, SourceError):
            fail("bad_file", str(error), EXIT_USAGE)
        if isinstance(error, OSError):
            fail("os_error", str(error), EXIT_OURS)
        if isinstance(error, KeyboardInterrupt):
            fail("interrupted", interrupted, EXIT_INTERRUPTED)
        raise


def node_urls(nodes: list[str]) -> list[str]:
    """URLs from options or the environment, where commas separate them, too."""
    urls = [url for part in nodes for url in part.replace(",", " ").split()]
    for url in urls:
        if not url.startswith(("ws://", "wss://")):
            fail("bad_url", f"{url!r} must begin with ws:// or wss://, as in ws://127.0.0.1:7400", EXIT_USAGE)
    return urls
