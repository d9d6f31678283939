"""`gmco shards`, `gmco failover`, `gmco repair`: who holds and leads which shard, another primary, replicas compared."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import gmco
from admin import show
from admin.terminal import (
    DEFAULT_NODES,
    EXIT_NOT_COMPARED,
    EXIT_REFUSED,
    EXIT_USAGE,
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
    app.command("repair", help="Compare a shard's replicas, and repair what differs.")(repair)


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
    for name in ("shard", "primary", "epoch", "log", "items", "users", "replicas", "witness", "compared"):
        table.add_column(
            name, justify="right" if name in ("shard", "epoch", "log", "items", "users") else "left"
        )
    for shard, rows in sorted(by_shard.items()):
        primary = next((row for row in rows if row["role"] == "primary"), None)
        newest = primary or max(rows, key=lambda row: (row["epoch"], row["sequence"]))
        others = Text()
        for row in rows:
            if row is not primary:
                others.append(", " if others else "")
                level = row["state"] == "following" and not row["lag"]
                others.append(row["node"], style="green" if level else "yellow")
                others.append("" if level else f" ({_why(row)})")
        table.add_row(
            str(shard),
            Text(primary["node"]) if primary else Text("nobody", style="red"),
            str(newest["epoch"]),
            str(newest["sequence"]),
            str(newest["items"]),
            str(newest["users"]),
            others,
            _witness(newest),
            primary.get("repair", "") if primary else "",
        )
    return table


def _witness(row: dict[str, Any]) -> Text:
    """By the primary, or whoever has the newest log: yellow while the primary does not hear it."""
    heard = row["role"] != "primary" or row.get("witness_heard", False)
    return Text(row.get("witness", ""), style="" if heard else "yellow")


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


def repair(
    shard: Annotated[
        int | None, typer.Argument(min=0, metavar="SHARD", help="Which one; left out with --all.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All shards, one after the other.")] = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 30.0,
) -> None:
    """Compared at one place of the log, by the primary; what differs is repaired, and compared again.

    Exit code 8: a replica could not be compared. 4: some still differ. The time is for each shard.
    """
    if (shard is None) is not all_:
        fail("bad_usage", "give a SHARD, or --all", EXIT_USAGE)

    async def work(client: gmco.Client) -> list[dict[str, Any]]:
        wanted = range((await client.status())["shard_count"]) if shard is None else [shard]
        return [await _repair_one(client, one, timeout) for one in wanted]

    found = with_client(node_urls(urls), timeout, work)
    if output is Output.JSON:
        show.print_json(found)
    else:
        show.out.print(repair_table(found))
    if any(one["problem"] or not _COMPARED.issuperset(one["replicas"].values()) for one in found):
        raise typer.Exit(EXIT_NOT_COMPARED)
    if not all(one["equal"] for one in found):
        raise typer.Exit(EXIT_REFUSED)


_COMPARED = frozenset(["equal", "repaired", "differs"])
_DONE = ("written", "taken", "mended", "dropped", "set_aside", "lost")


async def _repair_one(client: gmco.Client, shard: int, timeout_s: float) -> dict[str, Any]:
    try:
        return await client.repair(shard, timeout_s=timeout_s)
    except gmco.Unavailable as error:
        if error.code not in ("no_primary", "no_lease"):
            raise
        # This shard has no primary now; others can be compared.
        none = dict.fromkeys((*_DONE, "rounds", "buckets", "epoch", "sequence"), 0)
        problem = f"{error.code}: {error.message}"
        return {"shard": shard, "primary": "", "replicas": {}, **none, "equal": False, "problem": problem}


def repair_table(found: list[dict[str, Any]]) -> Table:
    """One row for each shard: what its replicas were, and what was done."""
    table = Table(header_style="bold")
    for name in ("shard", "primary", "at", "replicas", "done"):
        table.add_column(name, justify="right" if name in ("shard", "at") else "left")
    for one in found:
        states = Text(", ").join(
            Text(f"{name} {state}", style="green" if state in ("equal", "repaired") else "red")
            for name, state in sorted(one["replicas"].items())
        )
        done = ", ".join(f"{one[name]} {name.replace('_', ' ')}" for name in _DONE if one[name])
        table.add_row(
            str(one["shard"]),
            one["primary"],
            str(one["sequence"]),
            Text(one["problem"], style="red") if one["problem"] else states,
            done or "nothing",
        )
    return table
