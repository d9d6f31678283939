"""What the CLI prints: rich tables for people on stdout, one line on stderr for what went wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import gmco
from admin.films import CLASS_NAMES
from admin.load import LoadProgress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """One JSON document on stdout and nothing else, so that it can be piped."""
    print(json.dumps(value, ensure_ascii=False, default=_plain, indent=2))


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def answer_json(answer: gmco.Answer) -> dict[str, Any]:
    """The answer as it goes to stdout."""
    return {
        "hits": [dataclasses.asdict(hit) for hit in answer.hits],
        "coverage": dataclasses.asdict(answer.coverage) if answer.coverage else None,
        "stale_ms": answer.stale_ms,
    }


def hits_table(answer: gmco.Answer, title: str = "") -> Table:
    """Rank, score, id and whatever the metadata says of the item."""
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("#", justify="right", style="dim")
    table.add_column("score", justify="right")
    table.add_column("media_id", justify="right", style="cyan")
    table.add_column("item", overflow="fold")
    table.add_column("about", overflow="fold", style="dim")
    for rank, hit in enumerate(answer.hits, start=1):
        item, about = describe(hit.metadata or {})
        table.add_row(str(rank), f"{hit.score:.4f}", str(hit.media_id), Text(item), Text(about))
    return table


def describe(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """A headline and the rest, for metadata of any shape; films get "Title (year)" and their genres first."""
    rest = dict(metadata)
    head = str(rest.pop("title", None) or rest.pop("name", None) or "")
    year = rest.pop("year", None)
    if head and year is not None:
        head = f"{head} ({year})"
    parts = []
    for name in ("genres", "director", "taste"):
        if rest.get(name):
            value = rest.pop(name)
            parts.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    if not head and not parts:
        parts = [f"{name}: {value}" for name, value in rest.items()]
    return head, " · ".join(parts)


def footnotes(answer: gmco.Answer) -> list[str]:
    """What a reader must know before trusting the hits."""
    notes = []
    coverage = answer.coverage
    if coverage is not None and not coverage.complete:
        missing = ", ".join(map(str, coverage.missing))
        notes.append(f"partial: {coverage.answered} of {coverage.total} shards answered; missing: {missing}")
    if answer.stale_ms:
        notes.append(f"stale: up to {answer.stale_ms:.0f} ms behind")
    return notes


def records_table(records: Sequence[gmco.Record]) -> Table:
    """One row for each record."""
    table = Table(header_style="bold")
    for name in ("id", "version", "classes", "metadata"):
        table.add_column(name, overflow="fold")
    for record in records:
        classes = ", ".join(f"{one} {CLASS_NAMES.get(one, '')}".strip() for one in record.classes)
        said = json.dumps(record.metadata, ensure_ascii=False, default=_plain)
        table.add_row(str(record.id), f"{record.version[0]}.{record.version[1]}", classes, Text(said))
    return table


def print_status(status: Mapping[str, Any]) -> None:
    """How the node is, what should be mended, and its replicas."""
    members = status.get("members", [])
    alive = sum(member.get("state") == "alive" for member in members)
    out.print(
        f"[bold]{status.get('node', '?')}[/] of cluster {status.get('cluster', '?')} (version {status.get('version', '?')}): "
        f"{status.get('state', '?')}, sees {alive} of {len(members)} members alive"
    )
    own: Mapping[str, Any] = next((one for one in members if one.get("name") == status.get("node")), {})
    reached = [where for where in (own.get("app"), status.get("http")) if where]
    if reached:
        out.print(f"apps reach it at {' and '.join(reached)}", markup=False)
    for reason in status.get("degraded", []):
        out.print(f"degraded: {reason}", style="yellow", markup=False)
    for problem in status.get("problems", []):
        out.print(problem, style="red", markup=False)
    out.print(_shards_table(status))


def _shards_table(status: Mapping[str, Any]) -> Table:
    title = f"replicas on {status.get('node', '?')}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    names = ("shard", "role", "primary", "position", "items", "users", "fresh", "lag", "state")
    for name in names:
        table.add_column(
            name, no_wrap=True, justify="left" if name in ("role", "primary", "state") else "right"
        )
    for shard in status.get("shards", []):
        cells = {**shard, "position": f"{shard.get('epoch', '?')}.{shard.get('sequence', '?')}"}
        table.add_row(*(str(cells.get(name, "")) for name in names))
    return table


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Rows per second over the last seconds."""
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="dim")


@contextmanager
def load_bar(title: str, total: int | None) -> Iterator[Callable[[LoadProgress], None]]:
    """A progress bar on stderr (stdout stays pure) while in the block; call what it yields with the progress."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[yellow]{task.fields[note]}"),
    )
    # Into a file or a pipe a bar would only be noise between the lines that count.
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")

        def changed(progress: LoadProgress) -> None:
            note = progress.note or (f"{progress.bad} bad rows" if progress.bad else "")
            bar.update(task, completed=progress.rows_done, note=note)

        yield changed
