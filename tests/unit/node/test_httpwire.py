"""HTTP/1.1 bytes: what is a request, what is refused, and that it does not depend on how the bytes arrive."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.httpwire import HttpError, HttpRequest, RequestReader, Response, WireBounds, encode

BOUNDS = WireBounds(target_bytes_max=100, head_bytes_max=400, headers_max=8, body_bytes_max=64)


def read(*chunks: bytes, bounds: WireBounds = BOUNDS) -> tuple[list[HttpRequest], HttpError | None]:
    reader = RequestReader(bounds)
    requests: list[HttpRequest] = []
    for chunk in chunks:
        found, refusal = reader.feed(chunk)
        requests += found
        if refusal is not None:
            return requests, refusal
    return requests, None


def get(*headers: str, line: str = "GET /a HTTP/1.1", host: str = "Host: x") -> bytes:
    return "\r\n".join([line, *([host] if host else []), *headers, "", ""]).encode("latin-1")


def post(body: bytes, *headers: str) -> bytes:
    return get(f"Content-Length: {len(body)}", *headers, line="POST /b HTTP/1.1") + body


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(("raw", "status", "code"), [
    (get("Content-Length: 3", "Transfer-Encoding: chunked", line="POST / HTTP/1.1") + b"0\r\n\r\n", 400, "bad_http"),
    (get("Transfer-Encoding: chunked", "Content-Length: 3", line="POST / HTTP/1.1") + b"0\r\n\r\n", 400, "bad_http"),
    (get("Content-Length: 3", "Content-Length: 3", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length: 3", "content-length: 30", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length: 3, 3", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length: +3", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length: -3", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length: 0x3", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length: 1 3", line="POST / HTTP/1.1") + b"abc", 400, "bad_http"),
    (get("Content-Length:", line="POST / HTTP/1.1"), 400, "bad_http"),
    (get("Content-Length: " + "9" * 30, line="POST / HTTP/1.1"), 400, "bad_http"),
    (get("Transfer-Encoding: chunked", line="POST / HTTP/1.1") + b"0\r\n\r\n", 411, "length_required"),
    (get("Transfer-Encoding: gzip", line="POST / HTTP/1.1") + b"0\r\n\r\n", 411, "length_required"),
    (get("Transfer-Encoding: chunked"), 411, "length_required"),
    (get("Transfer-Encoding:\x0bchunked"), 400, "bad_http"),
    (get(line="POST / HTTP/1.1"), 411, "length_required"),
    (get("A: b", " folded"), 400, "bad_http"),
    (get("A: b", "\tfolded"), 400, "bad_http"),
    (get(" A: b"), 400, "bad_http"),
    (get("Host : x", host=""), 400, "bad_http"),
    (get("A: b\x00c"), 400, "bad_http"),
    (get("no colon"), 400, "bad_http"),
    (get("Host: y"), 400, "bad_http"),
    (get(host=""), 400, "bad_http"),
    (get().replace(b"\r\n", b"\n"), 400, "bad_http"),
    (b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400, "bad_http"),
    (b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n", 400, "bad_http"),
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r" + SMUGGLED, 400, "bad_http"),
    (post(b"", "Upgrade: h2c", "Connection: Upgrade").replace(b"Length: 0", b"Length: 36") + SMUGGLED, 400, "bad_http"),
    (get(line="get /a HTTP/1.1"), 400, "bad_http"),
    (get(line="GET /\x01 HTTP/1.1"), 400, "bad_http"),
    (get(line="GET / HTTP/1.2"), 400, "bad_http"),
    (get(line="GET / HTTP/2.0"), 505, "unsupported_version"),
    (get(line="GET / HTTP/0.9"), 505, "unsupported_version"),
    (b"GET /\r\n\r\n", 505, "unsupported_version"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "unsupported_version"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_http"),
    (b"\x00" * 50, 400, "bad_http"),
    (get(line="GET /" + "a" * 100 + " HTTP/1.1"), 414, "uri_too_long"),
    (get(*[f"A{i}: b" for i in range(8)]), 431, "head_too_large"),
    (get("A: " + "b" * 400), 431, "head_too_large"),
    (b"GET / HTTP/1.1\r\nA: " + b"b" * 400, 431, "head_too_large"),
    (post(b"x" * 65), 413, "too_large"),
    (post(b"x" * 65)[:-65], 413, "too_large"),
    (post(b"abc", "Expect: a-miracle"), 417, "expectation_failed"),
])  # fmt: skip
def test_what_is_refused(raw: bytes, status: int, code: str) -> None:
    """`framing-strict`: in one piece and byte by byte; and what follows is never taken for a request."""
    for chunks in ([raw + SMUGGLED], [bytes([one]) for one in raw + SMUGGLED]):
        requests, refusal = read(*chunks)
        assert refusal is not None
        assert (refusal.status, refusal.code) == (status, code)
        assert requests == []
        assert b'"code"' in refusal.body()


@pytest.mark.parametrize("raw", [
    get(),
    b"\r\n\r\n" + get(),
    get(line="GET /a?x=%20&y=1 HTTP/1.1"),
    get(line="GET http://x/a HTTP/1.1"),
    get(line="OPTIONS * HTTP/1.1"),
    get(line="GET /a HTTP/1.0", host=""),
    get("A: \xff"),
    post(b"abc"),
    post(b"x" * 64, "Expect: 100-Continue"),
    post(b""),
    get("Upgrade: websocket", "Connection: Upgrade"),
])  # fmt: skip
def test_what_is_taken(raw: bytes) -> None:
    for chunks in ([raw], [bytes([one]) for one in raw]):
        (request,), refusal = read(*chunks)
        assert refusal is None
        assert request.method == raw.strip().split()[0].decode()
        assert request.target == raw.strip().split()[1].decode()


def test_the_connection_stays_or_not() -> None:
    def stays(raw: bytes) -> bool:
        return read(raw)[0][0].keep_alive

    assert stays(get())
    assert not stays(get("Connection: close"))
    assert not stays(get(line="GET /a HTTP/1.0"))
    assert stays(get("Connection: keep-alive", line="GET /a HTTP/1.0"))
    assert not stays(get(line="CONNECT a:1 HTTP/1.1"))
    # Whatever follows a last request is not one.
    requests, _ = read(get("Connection: close") + SMUGGLED)
    assert len(requests) == 1


def test_an_upgrade_is_ignored_and_what_follows_it_read() -> None:
    requests, refusal = read(get("Upgrade: h2c", "Connection: Upgrade") * 3 + post(b"abc"))
    assert refusal is None
    assert [one.body for one in requests] == [b"", b"", b"", b"abc"]


def test_who_waits_for_a_word_before_the_body_is_known() -> None:
    reader = RequestReader(BOUNDS)
    raw = post(b"abc", "Expect: 100-continue")
    assert reader.feed(raw[:-3]) == ([], None)
    assert reader.wants_continue
    assert reader.in_body
    (request,), _ = reader.feed(b"abc")
    assert request.body == b"abc"
    assert not reader.wants_continue
    assert reader.feed(raw)[0][0].body == b"abc"
    assert not reader.wants_continue


# A body never looks like the start of a request in these, so that a wrong border would show.
REQUESTS = st.one_of(
    st.just(get()), st.just(get("Origin: http://a", "Accept: */*")), st.binary(max_size=64).map(post)
)


@given(st.lists(REQUESTS, min_size=1, max_size=6), st.lists(st.integers(0, 1_500), max_size=12))
def test_how_the_bytes_arrive_changes_nothing(sent: list[bytes], cuts: list[int]) -> None:
    raw = b"".join(sent)
    borders = sorted({0, len(raw), *[cut for cut in cuts if cut < len(raw)]})
    whole = read(raw)
    assert read(*[raw[a:b] for a, b in pairwise(borders)]) == whole
    assert len(whole[0]) == len(sent)
    assert whole[1] is None


def test_a_half_request_is_known_to_have_begun() -> None:
    reader = RequestReader(BOUNDS)
    assert reader.between
    reader.feed(get() + get()[:10])
    assert not reader.between
    reader.feed(get()[10:])
    assert reader.between


def test_a_closed_reader_leaves_nothing_for_the_garbage_collector() -> None:
    gc.disable()
    try:
        reader = RequestReader(BOUNDS)
        reader.feed(get())
        gone = weakref.ref(reader)
        reader.close()
        del reader
        assert gone() is None
    finally:
        gc.enable()


def test_answers_as_bytes() -> None:
    said = encode(Response(200, b"{}", headers=("A: b",)), 0.0, keep_alive=True)
    head, _, body = said.partition(b"\r\n\r\n")
    assert body == b"{}"
    assert head.startswith(b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n")
    assert b"\r\nContent-Length: 2" in head
    assert b"\r\nA: b\r\n" in head
    assert b"Connection" not in head
    assert b"Connection: close" in encode(Response(200, b""), 1.0, keep_alive=False)
    assert b"Connection: keep-alive" in encode(Response(200, b""), 1.0, keep_alive=True, old=True)
    only = encode(Response(200, b"{}"), 1.0, keep_alive=True, head_only=True)
    assert only.endswith(b"Content-Length: 2\r\n\r\n")
    assert b"Content-Length" not in encode(Response(204, b""), 1.0, keep_alive=True)
