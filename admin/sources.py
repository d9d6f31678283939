"""Files that `gmco load` reads: Parquet, npy with ids, and JSON lines, as one stream of rows.

A row that cannot be used comes out as a `BadRow` with its number and the reason; whether that stops the load is
the loader's business. Row numbers count from 0 over the whole file, bad rows too, so a resumed load finds its
place; people are told places, which count from 1: `row 1` of a table, `line 1` of a file of lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_128

Kind = Literal["items", "users"]
Unit = Literal["row", "line"]
ID_FIELD: Mapping[str, str] = {"items": "media_id", "users": "user_id"}
ID_MAX = (1 << 64) - 1
PARQUET_ROWS = 1024  # per read: 2 MiB of FP16 vectors at 1024 dims
DIGEST_BYTES = 1 << 20


class SourceError(ValueError):
    """The file as a whole cannot be loaded. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record to write. `vector`: float16 or float32 [dim]."""

    number: int
    id: int
    vector: npt.NDArray[np.floating[Any]]
    classes: tuple[int, ...]
    metadata: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be written, and why."""

    number: int
    reason: str

    @property
    def place(self) -> int:
        """As people and editors count."""
        return self.number + 1


class Source(Protocol):
    """A file with a known number of rows (None where counting means reading it all)."""

    @property
    def unit(self) -> Unit: ...

    @property
    def rows(self) -> int | None: ...

    @property
    def digest(self) -> str: ...

    def read(self, start: int) -> Iterator[Row | BadRow]:
        """Rows from number `start` on, bad ones in their places."""
        ...


def open_source(path: Path, kind: Kind, ids: Path | None = None) -> Source:
    """The reader for the file's suffix. Raises SourceError."""
    for file in (path, ids):
        if file is not None and not file.is_file():
            raise SourceError(f"{file}: no such file")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        if ids is None:
            raise SourceError(f"{path}: vectors without ids; give --ids ids.npy")
        return NpySource(path, ids)
    if ids is not None:
        raise SourceError("--ids goes with a .npy file only")
    if suffix in (".parquet", ".pq"):
        return ParquetSource(path, kind)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return JsonLinesSource(path, kind)
    raise SourceError(f"{path}: unknown format; give .parquet, .npy with --ids, or .jsonl")


def file_digest(*paths: Path) -> str:
    """A fingerprint of whole files, 32 hex digits: the same contents give the same write_ids."""
    state = xxh3_128()
    for path in paths:
        state.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while block := file.read(DIGEST_BYTES):
                state.update(block)
    return str(state.hexdigest())


def check_id(value: object) -> int:
    """The value as an id. Raises ValueError with the reason."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"id must be an unsigned integer, is {value!r}")  # noqa: TRY004  # bad data, not a bad call
    if not 0 <= value <= ID_MAX:
        raise ValueError(f"id must be 0 … 2^64-1, is {value}")
    return int(value)


def check_vector(value: object) -> npt.NDArray[np.floating[Any]]:
    """The value as finite float16 or float32 [dim]. Bytes are FP16, little endian. Raises ValueError."""
    if value is None:
        raise ValueError("no vector")
    if isinstance(value, bytes | memoryview):
        if len(value) % 2:
            raise ValueError(f"vector of {len(value)} bytes is not FP16")
        vector: npt.NDArray[np.floating[Any]] = np.frombuffer(value, dtype="<f2")
    else:
        try:
            vector = np.asarray(value)
            if vector.dtype != np.float16:
                vector = vector.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError("vector is not a list of numbers") from error
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError("vector must be a flat list of numbers, at least one")
    if not np.isfinite(vector).all():
        raise ValueError("vector holds NaN or infinity")
    if not vector.any():
        raise ValueError("vector is all zeros")
    return vector


def check_classes(value: object) -> tuple[int, ...]:
    """The value as ascending class ids without repeats. Raises ValueError."""
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise ValueError("classes must be a list of integers")  # noqa: TRY004  # bad data, not a bad call
    if any(isinstance(one, bool) or not isinstance(one, int | np.integer) or one < 0 for one in value):
        raise ValueError("classes must be integers from 0")
    return tuple(sorted({int(one) for one in value}))


def make_row(number: int, fields: Mapping[str, Any], id_field: str) -> Row | BadRow:
    """One record from a map: id, vector, classes, `metadata`; every other field joins the metadata."""
    if id_field not in fields:
        return BadRow(number, f"no {id_field}")
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        return BadRow(number, "metadata must be an object")
    try:
        known = {id_field, "vector", "classes", "metadata"}
        rest = {name: value for name, value in fields.items() if name not in known and value is not None}
        return Row(
            number,
            check_id(fields[id_field]),
            check_vector(fields.get("vector")),
            check_classes(fields.get("classes")),
            {**metadata, **rest},
        )
    except ValueError as error:
        return BadRow(number, str(error))


class ParquetSource:
    """Columns `media_id` or `user_id`, `vector` (list, fixed-size list, binary), `classes`; others: metadata."""

    unit: Unit = "row"

    def __init__(self, path: Path, kind: Kind) -> None:
        """Opens the file and checks its columns. Raises SourceError."""
        self._path = path
        self._id_field = ID_FIELD[kind]
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path}: not a Parquet file that can be read: {error}") from error
        names = set(self._file.schema_arrow.names)
        missing = {self._id_field, "vector"} - names
        if missing:
            raise SourceError(
                f"{path}: no column {', '.join(sorted(missing))}; there are {', '.join(sorted(names))}"
            )
        self.rows: int | None = self._file.metadata.num_rows
        self.digest = file_digest(path)

    def read(self, start: int) -> Iterator[Row | BadRow]:
        """Rows from `start` on; whole row groups before it are not read."""
        number = 0
        groups: list[int] = []
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if not groups and number + rows <= start:
                number += rows
            else:
                groups.append(group)
        for batch in self._file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups):
            if number + batch.num_rows > start:
                yield from self._rows(batch, number, start)
            number += batch.num_rows

    def _rows(self, batch: pa.RecordBatch, first: int, start: int) -> Iterator[Row | BadRow]:
        """Vectors come as views of Arrow's memory: a Python list of a thousand floats per row would cost ms."""
        column = batch.column("vector")
        numeric = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        numeric = numeric or pa.types.is_fixed_size_list(column.type)
        rest = batch.drop_columns(["vector"]).to_pylist()
        for place in range(max(start - first, 0), batch.num_rows):
            value: Any = column[place]
            if not value.is_valid:
                value = None
            elif numeric:
                value = value.values.to_numpy(zero_copy_only=False)
            else:
                value = value.as_py()
            yield make_row(first + place, {**rest[place], "vector": value}, self._id_field)


class NpySource:
    """`vectors.npy` [rows, dim] and `ids.npy` [rows], both memory-mapped."""

    unit: Unit = "row"

    def __init__(self, path: Path, ids: Path) -> None:
        """Opens both and checks that they fit. Raises SourceError."""
        try:
            self._vectors = np.load(path, mmap_mode="r", allow_pickle=False)
            self._ids = np.load(ids, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise SourceError(f"{path}: not an npy file that can be read: {error}") from error
        if self._vectors.ndim != 2 or self._vectors.dtype.kind != "f":
            raise SourceError(
                f"{path}: must be floats [rows, dim], is {self._vectors.dtype} {self._vectors.shape}"
            )
        if self._ids.ndim != 1 or self._ids.dtype.kind not in "iu":
            raise SourceError(f"{ids}: must be integers [rows], is {self._ids.dtype} {self._ids.shape}")
        if len(self._ids) != len(self._vectors):
            raise SourceError(f"{len(self._vectors)} vectors but {len(self._ids)} ids")
        self.rows: int | None = len(self._ids)
        self.digest = file_digest(path, ids)

    def read(self, start: int) -> Iterator[Row | BadRow]:
        """Rows from `start` on; there are no classes and no metadata."""
        for number in range(start, len(self._ids)):
            fields = {"id": self._ids[number], "vector": np.array(self._vectors[number])}
            yield make_row(number, fields, "id")


class JsonLinesSource:
    """One JSON object per line; empty lines count as nothing but keep their number."""

    unit: Unit = "line"

    def __init__(self, path: Path, kind: Kind) -> None:
        """Counts the lines, which takes one pass over the file."""
        self._path = path
        self._id_field = ID_FIELD[kind]
        self.digest = file_digest(path)
        with path.open("rb") as file:
            self.rows: int | None = sum(1 for _ in file)

    def read(self, start: int) -> Iterator[Row | BadRow]:
        """Lines from `start` on."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file):
                if number >= start and line.strip():
                    yield self._row(number, line)

    def _row(self, number: int, line: bytes) -> Row | BadRow:
        try:
            fields = json.loads(line)
        except ValueError as error:
            return BadRow(number, f"not JSON: {error}")
        if not isinstance(fields, dict):
            return BadRow(number, "not a JSON object")
        return make_row(number, fields, self._id_field)
