"""HTTP/1.1 as bytes: requests as they arrive, and answers as they go. Pure.

Laws of a `RequestReader` (docs/http.md: `framing-strict`, `bounded`, `one-answer`):

* it gives whole requests in the order in which they came, and at most one `HttpError`, which is its last word;
* a body is as long as one Content-Length says and never longer than the bound; there is no other way to say it;
* what it holds is at most the bound of a head, the bound of a body, and what it was fed last.

The parser is llhttp (httptools) as strict as it comes. What it lets through is refused here: Transfer-Encoding at all, two
hosts or none, other versions, a body beside Upgrade (whose end it does not look for).
"""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Literal, NamedTuple

import httptools
import msgspec

HttpCode = Literal[
    "bad_http",
    "origin_refused",
    "unknown_path",
    "method_not_allowed",
    "timeout",
    "length_required",
    "too_large",
    "uri_too_long",
    "head_too_large",
    "unsupported_media_type",
    "expectation_failed",
    "unsupported_version",
    "overloaded",
]

_REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = "application/json"


@dataclass(frozen=True, kw_only=True, slots=True)
class WireBounds:
    """Bytes and counts of one request."""

    target_bytes_max: int = 8 << 10
    head_bytes_max: int = 16 << 10
    headers_max: int = 100
    body_bytes_max: int = 1 << 20


class HttpRequest(NamedTuple):
    """One whole request. `target` as it was sent; header values stripped, None when there was none."""

    method: str
    target: str
    keep_alive: bool
    # HTTP/1.0 has to be told that the connection stays.
    old: bool
    origin: str | None
    content_type: str | None
    body: bytes


class HttpError(Exception):
    """A request that gets this status and code. `message` says what to do."""

    def __init__(self, status: int, code: HttpCode, message: str, headers: tuple[str, ...] = ()) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def body(self) -> bytes:
        return error_body({"code": self.code, "message": self.message})


def error_body(error: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"error": error})


class Response(NamedTuple):
    """An answer. `headers` are whole lines; `route` is its label in metrics."""

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[str, ...] = ()
    route: str = "other"


# Of all other headers nothing is wanted, so nothing is kept.
_WANTED = frozenset([b"host", b"content-length", b"transfer-encoding", b"expect", b"origin", b"content-type"])


class RequestReader:
    """Feed it what arrives; it gives requests, and what they are refused with."""

    def __init__(self, bounds: WireBounds) -> None:
        self._bounds = bounds
        self._parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self._found: list[HttpRequest] = []
        self._refusal: HttpError | None = None
        # The client waits for CONTINUE before it sends the body.
        self.wants_continue = False
        # Bytes of the body that has begun and is not whole.
        self.body_bytes = 0
        self._head_fed = 0
        self._begun = self._reading_body = False
        self._begin()

    def _begin(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = self._count = 0
        self._body: list[bytes] = []
        self.wants_continue = False
        self.body_bytes = 0

    @property
    def between(self) -> bool:
        """Whether nothing of a next request has come."""
        return not self._begun

    @property
    def in_body(self) -> bool:
        return self._reading_body

    def close(self) -> None:
        """The parser and we hold each other; without this only the garbage collector would find that out."""
        del self._parser

    def drop_body(self) -> None:
        """Frees what there is of a body that will not be read on."""
        self._body.clear()

    def feed(self, data: bytes | bytearray) -> tuple[list[HttpRequest], HttpError | None]:
        """The requests that are now whole, and why there are no more of them. After a refusal: feed nothing."""
        assert self._refusal is None
        self._found = []
        # All of it is the head's, as far as is known; a request that is whole sets it back.
        self._head_fed += len(data)
        rest: bytes | bytearray | memoryview = data
        while True:
            try:
                self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as upgrade:
                # Upgrade may be ignored, and is: what follows is the next request.
                rest = memoryview(rest)[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                if len(rest):
                    continue
            except httptools.HttpParserError as error:
                if self._refusal is None:
                    self._refusal = _broken(error)
            break
        if self._refusal is None and not self._reading_body and self._head_fed > self._bounds.head_bytes_max:
            self._refusal = self._head_too_large()
        return self._found, self._refusal

    def _head_too_large(self) -> HttpError:
        return HttpError(431, "head_too_large", f"a head is at most {self._bounds.head_bytes_max} bytes")

    def _refuse(self, refusal: HttpError) -> None:
        """Out of the parser's callbacks: it carries no exception of ours through."""
        self._refusal = refusal
        raise refusal

    # -- the parser's callbacks --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begun = True

    def on_url(self, part: bytes) -> None:
        self._target += part
        if len(self._target) > self._bounds.target_bytes_max:
            message = f"a request's target is at most {self._bounds.target_bytes_max} bytes"
            self._refuse(HttpError(414, "uri_too_long", message))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._count > self._bounds.headers_max:
            message = f"send at most {self._bounds.headers_max} headers"
            self._refuse(HttpError(431, "head_too_large", message))
        if len(self._target) + self._head_bytes > self._bounds.head_bytes_max:
            self._refuse(self._head_too_large())
        name = name.lower()
        if name in _WANTED:
            if name in self._headers:
                message = f"send {name.decode()} once"
                self._refuse(HttpError(400, "bad_http", message))
            self._headers[name] = value.strip()

    def on_headers_complete(self) -> None:
        headers, version = self._headers, self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._refuse(HttpError(505, "unsupported_version", "speak HTTP/1.1"))
        if b"transfer-encoding" in headers:
            message = "send the body's length as Content-Length; chunked bodies are not taken"
            self._refuse(HttpError(411, "length_required", message))
        if b"host" not in headers and version == "1.1":
            self._refuse(HttpError(400, "bad_http", "name the host that you ask, in Host"))
        length = int(headers.get(b"content-length", b"0"))
        if length > self._bounds.body_bytes_max:
            message = f"a body is at most {self._bounds.body_bytes_max} bytes"
            self._refuse(HttpError(413, "too_large", message))
        if length and self._parser.should_upgrade():
            self._refuse(HttpError(400, "bad_http", "send no body beside Upgrade or CONNECT"))
        if self._parser.get_method() == b"POST" and b"content-length" not in headers:
            message = "send the body's length as Content-Length"
            self._refuse(HttpError(411, "length_required", message))
        expect = headers.get(b"expect")
        if expect is not None:
            if expect.lower() != b"100-continue":
                self._refuse(HttpError(417, "expectation_failed", "expect nothing, or 100-continue"))
            self.wants_continue = length > 0 and version == "1.1"
        self._reading_body = True

    def on_body(self, part: bytes) -> None:
        self._body.append(part)
        self.body_bytes += len(part)
        self.wants_continue = False  # it did not wait

    def on_message_complete(self) -> None:
        headers, parser = self._headers, self._parser
        self._found.append(
            HttpRequest(
                parser.get_method().decode(),
                self._target.decode("latin-1"),
                # A CONNECT that we do not follow leaves a client that believes in a tunnel.
                parser.should_keep_alive() and parser.get_method() != b"CONNECT",
                parser.get_http_version() == "1.0",
                _text(headers.get(b"origin")),
                _text(headers.get(b"content-type")),
                b"".join(self._body),
            )
        )
        self._head_fed = 0
        self._begun = self._reading_body = False
        self._begin()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _broken(error: Exception) -> HttpError:
    # The parser's own sentences name what is wrong and quote nothing of the request.
    if "PRI" in str(error):
        return HttpError(505, "unsupported_version", "speak HTTP/1.1")
    return HttpError(400, "bad_http", f"this is not HTTP/1.1 as it should be: {error}")


_dated: tuple[int, str] = (-1, "")


def _date(now: float) -> str:
    """The header line; made once a second."""
    global _dated
    if int(now) != _dated[0]:
        _dated = (int(now), f"Date: {formatdate(now, usegmt=True)}\r\n")
    return _dated[1]


def encode(
    response: Response, now: float, *, keep_alive: bool, old: bool = False, head_only: bool = False
) -> bytes:
    """The answer's bytes. now: seconds since 1970. old: the client speaks HTTP/1.0. head_only: as to HEAD."""
    lines = "".join([line + "\r\n" for line in response.headers])
    if not keep_alive:
        lines += "Connection: close\r\n"
    elif old:
        lines += "Connection: keep-alive\r\n"
    if response.status != 204:
        lines += f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\n"
    head = (
        f"HTTP/1.1 {response.status} {_REASONS[response.status]}\r\n{_date(now)}"
        f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{lines}\r\n"
    ).encode("latin-1")
    return head if head_only else head + response.body
