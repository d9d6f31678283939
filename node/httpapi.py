"""What each path of the HTTP port does (docs/http.md): its query or body as a request, and the answer with its status.

The requests are those of the WebSocket, checked by the same `parse`; only how a query string spells values is decided here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final
from urllib.parse import unquote_plus

import structlog

from node.httpwire import JSON, HttpError, HttpRequest, Response, error_body
from router.errors import Code, RequestError
from router.requests import Limits, Request, parse
from router.wire import Kept, Reply, decode_json, encode_reply

log = structlog.get_logger(__name__)

# What contexts will be; until ranking knows them they only have to be spelt right.
CONTEXTS = ("homepage", "search_results", "video_page")
STATUS: Final[Mapping[Code, int]] = {
    **dict.fromkeys(
        (
            "bad_frame", "bad_request", "unknown_op", "unknown_field", "missing_field", "bad_type", "out_of_range", "bad_vector",
            "wrong_dimension", "zero_vector",
        ),
        400,
    ),
    **dict.fromkeys(("unknown_user", "unknown_item", "unknown_node", "unknown_plan"), 404),
    **dict.fromkeys(("refused", "stale_plan", "no_successor"), 409),
    "too_large": 413,
    **dict.fromkeys(("disk_full", "replica_stopped", "damaged", "internal"), 500),
    **dict.fromkeys(
        (
            "overloaded", "indexing", "no_majority", "no_lease", "no_primary", "session_behind", "partial", "unavailable",
            "shutting_down",
        ),
        503,
    ),
    **dict.fromkeys(("deadline_exceeded", "ack_timeout", "outcome_unknown"), 504),
}  # fmt: skip
INTERNAL = RequestError("internal", "something went wrong inside this node; its log says what")

Ask = Callable[[Request], Awaitable[Reply] | Reply]
Page = Callable[[], Response]

_INTEGER = re.compile(r"-?[0-9]{1,25}")
_NUMBER = re.compile(r"-?[0-9]{1,25}(\.[0-9]{1,25})?")
_CLASSES = frozenset({"require_all", "require_any", "exclude"})
_IDS = frozenset({"positive", "negative"})


class Api:
    """Answers requests. Raises HttpError for what no path takes; whatever else goes wrong is an answer."""

    def __init__(self, ask: Ask, limits: Limits, pages: Mapping[str, Page], origins: frozenset[str]) -> None:
        """pages: GET paths that answer at once by themselves. origins: whose pages browsers may run; "*": all."""
        self._ask, self._limits, self._pages, self._origins = ask, limits, pages, origins
        self._gets: dict[str, str] = {"/recommend": "recommend", "/similar": "similar"}
        self._posts: dict[str, str] = {"/recommend/batch": "batch", "/search": "search"}

    def __call__(self, request: HttpRequest) -> Response | Awaitable[Response]:
        path, _, query = _origin_form(request).partition("?")
        methods = self._methods(path)
        if request.origin is None:
            return self._act(request, path, query, methods)
        if request.origin not in self._origins and "*" not in self._origins:
            message = "pages of this origin may not ask; http.origins lists those that may"
            return _refused(HttpError(403, "origin_refused", message), path if methods else "other")
        found = self._act(request, path, query, methods)
        lines = (f"Access-Control-Allow-Origin: {request.origin}", "Vary: Origin")
        if isinstance(found, Response):
            return found._replace(headers=found.headers + lines)
        return _with(found, lines)

    def _methods(self, path: str) -> str:
        if path in self._posts:
            return "POST, OPTIONS"
        return "GET, HEAD, OPTIONS" if path in self._gets or path in self._pages else ""

    def _act(
        self, request: HttpRequest, path: str, query: str, methods: str
    ) -> Response | Awaitable[Response]:
        method = request.method
        if method == "OPTIONS" and (methods or path == "*"):
            return _options(methods or "GET, HEAD, POST, OPTIONS", path)
        if not methods:
            message = "there is nothing at this path; /openapi.json lists what there is"
            return _refused(HttpError(404, "unknown_path", message), "other")
        if method not in methods.split(", "):
            message = f"this path takes {methods}"
            return _refused(HttpError(405, "method_not_allowed", message, (f"Allow: {methods}",)), path)
        try:
            if method == "POST":
                return self._question(self._posts[path], self._body(request, query), path)
            page = self._pages.get(path)
            if page is not None:
                return page()._replace(route=path)
            return self._question(self._gets[path], query_fields(query), path)
        except HttpError as refusal:
            return _refused(refusal, path)
        except Exception as error:
            return failed(error, path)

    def _body(self, request: HttpRequest, query: str) -> dict[str, Any]:
        if query:
            raise RequestError("bad_request", "send the fields in the body, not in the query")
        kind = (request.content_type or "").partition(";")[0].strip().lower()
        if kind != JSON:
            raise HttpError(415, "unsupported_media_type", f"send the body as {JSON}")
        try:
            fields = decode_json(request.body.decode())
        except UnicodeDecodeError:
            raise RequestError("bad_frame", "the body is not UTF-8") from None
        if type(fields) is not dict:
            raise RequestError("bad_frame", "the body is a map of fields")
        return fields

    def _question(self, op: str, fields: dict[str, Any], route: str) -> Response | Awaitable[Response]:
        result = self._ask(parse(op, fields, self._limits))
        if isinstance(result, dict):
            return _answer(result, route)
        return _wait(result, route)


async def _wait(result: Awaitable[Reply], route: str) -> Response:
    try:
        return _answer(await result, route)
    except Exception as error:
        return failed(error, route)


async def _with(found: Awaitable[Response], lines: tuple[str, ...]) -> Response:
    response = await found
    return response._replace(headers=response.headers + lines)


def _answer(reply: Reply, route: str) -> Response:
    """A reply of the WebSocket, without its id."""
    body = reply.body() if type(reply) is Kept else encode_reply({"ok": True, **reply}, True)
    return Response(200, body, route=route)


def failed(error: Exception, route: str) -> Response:
    """The answer to a request that `error` ended."""
    if not isinstance(error, RequestError):
        log.error("HTTP request failed", route=route, exc_info=error)
        error = INTERNAL
    headers: tuple[str, ...] = ()
    if error.retry_after_ms is not None:
        headers = (f"Retry-After: {max(1, math.ceil(error.retry_after_ms / 1000))}",)
    return Response(STATUS[error.code], error_body(error.as_dict()), headers=headers, route=route)


def _refused(refusal: HttpError, route: str) -> Response:
    return Response(refusal.status, refusal.body(), headers=refusal.headers, route=route)


def _options(methods: str, path: str) -> Response:
    headers = (
        f"Allow: {methods}",
        f"Access-Control-Allow-Methods: {methods}",
        "Access-Control-Allow-Headers: Content-Type",
        "Access-Control-Max-Age: 600",
    )
    return Response(204, b"", headers=headers, route="other" if path == "*" else path)


def _origin_form(request: HttpRequest) -> str:
    """The target without the scheme and host that a client of a proxy puts before it."""
    target = request.target
    if target.startswith("/") or (target == "*" and request.method == "OPTIONS"):
        return target
    for scheme in ("http://", "https://"):
        if target.startswith(scheme):
            _, slash, path = target[len(scheme) :].partition("/")
            return slash + path if slash else "/"
    raise HttpError(400, "bad_http", "ask for a path of this node")


# ---- Query strings ----


def query_fields(query: str) -> dict[str, Any]:
    """The fields that a query string spells. What is spelt wrong stays text, which `parse` refuses by name."""
    texts: dict[str, list[str]] = {}
    for pair in query.split("&"):
        if pair:
            name, _, value = pair.partition("=")
            texts.setdefault(_plain(name), []).append(_plain(value))
    fields = {name: _value(name, values) for name, values in texts.items()}
    context = fields.pop("context", None)
    if context is not None and context not in CONTEXTS:
        raise RequestError("out_of_range", f"context must be one of {', '.join(CONTEXTS)}", "context")
    if fields.pop("cold_start", False) is not False:
        message = "leave cold_start out, or false: there are no answers from a context alone yet"
        raise RequestError("bad_request", message, "cold_start")
    return fields


def _plain(text: str) -> str:
    if "%" not in text and "+" not in text:
        return text
    try:
        return unquote_plus(text, errors="strict")
    except UnicodeDecodeError:
        raise RequestError("bad_request", "the query is not UTF-8") from None


def _value(name: str, values: list[str]) -> Any:
    if name in _CLASSES or name in _IDS or name == "session":
        parts = [part for value in values for part in value.split(",") if value]
        if name in _IDS:
            return parts
        if name == "session":
            return [[_integer(number) for number in part.split(":")] for part in parts]
        return [_integer(part) for part in parts]
    if len(values) > 1:
        raise RequestError("bad_request", "send each parameter once", name[:64])
    text = values[0]
    if name == "k":
        return _integer(text)
    if name == "timeout_ms":
        return float(text) if _NUMBER.fullmatch(text) else text
    if name in ("metadata", "cold_start", "require_full"):
        return {"true": True, "false": False}.get(text, text)
    return text


def _integer(text: str) -> int | str:
    return int(text) if _INTEGER.fullmatch(text) else text
