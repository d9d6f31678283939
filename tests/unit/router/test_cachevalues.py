"""Keys and values of L1: what makes two requests one, and that no bytes but ours, for that key, count."""

from __future__ import annotations

import msgpack
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.cachekeys import answer_key, context_hash, media_key, user_key
from router.cachevalues import (
    CachedAnswer,
    CachedUser,
    Origin,
    pack_answer,
    pack_user,
    unpack_answer,
    unpack_user,
)
from router.requests import Limits, Recommend, parse
from router.wire import Columns
from storage.view import ClassConstraint

HASH = context_hash(10, ClassConstraint(), True)
ANSWER = CachedAnswer(
    (3, 17),
    Origin("node-1", 4, 99),
    Columns(np.array([5, 2**64 - 1], np.uint64), np.array([0.5, 0.25], np.float32), [b"\x80", b""]),
    12,
)
USER = CachedUser((3, 17), Origin("node-1", 4, 99), np.arange(4, dtype=np.float16).tobytes())


def _hash(**fields: object) -> str:
    request = parse("recommend", {"user_id": 1, **fields}, Limits(dim=4))
    assert isinstance(request, Recommend)
    return context_hash(request.k, request.constraint, request.metadata)


def test_keys_are_those_of_the_design() -> None:
    assert answer_key(7, "ab") == "rec:v2:7:ab"
    assert (user_key(7), media_key(8)) == ("emb:user:7", "emb:media:8")


def test_order_defaults_and_repeats_do_not_matter_and_everything_else_does() -> None:
    assert _hash() == _hash(k=10, metadata=True, exclude=[]) == _hash(timeout_ms=5, session=[(1, 1, 1)])
    assert _hash(require_any=[3, 1, 3]) == _hash(require_any=[1, 3])
    different = [
        _hash(),
        _hash(k=11),
        _hash(metadata=False),
        _hash(require_any=[1]),
        _hash(require_all=[1]),
        _hash(exclude=[1]),
        _hash(require_all=[1], exclude=[1]),
    ]
    assert len(set(different)) == len(different)


def test_context_counts_whatever_the_order_of_its_keys() -> None:
    def of(context: dict[str, object]) -> str:
        return context_hash(10, ClassConstraint(), True, context)

    one = of({"page": "home", "device": {"kind": "tv", "os": None}})
    assert one == of({"device": {"kind": "tv"}, "page": "home"})
    assert one not in (of({"page": "home"}), of({"page": "home", "device": [["kind", "tv"]]}), HASH)
    assert of({"a": [1, 2]}) != of({"a": [2, 1]})


def test_an_answer_comes_back_and_only_for_its_user_and_context() -> None:
    packed = pack_answer(7, HASH, ANSWER)
    found = unpack_answer(7, HASH, packed)
    assert found is not None
    assert (found.version, found.origin, found.total) == (ANSWER.version, ANSWER.origin, ANSWER.total)
    assert found.columns.ids.tolist() == ANSWER.columns.ids.tolist()
    assert found.columns.scores.tolist() == ANSWER.columns.scores.tolist()
    assert found.columns.metadata == ANSWER.columns.metadata
    assert unpack_answer(8, HASH, packed) is None
    assert unpack_answer(7, _hash(k=11), packed) is None


def test_a_user_comes_back_with_the_fp16_bytes_first() -> None:
    packed = pack_user(7, USER)
    assert packed.startswith(USER.vector)
    assert unpack_user(7, 4, packed) == USER
    assert unpack_user(8, 4, packed) is None
    assert unpack_user(7, 8, packed) is None


@settings(deadline=None)
@given(st.data())
def test_values_that_were_cut_or_changed_are_none(data: st.DataObject) -> None:
    for packed in (pack_answer(7, HASH, ANSWER), pack_user(7, USER)):
        at = data.draw(st.integers(0, len(packed) - 1))
        changed = bytearray(packed)
        changed[at] ^= data.draw(st.integers(1, 255))
        for rubbish in (packed[:at], bytes(changed), packed + b"\x00"):
            assert unpack_answer(7, HASH, rubbish) is None
            assert unpack_user(7, 4, rubbish) is None


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text() | st.none() | st.lists(st.integers()))
def test_foreign_values_are_none(rubbish: object) -> None:
    assert unpack_answer(7, HASH, rubbish) is None
    assert unpack_user(7, 4, rubbish) is None


def test_a_well_formed_frame_around_a_wrong_body_is_none() -> None:
    from xxhash import xxh64_intdigest

    def framed(body: object) -> bytes:
        packed = msgpack.packb(body)
        whole: bytes = msgpack.packb((1, xxh64_intdigest(packed), packed))
        return whole

    good = [7, HASH, 1, (3, 17), ("n", 4, 99), b"\x05" + bytes(7), bytes(4), [b"\x80"], 12]
    assert unpack_answer(7, HASH, framed(good)) is not None
    for place, wrong in [
        (2, 2),  # another generation
        (3, (1,)),
        (3, ("a", 1)),
        (4, (1, 2, 3)),
        (5, bytes(7)),
        (6, bytes(8)),
        (7, []),
        (7, ["x"]),
        (8, 0),
        (8, "x"),
    ]:
        body = list(good)
        body[place] = wrong
        assert unpack_answer(7, HASH, framed(body)) is None, (place, wrong)
    assert unpack_answer(7, HASH, framed({})) is None
    assert unpack_answer(7, HASH, framed(good[:-1])) is None
