"""`shoal import FILE --collection C`: a Parquet, JSONL, CSV or .npy file into a collection.

The file is read as a stream, a few batches ahead of the server, so memory stays bounded whatever
its size. Several requests are in flight; what counts as done is what the server acknowledged without
a gap from the beginning. Cut off, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.encoder_api import DEFAULT_MODEL
from shoal.importing.chunks import Chunk, Columns, ImportFailed, Schema, Source, Text
from shoal.importing.resume import Progress, fingerprint
from shoal.importing.sender import Refused, Server

__all__ = ["DEFAULT_MODEL", "ImportFailed", "Report", "import_file", "run"]

DEFAULT_URL = "http://localhost:6333"
BATCH_ROWS = 1_000
BATCH_TEXTS = 128  # embedding takes milliseconds each: smaller, so that progress is seen
IN_FLIGHT = 4  # requests: the server works on some while others travel
WINDOW = 2 * IN_FLIGHT  # chunks that were read and not acknowledged: bounds the memory
NOTE_EVERY_CHUNKS = 16  # how often the resume note is written
DISTANCES = ("Cosine", "Dot", "Euclid", "Manhattan")


@dataclass(frozen=True, slots=True)
class Report:
    """rows: sent now. skipped: acknowledged by an earlier, interrupted import."""

    rows: int
    skipped: int
    seconds: float


class Watcher(Protocol):
    """Is told of progress: rows acknowledged so far, and the position in the file (of total)."""

    def __call__(self, rows: int, position: int, total: int) -> None: ...


def run(argv: Sequence[str]) -> int:
    """The command line. Raises ImportFailed (a ShoalError) with a sentence for people."""
    arguments = _parser().parse_args(argv)
    path: Path = arguments.file
    columns = _columns(arguments)
    batch_rows = arguments.batch or (BATCH_ROWS if columns.text is None else BATCH_TEXTS)
    source = open_source(path, columns, batch_rows)
    try:
        with _shown(path, source) as watcher:
            report = import_file(
                source,
                arguments.collection,
                url=arguments.url,
                api_key=arguments.api_key or os.environ.get("SHOAL_API_KEY"),
                distance=arguments.distance,
                restart=arguments.restart,
                options=f"{columns}",
                watcher=watcher,
            )
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    rate = report.rows / max(report.seconds, 1e-9)
    print(
        f"{report.rows:,} points from {path.name} are in {arguments.collection} "
        f"({report.seconds:.1f} s, {rate:,.0f} points/s)"
        + (f"; {report.skipped:,} were there from before" if report.skipped else "")
    )
    return 0


def open_source(path: Path, columns: Columns, batch_rows: int) -> Source:
    """The reader for a file, by its suffix. Raises ImportFailed."""
    if not path.is_file():
        raise ImportFailed(f"There is no file {path}.")
    from shoal.importing.arrays import NpySource, ParquetSource
    from shoal.importing.lines import CsvSource, JsonlSource

    match path.suffix.lower():
        case ".parquet" | ".pq":
            return ParquetSource(path, columns, batch_rows)
        case ".jsonl" | ".ndjson":
            return JsonlSource(path, columns, batch_rows)
        case ".csv":
            return CsvSource(path, columns, batch_rows)
        case ".npy":
            if columns.text is not None or columns.vectors_given or columns.id_given:
                raise ImportFailed(f"{path}: a .npy file has no columns, only vectors.")
            return NpySource(path, batch_rows)
        case suffix:
            raise ImportFailed(
                f"{path}: files {'without a suffix' if not suffix else 'of kind ' + suffix} are "
                "not known. Known are .parquet, .jsonl, .csv and .npy."
            )


def import_file(
    source: Source,
    collection: str,
    *,
    url: str = DEFAULT_URL,
    api_key: str | None = None,
    distance: str = "Cosine",
    restart: bool = False,
    options: str = "",
    watcher: Watcher | None = None,
) -> Report:
    """Send a whole file, creating the collection if there is none.

    restart  begin at the first row, whatever an earlier import left behind.
    options  part of the fingerprint: how the file is read.
    Raises   ImportFailed. What the server acknowledged stays, and is noted for the next time.
    """
    server = Server(url, api_key)
    note = Progress(source.path, server.url, collection, fingerprint(source.path, options))
    started = time.monotonic()
    try:
        there = _prepare(server, collection, source.schema(), distance)
        noted = 0 if restart else note.load()
        # Fewer points than were acknowledged: the collection is another one by now. Begin again.
        first_row = noted if noted <= there else 0
        rows = _send(server, collection, source, first_row, note, watcher)
    except Refused as refused:
        raise ImportFailed(_refusal(refused, server, collection)) from None
    finally:
        server.close()
    note.clear()
    return Report(rows, first_row, time.monotonic() - started)


def _send(
    server: Server,
    collection: str,
    source: Source,
    first_row: int,
    note: Progress,
    watcher: Watcher | None,
) -> int:
    """Send every chunk from `first_row` on; the number of rows that were sent."""
    done = first_row
    acknowledged = 0
    waiting: deque[tuple[Chunk, Future[None]]] = deque()  # oldest first
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="shoal-import")

    def settle_oldest() -> None:
        nonlocal done, acknowledged
        chunk = waiting[0][0]
        _await(waiting[0][1], chunk, source.path)
        waiting.popleft()
        done = chunk.first_row + chunk.row_count
        acknowledged += 1
        if acknowledged % NOTE_EVERY_CHUNKS == 0:
            note.save(done)
        if watcher is not None:
            watcher(done - first_row, chunk.position, source.total)

    try:
        for chunk in source.chunks(first_row):
            if len(waiting) >= WINDOW:
                settle_oldest()
            waiting.append((chunk, pool.submit(server.put, collection, chunk)))
        while waiting:
            settle_oldest()
    except BaseException:
        server.stop()
        pool.shutdown(cancel_futures=True)  # what travels already may still arrive, and then counts
        for chunk, future in waiting:
            if future.cancelled() or future.exception() is not None:
                break
            done = chunk.first_row + chunk.row_count
        note.save(done)
        raise
    pool.shutdown()
    return done - first_row


def _await(future: Future[None], chunk: Chunk, path: Path) -> None:
    try:
        future.result()
    except Refused as refused:
        last = chunk.first_row + chunk.row_count - 1
        raise ImportFailed(
            f"{path}, rows {chunk.first_row} to {last}: the server refused them: {refused.message}"
        ) from None


def _prepare(server: Server, collection: str, schema: Schema, distance: str) -> int:
    """Make the collection if there is none. Returns how many points it has."""
    found = server.collection(collection)
    dims = {**schema.dense, **schema.multi}
    for name, model in schema.text.items():
        if (
            model or found is None
        ):  # else the server knows which model a collection's vectors are of
            dims[name] = server.embedding_dim(model or DEFAULT_MODEL)
    if found is not None:
        _check_fits(found, collection, dims)
        return int(found.get("points_count") or 0)
    vectors: dict[str, Any] = {
        name: {"size": dim, "distance": distance} for name, dim in dims.items()
    }
    for name, model in schema.text.items():
        vectors[name]["shoal_model"] = model or DEFAULT_MODEL
    for name in schema.multi:
        vectors[name]["multivector_config"] = {"comparator": "max_sim"}
    config: dict[str, Any] = {"vectors": vectors.get("", vectors)}
    if schema.sparse:
        config["sparse_vectors"] = {name: {} for name in schema.sparse}
    server.create_collection(collection, config)
    return 0


def _check_fits(found: dict[str, Any], collection: str, dims: dict[str, int]) -> None:
    params = found["config"]["params"]
    vectors = params.get("vectors") or {}
    if "size" in vectors:
        vectors = {"": vectors}
    for name, dim in dims.items():
        what = f"vector {name}" if name else "unnamed vector"
        if name not in vectors:
            known = ", ".join(repr(known) if known else "an unnamed one" for known in vectors)
            raise ImportFailed(
                f"Collection {collection} has no {what}; it has {known or 'none'}. "
                "--vector-column COLUMN=NAME says which vector a column becomes."
            )
        if vectors[name]["size"] != dim:
            raise ImportFailed(
                f"The {what} of collection {collection} has {vectors[name]['size']} dimensions, "
                f"and the file's has {dim}. Choose another --collection."
            )


def _refusal(refused: Refused, server: Server, collection: str) -> str:
    if refused.status in (401, 403):
        return (
            f"The server at {server.url} wants an api key that may write ({refused.message}): "
            "--api-key, or SHOAL_API_KEY in the environment."
        )
    return f"The server at {server.url} refused collection {collection}: {refused.message}"


# -- the command line ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    from shoal.cli import Parser

    parser = Parser(
        "shoal import",
        "Load a file into a collection; made if it is not there. An import that was cut off goes\n"
        "on when the same command is given again.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=".parquet, .jsonl, .csv or .npy")
    add("--collection", required=True, metavar="NAME")
    add("--url", default=DEFAULT_URL, help=f"the server [default {DEFAULT_URL}]")
    add("--api-key", default=None, metavar="KEY", help="the server's key; better in SHOAL_API_KEY")
    add(
        "--id-column",
        default=None,
        metavar="COLUMN",
        help="the column with ids, whole numbers or UUIDs [default id if there is one, else the "
        "number of the row; '' for the number of the row]",
    )
    add(
        "--vector-column",
        action="append",
        default=[],
        metavar="COLUMN[=NAME]",
        help="a column with vectors, and the name that they get; may be given several times "
        "[default vector, without a name]",
    )
    add(
        "--text-column",
        default=None,
        metavar="COLUMN",
        help="a column with texts that the server makes vectors of; it stays in the payload",
    )
    add(
        "--model",
        default="",
        help="the encoder for --text-column [default: that of the collection; of a new one "
        f"{DEFAULT_MODEL}]",
    )
    add(
        "--distance",
        default="Cosine",
        choices=DISTANCES,
        help="of a collection that is made [default Cosine]",
    )
    add(
        "--batch",
        type=_batch,
        default=None,
        metavar="ROWS",
        help=f"rows in one request [default {BATCH_ROWS}, with --text-column {BATCH_TEXTS}]",
    )
    add("--restart", action="store_true", help="begin at the first row, always")
    return parser


def _batch(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def _columns(arguments: argparse.Namespace) -> Columns:
    if arguments.text_column is not None and arguments.vector_column:
        raise ImportFailed("Give --vector-column or --text-column, not both.")
    pairs = [given.partition("=") for given in arguments.vector_column]
    several = len(pairs) > 1
    vectors = {
        column: name if equals else (column if several else "") for column, equals, name in pairs
    }
    if len(set(vectors.values())) < len(pairs):
        raise ImportFailed("Two --vector-column become the same vector; give each its own =NAME.")
    text = arguments.text_column
    return Columns(
        id=("id" if arguments.id_column is None else arguments.id_column or None),
        id_given=bool(arguments.id_column),
        vectors=vectors or {"vector": ""},
        vectors_given=bool(vectors),
        text=None if text is None else Text(text, arguments.model),
    )


@contextmanager
def _shown(path: Path, source: Source) -> Iterator[Watcher | None]:
    """A progress bar on a terminal; silence in a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rows]:,} points  {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bars:
        task = bars.add_task(path.name, total=source.total, rows=0, rate="")

        def show(rows: int, position: int, total: int) -> None:
            elapsed = bars.tasks[task].elapsed or 0.0
            rate = f"{rows / elapsed:,.0f}/s" if elapsed > 0.5 else ""
            bars.update(task, completed=position, rows=rows, rate=rate)

        yield show
