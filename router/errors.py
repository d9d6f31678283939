"""What an app may be told went wrong: one class, and the stable codes (their meaning: docs/protocol.md)."""

from __future__ import annotations

from typing import Literal, cast, get_args

Code = Literal[
    "bad_frame",
    "bad_request",
    "unknown_op",
    "unknown_field",
    "missing_field",
    "bad_type",
    "out_of_range",
    "bad_vector",
    "wrong_dimension",
    "zero_vector",
    "too_large",
    "unknown_user",
    "unknown_item",
    "unknown_node",
    "refused",
    "unknown_plan",
    "stale_plan",
    "no_majority",
    "overloaded",
    "indexing",
    "disk_full",
    "replica_stopped",
    "no_lease",
    "no_primary",
    "no_successor",
    "ack_timeout",
    "outcome_unknown",
    "deadline_exceeded",
    "session_behind",
    "partial",
    "unavailable",
    "shutting_down",
    "damaged",
    "internal",
]
CODES: frozenset[str] = frozenset(get_args(Code))


def known(code: str) -> Code:
    """A code that came from another node as one of ours; a newer node may send one that we do not know."""
    return cast(Code, code) if code in CODES else "internal"


class RequestError(Exception):
    """A refusal. `message` says what to do; `field` is the path of what is wrong: `items[3].vector`."""

    def __init__(
        self, code: Code, message: str, field: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(code, message, field, retry_after_ms)
        self.code: Code = code
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" (field {self.field})" if self.field else "")

    def as_dict(self) -> dict[str, object]:
        """The `error` of a reply."""
        error: dict[str, object] = {"code": self.code, "message": self.message}
        if self.field is not None:
            error["field"] = self.field
        if self.retry_after_ms is not None:
            error["retry_after_ms"] = self.retry_after_ms
        return error
