"""Frames of apps: bytes or text in, request maps out, and replies back. Pure.

Binary frames are msgpack, text frames JSON, with the same fields. Whatever arrives, `decode_frame`
answers with requests and refusals and raises nothing: a frame that cannot be read at all is one refusal
without an id.
"""

from __future__ import annotations

import base64
import json as stdlib_json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt

from router.errors import RequestError
from router.requests import Limits

JSON_INT_MAX = (1 << 53) - 1  # above it JavaScript rounds
ID_CHARS_MAX = 128
# No list or map that we accept is longer; a header that claims more is refused before memory is set aside.
LENGTH_MAX = 1 << 16

RequestId = int | str | None
Reply = dict[str, Any]


class Refused(NamedTuple):
    """A request that could not be read. `id` is None when that was what could not be read."""

    id: RequestId
    error: RequestError


class Columns(NamedTuple):
    """Hits as columns. ids: uint64 [n], scores: float32 [n]; metadata: n packed maps, b"" for none."""

    ids: npt.NDArray[np.uint64]
    scores: npt.NDArray[np.float32]
    metadata: list[bytes] | None


class Kept(dict[str, Any]):
    """A reply's fields, `ok` included and `id` not, that will be sent many times: each wire form is made once, when first needed.

    Not to be changed. `size`: bytes of the columns. `grew`: told of each form's bytes; set by whoever keeps count.
    """

    __slots__ = ("_json", "_msgpack", "grew", "size")

    def __init__(self, fields: Reply) -> None:
        super().__init__(fields, ok=True)
        self._json = self._msgpack = b""
        self.grew: Callable[[int], None] | None = None
        hits = fields["hits"]
        self.size = 12 * len(hits.ids) + sum(len(one) + 40 for one in hits.metadata or ())

    def part(self, id: RequestId, json: bool) -> bytes:
        """What `encode_reply` would make of these fields and that id."""
        if json:
            return b'{"id":' + _JSON.encode(id) + b"," + self.body()[1:]
        if not self._msgpack:
            # The header counts the id, too; fewer than 15 fields make it one byte.
            self._msgpack = encode_reply(dict(self), json)[1:]
            self._tell(self._msgpack)
        header: bytes = _PACKER.pack_map_header(len(self) + 1)
        packed_id: bytes = _PACKER.pack(id)
        return header + b"\xa2id" + packed_id + self._msgpack

    def body(self) -> bytes:
        """What `encode_reply` would make of these fields in JSON, without an id: an answer over HTTP."""
        if not self._json:
            self._json = encode_reply(dict(self), json=True)
            self._tell(self._json)
        return self._json

    def _tell(self, made: bytes) -> None:
        if self.grew is not None:
            self.grew(len(made))


class _RepeatedKeyError(ValueError):
    pass


def decode_frame(data: bytes | str, limits: Limits) -> list[dict[str, Any] | Refused]:
    """The frame's requests in order: maps with a usable `id` and a string `op`, or why not. Never raises."""
    if len(data) > limits.frame_bytes_max:
        return [
            Refused(None, RequestError("too_large", f"a frame is at most {limits.frame_bytes_max} bytes"))
        ]
    try:
        frame = decode_json(data) if isinstance(data, str) else _decode_msgpack(data)
    except RequestError as error:
        return [Refused(None, error)]
    if isinstance(frame, dict):
        return [_checked(frame)]
    if not isinstance(frame, list):
        return [Refused(None, RequestError("bad_frame", "send a request map, or an array of request maps"))]
    if len(frame) > limits.frame_requests_max:
        message = f"send at most {limits.frame_requests_max} requests in a frame"
        return [Refused(None, RequestError("too_large", message))]
    return [_checked(one) for one in frame]


def _decode_msgpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(
            data, object_pairs_hook=_map, max_array_len=LENGTH_MAX, max_map_len=LENGTH_MAX, max_ext_len=64
        )
    except _RepeatedKeyError as error:
        raise RequestError("bad_frame", str(error)) from None
    except msgpack.StackError:
        raise RequestError("bad_frame", "the frame is nested too deep") from None
    except msgpack.ExtraData:
        raise RequestError(
            "bad_frame", "there are bytes after the first msgpack value of the frame"
        ) from None
    except (ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        # msgpack's own errors are ValueErrors; their text may quote the frame, so only ours is passed on
        reason = str(error) if type(error) is ValueError else ""
        message = "the frame is not whole, valid msgpack" + (f": {printable(reason)}" if reason else "")
        raise RequestError("bad_frame", message) from None


def decode_json(data: str) -> Any:
    """A JSON value as apps may send it: no key twice, no NaN. Raises RequestError `bad_frame`."""
    try:
        return stdlib_json.loads(data, object_pairs_hook=_map, parse_constant=_no_constant)
    except _RepeatedKeyError as error:
        raise RequestError("bad_frame", str(error)) from None
    except RecursionError:
        raise RequestError("bad_frame", "the frame is nested too deep") from None
    except (ValueError, MemoryError) as error:  # also: a number of thousands of digits
        raise RequestError("bad_frame", f"the frame is not valid JSON: {printable(str(error))}") from None


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKeyError("a map has a key twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def printable(text: str) -> str:
    """Safe to send back: bounded, and without what UTF-8 cannot hold."""
    return text[:200].encode("ascii", "backslashreplace").decode("ascii")


def _checked(one: Any) -> dict[str, Any] | Refused:
    if type(one) is not dict:
        return Refused(None, RequestError("bad_frame", "a request is a map"))
    if "id" not in one:
        return Refused(None, RequestError("bad_request", "give each request an id", "id"))
    id = one["id"]
    if type(id) is int:
        if not -(1 << 63) <= id < 1 << 64:
            return Refused(None, RequestError("bad_request", "an integer id has at most 64 bits", "id"))
    elif type(id) is not str or len(id) > ID_CHARS_MAX or not _encodable(id):
        message = f"an id is an integer or a string of at most {ID_CHARS_MAX} characters"
        return Refused(None, RequestError("bad_request", message, "id"))
    op = one.get("op")
    if type(op) is not str:
        if op is None:
            return Refused(id, RequestError("bad_request", "say which op", "op"))
        return Refused(id, RequestError("bad_type", "op is a string", "op"))
    return one


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no reply could carry it back
        return False
    return True


# ---- Replies ----


def error_reply(id: RequestId, error: RequestError) -> Reply:
    return {"id": id, "error": error.as_dict()}


def encode_reply(reply: Reply, json: bool) -> bytes:
    """One reply map. Raises TypeError, ValueError or OverflowError for what cannot be sent: our own bug."""
    if json:
        try:
            return _JSON.encode(_for_json(reply, unpack_metadata))
        except (TypeError, ValueError, OverflowError, RecursionError):
            return _JSON.encode(_for_json(reply, _any_metadata))  # raises again if it was not the metadata
    packed: bytes = _PACKER.pack(reply)
    return packed


def join(parts: Sequence[bytes], json: bool) -> bytes | str:
    """One frame of encoded replies: the map itself, or an array when there are several."""
    if json:
        return (parts[0] if len(parts) == 1 else b"[" + b",".join(parts) + b"]").decode()
    return parts[0] if len(parts) == 1 else _PACKER.pack_array_header(len(parts)) + b"".join(parts)


def encode_replies(replies: Sequence[Reply], json: bool) -> bytes | str:
    """One frame: str for JSON, bytes for msgpack."""
    return join([encode_reply(reply, json) for reply in replies], json)


def _pack_columns(value: Any) -> Any:
    # Columns is a tuple, so strict_types below is what brings it here
    if type(value) is Columns:
        columns: dict[str, Any] = {
            "media_ids": np.ascontiguousarray(value.ids, "<u8").tobytes(),
            "scores": np.ascontiguousarray(value.scores, "<f4").tobytes(),
        }
        if value.metadata is not None:
            columns["metadata"] = value.metadata
        return columns
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.generic | int | str | float):  # numpy scalars, enums
        return value.item() if isinstance(value, np.generic) else _plain(value)
    raise TypeError(f"a reply cannot hold {type(value).__name__}")


def _plain(value: int | str | float) -> int | str | float:
    for base in (int, str, float):
        if isinstance(value, base):
            return base(value)
    raise AssertionError("the types above are all there are")


def _encode_rest(value: Any) -> Any:
    """What msgspec cannot write by itself: numpy scalars, and msgpack values met in metadata."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, msgpack.Timestamp):
        try:
            return value.to_datetime()
        except (ValueError, OverflowError):  # a year that RFC 3339 cannot spell
            return [-1, value.to_bytes()]
    raise TypeError(f"a reply cannot hold {type(value).__name__}")


_PACKER = msgpack.Packer(default=_pack_columns, strict_types=True)
_JSON = msgspec.json.Encoder(enc_hook=_encode_rest)


def _for_json(reply: Reply, metadata: Callable[[bytes], Any]) -> Reply:
    if reply.keys() <= {"id", "ok", "error"}:
        return reply
    out = dict(reply)
    hits = out.get("hits")
    if type(hits) is Columns:
        out["hits"] = _hits(hits, metadata)
    if "records" in out:
        out["records"] = [None if r is None else _record(r, metadata) for r in out["records"]]
    if "unknown" in out:
        out["unknown"] = [_json_id(id) for id in out["unknown"]]
    if isinstance(out.get("write_id"), bytes):
        out["write_id"] = out["write_id"].hex()
    return out


def _hits(hits: Columns, metadata: Callable[[bytes], Any]) -> list[dict[str, Any]]:
    pairs = zip(hits.ids.tolist(), hits.scores.tolist(), strict=True)
    if hits.metadata is None:
        return [{"media_id": _json_id(id), "score": score} for id, score in pairs]
    return [
        {"media_id": _json_id(id), "score": score, "metadata": metadata(packed)}
        for (id, score), packed in zip(pairs, hits.metadata, strict=True)
    ]


def _record(record: dict[str, Any], metadata: Callable[[bytes], Any]) -> dict[str, Any]:
    out = dict(record)
    out["id"] = _json_id(out["id"])
    if isinstance(out.get("metadata"), bytes):
        out["metadata"] = metadata(out["metadata"])
    if isinstance(out.get("vector"), bytes):
        out["vector"] = np.frombuffer(out["vector"], "<f2").tolist()
    return out


def _json_id(id: int) -> int | str:
    return id if id <= JSON_INT_MAX else str(id)


def _any_metadata(packed: bytes) -> msgspec.Raw:
    """Stored metadata as JSON: base64 of its bytes where it is no map that JSON can spell."""
    try:
        return msgspec.Raw(_JSON.encode(unpack_metadata(packed)))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return msgspec.Raw(_JSON.encode(base64.b64encode(packed).decode()))


def unpack_metadata(packed: bytes) -> dict[str, Any]:
    """A record's metadata as a map; {} for b"". Raises ValueError, among others, for bytes that `parse` did not pack."""
    if not packed:
        return {}
    found: dict[str, Any] = msgpack.unpackb(packed, strict_map_key=False)
    return found
