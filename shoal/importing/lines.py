"""Readers of files that are text: JSONL and CSV. Their pieces are spliced, not parsed.

A line of JSONL is a point as in an HTTP upsert,

    {"id": 7, "vector": [0.1, 0.2], "payload": {"title": "..."}}
    {"id": 8, "vector": {"dense": [0.1, 0.2], "words": {"indices": [3, 9], "values": [1, 0.5]}}}

or a flat object whose columns are told apart by name, as those of a CSV file are:

    {"id": 7, "vector": [0.1, 0.2], "title": "...", "year": 1999}

The first line decides which of the two all are: a point has an id or a vector and no other keys
than id, vector and payload.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from shoal import limits
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

__all__ = ["CsvSource", "JsonlSource"]

Object = dict[str, msgspec.Raw]

_POINT_KEYS = frozenset({"id", "vector", "payload"})
_decode_object = msgspec.json.Decoder(Object).decode
_decode = msgspec.json.Decoder().decode
_decode_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")  # as JSON has it: 007 is a text


class _LineSource:
    """Rows of text, put together to bodies."""

    def __init__(self, path: Path, columns: Columns, batch_rows: int) -> None:
        self.path, self._columns = path, columns
        self._batch_rows = min(batch_rows, limits.BATCH_POINTS_MAX)
        self.total = path.stat().st_size

    def _points(self, first_row: int) -> Iterator[tuple[bytes, int]]:
        """(JSON point, bytes read so far) of each row from `first_row` on."""
        raise NotImplementedError

    def chunks(self, first_row: int) -> Iterator[Chunk]:
        points: list[bytes] = []
        size = position = 0
        start = first_row
        for point, position_after in self._points(first_row):
            if points and (
                len(points) >= self._batch_rows or size + len(point) > BODY_BYTES_TARGET
            ):
                yield Chunk(start, len(points), json_body(points), True, position)
                start += len(points)
                points, size = [], 0
            points.append(point)
            size += len(point) + 1
            position = position_after
        if points:
            yield Chunk(start, len(points), json_body(points), True, position)

    def _fail(self, line: int, what: str) -> ImportFailed:
        return ImportFailed(f"{self.path}, line {line}: {what}")

    def _no_vectors(self, names: list[str], line: int) -> ImportFailed:
        wanted = ", ".join(self._columns.vectors)
        return self._fail(
            line,
            f"there is no column {wanted}; there are {', '.join(names)}. Name the one with the "
            "vectors with --vector-column, or one with texts with --text-column.",
        )


class JsonlSource(_LineSource):
    """One JSON object a line. Blank lines are skipped and are no rows."""

    def __init__(self, path: Path, columns: Columns, batch_rows: int) -> None:
        super().__init__(path, columns, batch_rows)
        first = next(self._objects(), None)
        if first is None:
            raise ImportFailed(f"{path} has no rows.")
        _, line, self._first, _ = first
        self._are_points = (
            columns.text is None
            and not columns.vectors_given
            and bool(_POINT_KEYS - {"payload"} & self._first.keys())
            and self._first.keys() <= _POINT_KEYS
        )
        names = list(self._first)
        if columns.text is not None and columns.text.column not in names:
            raise self._fail(
                line,
                f"there is no column {columns.text.column} (--text-column); "
                f"there are {', '.join(names)}.",
            )
        if columns.id_given and columns.id is not None and columns.id not in names:
            raise self._fail(
                line,
                f"there is no column {columns.id} (--id-column); there are {', '.join(names)}.",
            )
        if (
            not self._are_points
            and columns.text is None
            and not columns.vectors.keys() & set(names)
        ):
            raise self._no_vectors(names, line)

    def schema(self) -> Schema:
        """From the first hundred rows, so that a vector which the first row lacks is found."""
        text = self._columns.text
        if text is not None:
            return Schema(text={"": text.model})
        found = _Shapes()
        for row, line, fields, _ in self._objects():
            if row >= 100:
                break
            try:
                if self._are_points:
                    found.add_vectors(_decode(fields["vector"]) if "vector" in fields else {})
                else:
                    for column, name in self._columns.vectors.items():
                        if column in fields:
                            found.add(name, _decode(fields[column]))
            except ValueError as error:
                raise self._fail(line, f"{error}.") from None
        return found.schema(self.path)

    def _points(self, first_row: int) -> Iterator[tuple[bytes, int]]:
        for row, line, fields, position in self._objects():
            if row < first_row:
                continue
            if self._are_points:
                if not fields.keys() <= _POINT_KEYS:
                    extra = min(fields.keys() - _POINT_KEYS)
                    raise self._fail(
                        line,
                        f"a point has id, vector and payload, and this one has {extra}. Put it "
                        "into the payload.",
                    )
                key = bytes(fields["id"]) if "id" in fields else b"%d" % row
                vector, payload = fields.get("vector"), fields.get("payload")
                yield json_point(key, _bytes(vector), _bytes(payload)), position
            else:
                yield self._flat_point(row, line, fields), position

    def _flat_point(self, row: int, line: int, fields: Object) -> bytes:
        columns = self._columns
        key = b"%d" % row
        if columns.id is not None and columns.id in fields:
            key = bytes(fields.pop(columns.id))
        elif columns.id is not None and columns.id in self._first:
            raise self._fail(line, f"there is no {columns.id}, which the first line has.")
        if columns.text is not None:
            vector = self._text(line, fields)
        else:
            vector = _vector(
                {
                    name: bytes(fields.pop(column))
                    for column, name in columns.vectors.items()
                    if column in fields
                }
            )
        return json_point(key, vector, _encode(fields) if fields else None)

    def _text(self, line: int, fields: Object) -> bytes | None:
        assert self._columns.text is not None
        raw = fields.get(self._columns.text.column)
        if raw is None or bytes(raw) == b"null":
            return None
        try:
            return text_vector(_decode_text(raw), self._columns.text.model)
        except msgspec.ValidationError:
            raise self._fail(
                line, f"column {self._columns.text.column} holds no text: {_short(bytes(raw))}."
            ) from None

    def _objects(self) -> Iterator[tuple[int, int, Object, int]]:
        """(row, line from 1, object, bytes read so far)."""
        position = row = 0
        with self.path.open("rb") as file:
            for line, content in enumerate(file, 1):
                position += len(content)
                if content.isspace():
                    continue
                try:
                    content.decode()  # cheap, and raw pieces are not checked by the decoder
                    fields = _decode_object(content)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise self._fail(line, f"this is no JSON object: {error}.") from None
                yield row, line, fields, position
                row += 1


class CsvSource(_LineSource):
    """Comma-separated values with a header line.

    A vector is a cell such as "[0.1, 0.2]" or "0.1 0.2". Another cell is a number or boolean when
    it is written as JSON writes one, absent when it is empty, and a text otherwise.
    """

    def __init__(self, path: Path, columns: Columns, batch_rows: int) -> None:
        super().__init__(path, columns, batch_rows)
        rows = self._rows()
        header = next(rows, None)
        if header is None or next(rows, None) is None:
            raise ImportFailed(f"{path} has no rows (the first line must name the columns).")
        self._names = header[0]
        if len(set(self._names)) != len(self._names):
            raise ImportFailed(f"{path} has two columns of one name; rename one.")
        wanted = list(columns.vectors) if columns.text is None else [columns.text.column]
        if columns.id is not None and columns.id_given:
            wanted.append(columns.id)
        for name in wanted:
            if name not in self._names:
                if name in columns.vectors and not columns.vectors_given:
                    raise self._no_vectors(self._names, 1)
                raise self._fail(
                    1, f"there is no column {name}; there are {', '.join(self._names)}."
                )

    def schema(self) -> Schema:
        text = self._columns.text
        if text is not None:
            return Schema(text={"": text.model})
        found = _Shapes()
        rows = self._rows()
        next(rows)
        for count, (cells, line, _) in enumerate(rows):
            if count >= 100:
                break
            row = dict(zip(self._names, cells, strict=False))
            for column, name in self._columns.vectors.items():
                if row.get(column):
                    try:
                        found.add(name, _decode(_vector_cell(row[column])))
                    except ValueError as error:
                        raise self._fail(line, f"column {column}: {error}.") from None
        return found.schema(self.path)

    def _points(self, first_row: int) -> Iterator[tuple[bytes, int]]:
        columns = self._columns
        names, width = self._names, len(self._names)
        rows = self._rows()
        next(rows)
        for row, (cells, line, position) in enumerate(rows):
            if row < first_row:
                continue
            if len(cells) != width:
                raise self._fail(line, f"{len(cells)} cells, and there are {width} columns.")
            fields = dict(zip(names, cells, strict=True))
            key = b"%d" % row
            if columns.id is not None and columns.id in fields:
                key = self._id(fields.pop(columns.id), line)
            vector: bytes | None
            if columns.text is not None:
                text = fields[columns.text.column]
                vector = text_vector(text, columns.text.model) if text else None
            else:
                pieces = {
                    name: _vector_cell(cell)
                    for column, name in columns.vectors.items()
                    if (cell := fields.pop(column))
                }
                vector = _vector(pieces)
            payload = {name: msgspec.Raw(_cell(cell)) for name, cell in fields.items() if cell}
            yield json_point(key, vector, _encode(payload) if payload else None), position

    def _id(self, cell: str, line: int) -> bytes:
        if not cell:
            raise self._fail(line, f"column {self._columns.id} is empty; every point needs an id.")
        return cell.encode() if cell.isascii() and cell.isdigit() else _encode(cell)

    def _rows(self) -> Iterator[tuple[list[str], int, int]]:
        """(cells, line from 1, bytes read so far), the header first; blank lines are skipped."""
        position = 0
        with self.path.open("rb") as file:

            def lines() -> Iterator[str]:
                nonlocal position
                for number, content in enumerate(file, 1):
                    position += len(content)
                    try:
                        yield content.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        raise self._fail(number, f"this is no UTF-8: {error.reason}.") from None

            reader = csv.reader(lines(), strict=True)
            try:
                for cells in reader:
                    if cells:
                        yield cells, reader.line_num, position
            except csv.Error as error:
                raise self._fail(reader.line_num, f"this is no CSV: {error}.") from None


class _Shapes:
    """Collects what the first vectors look like."""

    def __init__(self) -> None:
        self._dense: dict[str, int] = {}
        self._multi: dict[str, int] = {}
        self._sparse: list[str] = []

    def add_vectors(self, value: Any) -> None:
        """The value of `vector` in a point. Raises ValueError with a clause for people."""
        if isinstance(value, Mapping) and "indices" not in value:
            for name, vector in value.items():
                self.add(name, vector)
        else:
            self.add("", value)

    def add(self, name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, Mapping):
            if name not in self._sparse:
                self._sparse.append(name)
        elif isinstance(value, list) and value and isinstance(value[0], list):
            self._multi.setdefault(name, len(value[0]))
        elif isinstance(value, list) and value:
            self._dense.setdefault(name, len(value))
        else:
            shown = _short(_encode(value))
            raise ValueError(f"{shown} is no vector: a list of numbers is wanted")

    def schema(self, path: Path) -> Schema:
        if not (self._dense or self._multi or self._sparse):
            raise ImportFailed(
                f"{path} has no vectors in its first rows. Name their column with "
                "--vector-column, or one with texts with --text-column."
            )
        return Schema(self._dense, self._multi, tuple(self._sparse))


def _vector(pieces: Mapping[str, bytes]) -> bytes | None:
    """The JSON of one unnamed vector, or of named ones."""
    present = {name: raw for name, raw in pieces.items() if raw != b"null"}
    if "" in present:
        return present[""]
    return _encode({name: msgspec.Raw(raw) for name, raw in present.items()}) if present else None


def _vector_cell(cell: str) -> bytes:
    cell = cell.strip()
    if cell.startswith(("[", "{")):
        return cell.encode()
    return f"[{','.join(cell.replace(',', ' ').split())}]".encode()


def _cell(cell: str) -> bytes:
    if cell in ("true", "false") or _NUMBER.fullmatch(cell):
        return cell.encode()
    return _encode(cell)


def _bytes(raw: msgspec.Raw | None) -> bytes | None:
    return None if raw is None else bytes(raw)


def _short(raw: bytes) -> str:
    text = raw.decode(errors="replace")
    return text if len(text) <= 60 else text[:57] + "..."
