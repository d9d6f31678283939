"""Requests from fields: what is let in, how it comes out, and which code each refusal has."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.errors import CODES, RequestError
from router.requests import OPS, Batch, Delete, Get, Limits, Put, Query, Recommend, Search, Similar, parse
from router.sentences import translate
from storage.records import Kind
from storage.view import ClassConstraint

DIM = 8
LIMITS = Limits(dim=DIM)
ONES = [1.0] * DIM
ITEM = {"media_id": 1, "vector": ONES}


def refused(op: str, fields: dict[str, Any], limits: Limits = LIMITS) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        parse(op, fields, limits)
    assert caught.value.code in CODES
    assert caught.value.message
    return caught.value.code, caught.value.field


def test_recommend_has_defaults() -> None:
    request = parse("recommend", {"user_id": 7}, LIMITS)
    assert request == Recommend(
        user_id=7, k=10, constraint=ClassConstraint(), metadata=True, timeout_ms=None, session=()
    )


def test_how_urgent_a_read_is_and_whether_it_takes_half_an_answer() -> None:
    for op, fields in (
        ("recommend", {"user_id": 1}),
        ("similar", {"media_id": 1}),
        ("search", {"vector": [1.0] * 8}),
    ):
        plain = parse(op, dict(fields), LIMITS)
        assert isinstance(plain, Query)
        assert (plain.priority, plain.require_full) == (0, False)
        asked = parse(op, {**fields, "priority": "prefetch", "require_full": True}, LIMITS)
        assert isinstance(asked, Query)
        assert (asked.priority, asked.require_full) == (2, True)
    batch = parse(
        "batch", {"user_id": 1, "media_ids": [2], "require_full": True, "priority": "batch"}, LIMITS
    )
    assert isinstance(batch, Batch)
    assert batch.require_full
    assert refused("recommend", {"user_id": 1, "priority": "urgent"}) == ("out_of_range", "priority")
    assert refused("get", {"kind": "item", "ids": [1], "priority": "batch"}) == ("unknown_field", "priority")


def test_classes_come_out_sorted_and_once() -> None:
    request = parse("recommend", {"user_id": 7, "require_any": [9, 3, 9], "exclude": [255]}, LIMITS)
    assert isinstance(request, Recommend)
    assert request.constraint == ClassConstraint(require_any=(3, 9), exclude=(255,))


def test_similar_short_form_is_one_positive() -> None:
    request = parse("similar", {"media_id": "12", "session": [[1, 2, 3]]}, LIMITS)
    assert isinstance(request, Similar)
    assert (request.positive, request.negative, request.session) == ((12,), (), ((1, 2, 3),))


@pytest.mark.parametrize("make", [
    lambda v: v.tolist(),
    lambda v: v.astype("<f4").tobytes(),
    lambda v: v.astype("<f2").tobytes(),
])  # fmt: skip
def test_every_spelling_of_a_vector_is_scaled_to_unit_length(make: Any) -> None:
    vector = np.arange(1, DIM + 1, dtype=np.float32)
    request = parse("search", {"vector": make(vector)}, LIMITS)
    assert isinstance(request, Search)
    assert request.vector.dtype == np.float16
    assert request.vector.shape == (DIM,)
    np.testing.assert_array_equal(request.vector, (vector / np.linalg.norm(vector)).astype(np.float16))


def test_dot_keeps_lengths_and_lets_zero_in() -> None:
    dot = Limits(dim=DIM, metric="dot")
    request = parse("put_items", {"items": [ITEM, {"media_id": 2, "vector": bytes(2 * DIM)}]}, dot)
    assert isinstance(request, Put)
    np.testing.assert_array_equal(request.vectors, np.array([ONES, [0] * DIM], np.float16))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cosine_neither_overflows_nor_vanishes(scale: float) -> None:
    request = parse("search", {"vector": [scale] * DIM}, LIMITS)
    assert isinstance(request, Search)
    np.testing.assert_allclose(request.vector, 1 / np.sqrt(DIM), rtol=1e-3)


def test_put_brings_columns() -> None:
    items = [{"media_id": 2**64 - 1, "vector": ONES, "classes": [2, 1]}, {**ITEM, "metadata": {"a": 1}}]
    request = parse("put_items", {"items": items, "ack": "quorum", "write_id": "0f" * 16}, LIMITS)
    assert isinstance(request, Put)
    assert (request.kind, request.ids, request.classes) == (Kind.ITEM, (2**64 - 1, 1), ((1, 2), ()))
    assert (request.metadata, request.ack, request.write_id) == (
        (b"\x80", b"\x81\xa1a\x01"),
        "quorum",
        b"\x0f" * 16,
    )


def test_the_other_ops() -> None:
    get = parse("get", {"kind": "user", "ids": [1, 2], "vector": True}, LIMITS)
    assert get == Get(kind=Kind.USER, ids=(1, 2), vector=True, timeout_ms=None, session=())
    batch = parse("batch", {"user_id": 1, "media_ids": [3]}, LIMITS)
    assert batch == Batch(user_id=1, media_ids=(3,), metadata=False, timeout_ms=None, session=())
    delete = parse("delete_users", {"user_ids": [4], "write_id": b"x" * 16}, LIMITS)
    assert delete == Delete(kind=Kind.USER, ids=(4,), ack="primary", write_id=b"x" * 16, timeout_ms=None)


@pytest.mark.parametrize(("op", "fields", "code", "field"), [
    ("recomend", {}, "unknown_op", "op"),
    ("ping", {"x": 1}, "unknown_field", "x"),
    ("recommend", {"user_id": 1, "K": 5}, "unknown_field", "K"),
    ("recommend", {}, "missing_field", "user_id"),
    ("recommend", {"user_id": True}, "bad_type", "user_id"),
    ("recommend", {"user_id": 1.0}, "bad_type", "user_id"),
    ("recommend", {"user_id": "٣"}, "bad_type", "user_id"),
    ("recommend", {"user_id": "0x1"}, "bad_type", "user_id"),
    ("recommend", {"user_id": -1}, "out_of_range", "user_id"),
    ("recommend", {"user_id": 2**64}, "out_of_range", "user_id"),
    ("recommend", {"user_id": 1, "k": 0}, "out_of_range", "k"),
    ("recommend", {"user_id": 1, "k": 10_001}, "out_of_range", "k"),
    ("recommend", {"user_id": 1, "k": True}, "bad_type", "k"),
    ("recommend", {"user_id": 1, "k": 10**40}, "out_of_range", "k"),
    ("recommend", {"user_id": 1, "exclude": [256]}, "out_of_range", "exclude"),
    ("recommend", {"user_id": 1, "exclude": [-1]}, "out_of_range", "exclude"),
    ("recommend", {"user_id": 1, "timeout_ms": 0}, "out_of_range", "timeout_ms"),
    ("recommend", {"user_id": 1, "session": [[1, 2]]}, "bad_type", "session[0]"),
    ("similar", {}, "missing_field", "positive"),
    ("similar", {"media_id": 1, "positive": [2]}, "bad_request", "media_id"),
    ("search", {"vector": ONES[1:]}, "wrong_dimension", "vector"),
    ("search", {"vector": bytes(DIM)}, "wrong_dimension", "vector"),
    ("search", {"vector": bytes(2 * DIM), "dtype": "f4"}, "wrong_dimension", "vector"),
    ("search", {"vector": "abc"}, "bad_type", "vector"),
    ("search", {"vector": [True] * DIM}, "bad_type", "vector"),
    ("search", {"vector": ["\ud800"] * DIM}, "bad_type", "vector"),
    ("batch", {"user_id": 1, "media_ids": ["\ud800"]}, "bad_type", "media_ids[0]"),
    ("search", {"vector": [0] * DIM}, "zero_vector", "vector"),
    ("search", {"vector": [float("nan")] * DIM}, "bad_vector", "vector"),
    ("search", {"vector": [1e39] * DIM}, "bad_vector", "vector"),
    ("search", {"vector": [10**400] * DIM}, "bad_vector", "vector"),
    ("search", {"vector": np.full(DIM, np.inf, "<f2").tobytes()}, "bad_vector", "vector"),
    ("batch", {"user_id": 1, "media_ids": [1] * 1_001}, "too_large", "media_ids"),
    ("get", {"kind": "film", "ids": []}, "out_of_range", "kind"),
    ("put_items", {"items": [ITEM] * 1_001}, "too_large", "items"),
    ("put_items", {"items": [ITEM, {"media_id": 2}]}, "missing_field", "items[1].vector"),
    ("put_items", {"items": [ITEM, {**ITEM, "x": 1}]}, "unknown_field", "items[1].x"),
    ("put_items", {"items": [ITEM, {**ITEM, "vector": [0] * DIM}]}, "zero_vector", "items[1].vector"),
    ("put_items", {"items": [{**ITEM, "classes": list(range(1_025))}]}, "too_large", "items[0].classes"),
    ("put_items", {"items": [{**ITEM, "metadata": {"a": "x" * 70_000}}]}, "too_large", "items[0].metadata"),
    ("put_items", {"items": [{**ITEM, "metadata": {"a": 2**64}}]}, "bad_request", "items[0].metadata"),
    ("put_items", {"items": [{**ITEM, "metadata": {"a": "\ud800"}}]}, "bad_request", "items[0].metadata"),
    ("put_items", {"items": [ITEM], "ack": "most"}, "out_of_range", "ack"),
    ("put_items", {"items": [ITEM], "write_id": bytes(16)}, "out_of_range", "write_id"),
    ("put_items", {"items": [ITEM], "write_id": "zz" * 16}, "bad_type", "write_id"),
    ("put_items", {"items": [ITEM], "write_id": 5}, "bad_type", "write_id"),
])  # fmt: skip
def test_refusals_name_code_and_field(op: str, fields: dict[str, Any], code: str, field: str) -> None:
    assert refused(op, fields) == (code, field)


RECOMMEND = {"user_id": 1}


@pytest.mark.parametrize(("op", "fields", "said"), [
    ("recommend", {"user_id": True}, "user_id must be an id (a whole number or its decimal digits), not a boolean"),
    ("recommend", {**RECOMMEND, "k": "5"}, "k must be a whole number, not a string"),
    ("recommend", {**RECOMMEND, "k": 1.0}, "k must be a whole number, not a floating-point number"),
    ("recommend", {**RECOMMEND, "k": msgpack.Timestamp(1)}, "k must be a whole number, not a value of another kind"),
    ("recommend", {**RECOMMEND, "metadata": 1}, "metadata must be true or false, not a whole number"),
    ("recommend", {**RECOMMEND, "timeout_ms": b"x"}, "timeout_ms must be a number or null, not bytes"),
    ("recommend", {**RECOMMEND, "timeout_ms": 0}, "timeout_ms must be at least 1"),
    ("recommend", {**RECOMMEND, "session": [[1, 2]]}, "session[0] must have 3 entries, not 2"),
    ("recommend", {**RECOMMEND, "session": [[1, 2, 3]] * 1_025}, "session must have at most 1024 entries"),
    ("recommend", {**RECOMMEND, "exclude": {}}, "exclude must be a list, not a map"),
    ("similar", {"media_id": []},
     "media_id must be an id (a whole number or its decimal digits) or null, not a list"),
    ("get", {"kind": "film", "ids": []}, 'kind must be "item" or "user", not \'film\''),
    ("put_items", {"items": [ITEM], "ack": 5}, 'ack must be "primary", "quorum" or "all", not a whole number'),
    ("search", {"vector": ONES, "dtype": "f8"}, 'dtype must be "f2" or "f4", not \'f8\''),
    ("put_items", {"items": [5]}, "items[0] must be a map, not a whole number"),
    ("put_items", {"items": [{**ITEM, "metadata": {1: 2}}]},
     "a key of items[0].metadata must be a string, not a whole number"),
    ("forget_node", {"node": ""}, "node must have at least 1 character"),
])  # fmt: skip
def test_refusals_say_the_field_what_is_expected_and_what_came(
    op: str, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse(op, fields, LIMITS)
    assert caught.value.message == said


@pytest.mark.parametrize(
    "sentence", ["Expected `int`, got `novelty` - at `$.k`", "Something new - at `$.k`", "Novel"]
)
def test_no_sentence_of_the_library_is_sent_on(sentence: str) -> None:
    error = translate(sentence, {})
    assert error.code == "bad_type"
    assert error.field in ("k", None)
    for word in ("`", "novelty", "Something", "Novel"):
        assert word not in error.message


def test_dot_refuses_what_fp16_cannot_hold() -> None:
    assert refused("search", {"vector": [70_000.0] * DIM}, Limits(dim=DIM, metric="dot")) == (
        "bad_vector",
        "vector",
    )


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.binary(max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = [
    "user_id",
    "media_id",
    "k",
    "vector",
    "items",
    "users",
    "ids",
    "kind",
    "positive",
    "session",
    "write_id",
    "metadata",
]


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first draws compile the strategy
@given(st.sampled_from(sorted(OPS)), st.dictionaries(st.sampled_from(NAMES), anything, max_size=5))
def test_nothing_but_a_request_error_comes_out(op: str, fields: dict[str, Any]) -> None:
    try:
        parse(op, fields, LIMITS)
    except RequestError as error:
        error.message.encode()  # what goes back must be sendable
        (error.field or "").encode()


def put(metadata: Any) -> dict[str, Any]:
    return {"items": [{**ITEM, "metadata": metadata}]}


def nested(depth: int, *, lists: bool) -> dict[str, Any]:
    inner: Any = [] if lists else {}
    for _ in range(depth - 2):
        inner = [inner] if lists else {"a": inner}
    return {"a": inner}


@pytest.mark.parametrize("lists", [False, True])
def test_metadata_is_bounded_in_depth(lists: bool) -> None:
    assert isinstance(parse("put_items", put(nested(256, lists=lists)), LIMITS), Put)
    for depth in (257, 800, 5_000):
        assert refused("put_items", put(nested(depth, lists=lists))) == ("bad_request", "items[0].metadata")


def test_metadata_keeps_to_what_every_reader_can_take() -> None:
    first, last = -62_135_596_800, 253_402_300_799
    good = {
        "a": [msgpack.Timestamp(first), msgpack.Timestamp(last, 999_999_999)],
        "b": msgpack.ExtType(5, b""),
    }
    request = parse("put_items", put(good), LIMITS)
    assert isinstance(request, Put)
    for moment in (first, last):
        assert msgpack.Timestamp(moment).to_datetime().year in (1, 9999)
    for bad in (
        msgpack.Timestamp(first - 1),
        msgpack.Timestamp(last + 1),
        msgpack.Timestamp(2**63 - 1),
        float("nan"),
        float("-inf"),
        {b"x": 1},
    ):
        for metadata in ({"a": bad}, {"a": [{"b": [bad]}]}):
            assert refused("put_items", put(metadata)) == ("bad_request", "items[0].metadata")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"action": "dance"}, "out_of_range"),
        ({"action": "join"}, "missing_field"),
        ({"action": "commit", "hash": "short"}, "bad_type"),
        ({"action": "show", "node": "a"}, "bad_request"),
        ({"action": "set", "node": "a"}, "bad_request"),
        ({"action": "set", "node": "a", "replication": 2}, "bad_request"),
        ({"action": "set", "replication": 2, "zone": "z"}, "bad_request"),
        ({"action": "join", "node": "a", "capacity": -1}, "out_of_range"),
        ({"action": "recover", "force": False}, "missing_field"),
    ],
)
def test_what_operators_ask_of_the_layout_is_checked(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse("cluster", fields, LIMITS)
    assert caught.value.code == code


def test_what_operators_may_ask_of_the_layout() -> None:
    assert parse("cluster", {"action": "set", "node": "a", "capacity": 2}, LIMITS).values == {"capacity": 2}  # type: ignore[union-attr]
    assert parse("cluster", {"action": "set", "replication": 2}, LIMITS).values == {"replication": 2}  # type: ignore[union-attr]
    assert parse("cluster", {"action": "recover", "force": True}, LIMITS).force  # type: ignore[union-attr]
