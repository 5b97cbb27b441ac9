"""Readers of files whose vectors are blocks of numbers: Parquet and .npy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal import limits
from shoal.batch import DenseBlock, PointBatch
from shoal.errors import BadRequest
from shoal.ids import PointIds, format_id, parse_id
from shoal.importing.chunks import (
    BODY_BYTES_TARGET,
    Chunk,
    Columns,
    ImportFailed,
    Schema,
    json_body,
    json_point,
    text_vector,
)

__all__ = ["NpySource", "ParquetSource"]

_encode = msgspec.json.Encoder().encode


class NpySource:
    """A two-dimensional array of numbers, memory-mapped. The id of a point is its row."""

    def __init__(self, path: Path, batch_rows: int) -> None:
        self.path = path
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ImportFailed(f"{path} is no .npy file that can be read: {error}.") from error
        shape = "x".join(map(str, self._array.shape))
        if self._array.ndim != 2 or self._array.dtype.kind not in "fiu":
            raise ImportFailed(
                f"{path} holds an array of {self._array.dtype}, {shape}; "
                "it must be numbers, rows x dimension."
            )
        if 0 in self._array.shape:
            raise ImportFailed(f"{path} holds no vectors ({shape}).")
        self.total, self._dim = self._array.shape
        self._batch_rows = _rows_per_batch(batch_rows, self._dim)

    def schema(self) -> Schema:
        return Schema(dense={"": self._dim})

    def chunks(self, first_row: int) -> Iterator[Chunk]:
        for start in range(first_row, self.total, self._batch_rows):
            stop = min(start + self._batch_rows, self.total)
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(self._array[start:stop], np.float32)
            _check_finite(values, self.path, start, "the array")
            batch = PointBatch(PointIds(np.arange(start, stop, dtype=np.uint64)))
            batch.dense[""] = DenseBlock(values)
            body = batch.to_wire().SerializeToString()
            yield Chunk(start, stop - start, body, False, stop)


class ParquetSource:
    """Columns of a Parquet file, a record batch at a time. Needs pyarrow."""

    def __init__(self, path: Path, columns: Columns, batch_rows: int) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportFailed(
                f"Reading {path} needs pyarrow, which is not installed: pip install pyarrow"
            ) from error
        self.path, self._columns = path, columns
        self._types: Any = pyarrow.types
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ImportFailed(f"{path} is no Parquet file that can be read: {error}.") from error
        self._arrow_error = pyarrow.ArrowException
        self.total = self._file.metadata.num_rows
        self._schema: Any = self._file.schema_arrow
        self._names = list(self._schema.names)
        if len(set(self._names)) != len(self._names):
            raise ImportFailed(f"{path} has two columns of one name; rename one.")
        if self.total == 0:
            raise ImportFailed(f"{path} has no rows.")
        self._vectors = self._vector_columns()
        self._dims = {name: self._dim(column) for column, name in self._vectors.items()}
        self._batch_rows = _rows_per_batch(batch_rows, sum(self._dims.values()))
        self._id = self._id_column()
        taken = {self._id, *self._vectors}
        self._payload = [name for name in self._names if name not in taken]

    def schema(self) -> Schema:
        text = self._columns.text
        return Schema(dense=self._dims) if text is None else Schema(text={"": text.model})

    def chunks(self, first_row: int) -> Iterator[Chunk]:
        row = 0
        groups: list[int] = []
        for group in range(self._file.num_row_groups):  # whole groups before the start are not read
            size = self._file.metadata.row_group(group).num_rows
            if groups or row + size > first_row:
                groups.append(group)
            else:
                row += size
        batches = self._file.iter_batches(
            batch_size=self._batch_rows, row_groups=groups, use_threads=False
        )
        try:
            for batch in batches:
                skip = max(0, first_row - row)
                if skip < len(batch):
                    yield self._chunk(batch.slice(skip) if skip else batch, row + skip)
                row += len(batch)
        except self._arrow_error as error:
            raise ImportFailed(
                f"{self.path} is damaged near row {row}: {error}. Make the file again."
            ) from error

    # -- which columns ----------------------------------------------------------------------------

    def _id_column(self) -> str | None:
        wanted = self._columns.id
        if wanted in self._names:
            return wanted
        if wanted is not None and self._columns.id_given:
            raise self._no_column(wanted, "--id-column")
        return None

    def _vector_columns(self) -> dict[str, str]:
        if self._columns.text is not None:
            if self._columns.text.column not in self._names:
                raise self._no_column(self._columns.text.column, "--text-column")
            return {}
        for column in self._columns.vectors:
            if column not in self._names:
                raise self._no_column(column, "--vector-column")
            kind = self._schema.field(column).type
            if not (self._is_list(kind) and self._is_number(kind.value_type)):
                raise ImportFailed(
                    f"{self.path}: column {column} holds {kind}, not vectors (lists of numbers). "
                    f"{self._list_columns()}"
                )
        return dict(self._columns.vectors)

    def _dim(self, column: str) -> int:
        kind = self._schema.field(column).type
        if self._types.is_fixed_size_list(kind):
            return int(kind.list_size)
        for batch in self._file.iter_batches(batch_size=64, columns=[column]):
            lengths = batch.column(0).value_lengths().drop_null()
            if len(lengths):
                return int(lengths[0].as_py())
        raise ImportFailed(f"{self.path}: column {column} holds no vector at all.")

    def _no_column(self, name: str, flag: str) -> ImportFailed:
        return ImportFailed(
            f"{self.path} has no column {name} ({flag}); it has {', '.join(self._names)}. "
            f"{self._list_columns()}"
        )

    def _list_columns(self) -> str:
        found = [
            field.name
            for field in self._schema
            if self._is_list(field.type) and self._is_number(field.type.value_type)
        ]
        if not found:
            return "No column holds vectors; --text-column makes them from texts."
        return f"Columns with vectors: {', '.join(found)} (--vector-column)."

    def _is_list(self, kind: Any) -> bool:
        types = self._types
        return bool(
            types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)
        )

    def _is_number(self, kind: Any) -> bool:
        return bool(self._types.is_floating(kind) or self._types.is_integer(kind))

    # -- conversion -------------------------------------------------------------------------------

    def _chunk(self, table: Any, first_row: int) -> Chunk:
        rows = len(table)
        ids = self._ids(table, first_row)
        payloads = self._payloads(table)
        text = self._columns.text
        if text is not None:
            texts = table.column(text.column).to_pylist()
            points = [
                json_point(
                    _encode(format_id(key)),
                    None if words is None else text_vector(str(words), text.model),
                    payload,
                )
                for key, words, payload in zip(ids.keys(), texts, payloads, strict=True)
            ]
            return Chunk(first_row, rows, json_body(points), True, first_row + rows)
        batch = PointBatch(ids)
        for column, name in self._vectors.items():
            batch.dense[name] = self._dense(table.column(column), column, first_row)
        batch.set_payloads(payloads)
        body = batch.to_wire().SerializeToString()
        return Chunk(first_row, rows, body, False, first_row + rows)

    def _ids(self, table: Any, first_row: int) -> PointIds:
        if self._id is None:
            return PointIds(np.arange(first_row, first_row + len(table), dtype=np.uint64))
        column = table.column(self._id)
        if self._types.is_integer(column.type) and column.null_count == 0:
            numbers = column.to_numpy(zero_copy_only=False)
            if numbers.dtype.kind == "u" or int(numbers.min()) >= 0:
                return PointIds(numbers.astype("<u8"))
        keys = []
        for offset, value in enumerate(column.to_pylist()):
            try:
                keys.append(parse_id(_plain_id(value)))
            except BadRequest:
                raise ImportFailed(
                    f"{self.path}, row {first_row + offset}, column {self._id}: {value!r} is no "
                    "id; ids are whole numbers from 0 or UUIDs. Choose another --id-column, or "
                    "--id-column '' to number the rows."
                ) from None
        return PointIds.from_keys(keys)

    def _dense(self, column: Any, name: str, first_row: int) -> DenseBlock:
        where = f"column {name}"
        rows = len(column)
        present: NDArray[np.bool_] | None = None
        if column.null_count:
            present = column.is_valid().to_numpy(zero_copy_only=False)
        lengths = column.value_lengths().drop_null().to_numpy(zero_copy_only=False)
        dim = int(lengths[0]) if len(lengths) else 1
        uneven = lengths != dim
        if uneven.any():
            present_rows = np.arange(rows) if present is None else np.flatnonzero(present)
            bad = int(present_rows[np.argmax(uneven)])
            raise ImportFailed(
                f"{self.path}, row {first_row + bad}, {where}: a vector of "
                f"{int(lengths[np.argmax(uneven)])} numbers among vectors of {dim}."
            )
        flat = column.flatten()  # without the nulls' places, and a view of the file's pages
        if flat.null_count:
            bad = int(np.argmin(flat.is_valid().to_numpy(zero_copy_only=False))) // dim
            raise ImportFailed(
                f"{self.path}, row {first_row + bad}, {where}: a vector with an empty element."
            )
        with np.errstate(over="ignore"):
            block = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        block = block.reshape(-1, dim)
        if present is not None:
            spread = np.zeros((rows, dim), np.float32)
            spread[present] = block
            block = spread
        _check_finite(block, self.path, first_row, where)
        return DenseBlock(block, present)

    def _payloads(self, table: Any) -> list[bytes]:
        """JSON objects; an empty cell is a key that is not there."""
        names = self._payload
        if not names:
            return [b""] * len(table)
        columns = [self._cells(table.column(name)) for name in names]
        return [
            _encode({k: v for k, v in zip(names, row, strict=True) if v is not None})
            for row in zip(*columns, strict=True)
        ]

    def _cells(self, column: Any) -> list[Any]:
        if self._types.is_timestamp(column.type) and column.type.unit == "ns":
            import pyarrow

            # JSON has microseconds at most here, and Python's datetime as well
            column = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
        cells: list[Any] = column.to_pylist()
        return cells


def _plain_id(value: object) -> object:
    """A UUID column comes as UUIDs or as 16 bytes."""
    if isinstance(value, bytes) and len(value) == 16:
        return str(uuid.UUID(bytes=value))
    return str(value) if isinstance(value, uuid.UUID) else value


def _rows_per_batch(wanted: int, dim: int) -> int:
    return max(1, min(wanted, limits.BATCH_POINTS_MAX, BODY_BYTES_TARGET // (4 * max(dim, 1))))


def _check_finite(block: NDArray[np.float32], path: Path, first_row: int, where: str) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        bad = first_row + int(np.argmin(finite.all(axis=1)))
        raise ImportFailed(
            f"{path}, row {bad}, {where}: a vector with NaN, infinity or a number that is too "
            "large for float32. Repair or remove that row."
        )
