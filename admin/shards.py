"""`gmco shards`, `gmco failover`: who holds and leads which shard, and making another node lead."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from admin import show
from admin.terminal import (
    DEFAULT_NODES,
    EXIT_REFUSED,
    Nodes,
    Output,
    OutputOption,
    Timeout,
    fail,
    node_urls,
    with_client,
)


def add_to(app: typer.Typer) -> None:
    app.command("shards", help="Who holds and who leads each shard.")(shards)
    app.command("failover", help="Make another node lead a shard.")(failover)


def shards(urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0) -> None:
    """As each alive node tells of its own replicas."""
    found = with_client(node_urls(urls), timeout, lambda client: client.shards())
    if output is Output.JSON:
        show.print_json(found)
        return
    show.out.print(shards_table(found["replicas"]))
    if found["silent"]:
        show.err.print(f"not heard in time: {', '.join(found['silent'])}", style="yellow", markup=False)


def shards_table(replicas: list[dict[str, Any]]) -> Table:
    """One row for each shard; a replica that is not level says how far it is behind."""
    by_shard: dict[int, list[dict[str, Any]]] = {}
    for row in replicas:
        by_shard.setdefault(row["shard"], []).append(row)
    table = Table(header_style="bold")
    for name in ("shard", "primary", "epoch", "log", "items", "users", "replicas"):
        table.add_column(
            name, justify="right" if name in ("shard", "epoch", "log", "items", "users") else "left"
        )
    for shard, rows in sorted(by_shard.items()):
        leader = next((row for row in rows if row["role"] == "primary"), None)
        newest = leader or max(rows, key=lambda row: (row["epoch"], row["sequence"]))
        others = Text()
        for row in rows:
            if row is not leader:
                others.append(", " if others else "")
                level = row["state"] == "following" and not row["lag"]
                others.append(row["node"], style="green" if level else "yellow")
                others.append("" if level else f" ({_why(row)})")
        table.add_row(
            str(shard),
            Text(leader["node"]) if leader else Text("nobody", style="red"),
            str(newest["epoch"]),
            str(newest["sequence"]),
            str(newest["items"]),
            str(newest["users"]),
            others,
        )
    return table


def _why(row: dict[str, Any]) -> str:
    if row["state"] != "following":
        return str(row["state"])
    return f"{row['lag']} behind, {row['lag_ms']} ms"


def failover(
    shard: Annotated[int, typer.Argument(min=0, metavar="SHARD")],
    to: Annotated[
        str, typer.Option("--to", metavar="NODE", help="Who shall lead; else who has most of it.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Without a majority of its voters. Writes may be lost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --force: do not ask.")] = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 10.0,
) -> None:
    """A planned failover loses nothing and fails no request: the new primary has everything before it leads."""
    if not force:
        done = with_client(node_urls(urls), timeout, lambda client: client.failover(shard, to=to))
        _say(done, output, f"shard {shard}: {done['from']} → {done['to']}, epoch {done['epoch']}")
        return
    told = with_client(node_urls(urls), timeout, lambda client: client.failover(shard, to=to, force=True))
    if output is Output.TABLE or not yes:
        for line in what_may_be_lost(told):
            show.err.print(line, style="yellow", markup=False)
    if not yes and not typer.confirm("Do it?", err=True):
        fail("refused", "nothing was done", EXIT_REFUSED)
    done = with_client(
        node_urls(urls), timeout, lambda client: client.failover(shard, to=to, force=True, confirmed=True)
    )
    if not done["forced"]:
        fail("refused", f"{to} does not lead shard {shard}; see its log", EXIT_REFUSED)
    _say(done, output, f"shard {shard}: {to} leads, epoch {done['epoch']}")


def what_may_be_lost(told: dict[str, Any]) -> list[str]:
    """The sentences for a person who is about to force."""
    epoch, sequence = told["end"]
    lines = [
        f"{told['to']} holds shard {told['shard']} up to sequence {sequence} of epoch {epoch}. It would lead without a "
        "majority: every write behind that, acknowledged with ack=primary or ack=quorum, is lost to readers until a node "
        "that has it comes back and offers it again, and for good when none does."
    ]
    for name, (epoch, sequence) in told["ahead"].items():
        lines.append(f"{name} has more: up to {sequence} of epoch {epoch}. Force it --to {name} instead.")
    if told["silent"]:
        lines.append(f"Nobody knows what is on {', '.join(told['silent'])}: not reachable.")
    return lines


def _say(done: dict[str, Any], output: Output, text: str) -> None:
    if output is Output.JSON:
        show.print_json(done)
    else:
        show.out.print(text, markup=False, highlight=False)
