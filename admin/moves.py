"""`gmco shard move|cancel|moves`, `gmco drain`, `gmco rebalance`, `gmco maintenance`: orders, and how far they are.

An order is committed at once; the moves that follow go on whether anybody looks or not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import trio
import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

import gmco
from admin import layouts, show
from admin.terminal import (
    DEFAULT_NODES,
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

EVERY_S = 0.5
# So long nobody may be able to say how far it is, before that ends the command.
PATIENCE_S = 60.0

shard_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
Shard = Annotated[int, typer.Argument(min=0, metavar="SHARD")]
Node = Annotated[str, typer.Argument(metavar="NODE", help="Its node.name, as `gmco nodes` shows it.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return once it is ordered; do not follow.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what it would move.")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(shard_app, name="shard", help="Move a replica, cancel that, see what is on its way.")
    app.command("drain", help="A node gives up all that it leads and holds, and is no member any more.")(
        drain
    )
    app.command("rebalance", help="Move what it takes for everybody to hold its fair share.")(rebalance)
    app.command("maintenance", help="While it is on, a node leads nothing and nobody replaces it.")(
        maintenance
    )


# -- commands ----------------------------------------------------------------------------------------------------------


@shard_app.command("move", help="One replica of a shard: from one node to another.")
def move(
    shard: Shard,
    source: Annotated[str, typer.Option("--from", metavar="NODE", help="Who holds it now.")],
    target: Annotated[str, typer.Option("--to", metavar="NODE", help="Who shall hold it.")],
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0, metavar="MB/s", help="Of this move alone; 0: as fast as it goes."),
    ] = None,
    detach: Detach = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 15.0,
) -> None:
    """Changes the layout's target of that shard, and follows. Ctrl-C ends the looking, not the move."""
    fields = {"shard": shard, "source": source, "target": target}
    if rate is not None:
        fields["bytes_per_s"] = round(rate * 1e6)
    given = node_urls(urls)
    done = with_client(given, timeout, lambda client: client.moves("move", fields))
    for limit in done["limits"]:
        show.err.print(f"cannot be ({limit['law']}): {limit['message']}", style="yellow", markup=False)
    if detach:
        _say(
            done,
            output,
            f"ordered, as layout {done['layout']['version']}; `gmco shard moves` shows how far it is",
        )
        return
    hint = f"stopped by Ctrl-C; the move goes on: `gmco shard moves` shows how far it is, `gmco shard cancel {shard}` ends it"
    began = time.monotonic()
    _follow(
        given,
        timeout,
        output,
        lambda found: [m for m in found["moves"] if m["shard"] == shard],
        [shard],
        hint,
    )
    took = layouts.seconds(time.monotonic() - began)
    _say(done, output, f"shard {shard} is on {', '.join(done['wished'])}, after {took}")


@shard_app.command("cancel", help="Those who vote now stay; a replica on its way goes.")
def cancel(
    shard: Shard, urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 15.0
) -> None:
    """Possible until the new replica votes; from then on, move it back."""
    done = with_client(node_urls(urls), timeout, lambda client: client.moves("cancel", {"shard": shard}))
    _say(done, output, f"shard {shard} stays on {', '.join(done['wished'])}")


@shard_app.command("moves", help="What is on its way, as all nodes tell it.")
def moves(urls: Nodes = DEFAULT_NODES, output: OutputOption = Output.TABLE, timeout: Timeout = 5.0) -> None:
    """Whatever has ordered it: a hand, a plan, or the loss of a host."""
    found = with_client(node_urls(urls), timeout, lambda client: client.moves())
    if output is Output.JSON:
        show.print_json(found)
        return
    show.out.print(moves_table(found["moves"]))
    if found["unknown"]:
        numbers = ", ".join(str(shard) for shard in found["unknown"])
        show.err.print(
            f"nobody leads shards {numbers} at this moment, so nobody tells of their moves: a step of a move takes an instant, "
            "else see `gmco shards`",
            style="yellow",
            markup=False,
        )
    if found["silent"]:
        show.err.print(f"not heard in time: {', '.join(found['silent'])}", style="yellow", markup=False)


def drain(
    node: Node,
    dry_run: DryRun = False,
    detach: Detach = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 30.0,
) -> None:
    """No request fails: others lead before it stops leading, and hold before it stops holding. Then it can be stopped."""
    given = node_urls(urls)
    fields = {"node": node, "dry_run": dry_run or None}
    done = with_client(given, timeout, lambda client: client.moves("drain", fields))
    if dry_run:
        _print_told(done, output)
        return
    if output is Output.TABLE and done.get("kept"):
        show.err.print(f"{node} still leads {done['kept']}: it hands them over as they move", markup=False)
    if not detach:
        hint = f"stopped by Ctrl-C; {node} goes on being drained: `gmco shard moves` shows how far it is"
        _follow(given, timeout, output, lambda found: found["moves"], None, hint, empty=node)
    _say(
        done,
        output,
        f"{node} is drained" if not detach else f"ordered, as layout {done['layout']['version']}",
    )


def rebalance(
    dry_run: DryRun = False,
    detach: Detach = False,
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 30.0,
) -> None:
    """The members stay; what was moved by hand may be moved back."""
    given = node_urls(urls)
    done = with_client(given, timeout, lambda client: client.moves("rebalance", {"dry_run": dry_run or None}))
    if dry_run:
        _print_told(done, output)
        return
    if not done["moves"] and not done["handovers"]:
        _say(done, output, "balanced already")
        return
    if not detach:
        hint = "stopped by Ctrl-C; the moves go on: `gmco shard moves` shows how far they are"
        _follow(given, timeout, output, lambda found: found["moves"], None, hint)
    moved = sum(1 for one in done["moves"] if one["target"])
    _say(
        done,
        output,
        f"{moved} moves {'ordered' if detach else 'made'}; {done['handovers']} shards prefer another primary",
    )


def maintenance(
    node: Node,
    state: Annotated[str, typer.Argument(metavar="on|off")],
    urls: Nodes = DEFAULT_NODES,
    output: OutputOption = Output.TABLE,
    timeout: Timeout = 30.0,
) -> None:
    """It must run for that; then it may be stopped for as long as it takes."""
    if state not in ("on", "off"):
        fail("bad_argument", f"say on or off, not {state!r}", EXIT_USAGE)
    done = with_client(node_urls(urls), timeout, lambda client: client.maintenance(node, state == "on"))
    text = f"{node} is in maintenance" if state == "on" else f"{node} is in use again"
    if done["handed_over"]:
        text += f"; {len(done['handed_over'])} shards have another primary"
    _say(done, output, text)
    if done["kept"] and state == "on" and output is Output.TABLE:
        show.err.print(f"it still leads {done['kept']}: no other voter follows", style="yellow", markup=False)


# -- following ---------------------------------------------------------------------------------------------------------


def _follow(
    urls: list[str],
    timeout_s: float,
    output: Output,
    mine: Callable[[dict[str, Any]], list[dict[str, Any]]],
    shards: Iterable[int] | None,
    interrupted: str,
    *,
    empty: str = "",
) -> None:
    """Shows the moves that are `mine` until there are none; `shards`: those that they are of, None: any. `empty`: the node that
    shall hold and witness nothing in the end."""
    watched = None if shards is None else set(shards)

    async def follow() -> None:
        told_at = trio.current_time()
        with _Bars(output) as bars:
            while True:
                try:
                    async with gmco.connect(urls, timeout_s=timeout_s) as client:
                        while True:
                            found = await client.moves()
                            told_at = trio.current_time()
                            bars.show(mine(found))
                            if is_over(found, watched, mine(found), empty):
                                return
                            await trio.sleep(EVERY_S)
                except (gmco.Unavailable, gmco.DeadlineExceeded):
                    if trio.current_time() - told_at > PATIENCE_S:
                        raise
                    await trio.sleep(EVERY_S)

    run(follow, interrupted=interrupted)


def is_over(found: dict[str, Any], watched: set[int] | None, mine: list[dict[str, Any]], empty: str) -> bool:
    """Whether there is nothing left to wait for; the arguments as in `_follow`."""
    unknown = [shard for shard in found["unknown"] if watched is None or shard in watched]
    # Nodes of an older build tell of no witnesses.
    left = found["held"].get(empty) or found.get("witnessed", {}).get(empty)
    return not mine and not unknown and not found["silent"] and not left


class _Bars:
    """A bar for each move on a terminal; else a line when a stage changes; with JSON an object each."""

    def __init__(self, output: Output) -> None:
        self._json = output is Output.JSON
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            console=show.err,
            transient=True,
            disable=self._json or not show.err.is_terminal,
        )
        self._tasks: dict[tuple[Any, ...], TaskID] = {}
        # Of each move: its name and its stage. The names outlive the bars: a move may be out of sight while its shard's
        # primary changes.
        self._names: dict[tuple[Any, ...], str] = {}
        self._stages: dict[tuple[Any, ...], str] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> Literal[False]:
        self._progress.stop()
        return False

    def show(self, found: list[dict[str, Any]]) -> None:
        """The moves that there are; those that have gone from it are over."""
        # Once the new replica votes only the old one is told of: it is the same move.
        there = {(one["shard"], one["source"] or one["target"]): one for one in found}
        for key, one in there.items():
            if one["target"] is not None or key not in self._names:
                self._names[key] = _name(one)
            self._update(key, one)
            if self._stages.get(key) != one["stage"]:
                self._stages[key] = one["stage"]
                self._line(key, one)
        for key in self._tasks.keys() - there.keys():
            self._progress.remove_task(self._tasks.pop(key))

    def _update(self, key: tuple[Any, ...], one: dict[str, Any]) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(self._names[key], total=100.0, figures="")
        here = one["target"] is None
        self._progress.update(
            self._tasks[key],
            description=self._names[key],
            completed=100.0 if here else one["percent"] or 0.0,
            figures=f"{one['stage']} {figures(one)}".rstrip(),
        )

    def _line(self, key: tuple[Any, ...], one: dict[str, Any]) -> None:
        if self._json:
            print(json.dumps(one, ensure_ascii=False), flush=True)
        elif self._progress.disable:
            show.err.print(f"{self._names[key]}: {one['stage']}", markup=False)


def figures(one: dict[str, Any]) -> str:
    """`41%, 120 MB of 290 MB, 49 MB/s, 4 s left`, as far as it is known."""
    parts = []
    if one["percent"] is not None:
        parts.append(f"{one['percent']:.0f}%")
    if one["total_bytes"]:
        parts.append(f"{layouts.size(one['bytes'])} of {layouts.size(one['total_bytes'])}")
    if one["bytes_per_s"]:
        parts.append(f"{layouts.size(one['bytes_per_s'])}/s")
    if one["eta_s"] is not None:
        parts.append(f"{layouts.seconds(one['eta_s'])} left")
    return ", ".join(parts)


def _name(one: dict[str, Any]) -> str:
    if one["target"] is None:
        return f"shard {one['shard']}: {one['source']} lets go of it"
    return f"shard {one['shard']}: {one['source'] or '(one more)'} → {one['target']}"


# -- printing ----------------------------------------------------------------------------------------------------------


def moves_table(found: list[dict[str, Any]]) -> Table:
    """One row for each move."""
    table = Table(header_style="bold")
    for name in ("shard", "from", "to", "stage", "how far", "the primary says"):
        table.add_column(name, justify="right" if name == "shard" else "left", overflow="fold")
    for one in found:
        table.add_row(
            str(one["shard"]),
            Text(one["source"] or "–"),
            Text(one["target"] or "–"),
            one["stage"],
            figures(one),
            Text(one["detail"]),
        )
    return table


def _print_told(told: dict[str, Any], output: Output) -> None:
    if output is Output.JSON:
        show.print_json(told)
    else:
        layouts.print_plan(told)


def _say(done: dict[str, Any], output: Output, text: str) -> None:
    if output is Output.JSON:
        print(json.dumps(done, ensure_ascii=False), flush=True)
    else:
        show.out.print(text, markup=False, highlight=False, soft_wrap=True)
