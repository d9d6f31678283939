"""`gmco`: what an operator types. People get tables, programs get `--output json`, both get exit codes.

0 done · 1 our own fault · 2 wrong usage or request · 3 no node reachable · 4 refused by the cluster · 5 a row that cannot
be loaded · 6 no such record · 7 not answered in time · 8 replicas could not be compared · 130 Ctrl-C
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import gmco
from admin import moves, operating, shards, show
from admin.films import CLASS_IDS
from admin.load import Loader, LoadOptions, LoadProgress, StateFile, summary
from admin.sources import Kind, SourceError, open_source
from admin.terminal import (
    DEFAULT_NODES,
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    Nodes,
    Output,
    OutputOption,
    Timeout,
    fail,
    node_urls,
    with_client,
)

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
get_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(get_app, name="get", help="Show stored records.")
operating.add_to(app)
shards.add_to(app)
moves.add_to(app)


class KindName(StrEnum):
    """What a file holds."""

    ITEMS = "items"
    USERS = "users"


class AckName(StrEnum):
    """When a write counts as done."""

    PRIMARY = "primary"
    QUORUM = "quorum"
    ALL = "all"


Count = Annotated[int, typer.Option("-k", min=1, max=10_000, help="How many.")]
Classes = list[str]
RequireAll = Annotated[
    Classes, typer.Option("--all", help="Class id or film class name that each must have.")
]
RequireAny = Annotated[Classes, typer.Option("--any", help="At least one of these classes.")]
Exclude = Annotated[Classes, typer.Option("--exclude", help="None of these classes.")]
# Named, because typer wants lists as defaults; nobody changes them.
NO_CLASSES: list[str] = []
NO_IDS: list[int] = []


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gmco {_version()}")
        raise typer.Exit


@app.callback(help="GMC-O: recommendations from sharded, replicated embeddings.")
def common(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def _version() -> str:
    try:
        return version("gmco")
    except PackageNotFoundError:
        return "(not installed)"


def class_ids(names: Classes) -> list[int]:
    """Class ids from numbers or film class names (Animation, France, 1990s, PG-13)."""
    lower = {name.lower(): number for name, number in CLASS_IDS.items()}
    ids = []
    for name in names:
        if name.isascii() and name.isdigit():
            ids.append(int(name))
        elif name.lower() in lower:
            ids.append(lower[name.lower()])
        else:
            fail("unknown_class", f"{name!r} is neither a class id nor a class of the film data", EXIT_USAGE)
    return ids


def _print_answer(answer: gmco.Answer, title: str, output: Output) -> None:
    if output is Output.JSON:
        show.print_json(show.answer_json(answer))
        return
    show.out.print(show.hits_table(answer, title))
    for note in show.footnotes(answer):
        show.err.print(f"[yellow]{note}")


@app.command(help="How the node asked is, and its replicas.")
def status(nodes: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0) -> None:
    """Asks the first node that answers."""
    reply = with_client(node_urls(nodes), timeout, lambda client: client.status())
    if output is Output.JSON:
        show.print_json(reply)
        return
    show.print_status(reply)


@app.command(help="The best items for a user.")
def recommend(
    user: Annotated[int, typer.Argument(min=0, metavar="USER", help="The user's id.")],
    k: Count = 10,
    require_all: RequireAll = NO_CLASSES,
    require_any: RequireAny = NO_CLASSES,
    exclude: Exclude = NO_CLASSES,
    nodes: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """With the same constraints as the API."""
    chosen = _constraints(require_all, require_any, exclude)
    answer = with_client(node_urls(nodes), timeout, lambda client: client.recommend(user, k, **chosen))
    _print_answer(answer, f"for user {user}", output)


@app.command(help="Items near one or several items, and away from others.")
def similar(
    media_ids: Annotated[
        list[int], typer.Argument(min=0, metavar="MEDIA_ID...", help="Items to be near to.")
    ],
    away: Annotated[list[int], typer.Option("--not", min=0, help="Item to be away from; repeat.")] = NO_IDS,
    k: Count = 10,
    require_all: RequireAll = NO_CLASSES,
    require_any: RequireAny = NO_CLASSES,
    exclude: Exclude = NO_CLASSES,
    nodes: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """With the same constraints as the API."""
    chosen = _constraints(require_all, require_any, exclude)
    answer = with_client(
        node_urls(nodes),
        timeout,
        lambda client: client.similar(positive=media_ids, negative=away, k=k, **chosen),
    )
    _print_answer(answer, f"similar to {', '.join(map(str, media_ids))}", output)


def _constraints(require_all: Classes, require_any: Classes, exclude: Classes) -> dict[str, Any]:
    return {
        "require_all": class_ids(require_all),
        "require_any": class_ids(require_any),
        "exclude": class_ids(exclude),
    }


Ids = Annotated[list[int], typer.Argument(min=0, metavar="ID...")]
WithVector = Annotated[bool, typer.Option("--vector", help="With the vector (JSON only).")]


def _get(kind: Kind, ids: list[int], vector: bool, nodes: list[str], output: Output, timeout: float) -> None:
    async def fetch(client: gmco.Client) -> list[gmco.Record | None]:
        method = client.get_items if kind == "items" else client.get_users
        return await method(ids, vector=vector)

    found = with_client(node_urls(nodes), timeout, fetch)
    if output is Output.JSON:
        show.print_json(found)
    else:
        show.out.print(show.records_table([record for record in found if record is not None]))
    absent = [str(id) for id, record in zip(ids, found, strict=True) if record is None]
    if absent:
        fail(f"unknown_{kind[:-1]}", f"no such {kind[:-1]}: {', '.join(absent)}", EXIT_NOT_FOUND)


@get_app.command("item", help="Items by id.")
def get_item(
    ids: Ids,
    vector: WithVector = False,
    nodes: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """What is stored, from any replica."""
    _get("items", ids, vector, nodes, output, timeout)


@get_app.command("user", help="Users by id.")
def get_user(
    ids: Ids,
    vector: WithVector = False,
    nodes: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """What is stored, from any replica."""
    _get("users", ids, vector, nodes, output, timeout)


@app.command(help="Load vectors from Parquet, npy with ids, or JSON lines.")
def load(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    kind: Annotated[KindName, typer.Option(help="What the file holds.")] = KindName.ITEMS,
    ids: Annotated[Path | None, typer.Option("--ids", help="ids.npy beside vectors.npy.")] = None,
    ack: Annotated[AckName, typer.Option(help="When a batch counts as written.")] = AckName.QUORUM,
    batch_rows: Annotated[int, typer.Option("--batch", min=1, max=1000, help="Rows in a request.")] = 256,
    window: Annotated[int, typer.Option(min=1, max=64, help="Batches under way at most.")] = 8,
    resume: Annotated[bool, typer.Option(help="Go on where an earlier load stopped.")] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count bad rows instead of stopping.")] = False,
    nodes: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds without progress.")] = 60.0,
) -> None:
    """Ctrl-C leaves FILE.gmco-load beside the file; the same command goes on from there."""
    urls = node_urls(nodes)
    try:
        source = open_source(file, kind.value, ids)
    except SourceError as error:
        fail("bad_file", str(error), EXIT_USAGE)
    options = LoadOptions(
        kind=kind.value,
        ack=ack.value,
        batch_rows=batch_rows,
        window=window,
        skip_bad=skip_bad,
        give_up_s=timeout,
    )
    state = StateFile(file.with_name(file.name + ".gmco-load"), source, options)
    before = state.read() if resume else LoadProgress()
    if before.next_batch:
        show.err.print(
            f"going on at {source.unit} {before.rows_done + 1} ({state.path.name}); --no-resume starts over"
        )
    started = time.monotonic()
    with show.load_bar(f"loading {kind.value}", source.rows) as changed:
        work = functools.partial(
            _load, source=source, options=options, state=state, before=before, changed=changed
        )
        progress = with_client(urls, min(timeout, 10.0), work)
    done = summary(progress, time.monotonic() - started)
    if output is Output.JSON:
        show.print_json(done)
        return
    show.out.print(f"{done['written']:,} {kind.value} written, {done['bad']} bad rows, {done['elapsed_s']} s")
    for bad in progress.bad_rows:
        show.err.print(f"{source.unit} {bad.place}: {bad.reason}", markup=False)


async def _load(client: gmco.Client, *, before: LoadProgress, changed: Any, **given: Any) -> LoadProgress:
    """The cluster's dimension is asked for first: a file of another one should fail on its first row."""
    dim = (await client.status()).get("dim")
    options: LoadOptions = given["options"]
    if isinstance(dim, int):
        options = replace(options, dim=dim)
    return await Loader(
        client, given["source"], options, given["state"], progress=before, changed=changed
    ).run()


@app.command(help="Three nodes and 17,472 films on this machine, until Ctrl-C.")
def demo(
    once: Annotated[bool, typer.Option("--once", help="Check every claim, then stop.")] = False,
    directory: Annotated[Path, typer.Option("--dir", help="Where the nodes keep their data.")] = Path(
        ".demo"
    ),
) -> None:
    """See `admin.demo`."""
    from admin import demo as demonstration  # the other commands need not wait for its imports

    raise typer.Exit(demonstration.main(once=once, directory=directory))


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script. Usage errors are one line, like all others."""
    try:
        code = app(args=arguments, prog_name="gmco", standalone_mode=False)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(_help(error), file=sys.stderr)
            sys.exit(EXIT_USAGE)
        print(f"error[usage]: {_message(error)} (see {_command(error)} --help)", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("error[interrupted]: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)


def _message(error: typer.TyperException) -> str:
    return " ".join(_help(error).split())


def _command(error: typer.TyperException) -> str:
    """The command that was used wrongly, as `gmco load`: its help says more than that of the whole."""
    return str(getattr(getattr(error, "ctx", None), "command_path", "gmco"))


def _help(error: typer.TyperException) -> str:
    return str(getattr(error, "format_message", lambda: error)())


if __name__ == "__main__":
    main()
