"""The HTTP port's description of itself (OpenAPI 3.1), with this node's limits. A test holds a real node against it. Pure."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, get_args

from node.httpapi import CONTEXTS, STATUS
from node.httpwire import HttpCode
from router.errors import Code
from router.requests import PRIORITIES, Limits
from router.wire import JSON_INT_MAX

Schema = dict[str, Any]

U64_MAX = (1 << 64) - 1
# As much as one query string holds anyway.
QUERY_LIST_MAX = 100
_JSON = "application/json"


def document(limits: Limits) -> Schema:
    """Everything that this node's HTTP port takes and gives."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "GMC-O",
            "version": version("gmco"),
            "description": "Media recommendations from embeddings. Any node answers any request. "
            "Writes and pipelines of many requests go over the WebSocket.",
        },
        "paths": {
            "/recommend": _get(
                "recommend", "The best items for a user.", [_user_parameter(), _context(), *_query(limits), _cold_start()],
                "Answer", "unknown_user",
            ),
            "/similar": _get("similar", "Items like the given ones.", [*_examples(), *_query(limits)], "Answer", "unknown_item"),
            "/recommend/batch": _post("batch", "Scores of given items for a user.", "Batch", "Scores", "unknown_user"),
            "/search": _post("search", "The items nearest to a vector.", "Search", "Answer", None),
            "/healthz": _page("healthz", "Whether the process answers at all.", {"status": {"const": "alive"}}),
            "/readyz": _ready(),
            "/metrics": _text_page(),
            "/openapi.json": _page("openapi", "This document.", {"openapi": {"type": "string"}}),
        },
        "components": {"schemas": _schemas(limits)},
    }  # fmt: skip


# ---- Operations ----


def _get(id: str, summary: str, parameters: list[Schema], answer: str, missing: str | None) -> Schema:
    return {
        "get": {
            "operationId": id,
            "summary": summary,
            "parameters": parameters,
            "responses": _responses(answer, missing),
        }
    }


def _post(id: str, summary: str, body: str, answer: str, missing: str | None) -> Schema:
    content = {_JSON: {"schema": _ref(body)}}
    responses = _responses(answer, missing) | {
        str(status): _error(said)
        for status, said in (
            (408, "The body was not there in time."),
            (411, "A body without Content-Length."),
            (415, "A body that is not application/json."),
        )
    }
    return {
        "post": {
            "operationId": id,
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": responses,
        }
    }


def _responses(answer: str, missing: str | None) -> Schema:
    said = {
        400: "Something is wrong with the request; code, message and field say what.",
        403: "A page of this origin may not ask.",
        413: "More than this node takes at once.",
        500: "A bug or damage in this node; its log says what.",
        503: "Not now, or not here: after Retry-After, or on another node.",
        504: "timeout_ms has passed.",
    }
    if missing:
        said[404] = f"`{missing}`: there is no such record."
    found = {str(status): _error(words) for status, words in said.items()}
    found["200"] = {"description": "The answer.", "content": {_JSON: {"schema": _ref(answer)}}}
    found["503"]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    return found


def _error(description: str) -> Schema:
    return {"description": description, "content": {_JSON: {"schema": _ref("Error")}}}


def _page(id: str, summary: str, properties: Schema) -> Schema:
    schema = {"type": "object", "required": list(properties), "properties": properties}
    ok = {"description": "Always.", "content": {_JSON: {"schema": schema}}}
    return {
        "get": {
            "operationId": id,
            "summary": summary,
            "responses": {"200": ok, "403": _error("A page of this origin may not ask.")},
        }
    }


def _ready() -> Schema:
    def state(status: str, reasons: Schema) -> Schema:
        properties = {
            "status": {"const": status},
            "reasons": {"type": "array", "items": {"type": "string"}} | reasons,
        }
        schema = {"type": "object", "required": ["status", "reasons"], "properties": properties}
        return {"description": f"It is {status}.", "content": {_JSON: {"schema": schema}}}

    responses = {
        "200": state("ready", {"maxItems": 0}),
        "503": state("not ready", {"minItems": 1}),
        "403": _error("A page of this origin may not ask."),
    }
    summary = "Whether requests should be sent here: recovered, joined, warm, and not stopping."
    return {"get": {"operationId": "readyz", "summary": summary, "responses": responses}}


def _text_page() -> Schema:
    ok = {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    responses = {"200": ok, "403": _error("A page of this origin may not ask.")}
    return {"get": {"operationId": "metrics", "summary": "For Prometheus.", "responses": responses}}


# ---- Parameters ----


def _parameter(name: str, schema: Schema, said: str, *, required: bool = False, **more: Any) -> Schema:
    return {"name": name, "in": "query", "required": required, "description": said, "schema": schema} | more


def _user_parameter() -> Schema:
    return _parameter("user_id", _u64(), "Whom to recommend to.", required=True, example=4)


def _context() -> Schema:
    said = "Where the answer will be shown. It does not change the answer yet."
    return _parameter("context", {"type": "string", "enum": list(CONTEXTS)}, said)


def _cold_start() -> Schema:
    said = "An answer from the context alone for an unknown user: not there yet, so only false is taken."
    return _parameter("cold_start", {"type": "boolean", "enum": [False], "default": False}, said)


def _examples() -> list[Schema]:
    ids = {"type": "array", "items": _u64(), "maxItems": QUERY_LIST_MAX // 2}
    return [
        _parameter("media_id", _u64(), "The item; instead of positive and negative.", example=1),
        _parameter(
            "positive", ids, "Items to be near; at least one without media_id.", explode=False, style="form"
        ),
        _parameter("negative", ids, "Items to be far from.", explode=False, style="form"),
    ]


def _query(limits: Limits) -> list[Schema]:
    classes = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": limits.class_width - 1},
        "maxItems": QUERY_LIST_MAX,
    }
    lists = {
        "require_all": "Only items that have all of these classes.",
        "require_any": "Only items that have one of these classes.",
        "exclude": "No items that have one of these classes.",
    }
    number = r"[0-9]{1,18}"
    token = f"{number}:{number}:{number}"
    return [
        _parameter("k", _k(limits), "How many."),
        *(_parameter(name, classes, said, explode=False, style="form") for name, said in lists.items()),
        _parameter("metadata", {"type": "boolean", "default": True}, "Whether hits carry their metadata."),
        _parameter(
            "timeout_ms", {"type": "number", "minimum": 1, "maximum": 60_000}, "How long to wait at most."
        ),
        _parameter(
            "session",
            {"type": "string", "pattern": f"^{token}(,{token}){{0,20}}$"},
            "shard:epoch:sequence of writes that the answer must reflect, as their replies gave them.",
        ),
        _parameter("priority", _priority(), "What goes first, where searches wait."),
        _parameter(
            "require_full",
            {"type": "boolean", "default": False},
            "An error (`partial`) instead of an answer that some shards are missing from.",
        ),
    ]


# ---- Schemas ----


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _u64() -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": U64_MAX}


def _k(limits: Limits) -> Schema:
    return {"type": "integer", "minimum": 1, "maximum": limits.k_max, "default": 10}


def _priority() -> Schema:
    return {"type": "string", "enum": list(PRIORITIES), "default": PRIORITIES[0]}


def _schemas(limits: Limits) -> Schema:
    return {
        "Id": _id(),
        "AnsweredId": _answered_id(),
        "Error": _error_schema(),
        "Coverage": _coverage(),
        "Hit": _hit(),
        "Answer": _answer({}),
        "Scores": _answer({"unknown": {"type": "array", "items": _ref("AnsweredId")}}),
        "Batch": _batch(limits),
        "Search": _search(limits),
        "Session": _session(),
    }


def _id() -> Schema:
    return {
        "anyOf": [_u64(), {"type": "string", "pattern": "^[0-9]{1,19}$"}],
        "description": "Unsigned, 64 bits: a whole number (1.0 is none), or its decimal digits as text.",
    }


def _answered_id() -> Schema:
    number = {"type": "integer", "minimum": 0, "maximum": JSON_INT_MAX}
    text = {"type": "string", "pattern": "^[0-9]{16,20}$"}
    return {"anyOf": [number, text], "description": "Text above 2^53 - 1, which JavaScript would round."}


def _error_schema() -> Schema:
    codes = sorted({*get_args(Code), *get_args(HttpCode)})
    properties = {
        "code": {"type": "string", "enum": codes, "description": "Stable; for programs."},
        "message": {"type": "string", "description": "One sentence for a person: what to do."},
        "field": {"type": "string", "description": "The path of what is wrong."},
        "retry_after_ms": {"type": "integer", "minimum": 0},
    }
    error = {"type": "object", "required": ["code", "message"], "properties": properties}
    example = {"error": {"code": "unknown_user", "message": "there is no user 5", "field": "user_id"}}
    assert STATUS["unknown_user"] == 404
    return {"type": "object", "required": ["error"], "properties": {"error": error}, "examples": [example]}


def _coverage() -> Schema:
    count = {"type": "integer", "minimum": 0}
    return {
        "type": "object",
        "required": ["answered", "total", "missing"],
        "properties": {
            "answered": count,
            "total": count,
            "missing": {
                "type": "array",
                "items": count,
                "description": "Shards that nobody could answer for.",
            },
            "reason": {"type": "string", "description": "The code that told of the first missing shard."},
        },
    }


def _hit() -> Schema:
    return {
        "type": "object",
        "required": ["media_id", "score"],
        "properties": {
            "media_id": _ref("AnsweredId"),
            "score": {"type": "number"},
            "metadata": {
                "type": ["object", "string"],
                "description": "Text: base64 of what JSON cannot spell.",
            },
        },
    }


def _answer(more: Schema) -> Schema:
    return {
        "type": "object",
        "required": ["ok", "hits", "coverage", *more],
        "properties": {
            "ok": {"const": True},
            "hits": {"type": "array", "items": _ref("Hit"), "description": "Best first."},
            "coverage": _ref("Coverage"),
            "stale_ms": {"type": "integer", "minimum": 0},
        }
        | more,
        "examples": [
            {
                "ok": True,
                "hits": [{"media_id": 1, "score": 0.93, "metadata": {"title": "Toy Story"}}],
                "coverage": {"answered": 12, "total": 12, "missing": []},
            }
            | {name: [] for name in more}
        ],
    }


def _session() -> Schema:
    natural = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}
    token = {"type": "array", "prefixItems": [natural] * 3, "items": False, "minItems": 3, "maxItems": 3}
    return {"type": "array", "items": token, "maxItems": 1_024}


def _read_properties(metadata: bool) -> Schema:
    return {
        "metadata": {"type": "boolean", "default": metadata},
        "timeout_ms": {"type": ["number", "null"], "minimum": 1, "maximum": 60_000},
        "session": _ref("Session"),
        "priority": _priority(),
        "require_full": {"type": "boolean", "default": False},
    }


def _batch(limits: Limits) -> Schema:
    ids = {"type": "array", "items": _ref("Id"), "maxItems": limits.items_max}
    properties = {"user_id": _ref("Id"), "media_ids": ids} | _read_properties(metadata=False)
    return {
        "type": "object",
        "required": ["user_id", "media_ids"],
        "properties": properties,
        "additionalProperties": False,
        "examples": [{"user_id": 4, "media_ids": [1, 2, 3]}],
    }


def _search(limits: Limits) -> Schema:
    classes = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": limits.class_width - 1},
        "maxItems": 1_024,
    }
    vector = {
        "type": "array",
        "items": {"type": "number"},
        "minItems": limits.dim,
        "maxItems": limits.dim,
        "description": "Not all zeros with the metric cosine; within FP16 with dot.",
    }
    properties = {
        "vector": vector,
        "dtype": {"type": ["string", "null"], "enum": ["f2", "f4", None]},
        "k": _k(limits),
        "require_all": classes,
        "require_any": classes,
        "exclude": classes,
    }
    return {
        "type": "object",
        "required": ["vector"],
        "properties": properties | _read_properties(metadata=True),
        "additionalProperties": False,
        "examples": [{"vector": [1.0] * limits.dim, "k": 10}] if limits.dim <= 16 else [],
    }
