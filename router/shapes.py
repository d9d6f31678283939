"""The fields of each op as they arrive. msgspec checks names and types; what depends on Limits is checked by
`router.requests`. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from router.errors import RequestError
from router.layout import REPLICATION_MAX
from router.sentences import translate
from router.vectors import Dtype
from storage.records import CLASSES_MAX

Ack = Literal["primary", "quorum", "all"]
Priority = Literal["interactive", "batch", "prefetch"]
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
    priority: Priority = "interactive"
    require_full: bool = False


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


class FailOverFields(Struct, forbid_unknown_fields=True, kw_only=True):
    shard: Annotated[int, Meta(ge=0, lt=65_536)]
    to: Annotated[str, Meta(max_length=64)] = ""
    force: bool = False
    confirmed: bool = False
    timeout_ms: Timeout = None


class RepairFields(Struct, forbid_unknown_fields=True, kw_only=True):
    shard: Annotated[int, Meta(ge=0, lt=65_536)]
    timeout_ms: Timeout = None


Place = Annotated[str, Meta(max_length=64)] | None


class ClusterFields(Struct, forbid_unknown_fields=True, kw_only=True):
    action: Literal["show", "join", "leave", "set", "plan", "commit", "revert", "init", "recover"]
    node: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    region: Place = None
    zone: Place = None
    host: Place = None
    capacity: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    replication: Annotated[int, Meta(ge=1, le=REPLICATION_MAX)] | None = None
    members: (
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=4_096)] | None
    ) = None
    hash: Annotated[str, Meta(min_length=16, max_length=16)] | None = None
    force: bool = False
    timeout_ms: Timeout = None


NodeName = Annotated[str, Meta(min_length=1, max_length=64)]


class MovesFields(Struct, forbid_unknown_fields=True, kw_only=True):
    action: Literal["list", "move", "cancel", "drain", "rebalance"]
    shard: Annotated[int, Meta(ge=0, lt=65_536)] | None = None
    source: NodeName | None = None
    target: NodeName | None = None
    bytes_per_s: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None
    node: NodeName | None = None
    dry_run: bool | None = None
    timeout_ms: Timeout = None


class MaintenanceFields(Struct, forbid_unknown_fields=True, kw_only=True):
    node: NodeName
    on: bool
    timeout_ms: Timeout = None


def convert(fields: dict[str, Any], shape: type[S]) -> S:
    """`fields` as `shape`. Raises RequestError with the path of what is wrong."""
    try:
        return msgspec.convert(fields, shape)
    except msgspec.ValidationError as error:
        raise translate(str(error), _choices(shape)) from None
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no name or word of ours has
        raise RequestError("bad_request", "a name or a value has half a surrogate pair") from None
    except RecursionError:
        raise RequestError("bad_request", "the request is nested too deep") from None


def _choices(shape: type) -> dict[str, tuple[str, ...]]:
    """The words that each field takes that takes one of several, by name."""
    found = {}
    for name, hint in get_type_hints(shape).items():
        for part in (hint, *get_args(hint)):  # dtype is a Literal or None
            if get_origin(part) is Literal:
                found[name] = get_args(part)
    return found
