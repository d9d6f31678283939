"""`gmco cluster`: the layout. Changes are staged on the node asked (the first `--node`), planned and committed there."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from admin import show
from admin.terminal import (
    DEFAULT_NODES,
    EXIT_USAGE,
    Nodes,
    Output,
    OutputOption,
    Timeout,
    fail,
    node_urls,
    with_client,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

MOVES_SHOWN = 40
SETTABLE = ("region", "zone", "host", "capacity")
Node = Annotated[str, typer.Argument(metavar="NODE", help="Its node.name, as `gmco nodes` shows it.")]
Region = Annotated[str | None, typer.Option(help="Else what the node says of itself.")]
Capacity = Annotated[
    int | None, typer.Option(min=0, help="Relative: twice the capacity, twice the shards; 0: --witness.")
]
Witness = Annotated[
    bool, typer.Option("--witness", help="It holds no data, and votes where there are two replicas.")
]


def ask(action: Any, urls: list[str], timeout: float, **fields: Any) -> dict[str, Any]:
    # One node: what is staged lies on it.
    first = node_urls(urls)[:1]
    return with_client(first, timeout, lambda client: client.cluster(action, fields))


@app.command("init", help="Make the first layout of a new cluster. Only once, on nodes that wait for one.")
def init(
    member: Annotated[
        list[str] | None, typer.Option(help="Name of a member; without: all alive nodes.")
    ] = None,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 10.0,
) -> None:
    """Refused where a layout is known."""
    _print_layout(ask("init", urls, timeout, members=member or None), output)


@app.command("show", help="The layout that the node goes by, and what is staged on it.")
def show_(urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0) -> None:
    """Asks nobody else."""
    _print_layout(ask("show", urls, timeout), output)


@app.command("join", help="Stage: a node becomes a member. Also a member that has a new disk.")
def join(
    node: Node,
    region: Region = None,
    zone: Region = None,
    host: Region = None,
    capacity: Capacity = None,
    witness: Witness = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """It must run and be known by gossip."""
    if witness and capacity:
        fail("bad_argument", "a witness has no capacity: give --witness or --capacity", EXIT_USAGE)
    capacity = 0 if witness else capacity
    fields = {"node": node, "region": region, "zone": zone, "host": host, "capacity": capacity}
    _print_staged(ask("join", urls, timeout, **fields), output)


@app.command("leave", help="Stage: a member leaves.")
def leave(
    node: Node, urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0
) -> None:
    """Alive or not."""
    _print_staged(ask("leave", urls, timeout, node=node), output)


@app.command("set", help="Stage: NODE KEY=VALUE… (region, zone, host, capacity), or replication=N.")
def set_(
    words: Annotated[list[str], typer.Argument(metavar="[NODE] KEY=VALUE…")],
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 5.0,
) -> None:
    """Of one member, or of the whole layout."""
    node = None if "=" in words[0] else words[0]
    fields: dict[str, Any] = {"node": node}
    allowed = SETTABLE if node else ("replication",)
    for word in words[node is not None :]:
        key, _, value = word.partition("=")
        if key not in allowed or not value:
            fail("bad_argument", f"{word!r}: give {' or '.join(f'{one}=…' for one in allowed)}", EXIT_USAGE)
        fields[key] = value
    for key in {"capacity", "replication"} & set(fields):
        if not fields[key].isdecimal():
            fail("bad_argument", f"{key} is a whole number, not {fields[key]!r}", EXIT_USAGE)
        fields[key] = int(fields[key])
    _print_staged(ask("set", urls, timeout, **fields), output)


@app.command("plan", help="What the staged changes would move, how long that takes, and what cannot be.")
def plan(urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 10.0) -> None:
    """Changes nothing."""
    made = ask("plan", urls, timeout)
    if output is Output.JSON:
        show.print_json(made)
        return
    staged = "; ".join(made["staged"]) or "nothing"
    show.out.print(
        f"layout {made['base']['version']} → {made['version']}, staged on {made['node']}: {staged}",
        markup=False,
    )
    print_plan(made)
    show.out.print(f"commit with: gmco cluster commit {made['hash']}", markup=False)


@app.command("commit", help="Make the plan of that hash the layout, if nothing has changed since.")
def commit(
    hash_: Annotated[str, typer.Argument(metavar="HASH", help="As `plan` has shown it.")],
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 15.0,
) -> None:
    """By majorities of the members before and after."""
    _print_layout(ask("commit", urls, timeout, hash=hash_), output)
    if output is Output.TABLE:
        show.err.print("replicas follow by themselves; how far they are: gmco shard moves", markup=False)


@app.command("revert", help="Forget what is staged on the node.")
def revert(urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0) -> None:
    """The layout stays as it is."""
    _print_staged(ask("revert", urls, timeout), output)


@app.command(
    "recover", help="When a majority of the members is lost for good: go on with those that are alive."
)
def recover(
    force: Annotated[
        bool, typer.Option("--force", help="Yes: what only the lost have committed is given up.")
    ] = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 15.0,
) -> None:
    """Asks no majority, because there is none."""
    if not force:
        fail("bad_argument", "this gives up layouts that only the lost know; say --force", EXIT_USAGE)
    reply = ask("recover", urls, timeout, force=True)
    _print_layout(reply, output)
    if output is Output.TABLE:
        show.err.print(
            f"without {', '.join(reply['without']) or 'nobody'}; lost: {reply['lost']}", markup=False
        )


# -- printing ----------------------------------------------------------------------------------------------------------


def print_plan(made: dict[str, Any]) -> None:
    """What a plan would move, the balance before and after, and what cannot be."""
    show.out.print(_moves_table(made["moves"]))
    if len(made["moves"]) > MOVES_SHOWN:
        show.out.print(f"and {len(made['moves']) - MOVES_SHOWN} more (--output json has all)")
    moved = sum(1 for move in made["moves"] if move["target"])
    rate = f"{made['bytes_per_s'] / 1e6:.0f} MB/s per node"
    show.out.print(
        f"{moved} moves, {size(made['bytes'])}, about {seconds(made['eta_s'])} at {rate}; "
        f"{made['handovers']} shards prefer another primary"
    )
    show.out.print(_balance_table(made["before"], made["after"]))
    for gain in made["gains"]:
        show.out.print(gain, markup=False, highlight=False)
    if made["sizes_unknown"]:
        show.err.print(
            f"no size known of {len(made['sizes_unknown'])} shards (silent: {', '.join(made['silent']) or 'nobody'})"
        )
    _print_limits(made["limits"])


def _print_staged(reply: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        show.print_json(reply)
        return
    show.out.print(f"staged on {reply['node']}: {'; '.join(reply['staged']) or 'nothing'}", markup=False)


def _print_layout(reply: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        show.print_json(reply)
        return
    layout = reply["layout"]
    title = f"layout {layout['version']} ({layout['hash']}), {layout['shard_count']} shards × {layout['replication']}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name in ("member", "where", "host", "capacity", "replicas", "primaries", "witnesses"):
        table.add_column(name, overflow="fold")
    for member, load in zip(layout["members"], layout["balance"], strict=True):
        table.add_row(
            Text(member["name"]),
            Text(f"{member['region']}/{member['zone']}"),
            Text(member["host"]),
            str(member["capacity"] or "witness"),
            str(load["replicas"]),
            str(load["primaries"]),
            str(load["witnesses"]),
        )
    show.out.print(table)
    _print_limits(reply.get("limits", []))
    for name in reply.get("new_disks", []):
        show.err.print(
            f"{name} has a new disk and no vote: gmco cluster join {name}", style="yellow", markup=False
        )
    if reply.get("staged"):
        show.out.print(f"staged on {reply['node']}: {'; '.join(reply['staged'])}", markup=False)


def _print_limits(limits: list[dict[str, Any]]) -> None:
    for limit in limits:
        show.err.print(f"cannot be ({limit['law']}): {limit['message']}", style="yellow", markup=False)


def _moves_table(moves: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold")
    for name in ("shard", "from", "to", "bytes", "why"):
        table.add_column(name, overflow="fold", justify="right" if name in ("shard", "bytes") else "left")
    for move in moves[:MOVES_SHOWN]:
        table.add_row(
            str(move["shard"]),
            Text(move["source"] or "–"),
            Text(move["target"] or "–"),
            size(move["size_bytes"]) if move["target"] else "",
            Text(move["reason"]),
        )
    return table


def _balance_table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold")
    for name in ("member", "replicas", "fair share", "primaries", "witnesses", "bytes"):
        table.add_column(name, justify="left" if name == "member" else "right")
    old, new = ({load["node"]: load for load in loads} for loads in (before, after))
    for node in sorted({*old, *new}):
        was, now = old.get(node), new.get(node)
        table.add_row(
            Text(node),
            _change(was, now, lambda load: str(load["replicas"])),
            _change(was, now, lambda load: f"{load['share']:g}"),
            _change(was, now, lambda load: str(load["primaries"])),
            _change(was, now, lambda load: str(load["witnesses"])),
            _change(was, now, lambda load: size(load["size_bytes"])),
        )
    return table


def _change(was: dict[str, Any] | None, now: dict[str, Any] | None, text: Any) -> str:
    old, new = (text(load) if load is not None else "–" for load in (was, now))
    return str(old) if old == new else f"{old} → {new}"


def size(count: float) -> str:
    """Bytes as people say them: 0 B, 12 kB, 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(count: float) -> str:
    """12 s, 5 min, 3 h."""
    for limit, unit in ((3_600, "h"), (60, "min")):
        if count >= 2 * limit:
            return f"{count / limit:.0f} {unit}"
    return f"{count:.0f} s" if count >= 10 else f"{count:.1f} s"
