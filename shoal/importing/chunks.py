"""What the readers of files hand to the sender: bodies of requests that are ready to go.

Vectors that are one block of numbers (Parquet, .npy) travel as a PointBatch and are never made into
Python objects. What is text anyway (JSONL, CSV, texts to embed) is spliced into a JSON body without
being parsed here: the server checks it, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from shoal.errors import ShoalError

__all__ = [
    "BODY_BYTES_TARGET",
    "Chunk",
    "Columns",
    "ImportFailed",
    "Schema",
    "Source",
    "Text",
    "json_body",
    "json_point",
]

BODY_BYTES_TARGET = 8 * 1024 * 1024  # of one request, at most: a quarter of what a server takes


class ImportFailed(ShoalError):
    """The import stopped; the message names file, row and column, and what to do."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows on their way to the server in one request.

    body      JSON points, or a serialized PointBatch.
    position  how far into the file the reader was after these rows, in the units of `Source.total`.
    """

    first_row: int
    row_count: int
    body: bytes
    is_json: bool
    position: int


@dataclass(frozen=True, slots=True)
class Schema:
    """The vectors of the first rows, to make a collection from. "" is the unnamed vector.

    dense, multi  name -> dimension. text: name -> the model that will make it.
    """

    dense: Mapping[str, int] = field(default_factory=dict)
    multi: Mapping[str, int] = field(default_factory=dict)
    sparse: tuple[str, ...] = ()
    text: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """A column of texts, and the model by which the server makes vectors of them."""

    column: str
    model: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns mean what; all others are payload.

    id          None: the number of the row, from 0.
    id_given    the user asked for this column, so it must be there.
    vectors     column -> name of the vector.
    """

    id: str | None
    id_given: bool
    vectors: Mapping[str, str]
    vectors_given: bool
    text: Text | None


class Source(Protocol):
    """An open file. total: its length, in the units of `Chunk.position`."""

    path: Path
    total: int

    def schema(self) -> Schema:
        """Reads the beginning. Raises ImportFailed: no such column, no vectors, no rows."""
        ...

    def chunks(self, first_row: int) -> Iterator[Chunk]:
        """Everything from row `first_row` on, in order. Bounded memory. Raises ImportFailed."""
        ...


def json_point(key: bytes, vector: bytes | None, payload: bytes | None) -> bytes:
    """One point of an HTTP upsert, from JSON pieces."""
    return b'{"id":%b,"vector":%b,"payload":%b}' % (key, vector or b"{}", payload or b"null")


def json_body(points: list[bytes]) -> bytes:
    return b'{"points":[' + b",".join(points) + b"]}"


_encode = msgspec.json.Encoder().encode


def text_vector(text: str, model: str) -> bytes:
    """Text in place of a vector."""
    return b'{"text":%b,"model":%b}' % (_encode(text), _encode(model))
