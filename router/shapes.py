"""The fields of each op as they arrive. msgspec checks names and types; what depends on Limits is checked by
`router.requests`. Pure.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from router.errors import Code, RequestError
from router.vectors import Dtype
from storage.records import CLASSES_MAX

Ack = Literal["primary", "quorum", "all"]
S = TypeVar("S")

Id = Annotated[int, Meta(ge=0)] | str
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Timeout = Annotated[float, Meta(ge=1, le=60_000)] | None
WireSession = Annotated[list[tuple[Natural, Natural, Natural]], Meta(max_length=1_024)]
Classes = Annotated[list[int], Meta(max_length=CLASSES_MAX)]


class NothingFields(Struct, forbid_unknown_fields=True):
    pass


class ReadFields(Struct, forbid_unknown_fields=True, kw_only=True):
    metadata: bool = True
    timeout_ms: Timeout = None
    session: WireSession = []


class QueryFields(ReadFields, forbid_unknown_fields=True, kw_only=True):
    k: int = 10
    require_all: Classes = []
    require_any: Classes = []
    exclude: Classes = []


class RecommendFields(QueryFields, forbid_unknown_fields=True, kw_only=True):
    user_id: Id


class SimilarFields(QueryFields, forbid_unknown_fields=True, kw_only=True):
    media_id: Id | None = None
    positive: list[Id] = []
    negative: list[Id] = []


class SearchFields(QueryFields, forbid_unknown_fields=True, kw_only=True):
    vector: Any
    dtype: Dtype | None = None


class BatchFields(ReadFields, forbid_unknown_fields=True, kw_only=True):
    user_id: Id
    media_ids: list[Id]
    metadata: bool = False


class GetFields(Struct, forbid_unknown_fields=True, kw_only=True):
    kind: Literal["item", "user"]
    ids: list[Id]
    vector: bool = False
    timeout_ms: Timeout = None
    session: WireSession = []


class WriteFields(Struct, forbid_unknown_fields=True, kw_only=True):
    ack: Ack = "primary"
    write_id: Any = None  # bytes or hex: msgspec has no union of the two
    timeout_ms: Timeout = None


class ItemFields(Struct, forbid_unknown_fields=True, kw_only=True):
    media_id: Id
    vector: Any
    classes: Classes = []
    metadata: dict[str, Any] = {}


class UserFields(Struct, forbid_unknown_fields=True, kw_only=True):
    user_id: Id
    vector: Any
    classes: Classes = []
    metadata: dict[str, Any] = {}


class PutItemsFields(WriteFields, forbid_unknown_fields=True, kw_only=True):
    items: list[ItemFields]
    dtype: Dtype | None = None


class PutUsersFields(WriteFields, forbid_unknown_fields=True, kw_only=True):
    users: list[UserFields]
    dtype: Dtype | None = None


class DeleteItemsFields(WriteFields, forbid_unknown_fields=True, kw_only=True):
    media_ids: list[Id]


class DeleteUsersFields(WriteFields, forbid_unknown_fields=True, kw_only=True):
    user_ids: list[Id]


class EventsFields(Struct, forbid_unknown_fields=True, kw_only=True):
    after: Natural = 0
    wait_ms: Annotated[float, Meta(ge=0, le=60_000)] = 0


class ForgetNodeFields(Struct, forbid_unknown_fields=True, kw_only=True):
    node: Annotated[str, Meta(min_length=1, max_length=64)]


class KeyringFields(Struct, forbid_unknown_fields=True, kw_only=True):
    action: Literal["list", "install", "use", "remove"]
    key: Any = None  # bytes or hex
    fingerprint: Annotated[str, Meta(max_length=64)] | None = None
    timeout_ms: Timeout = None


Place = Annotated[str, Meta(max_length=64)] | None


class ClusterFields(Struct, forbid_unknown_fields=True, kw_only=True):
    action: Literal["show", "join", "leave", "set", "plan", "commit", "revert", "init", "recover"]
    node: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    region: Place = None
    zone: Place = None
    host: Place = None
    capacity: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    replication: Annotated[int, Meta(ge=1, le=7)] | None = None
    members: (
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=4_096)] | None
    ) = None
    hash: Annotated[str, Meta(min_length=16, max_length=16)] | None = None
    force: bool = False
    timeout_ms: Timeout = None


# ---- msgspec's sentences, as our codes ----

_SENTENCE = re.compile(r"(?P<what>.*?)(?: - at `(?:key` in `)?\$?\.?(?P<path>[^`]*)`)?$", re.DOTALL)
_QUOTED = re.compile(r"field `([^`]*)`")


def convert(fields: dict[str, Any], shape: type[S]) -> S:
    """`fields` as `shape`. Raises RequestError with the path of what is wrong."""
    try:
        return msgspec.convert(fields, shape)
    except msgspec.ValidationError as error:
        raise _translate(str(error)) from None
    except RecursionError:
        raise RequestError("bad_request", "the request is nested too deep") from None


def _translate(sentence: str) -> RequestError:
    match = _SENTENCE.fullmatch(sentence)
    assert match is not None, "every part of the pattern is optional"
    what, path = match["what"], _printable(match["path"] or "")
    quoted = _QUOTED.search(what)
    if quoted and what.startswith(("Object contains unknown", "Object missing")):
        name = _printable(quoted[1])
        field = f"{path}.{name}" if path else name
        if "unknown" in what:
            return RequestError("unknown_field", f"this op has no field {name!a}; remove it", field)
        return RequestError("missing_field", f"send {name}", field)
    code: Code = "bad_type"
    if "of length" in what:
        code = "too_large" if "<=" in what else "bad_type"
    elif "<=" in what or ">=" in what or "out of range" in what or what.startswith("Invalid enum"):
        code = "out_of_range"
    return RequestError(code, _printable(what[:1].lower() + what[1:]), path or None)


def _printable(text: str) -> str:
    """Safe to send back: bounded, and without what UTF-8 cannot hold."""
    return text[:200].encode("ascii", "backslashreplace").decode("ascii")
