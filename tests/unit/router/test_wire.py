"""Frames: whatever arrives becomes requests or refusals, and replies read back as docs/protocol.md says."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import RequestError
from router.requests import Limits
from router.wire import Columns, Refused, decode_frame, encode_replies, encode_reply, error_reply, join

LIMITS = Limits(dim=8, frame_requests_max=4, frame_bytes_max=100_000)
PING = {"id": 1, "op": "ping"}


def one_refusal(data: bytes | str) -> Refused:
    (found,) = decode_frame(data, LIMITS)
    assert isinstance(found, Refused)
    return found


def test_one_map_and_an_array_of_them() -> None:
    assert decode_frame(msgpack.packb(PING), LIMITS) == [PING]
    assert decode_frame(json.dumps([PING, {"id": "a", "op": "x", "k": 1}]), LIMITS) == [
        PING,
        {"id": "a", "op": "x", "k": 1},
    ]
    assert decode_frame("[]", LIMITS) == []


@pytest.mark.parametrize("data", [
    b"", b"\xc1", b"\x93\x01", b"\x01", msgpack.packb("text"), msgpack.packb(PING) + b"x", b"\x91" * 5_000,
    b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\x82\xa2id\x01\xa2id\x02", b"\x81\x01\x02", b"\x81\x90\x01",
    b"\xa1\xff", msgpack.packb({b"id": 1, "op": [1, {2.5: 1}]}, use_bin_type=True),
    "", "{", "[NaN]", "[Infinity]", "[-Infinity]", "5", '"x"', "[" * 50_000, '{"id":1,"id":2,"op":"ping"}',
    '{"id":' + "9" * 5_000 + "}",
])  # fmt: skip
def test_what_cannot_be_read_is_one_refusal_without_an_id(data: bytes | str) -> None:
    refused = one_refusal(data)
    assert (refused.id, refused.error.code) == (None, "bad_frame")


@pytest.mark.parametrize(("request_", "id", "code"), [
    (5, None, "bad_frame"),
    ({}, None, "bad_request"),
    ({"id": None, "op": "ping"}, None, "bad_request"),
    ({"id": True, "op": "ping"}, None, "bad_request"),
    ({"id": 1.5, "op": "ping"}, None, "bad_request"),
    ({"id": 2**64, "op": "ping"}, None, "bad_request"),
    ({"id": "x" * 129, "op": "ping"}, None, "bad_request"),
    ({"id": "\ud800", "op": "ping"}, None, "bad_request"),
    ({"id": 3}, 3, "bad_request"),
    ({"id": 3, "op": 4}, 3, "bad_type"),
])  # fmt: skip
def test_a_bad_request_does_not_spoil_its_neighbours(request_: Any, id: int | None, code: str) -> None:
    first, second = decode_frame(json.dumps([request_, PING]), LIMITS)
    assert isinstance(first, Refused)
    assert (first.id, first.error.code) == (id, code)
    assert second == PING


def test_bounds() -> None:
    assert one_refusal(json.dumps([PING] * 5)).error.code == "too_large"
    assert one_refusal(bytes(100_001)).error.code == "too_large"


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_noise_raises_nothing(data: bytes | str) -> None:
    for one in decode_frame(data, LIMITS):
        if isinstance(one, Refused):
            encode_reply(error_reply(one.id, one.error), json=isinstance(data, str))


@given(st.data())
def test_damaged_frames_raise_nothing(data: st.DataObject) -> None:
    frame = bytearray(msgpack.packb([PING, {"id": "é", "op": "put", "v": [1.5, None, {"a": b"x" * 40}]}]))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    for one in decode_frame(cut, LIMITS) + decode_frame(cut.decode("latin-1"), LIMITS):
        assert isinstance(one, Refused) or ("id" in one and isinstance(one["op"], str))


HITS = Columns(
    np.array([1, 2**64 - 1], np.uint64),
    np.array([0.5, -1.0], np.float32),
    [msgpack.packb({"a": b"\x00"}), b""],
)


def test_hits_travel_as_columns_in_msgpack() -> None:
    reply = msgpack.unpackb(
        encode_replies([{"id": 1, "ok": True, "hits": HITS, "coverage": {"missing": (3,)}}], False)
    )
    assert reply["hits"]["media_ids"] == struct.pack("<2Q", 1, 2**64 - 1)
    assert reply["hits"]["scores"] == struct.pack("<2f", 0.5, -1.0)
    assert reply["hits"]["metadata"] == HITS.metadata
    assert reply["coverage"] == {"missing": [3]}


def test_hits_are_maps_in_json_with_large_ids_as_strings() -> None:
    frame = encode_replies([{"id": 1, "ok": True, "hits": HITS, "write_id": b"\xab" * 16}], True)
    assert json.loads(frame) == {
        "id": 1,
        "ok": True,
        "write_id": "ab" * 16,
        "hits": [
            {"media_id": 1, "score": 0.5, "metadata": {"a": "AA=="}},
            {"media_id": str(2**64 - 1), "score": -1.0, "metadata": {}},
        ],
    }


def test_records_in_both() -> None:
    record = {
        "id": 5,
        "version": (1, 2),
        "classes": (3,),
        "metadata": msgpack.packb({"t": "x"}),
        "vector": np.ones(2, "<f2").tobytes(),
    }
    reply = {"id": 1, "ok": True, "records": [record, None]}
    packed = msgpack.unpackb(encode_replies([reply], False))["records"]
    assert packed == [{**record, "version": [1, 2], "classes": [3]}, None]
    plain = json.loads(encode_replies([reply], True))["records"]
    assert plain == [
        {"id": 5, "version": [1, 2], "classes": [3], "metadata": {"t": "x"}, "vector": [1.0, 1.0]},
        None,
    ]


def test_several_replies_are_an_array() -> None:
    replies = [{"id": 1, "ok": True}, error_reply("b", RequestError("overloaded", "wait", "k", 50))]
    expected = [
        replies[0],
        {"id": "b", "error": {"code": "overloaded", "message": "wait", "field": "k", "retry_after_ms": 50}},
    ]
    assert msgpack.unpackb(encode_replies(replies, False)) == expected
    assert json.loads(encode_replies(replies, True)) == expected
    assert (
        msgpack.unpackb(join([encode_reply(r, False) for r in replies * 20_000], False)) == expected * 20_000
    )


def test_metadata_that_json_has_no_word_for() -> None:
    metadata = msgpack.packb({"at": msgpack.Timestamp(0), "ext": msgpack.ExtType(5, b"\x01")})
    hits = Columns(np.ones(1, np.uint64), np.ones(1, np.float32), [metadata])
    (hit,) = json.loads(encode_replies([{"id": 1, "hits": hits}], True))["hits"]
    assert hit["metadata"] == {"at": "1970-01-01T00:00:00Z", "ext": [5, "AQ=="]}


def test_a_reply_that_cannot_be_sent_is_an_error_and_spoils_none_after_it() -> None:
    for as_json in (False, True):
        with pytest.raises(TypeError):
            encode_reply({"id": 1, "oops": object()}, as_json)
        assert b"ok" in encode_reply({"id": 1, "ok": True}, as_json)


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth - 1):
        inner = {"a": inner}
    return inner


@pytest.mark.parametrize(("packed", "expected"), [
    (msgpack.packb({"at": msgpack.Timestamp(2**62)}), {"at": [-1, "AAAAAEAAAAAAAAAA"]}),
    (msgpack.packb({"at": msgpack.Timestamp(-(2**40))}), {"at": [-1, "AAAAAP///wAAAAAA"]}),
    (msgpack.packb({"x": float("nan")}), {"x": None}),
    (msgpack.packb({None: 1}), "gcAB"),
    (msgpack.packb({"x": {True: 1}}), None),
    (msgpack.packb(nested(1_000)), None),
    (b"\x81\xa1a\xd7\xff" + b"\xff" * 8, None),
    (b"\x81\xa1\xff\x01", None),
    (b"\xc1", "wQ=="),
])  # fmt: skip
def test_no_stored_metadata_keeps_its_neighbours_from_json(packed: bytes, expected: Any) -> None:
    expected = expected or base64.b64encode(packed).decode()
    good = msgpack.packb({"at": msgpack.Timestamp(0)})
    hits = Columns(np.arange(2, dtype=np.uint64), np.ones(2, np.float32), [packed, good])
    found = json.loads(encode_reply({"id": 1, "hits": hits}, True))["hits"]
    assert [hit["metadata"] for hit in found] == [expected, {"at": "1970-01-01T00:00:00Z"}]
    records = [{"id": 5, "version": (1, 2), "classes": (), "metadata": packed}]
    assert json.loads(encode_reply({"id": 1, "records": records}, True))["records"][0]["metadata"] == expected


def test_unknown_ids_are_ids() -> None:
    unknown = [2**53 - 1, 2**53, 2**64 - 1]
    reply = {"id": 1, "ok": True, "hits": HITS, "unknown": unknown}
    assert json.loads(encode_reply(reply, True))["unknown"] == [2**53 - 1, str(2**53), str(2**64 - 1)]
    assert msgpack.unpackb(encode_reply(reply, False))["unknown"] == unknown
