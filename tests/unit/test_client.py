"""gmco's client against real servers on loopback with handlers of our own: the wire, pipelining, retries, failover."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgpack
import numpy as np
import pytest
import trio
from trio_websocket import ConnectionClosed, serve_websocket

import gmco
from node.server import AppServer, Connection
from router.errors import RequestError
from router.requests import Batch, Delete, Get, Limits, Put, Recommend, Request, Search, Similar
from router.wire import Columns, Reply
from storage.records import Kind

LIMITS = Limits(dim=4)
UNIT = [0.5, 0.5, 0.5, 0.5]


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await test()

    trio.run(main)


class Backend:
    """Keeps what it was asked; answers from `refusals` first, waits for `gate` when it is closed."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.refusals: list[RequestError] = []
        self.gate = trio.Event()
        self.gate.set()

    async def __call__(self, request: Request, connection: Connection) -> Reply:
        self.requests.append(request)
        await self.gate.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        if isinstance(request, Put | Delete):
            return {"written": len(request.ids), "session": [(1, 2, 3)], "write_id": request.write_id}
        if isinstance(request, Get):
            record = {"id": 5, "version": (1, 9), "classes": (2,), "metadata": msgpack.packb({"t": "x"})}
            return {"records": [record | ({"vector": bytes(8)} if request.vector else {}), None]}
        if isinstance(request, Recommend | Similar | Search | Batch):
            hits = Columns(np.array([2**64 - 1, 3], np.uint64), np.array([1, 0.5], np.float32), None)
            if request.metadata:
                hits = hits._replace(metadata=[msgpack.packb({"title": "é"}), b""])
            return {"hits": hits, "coverage": {"answered": 2, "total": 3, "missing": [1]}, "stale_ms": 7}
        return {"node": "a"}


@asynccontextmanager
async def nodes(
    count: int,
) -> AsyncIterator[tuple[list[AppServer], list[Backend], list[trio.CancelScope], list[str]]]:
    """Servers with their backends, a scope each whose cancelling is a crash, and their URLs."""
    backends = [Backend() for _ in range(count)]
    servers = [AppServer(backend, LIMITS, port=0) for backend in backends]
    scopes = [trio.CancelScope() for _ in range(count)]

    async def serve(server: AppServer, scope: trio.CancelScope, *, task_status: Any) -> None:
        with scope:
            await server.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        urls = [
            f"ws://127.0.0.1:{await nursery.start(serve, s, scope)}"
            for s, scope in zip(servers, scopes, strict=True)
        ]
        yield servers, backends, scopes, urls
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await trio.sleep(0.005)


def test_every_method_speaks_the_protocol() -> None:
    async def test() -> None:
        async with nodes(1) as (_, (backend,), _, urls), gmco.connect(urls) as client:
            await client.ping()
            assert await client.status() == {"node": "a"}
            answer = await client.recommend(7, k=2, require_any=[1], exclude=[2], session=[(1, 2, 3)])
            assert answer.hits == [gmco.Hit(2**64 - 1, 1.0, {"title": "é"}), gmco.Hit(3, 0.5, {})]
            assert answer.coverage == gmco.Coverage(2, 3, (1,))
            assert not answer.coverage.complete
            assert answer.stale_ms == 7
            assert backend.requests[-1].session == ((1, 2, 3),)
            assert (await client.similar(5, k=1, metadata=False)).hits[0].metadata is None
            await client.similar(positive=[1, 2], negative=[3])
            assert (backend.requests[-1].positive, backend.requests[-1].negative) == ((1, 2), (3,))
            await client.batch(1, [2, 3])
            assert await client.get_items([5, 6]) == [gmco.Record(5, (1, 9), (2,), {"t": "x"}), None]
            found = await client.get_users([5, 6], vector=True)
            assert found[0] is not None
            assert found[0].vector == bytes(8)
            assert backend.requests[-1].kind == Kind.USER
            for vector in (
                UNIT,
                tuple(UNIT),
                np.array(UNIT),
                np.array(UNIT, np.float16),
                np.array(UNIT, "<f4").tobytes(),
            ):
                await client.search(vector)
                np.testing.assert_array_equal(backend.requests[-1].vector, np.array(UNIT, np.float16))

    run(test)


def test_writes() -> None:
    async def test() -> None:
        async with nodes(1) as (_, (backend,), _, urls), gmco.connect(urls) as client:
            items = [gmco.Item(1, UNIT, [3], {"a": 1}), gmco.Item(2, np.array(UNIT, np.float32))]
            written = await client.put_items(items, ack="quorum", write_id=b"w" * 16)
            assert written == gmco.Written(2, ((1, 2, 3),), b"w" * 16)
            request = backend.requests[-1]
            assert (request.ids, request.classes, request.ack) == ((1, 2), ((3,), ()), "quorum")
            first = await client.put_users([gmco.User(1, UNIT)])
            second = await client.delete_users([1])
            assert first.write_id != second.write_id
            assert (await client.delete_items([1, 2])).written == 2

    run(test)


def test_errors_have_classes_and_fields() -> None:
    async def test() -> None:
        async with nodes(1) as (_, (backend,), _, urls), gmco.connect(urls) as client:
            with pytest.raises(gmco.BadRequest) as bad:
                await client.recommend(1, k=0)
            assert (bad.value.code, bad.value.field) == ("out_of_range", "k")
            with pytest.raises(gmco.BadRequest):
                await client.search(np.array(UNIT[:2], np.float32))  # not read as four FP16 numbers
            with pytest.raises(gmco.BadRequest):
                await client.search(["x"])
            backend.refusals = [RequestError("unknown_user", "no such user")]
            with pytest.raises(gmco.NotFound):
                await client.recommend(1)
            backend.refusals = [RequestError("overloaded", "wait", retry_after_ms=5)]
            with pytest.raises(gmco.Overloaded) as overloaded:
                await client.recommend(1)
            assert overloaded.value.retry_after_ms == 5

    run(test)


def test_requests_of_many_tasks_share_frames_and_overtake_each_other() -> None:
    async def test() -> None:
        async with nodes(1) as ((server,), (backend,), _, urls), gmco.connect(urls) as client:
            backend.gate = trio.Event()
            async with trio.open_nursery() as nursery:
                for user in range(50):
                    nursery.start_soon(client.recommend, user)
                await until(lambda: len(backend.requests) == 50)
                await client.ping()  # overtakes them all
                backend.gate.set()
            statistics = server.statistics()
            assert statistics.accepted == 1
            assert statistics.requests == 51
            assert statistics.frames_in < 10
            assert statistics.frames_out < 10

    run(test)


def test_a_crashed_node_hands_its_requests_to_another() -> None:
    async def test() -> None:
        async with nodes(2) as (_, backends, scopes, urls), gmco.connect(urls) as client:
            await client.recommend(1)
            used = 0 if backends[0].requests else 1
            backends[used].gate = trio.Event()
            async with trio.open_nursery() as nursery:
                for user in range(20):
                    nursery.start_soon(client.recommend, user)
                nursery.start_soon(client.put_items, [gmco.Item(1, UNIT)])
                await until(lambda: len(backends[used].requests) == 22)
                begin = trio.current_time()
                scopes[used].cancel()
            assert trio.current_time() - begin < 1
            assert len(backends[1 - used].requests) == 21
            (put,) = [r for r in backends[1 - used].requests if isinstance(r, Put)]
            assert put.write_id == next(r for r in backends[used].requests if isinstance(r, Put)).write_id

    run(test)


@pytest.mark.parametrize("code", ["unavailable", "shutting_down"])
def test_a_refusing_node_is_left(code: Any) -> None:
    async def test() -> None:
        async with nodes(2) as (_, backends, _, urls), gmco.connect(urls) as client:
            await client.status()
            used = 0 if backends[0].requests else 1
            backends[used].refusals = [RequestError(code, "not here")] * 10
            assert (await client.recommend(1)).hits
            assert len(backends[1 - used].requests) == 1
            await client.recommend(2)
            assert len(backends[1 - used].requests) == 2

    run(test)


def test_a_node_that_comes_back_is_found_again() -> None:
    async def test() -> None:
        async with nodes(1) as ((server,), _, (scope,), urls), gmco.connect(urls) as client:
            await client.ping()
            scope.cancel()
            await until(lambda: not server.statistics().connections)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.ping)
                await trio.sleep(0.1)
                again = AppServer(Backend(), LIMITS, port=server.port)
                await nursery.start(again.run)
                await until(lambda: again.statistics().requests == 1)
                nursery.cancel_scope.cancel()

    run(test)


def test_writes_wait_as_they_are_told_and_keep_their_write_id() -> None:
    async def test() -> None:
        async with nodes(1) as (_, (backend,), _, urls), gmco.connect(urls) as client:
            backend.refusals = [
                RequestError("overloaded", "wait", retry_after_ms=100),
                RequestError("indexing", "wait", retry_after_ms=100),
                RequestError("no_primary", "soon"),
            ]
            begin = trio.current_time()
            await client.put_items([gmco.Item(1, UNIT)])
            assert trio.current_time() - begin >= 0.2
            assert len(backend.requests) == 4
            assert len({request.write_id for request in backend.requests}) == 1

    run(test)


@asynccontextmanager
async def scripted(script: list[RequestError | str]) -> AsyncIterator[tuple[list[float], str]]:
    """A node that refuses, is "silent" or "break"s the connection, in that order; then answers. When it was asked; its URL."""
    times: list[float] = []

    async def serve(request: Any) -> None:
        ws = await request.accept(subprotocol="gmco.msgpack")
        while True:
            try:
                asked = msgpack.unpackb(await ws.get_message())
            except ConnectionClosed:
                return
            times.append(trio.current_time())
            does = script.pop(0) if script else None
            if does == "break":
                await ws.aclose(1011)
                return
            if isinstance(does, RequestError):
                await ws.send_message(msgpack.packb({"id": asked["id"], "error": does.as_dict()}))
            elif does is None:
                await ws.send_message(
                    msgpack.packb({"id": asked["id"], "ok": True, "written": 1, "session": []})
                )

    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_websocket, serve, "127.0.0.1", 0, None))
        yield times, f"ws://127.0.0.1:{server.port}"
        nursery.cancel_scope.cancel()


WAIT = RequestError("overloaded", "wait", retry_after_ms=1)


@pytest.mark.parametrize(("script", "code"), [
    ([WAIT, "silent"], "deadline_exceeded"),
    (["break", *[WAIT] * 500], "deadline_exceeded"),
    (["break", "silent"], "deadline_exceeded"),
    (["break", RequestError("disk_full", "full")], "outcome_unknown"),
    (["break", RequestError("ack_timeout", "written")], "ack_timeout"),
    ([*[WAIT] * 500], "overloaded"),
    ([RequestError("disk_full", "full")], "disk_full"),
])  # fmt: skip
def test_a_write_in_doubt_is_never_told_as_refused(script: list[RequestError | str], code: str) -> None:
    async def test() -> None:
        async with scripted(list(script)) as (_, url), gmco.connect([url]) as client:
            with pytest.raises(gmco.GmcoError) as caught:
                await client.delete_items([1], timeout_s=0.4)
            assert caught.value.code == code
            assert isinstance(caught.value, gmco.DeadlineExceeded) == (code == "deadline_exceeded")

    run(test)


def test_a_write_in_doubt_whose_client_closes_has_an_unknown_outcome() -> None:
    async def test() -> None:
        codes: list[str] = []

        async def write(client: gmco.Client) -> None:
            with pytest.raises(gmco.GmcoError) as caught:
                await client.delete_items([1])
            codes.append(caught.value.code)

        async with scripted(["silent"]) as (times, url), trio.open_nursery() as nursery:
            async with gmco.connect([url]) as client:
                nursery.start_soon(write, client)
                await until(lambda: len(times) == 1)
        assert codes == ["outcome_unknown"]

    run(test)


def test_broken_links_are_not_stormed() -> None:
    async def test() -> None:
        async with scripted(["break"] * 1_000) as (times, url), gmco.connect([url]) as client:
            with pytest.raises(gmco.Unavailable):
                await client.recommend(1, timeout_s=1)
            assert 2 <= len(times) < 20
        async with scripted(["break"]) as (times, url), gmco.connect([url]) as client:
            await client.delete_items([1])
            assert len(times) == 2

    run(test)


def test_a_request_over_the_frame_bound_is_refused_before_it_is_sent() -> None:
    async def test() -> None:
        async with nodes(1) as ((server,), (backend,), _, urls), gmco.connect(urls) as client:
            backend.gate = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.recommend, 1)
                await until(lambda: len(backend.requests) == 1)
                items = [gmco.Item(i, UNIT, metadata={"a": bytes(60_000)}) for i in range(140)]
                with pytest.raises(gmco.BadRequest) as caught:
                    await client.put_items(items)
                assert caught.value.code == "too_large"
                backend.gate.set()
            assert (server.statistics().accepted, len(backend.requests)) == (1, 1)
            await client.put_items(items[:139])

    run(test)


def test_reads_of_a_session_find_a_node_that_has_it() -> None:
    async def test() -> None:
        behind = RequestError("session_behind", "not yet")
        async with nodes(2) as (_, backends, _, urls), gmco.connect(urls) as client:
            await client.status()
            used = 0 if backends[0].requests else 1
            backends[used].refusals = [behind] * 1_000
            assert (await client.recommend(1, session=[(1, 2, 3)])).hits
            assert len(backends[1 - used].requests) == 1
        async with nodes(1) as (_, (backend,), _, urls), gmco.connect(urls) as client:
            backend.refusals = [behind] * 4  # more than there are nodes: it catches up
            assert (await client.recommend(1, session=[(1, 2, 3)])).hits
            backend.refusals = [behind] * 1_000
            with pytest.raises(gmco.Unavailable) as caught:
                await client.recommend(1, session=[(1, 2, 3)], timeout_s=0.2)
            assert caught.value.code == "session_behind"

    run(test)


def test_a_users_requests_go_to_one_node_and_to_another_one_when_that_is_gone() -> None:
    async def test() -> None:
        async with nodes(3) as (_, backends, scopes, urls), gmco.connect(urls) as client:

            async def homes() -> dict[int, list[int]]:
                """By user: how many of its requests came to each node."""
                found = {}
                for user in range(60):
                    before = [len(b.requests) for b in backends]
                    for _ in range(3):
                        await client.recommend(user)
                    await client.batch(user, [1])
                    await client.put_users([gmco.User(user, UNIT)])
                    found[user] = [len(b.requests) - n for b, n in zip(backends, before, strict=True)]
                return found

            await homes()  # it connects to the others meanwhile
            while len(client._links) < 3:
                await trio.sleep(0.01)
            first = await homes()
            assert all(sorted(counts) == [0, 0, 5] for counts in first.values())
            shares = [sum(counts[i] for counts in first.values()) / 5 for i in range(3)]
            assert min(shares) >= 8, shares
            async with gmco.connect(urls[::-1]) as other:
                for user in range(60):
                    await other.recommend(user)
                while len(other._links) < 3:
                    await trio.sleep(0.01)
                before = [len(b.requests) for b in backends]
                for user in range(60):
                    await other.recommend(user)
                moved = [len(b.requests) - n for b, n in zip(backends, before, strict=True)]
            assert moved == shares  # every client finds the same node

            scopes[1].cancel()
            second = await homes()
            await trio.sleep(0.1)
            second = await homes()
            for user, counts in first.items():
                assert second[user][1] == 0
                if not counts[1]:
                    assert second[user] == counts  # nobody else had to move

    run(test)


def test_deadlines() -> None:
    async def test() -> None:
        async with nodes(1) as (_, (backend,), (scope,), urls), gmco.connect(urls) as client:
            backend.gate = trio.Event()
            with pytest.raises(gmco.DeadlineExceeded):
                await client.recommend(1, timeout_s=0.1)
            assert 0 < backend.requests[-1].timeout_ms <= 100
            backend.gate.set()
            await client.recommend(1)
            scope.cancel()
            await trio.sleep(0.05)
            with pytest.raises((gmco.Unavailable, gmco.DeadlineExceeded)):
                await client.recommend(1, timeout_s=0.2)
            with pytest.raises(gmco.Unavailable):
                async with gmco.connect(urls, timeout_s=0.2):
                    pass

    run(test)


def test_closing_fails_those_who_wait_and_leaves_errors_unwrapped() -> None:
    async def test() -> None:
        async with nodes(1) as ((server,), (backend,), _, urls):
            backend.gate = trio.Event()
            failed: list[BaseException] = []

            async def wait(client: gmco.Client) -> None:
                try:
                    await client.recommend(1)
                except gmco.Unavailable as error:
                    failed.append(error)

            async with trio.open_nursery() as nursery:
                with pytest.raises(RuntimeError, match="mine"):  # and no ExceptionGroup
                    async with gmco.connect(urls) as client:
                        nursery.start_soon(wait, client)
                        await until(lambda: len(backend.requests) == 1)
                        raise RuntimeError("mine")
            assert len(failed) == 1
            await until(lambda: not server.statistics().connections)
            with pytest.raises(gmco.Unavailable):
                await client.ping()

    run(test)


def test_the_blocking_client_serves_many_threads() -> None:
    async def test() -> None:
        async with nodes(1) as ((server,), _, _, urls):
            answers: list[int] = []

            def use() -> None:
                with gmco.connect_blocking(urls) as client:

                    def one(user: int) -> None:
                        answers.append(client.recommend(user, k=2).hits[1].media_id)

                    threads = [threading.Thread(target=one, args=(user,)) for user in range(10)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    with pytest.raises(gmco.BadRequest):
                        client.recommend(1, k=0)
                with pytest.raises(gmco.Unavailable):
                    client.ping()

            await trio.to_thread.run_sync(use)
            assert answers == [3] * 10
            assert server.statistics().accepted == 1

    run(test)


def test_blocking_without_a_node_is_an_error_at_once() -> None:
    with pytest.raises(gmco.Unavailable), gmco.connect_blocking(["ws://127.0.0.1:1"], timeout_s=0.2):
        pass
    with pytest.raises(gmco.BadRequest), gmco.connect_blocking([]):
        pass
