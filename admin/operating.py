"""`gmco nodes`, `gmco events`, `gmco keyring`: who is in the cluster, what happens to it, and who may join."""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

import gmco
from admin import layouts, show
from admin.following import Follower
from admin.terminal import (
    DEFAULT_NODES,
    EXIT_REFUSED,
    EXIT_USAGE,
    Nodes,
    Output,
    OutputOption,
    Timeout,
    fail,
    node_urls,
    run,
    with_client,
)

STYLES = {"alive": "green", "suspect": "yellow", "down": "red", "left": "red", "unheard": "red"}
KIND_STYLES = {
    "suspected": "yellow",
    "down": "red",
    "degraded": "yellow",
    "returned": "green",
    "well": "green",
}

nodes_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
keyring_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    app.add_typer(nodes_app, name="nodes", help="Who is in the cluster and how each is doing.")
    app.add_typer(keyring_app, name="keyring", help="The keys of gossip, on all alive nodes.")
    app.add_typer(layouts.app, name="cluster", help="Which members should hold what: stage, plan, commit.")
    app.command("events", help="What has happened to the members, as the node asked saw it.")(events)


# -- nodes -------------------------------------------------------------------------------------------------------------


@nodes_app.callback()
def nodes(
    context: typer.Context,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """Asks the first node that answers what it sees."""
    if context.invoked_subcommand is not None:
        return
    status = with_client(node_urls(urls), timeout, lambda client: client.status())
    if output is Output.JSON:
        show.print_json(status["members"])
        return
    show.out.print(nodes_table(status))
    for problem in status.get("problems", []):
        show.err.print(problem, style="red", markup=False)


def nodes_table(status: dict[str, Any]) -> Table:
    """One row for each member."""
    title = f"cluster {status.get('cluster', '?')}, seen by {status.get('node', '?')} ({status.get('state', '?')})"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    members = status.get("members", [])
    # A terminal has 80 columns: what is the same for all, or empty, is left out (`--output json` has everything).
    places = {(member.get("region"), member.get("zone")) for member in members}
    versions = {member.get("version") for member in members if member.get("version")}
    unwell = any(member.get("degraded") for member in members)
    columns = ["node", "state", "for", "heard", "shards", "lag", "load", "app"]
    columns += ["where"] * (len(places) > 1) + ["version"] * (len(versions) > 1)
    for name in columns:
        table.add_column(name, no_wrap=name in ("node", "state", "app"), overflow="fold")
    if unwell:
        table.add_column("not well", overflow="fold", style="yellow")
    for member in members:
        state = str(member.get("state", "?"))
        if state == "alive" and not member.get("connected", True):
            state = "alive, no link"
        if member.get("duty"):
            state = f"{state}, {member['duty']}"
        load = member.get("load", {})
        cells: dict[str, RenderableType] = {
            "node": str(member.get("name", "?")),
            "state": Text(state, style=STYLES.get(state, "yellow")),
            "for": duration(member.get("state_ms")),
            "heard": duration(member.get("heard_ms")),
            "where": f"{member.get('region', '')}/{member.get('zone', '')}",
            "version": str(member.get("version", "")),
            "shards": str(member.get("shards", "")) if member.get("in_layout", True) else "not in the layout",
            "lag": duration(member.get("lag_ms")),
            "load": f"{load['queued']:.0f} queued, {load['batch_ms']:.1f} ms" if load else "",
            "app": Text(str(member.get("app", "")).removeprefix("ws://")),
        }
        row: list[RenderableType] = [cells[name] for name in columns]
        table.add_row(*row, *([Text(str(member.get("degraded") or ""))] if unwell else []))
    return table


def duration(ms: float | None) -> str:
    """As a person would say it: 0.3 s, 12 s, 5 min, 3 h, 2 d."""
    if ms is None:
        return ""
    seconds = ms / 1000
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


@nodes_app.command("forget", help="A node that is down will not come back.")
def forget(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name, or its id.")],
    urls: Nodes = DEFAULT_NODES,
    timeout: Timeout = 5.0,
) -> None:
    """The layout stays as it is: its shards keep their place for it."""
    with_client(node_urls(urls), timeout, lambda client: client.forget_node(name))
    show.out.print(f"{name} is forgotten", markup=False)


# -- events ------------------------------------------------------------------------------------------------------------


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as they happen, at another node when one is lost.")
    ] = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """The last 1,000 that the node remembers; with JSON, one object a line."""
    given = node_urls(urls)
    if not follow:
        _print_events(with_client(given, timeout, lambda client: client.events()), output)
        return
    follower = Follower(
        given,
        timeout,
        show=lambda found: _print_events(found, output),
        say=lambda text: show.err.print(text, markup=False, soft_wrap=True),
    )
    run(follower.run)


def _print_events(found: gmco.Events, output: Output) -> None:
    if found.lost:
        show.err.print(f"{found.lost} events are forgotten", markup=False)
    for event in found.events:
        _print_event(event, output)


def _print_event(event: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        print(json.dumps(event), flush=True)
        return
    clock = time.strftime("%H:%M:%S", time.localtime(event["at"])) + f".{int(event['at'] % 1 * 1000):03}"
    kind = str(event["kind"])
    by = f", says {event['by']}" if event.get("by") else ""
    reason = f": {event['reason']}" if event.get("reason") else ""
    line = Text(f"{clock}  {event['node']:20} ")
    line.append(kind, style=KIND_STYLES.get(kind, ""))
    line.append(f"{reason}{by}")
    show.out.print(line)


# -- keyring -----------------------------------------------------------------------------------------------------------


@keyring_app.command("generate", help="Print a new key: for gossip.key, or for `install`. Keep it secret.")
def generate() -> None:
    """Asks nobody."""
    print(secrets.token_hex(32))


@keyring_app.command("list", help="The fingerprints of the keys of each node.")
def list_(urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0) -> None:
    """The first of each node is the one it seals with."""
    _keyring("list", urls, output, timeout)


@keyring_app.command("install", help="Every node can read what is sealed with the key from now on.")
def install(
    file: Annotated[str, typer.Argument(metavar="FILE", help="With the key in hex; - for standard input.")],
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """From a file, because what stands on a command line is seen by everybody on the machine."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        key = bytes.fromhex(text.strip())
    except OSError as error:
        fail("bad_file", f"{file}: {error.strerror}", EXIT_USAGE)
    except ValueError:
        key = b""
    if len(key) != 32:
        fail("bad_file", f"{file} does not hold 64 hex digits; see `gmco keyring generate`", EXIT_USAGE)
    _keyring("install", urls, output, timeout, key=key)


Fingerprint = Annotated[str, typer.Argument(metavar="FINGERPRINT", help="As `gmco keyring list` shows it.")]


@keyring_app.command("use", help="Every node seals with the key from now on; all must have installed it.")
def use(
    fingerprint: Fingerprint,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """Refused while an alive node could not read it."""
    _keyring("use", urls, output, timeout, fingerprint=fingerprint)


@keyring_app.command("remove", help="No node reads what is sealed with the key any more.")
def remove(
    fingerprint: Fingerprint,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """Refused while an alive node seals with it."""
    _keyring("remove", urls, output, timeout, fingerprint=fingerprint)


def _keyring(action: Any, urls: list[str], output: Output, timeout: float, **given: Any) -> None:
    results = with_client(node_urls(urls), timeout, lambda client: client.keyring(action, **given))
    if output is Output.JSON:
        show.print_json(results)
    else:
        table = Table(header_style="bold")
        for name in ("node", "seals with", "reads, too", "error"):
            table.add_column(name, overflow="fold")
        for one in results:
            keys = one.get("keys", [])
            names = [key["fingerprint"] + (" (derived)" if key["derived"] else "") for key in keys]
            table.add_row(
                one["node"],
                ", ".join(names[:1]),
                ", ".join(names[1:]),
                Text(str(one.get("message", "")), style="red"),
            )
        show.out.print(table)
    failed = [one["node"] for one in results if "error" in one]
    if failed:
        fail("refused", f"not done on {', '.join(failed)}; the others have: try again", EXIT_REFUSED)
