"""Paths, query strings, statuses and origins; the requests that come out are those of the WebSocket."""

from __future__ import annotations

import json
import typing
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import validate

from node.httpapi import STATUS, Api, query_fields
from node.httpwire import HttpError, HttpRequest, Response, encode
from node.openapi import document
from router.errors import CODES, RequestError
from router.requests import Batch, Limits, Recommend, Request, Search, Similar, parse
from router.wire import Columns, Reply

LIMITS = Limits(dim=4, items_max=5)


class Backend:
    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.error: Exception | None = None
        self.waits = False

    def __call__(self, request: Request) -> Reply | Awaitable[Reply]:
        self.asked.append(request)
        return self._wait() if self.waits else self._reply()

    async def _wait(self) -> Reply:
        return self._reply()

    def _reply(self) -> Reply:
        if self.error is not None:
            raise self.error
        hits = Columns(np.array([2**60], np.uint64), np.ones(1, np.float32), [b""])
        return {"hits": hits, "coverage": {"answered": 1, "total": 1, "missing": []}}


def api(backend: Backend | None = None, *origins: str) -> Api:
    pages = {"/healthz": lambda: Response(200, b"{}")}
    return Api(backend or Backend(), LIMITS, pages, frozenset(origins))


def ask(
    api: Api,
    target: str,
    body: Any = None,
    *,
    method: str = "",
    origin: str | None = None,
    kind: str | None = "application/json",
) -> Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    method = method or ("GET" if body is None else "POST")
    found = api(HttpRequest(method, target, True, False, origin, kind, raw))
    if isinstance(found, Response):
        return found

    async def wait() -> Response:
        assert not isinstance(found, Response)
        return await found

    return trio.run(wait)


def error(response: Response) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(response.body)["error"]
    return found


def test_every_code_has_a_status() -> None:
    assert STATUS.keys() == CODES


def test_every_status_has_its_words() -> None:
    for status in {*STATUS.values()}:
        assert encode(Response(status, b"{}"), 0.0, keep_alive=True).startswith(b"HTTP/1.1 %d " % status)


def test_queries_spell_what_the_websocket_asks() -> None:
    backend = Backend()
    door = api(backend)
    target = "/recommend?user_id=18446744073709551615&k=3&require_all=1,2&exclude=3&exclude=4&metadata=false&timeout_ms=50.5"
    assert ask(door, target + "&session=1:2:3,4:5:6&context=homepage&cold_start=false").status == 200
    fields = {
        "user_id": 2**64 - 1,
        "k": 3,
        "require_all": [1, 2],
        "exclude": [3, 4],
        "metadata": False,
        "timeout_ms": 50.5,
        "session": [[1, 2, 3], [4, 5, 6]],
    }
    assert backend.asked == [parse("recommend", fields, LIMITS)]
    assert isinstance(backend.asked[0], Recommend)
    ask(door, "/similar?positive=1,%32&negative=3")
    assert backend.asked[1] == parse("similar", {"positive": [1, 2], "negative": [3]}, LIMITS)
    assert isinstance(backend.asked[1], Similar)
    ask(door, "/similar?media_id=1&priority=batch&require_full=true")
    fields = {"media_id": 1, "priority": "batch", "require_full": True}
    assert backend.asked.pop() == parse("similar", fields, LIMITS)
    ask(door, "http://anybody/recommend?user_id=1")
    assert backend.asked[2] == parse("recommend", {"user_id": 1}, LIMITS)


def test_bodies_are_the_fields_themselves() -> None:
    backend = Backend()
    door = api(backend)
    fields = {"user_id": "7", "media_ids": [1, "2"]}
    assert ask(door, "/recommend/batch", fields, kind="Application/JSON; charset=utf-8").status == 200
    assert isinstance(backend.asked[0], Batch)
    assert backend.asked[0] == parse("batch", fields, LIMITS)
    assert ask(door, "/search", {"vector": [1, 0, 0, 0], "k": 2}).status == 200
    assert isinstance(backend.asked[1], Search)


@pytest.mark.parametrize("waits", [False, True])
def test_answers_are_those_of_the_json_frames(waits: bool) -> None:
    backend = Backend()
    backend.waits = waits
    response = ask(api(backend), "/recommend?user_id=1")
    assert json.loads(response.body) == {
        "ok": True,
        "hits": [{"media_id": str(2**60), "score": 1.0, "metadata": {}}],
        "coverage": {"answered": 1, "total": 1, "missing": []},
    }
    assert (response.status, response.route, response.content_type) == (200, "/recommend", "application/json")


@pytest.mark.parametrize(("target", "code", "field"), [
    ("/recommend", "missing_field", "user_id"),
    ("/recommend?user_id=", "bad_type", "user_id"),
    ("/recommend?user_id=x", "bad_type", "user_id"),
    ("/recommend?user_id=-1", "bad_type", "user_id"),
    ("/recommend?user_id=18446744073709551616", "out_of_range", "user_id"),
    ("/recommend?user_id=%D9%A3", "bad_type", "user_id"),
    ("/recommend?user_id=1&user_id=2", "bad_request", "user_id"),
    ("/recommend?user_id=1&k=0", "out_of_range", "k"),
    ("/recommend?user_id=1&k=1.5", "bad_type", "k"),
    ("/recommend?user_id=1&k=99999999999999999999999", "out_of_range", "k"),
    ("/recommend?user_id=1&exclude=a", "bad_type", "exclude[0]"),
    ("/recommend?user_id=1&exclude=256", "out_of_range", "exclude"),
    ("/recommend?user_id=1&metadata=yes", "bad_type", "metadata"),
    ("/recommend?user_id=1&require_full=1", "bad_type", "require_full"),
    ("/recommend?user_id=1&priority=urgent", "out_of_range", "priority"),
    ("/recommend?user_id=1&timeout_ms=nan", "bad_type", "timeout_ms"),
    ("/recommend?user_id=1&timeout_ms=0", "out_of_range", "timeout_ms"),
    ("/recommend?user_id=1&session=1:2", "bad_type", "session[0]"),
    ("/recommend?user_id=1&session=a:b:c", "bad_type", "session[0][0]"),
    ("/recommend?user_id=1&nonsense=1", "unknown_field", "nonsense"),
    ("/recommend?user_id=1&context=homepag", "out_of_range", "context"),
    ("/recommend?user_id=1&cold_start=true", "bad_request", "cold_start"),
    ("/recommend?user_id=1&%FF=1", "bad_request", None),
    ("/similar", "missing_field", "positive"),
    ("/similar?media_id=1&positive=2", "bad_request", "media_id"),
])  # fmt: skip
def test_what_is_wrong_in_a_query_is_named(target: str, code: str, field: str | None) -> None:
    backend = Backend()
    response = ask(api(backend), target)
    assert response.status == 400
    assert (error(response)["code"], error(response).get("field")) == (code, field)
    assert backend.asked == []
    assert response.route == target.partition("?")[0]


DEEP = b'{"a":' * 100_000


@pytest.mark.parametrize(("body", "status", "code"), [
    (b"", 400, "bad_frame"), (b"[]", 400, "bad_frame"), (b"{", 400, "bad_frame"), (b"\xff", 400, "bad_frame"),
    (DEEP, 400, "bad_frame"), (b'{"user_id": NaN}', 400, "bad_frame"), (b'{"a": 1, "a": 2}', 400, "bad_frame"),
    (b'{"user_id": 1' + b"0" * 5_000 + b"}", 400, "bad_frame"),
    (b'{"user_id": 1, "media_ids": [1,2,3,4,5,6]}', 413, "too_large"),
    (b'{"user_id": 1, "media_ids": [1.0]}', 400, "bad_type"),
    (b'{"user_id": 1, "media_ids": [], "\\ud800": 1}', 400, "bad_request"),
])  # fmt: skip
def test_what_is_wrong_in_a_body_is_named(body: bytes, status: int, code: str) -> None:
    response = ask(api(), "/recommend/batch", body, method="POST")
    assert (response.status, error(response)["code"]) == (status, code)


def test_paths_methods_and_types() -> None:
    door = api()
    assert error(ask(door, "/nothing"))["code"] == "unknown_path"
    assert ask(door, "/nothing").route == "other"
    assert ask(door, "/healthz", method="HEAD").status == 200
    wrong = ask(door, "/recommend", {})
    assert (wrong.status, error(wrong)["code"]) == (405, "method_not_allowed")
    assert "Allow: GET, HEAD, OPTIONS" in wrong.headers
    assert ask(door, "/search", method="GET").status == 405
    assert ask(door, "/search?k=1", {"vector": []}).status == 400
    assert ask(door, "/search", {}, kind="text/plain").status == 415
    assert ask(door, "/search", {}, kind=None).status == 415
    assert ask(door, "/search", method="OPTIONS").status == 204
    assert ask(door, "*", method="OPTIONS").status == 204
    with pytest.raises(HttpError) as caught:
        ask(door, "nonsense")
    assert caught.value.status == 400


@pytest.mark.parametrize("waits", [False, True])
def test_errors_are_those_of_the_websocket_with_a_status(waits: bool) -> None:
    """`same-errors`, `nothing-leaks`."""
    backend = Backend()
    backend.waits = waits
    backend.error = RequestError("overloaded", "wait", None, 1_500)
    response = ask(api(backend), "/recommend?user_id=1")
    assert (response.status, response.headers) == (503, ("Retry-After: 2",))
    assert error(response) == {"code": "overloaded", "message": "wait", "retry_after_ms": 1_500}
    backend.error = RequestError("unknown_user", "no such user", "user_id")
    assert ask(api(backend), "/recommend?user_id=1").status == 404
    backend.error = KeyError("a secret")
    response = ask(api(backend), "/recommend?user_id=1")
    assert (response.status, error(response)["code"]) == (500, "internal")
    assert b"secret" not in response.body


@pytest.mark.parametrize("waits", [False, True])
def test_pages_of_other_origins_may_not_ask(waits: bool) -> None:
    """`browsers-asked`."""
    backend = Backend()
    backend.waits = waits
    for door in (api(backend), api(backend, "https://ours.example")):
        for target, method in (("/recommend?user_id=1", "GET"), ("/healthz", "GET"), ("/search", "OPTIONS")):
            response = ask(door, target, method=method, origin="https://evil.example")
            assert response.status == 403
            assert error(response)["code"] == "origin_refused"
            assert not any("Access-Control" in line for line in response.headers)
    assert backend.asked == []
    for door in (api(backend, "https://ours.example"), api(backend, "*")):
        response = ask(door, "/recommend?user_id=1", origin="https://ours.example")
        assert response.status == 200
        assert "Access-Control-Allow-Origin: https://ours.example" in response.headers
        assert "Vary: Origin" in response.headers
        assert ask(door, "/search", method="OPTIONS", origin="https://ours.example").status == 204


@given(st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=200))
def test_no_query_string_breaks_it(query: str) -> None:
    try:
        fields = query_fields(query)
    except RequestError:
        return
    response = ask(api(), "/recommend?" + query)
    assert response.status == 200 or error(response)["code"] in CODES
    assert all(type(name) is str for name in fields)


def test_the_document_is_valid_and_names_every_code() -> None:
    found = document(LIMITS)
    validate(found)
    codes = set(found["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"])
    assert codes >= CODES
    paths = typing.cast(dict[str, Any], found["paths"])
    assert {"/recommend", "/recommend/batch", "/search", "/similar"} < paths.keys()
