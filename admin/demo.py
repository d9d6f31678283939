"""`make demo`: three nodes and 17,472 films on this machine; one node is killed while queries and writes run.

With `once` every claim is checked, and the exit code is the verdict.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
from rich.table import Table

import gmco
from admin import films, show, tastes
from admin.cluster import ClusterError, LocalCluster, own_directory
from admin.load import Loader, LoadOptions, RowsSource, first_cause
from admin.sources import Kind, Row

READY_S = 40.0
WORKERS = 6
WRITERS = 3
STREAM_S = 6.0  # queries run so long; the node is killed after a third of it
KILL_AFTER_S = 2.0
PROBE_USERS = 20  # whose answers are compared before and after the kill
PASSED = "no query and no write failed when a node was killed, and its answers are the same bit by bit"
SEQUELS = ("Toy Story 2", "Toy Story 3")


class ClaimError(AssertionError):
    """The demo claims something that is not so."""


@dataclass(slots=True)
class StreamCounts:
    """What happened to the queries of the stream. `latencies_ms`: one list before the kill, one after it."""

    answered: int = 0
    partial: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    written: int = 0
    refused: int = 0
    # The longest time in which no write of one writer was acknowledged.
    gap_s: float = 0.0
    before_ms: list[float] = field(default_factory=list)
    after_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What is loaded."""

    films: Sequence[films.Film]
    viewers: Sequence[tastes.Viewer]
    film_rows: Sequence[Row]
    viewer_rows: Sequence[Row]

    def film_id(self, title: str) -> int:
        """The id of the film with this title; the oldest, where there are several."""
        return min((film.year, film.media_id) for film in self.films if film.title == title)[1]


def make_catalogue() -> Catalogue:
    """Reads and embeds the films, and makes up the viewers. Some seconds of one core."""
    found = films.read_films()
    vectors = films.embed(found)
    viewers = tastes.make_viewers(found, vectors)
    film_rows = [
        Row(i, film.media_id, vectors[i], film.classes, film.metadata) for i, film in enumerate(found)
    ]
    viewer_rows = [
        Row(i, one.user_id, one.vector, one.classes, one.metadata) for i, one in enumerate(viewers)
    ]
    return Catalogue(found, viewers, film_rows, viewer_rows)


def main(*, once: bool, directory: Path) -> int:
    """Runs the demo and cleans up in any case. Returns the exit code."""
    started = time.monotonic()
    try:
        with own_directory(directory) as place:
            cluster = LocalCluster(place)
            try:
                trio.run(_run, cluster, once, started)
            finally:
                cluster.stop()
    except KeyboardInterrupt:
        show.err.print("stopped; the nodes and their data are gone")
        return 130 if once else 0
    except (ClusterError, ClaimError, gmco.GmcoError, FileNotFoundError) as error:
        # One line, and the last: the tails of logs come before it.
        reason, _, more = str(error).partition("\n")
        if more:
            show.err.print(more, markup=False)
        show.err.print(f"demo failed: {reason}", markup=False, soft_wrap=True)
        return 1
    if once:
        show.out.print(f"demo passed: {PASSED}, in {time.monotonic() - started:.0f} s", soft_wrap=True)
    return 0


async def _run(cluster: LocalCluster, once: bool, started: float) -> None:
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_sigterm)
            await _demo(cluster, once, started)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_cause(group) from None


async def _stop_on_sigterm(*, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            raise KeyboardInterrupt


async def _demo(cluster: LocalCluster, once: bool, started: float) -> None:
    say = show.out.print
    say("[bold]1. Three nodes[/], each of which knows one other")
    for name in cluster.names:
        cluster.start(name)
    catalogue = await trio.to_thread.run_sync(make_catalogue)  # while they start
    await _ready(cluster, cluster.names)
    await _show_nodes(cluster)
    async with gmco.connect(cluster.urls, timeout_s=10) as client:
        say(
            f"[bold]2. Load[/] {len(catalogue.films):,} films and {len(catalogue.viewers)} viewers, on all disks"
        )
        await _load(client, "items", catalogue.film_rows)
        await _load(client, "users", catalogue.viewer_rows)
        await _show_answers(client, catalogue)
        before = await _probe(client, catalogue)
        victim, counts = await _kill_under_load(cluster, catalogue.viewers)
        _show_stream(victim, counts)
        if await _probe(client, catalogue) != before:
            raise ClaimError(f"answers differ after the death of {victim}")
        say(f"   {len(before)} answers compared with those before the kill: [green]the same, bit by bit[/]")
        cluster.start(victim)
        await _ready(cluster, cluster.names)
        say(f"   {victim} is started again and has everything it had")
    if not once:
        say(f"[green]All of this took {time.monotonic() - started:.0f} s.[/]")
        _say_how_to_go_on(cluster, catalogue)
        while True:
            await trio.sleep(1)
            cluster.check()


async def _ready(cluster: LocalCluster, names: Sequence[str]) -> None:
    """Until each node answers and sees all others alive and itself level. Raises ClusterError."""
    waiting = dict(zip(cluster.names, cluster.urls, strict=True))
    with trio.move_on_after(READY_S):
        for name in names:
            while not await _is_ready(waiting[name], len(cluster.names)):
                cluster.check()
                await trio.sleep(0.1)
            del waiting[name]
    if waiting:
        tails = "\n".join(cluster.log_tail(name) for name in waiting)
        raise ClusterError(f"not ready after {READY_S:.0f} s: {', '.join(waiting)}\n{tails}")


async def _is_ready(url: str, count: int) -> bool:
    try:
        async with gmco.connect([url], timeout_s=1.0) as client:
            status = await client.status()
    except gmco.GmcoError:
        return False
    seen = [one for one in status["members"] if one["state"] == "alive" and one["connected"]]
    level = all(shard.get("lag", 0) == 0 for shard in status["shards"])
    return status["state"] == "ready" and len(seen) == count and level


async def _show_nodes(cluster: LocalCluster) -> None:
    """As one of them has heard by gossip."""
    async with gmco.connect(cluster.urls[:1], timeout_s=5) as client:
        status = await client.status()
    names = [member["name"] for member in status["members"]]
    if names != cluster.names:
        raise ClaimError(f"{status['node']} knows {names}")
    table = Table(title=f"   as {status['node']} has heard", title_justify="left", header_style="bold")
    for name in ("node", "state", "shards", "for apps"):
        table.add_column(name)
    for member in status["members"]:
        table.add_row(member["name"], member["state"], str(member["shards"]), member["app"])
    show.out.print(table)


async def _load(client: gmco.Client, kind: Kind, rows: Sequence[Row]) -> None:
    options = LoadOptions(kind=kind, ack="all", window=6)
    with show.load_bar(f"   {kind}", len(rows)) as changed:
        progress = await Loader(client, RowsSource(f"demo-{kind}", rows), options, changed=changed).run()
    if progress.written != len(rows):
        raise ClaimError(f"{progress.written} of {len(rows)} {kind} written")


async def _show_answers(client: gmco.Client, catalogue: Catalogue) -> None:
    show.out.print("[bold]3. Ask[/]")
    for viewer in catalogue.viewers[:2]:
        answer = await client.recommend(viewer.user_id, 6)
        _check_complete(answer)
        _check_taste(answer, viewer)
        show.out.print(show.hits_table(answer, f"for viewer {viewer.user_id}, who likes {viewer.taste}"))
    toy_story = catalogue.film_id("Toy Story")
    answer = await client.similar(toy_story, k=6)
    _check_complete(answer)
    titles = [(hit.metadata or {}).get("title") for hit in answer.hits[:5]]
    if not set(SEQUELS) <= set(titles):
        raise ClaimError(f"the sequels of Toy Story are not among {titles}")
    show.out.print(show.hits_table(answer, "similar to Toy Story"))
    scifi = catalogue.film_id("The Matrix")
    answer = await client.similar(scifi, k=6, require_all=[films.CLASS_IDS["Animation"]])
    _check_complete(answer)
    if not answer.hits or any("Animation" not in (hit.metadata or {})["genres"] for hit in answer.hits):
        raise ClaimError("a film that is not Animation came through the filter")
    show.out.print(show.hits_table(answer, "similar to The Matrix, only Animation"))


def _check_complete(answer: gmco.Answer) -> None:
    if answer.coverage is not None and not answer.coverage.complete:
        raise ClaimError(f"partial answer: {show.footnotes(answer)}")


def _check_taste(answer: gmco.Answer, viewer: tastes.Viewer) -> None:
    fitting = [hit for hit in answer.hits if set(viewer.genres) & set((hit.metadata or {})["genres"])]
    if 2 * len(fitting) <= len(answer.hits):
        raise ClaimError(
            f"{len(fitting)} of {len(answer.hits)} films fit viewer {viewer.user_id}: {viewer.taste}"
        )


async def _probe(client: gmco.Client, catalogue: Catalogue) -> list[list[tuple[int, float]]]:
    """Ids and scores for some users and films: what must not change when a node dies."""
    answers = [await client.recommend(one.user_id, 20) for one in catalogue.viewers[:PROBE_USERS]]
    answers += [
        await client.similar(film.media_id, k=20) for film in catalogue.films[:: len(catalogue.films) // 20]
    ]
    for answer in answers:
        _check_complete(answer)
    return [[(hit.media_id, hit.score) for hit in answer.hits] for answer in answers]


async def _kill_under_load(
    cluster: LocalCluster, viewers: Sequence[tastes.Viewer]
) -> tuple[str, StreamCounts]:
    """Queries and writes from several connections; the node that the first one is connected to dies among them."""
    show.out.print("[bold]4. Kill[/] a node while queries and writes run")
    counts = StreamCounts()
    victim: list[str] = []
    killed = trio.Event()

    async def worker(number: int) -> None:
        chance = random.Random(number)
        async with gmco.connect(cluster.urls, timeout_s=5) as client:
            if number == 0:
                victim.append(str((await client.status())["node"]))
            while trio.current_time() < end:
                await _query(client, chance.randint(1, len(viewers)), counts, killed.is_set())

    async def writer(number: int) -> None:
        """Writes viewers again as they are, so that answers stay what they were."""
        async with gmco.connect(cluster.urls, timeout_s=10) as client:
            last = trio.current_time()
            while trio.current_time() < end:
                await _write(client, viewers[(number + counts.written) % len(viewers)], counts)
                counts.gap_s = max(counts.gap_s, trio.current_time() - last)
                last = trio.current_time()
                await trio.sleep(0.02)

    end = trio.current_time() + STREAM_S
    async with trio.open_nursery() as nursery:
        for number in range(WORKERS):
            nursery.start_soon(worker, number)
        for number in range(WRITERS):
            nursery.start_soon(writer, number * len(viewers) // WRITERS)
        await trio.sleep(KILL_AFTER_S)
        killed.set()
        cluster.kill(victim[0])
    if counts.failed or counts.partial or not counts.after_ms:
        _show_stream(victim[0], counts)
        raise ClaimError(
            f"{counts.failed} queries failed, {counts.partial} were partial: {counts.errors[:3]}"
        )
    if counts.refused or not counts.written:
        raise ClaimError(f"{counts.refused} of {counts.written} writes were refused: {counts.errors[:3]}")
    return victim[0], counts


async def _query(client: gmco.Client, user_id: int, counts: StreamCounts, after: bool) -> None:
    start = time.perf_counter()
    try:
        answer = await client.recommend(user_id, 10)
    except gmco.GmcoError as error:
        counts.failed += 1
        counts.errors.append(str(error))
        return
    (counts.after_ms if after else counts.before_ms).append((time.perf_counter() - start) * 1000)
    counts.answered += 1
    if answer.coverage is None or not answer.coverage.complete or len(answer.hits) != 10:
        counts.partial += 1
        counts.errors.append(f"coverage {answer.coverage}, {len(answer.hits)} hits")


async def _write(client: gmco.Client, viewer: tastes.Viewer, counts: StreamCounts) -> None:
    user = gmco.User(viewer.user_id, viewer.vector, viewer.classes, viewer.metadata)
    try:
        await client.put_users([user], ack="quorum")
    except gmco.GmcoError as error:
        counts.refused += 1
        counts.errors.append(str(error))
    else:
        counts.written += 1


def percentile(values: Sequence[float], part: float) -> float:
    """The nearest-rank percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def _show_stream(victim: str, counts: StreamCounts) -> None:
    table = Table(title=f"   {victim} got SIGKILL", title_justify="left", header_style="bold")
    for name in ("", "answered", "p50 ms", "p99 ms", "max ms"):
        table.add_column(name, justify="right")
    for name, values in (("before", counts.before_ms), ("after", counts.after_ms)):
        figures = (percentile(values, 0.5), percentile(values, 0.99), max(values, default=0.0))
        table.add_row(name, str(len(values)), *(f"{figure:.1f}" for figure in figures))
    show.out.print(table)
    show.out.print(f"   failed: {counts.failed}, partial: {counts.partial} of {counts.answered} answered")
    show.out.print(
        f"   {counts.written} writes on a majority of disks, {counts.refused} refused; the longest that a writer waited: "
        f"{counts.gap_s:.1f} s, while the shards of {victim} elected others"
    )


def _say_how_to_go_on(cluster: LocalCluster, catalogue: Catalogue) -> None:
    url = cluster.urls[0]
    toy_story = catalogue.film_id("Toy Story")
    lines = [
        "",
        "Now you, from another shell (users are 1 to 300):",
        "",
        f"  export GMCO_NODES={','.join(cluster.urls)}",
        "  .venv/bin/gmco nodes",
        "  .venv/bin/gmco events --follow",
        "  .venv/bin/gmco status",
        "  .venv/bin/gmco get user 4",
        "  .venv/bin/gmco recommend 4 -k 5 --any Comedy --exclude R",
        f"  .venv/bin/gmco similar {toy_story} --not {catalogue.film_id('Cars')}",
        "",
        "or by HTTP:",
        "",
        f"  curl '{cluster.ports[0].http_url}/recommend?user_id=4&k=5'",
        f"  curl {cluster.ports[0].http_url}/metrics",
        "",
        "or from Python:",
        "",
        "  import gmco",
        f'  with gmco.connect_blocking(["{url}"]) as client:',
        "      for hit in client.recommend(4, k=5).hits:",
        '          print(hit.score, hit.metadata["title"])',
        "",
        f"Logs are in {cluster.directory}/node-1.log … Ctrl-C ends it and removes everything.",
    ]
    print("\n".join(lines), flush=True)
