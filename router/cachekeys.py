"""What cached values are called (docs/caching.md). Pure.

A key names everything that the answer depends on, and nothing else: two requests that must be answered alike have one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import msgpack
from xxhash import xxh3_128_hexdigest

from storage.view import ClassConstraint

ANSWER_TTL_S = 300.0
USER_TTL_S = 3_600.0
MEDIA_TTL_S = 86_400.0
# There is one embedding model so far.
GENERATION = 1
NO_CONTEXT: Mapping[str, Any] = MappingProxyType({})


def context_hash(
    k: int, constraint: ClassConstraint, metadata: bool, context: Mapping[str, Any] = NO_CONTEXT
) -> str:
    """32 hex digits over what the answer depends on beside the user.

    `context`: what a request says of the moment, msgpack's types with string keys; the order of its keys does not matter, and a
    key with None is one that is absent. Raises TypeError or ValueError for what msgpack cannot pack.
    """
    if not context:
        return _plain(k, constraint, metadata)
    return _hash(k, constraint, metadata, context)


# Apps ask in few ways, and often.
@lru_cache(maxsize=1_024)
def _plain(k: int, constraint: ClassConstraint, metadata: bool) -> str:
    return _hash(k, constraint, metadata, NO_CONTEXT)


def _hash(k: int, constraint: ClassConstraint, metadata: bool, context: Mapping[str, Any]) -> str:
    fields = {
        "k": k,
        "all": sorted(set(constraint.require_all)),
        "any": sorted(set(constraint.require_any)),
        "not": sorted(set(constraint.exclude)),
        "metadata": metadata,
        "context": _sorted(context),
    }
    return xxh3_128_hexdigest(msgpack.packb(sorted(fields.items())))


def _sorted(value: Any) -> Any:
    """Maps as sorted pairs, however deep, without what is None."""
    if isinstance(value, Mapping):
        pairs = [(key, _sorted(one)) for key, one in value.items() if one is not None]
        # A map and a list of pairs that looks like it are two things.
        return {"map": sorted(pairs, key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple):
        return [_sorted(one) for one in value]
    return value


def answer_key(user_id: int, context: str) -> str:
    return f"rec:v2:{user_id}:{context}"


def user_key(user_id: int) -> str:
    return f"emb:user:{user_id}"


def media_key(media_id: int) -> str:
    return f"emb:media:{media_id}"
