"""Pairs to learn from: read from files, split by query, dealt into batches. All of it is a function of
the texts and a seed, so that a run that starts again in the middle sees what it would have seen.

    pairs.jsonl ─▶ [Pair] ─split─▶ train ─▶ Batches.at(step)
                              └──▶ held out ─▶ Judged: queries, documents, which fit

A file has the columns `query`, `positive` and, if wanted, `negatives`: JSONL (a list, or one text),
CSV (a JSON list, or one text) or Parquet (a list of texts, or one).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from shoal.errors import SettingsError, must
from shoal.limits import TEXT_BYTES_MAX

__all__ = [
    "Batches",
    "Judged",
    "Pair",
    "Split",
    "digest_of",
    "judged_documents",
    "positives_by_query",
    "read_pairs",
    "split_by_query",
    "write_pairs",
]

PAIRS_MAX = 10_000_000  # all are in memory: about 300 bytes each
NEGATIVES_MAX = 64  # of one pair
CELL_CHARACTERS_MAX = TEXT_BYTES_MAX * NEGATIVES_MAX  # of CSV, where Python's own limit is 131,072
COLUMNS = ("query", "positive", "negatives")


@dataclass(frozen=True, slots=True)
class Pair:
    """query and positive belong together; negatives look alike and do not."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Split:
    """No query and no positive of `held_out` is a text of `train`, in whatever place."""

    train: list[Pair]
    held_out: list[Pair]


@dataclass(frozen=True, slots=True)
class Judged:
    """Questions with known answers. relevant[i]: positions in `documents` that fit queries[i]."""

    queries: list[str]
    documents: list[str]
    relevant: list[frozenset[int]]


# -- files ----------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Pair]:
    """Raises SettingsError, naming the file, the row and what is wrong with it."""
    if not path.is_file():
        raise SettingsError(f"There is no file {path} with pairs.")
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            rows = _jsonl_rows(path)
        case ".csv":
            rows = _csv_rows(path)
        case ".parquet" | ".pq":
            rows = _parquet_rows(path)
        case suffix:
            raise SettingsError(
                f"{path}: pairs come as .jsonl, .csv or .parquet, not as {suffix or 'a nameless kind'}."
            )
    pairs = []
    for number, row in rows:
        pairs.append(_pair(row, f"{path}, row {number}"))
        if len(pairs) > PAIRS_MAX:
            raise SettingsError(f"{path} holds more than {PAIRS_MAX} pairs; train on a sample.")
    if not pairs:
        raise SettingsError(f"{path} holds no pairs.")
    return pairs


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """As JSONL, what `read_pairs` reads. What was at `path` stays until all are written, which may
    be the pairs that these are made of. Raises SettingsError when it cannot be written."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for pair in pairs:
                row: dict[str, object] = {"query": pair.query, "positive": pair.positive}
                if pair.negatives:
                    row["negatives"] = list(pair.negatives)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise SettingsError(f"The pairs could not be written: {error}.") from error
    finally:
        scratch.unlink(missing_ok=True)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SettingsError(f"{path}, row {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise SettingsError(f"{path}, row {number} is not a JSON object.")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(CELL_CHARACTERS_MAX)
    with _opened(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                given: dict[str, Any] = {key: value for key, value in row.items() if value}
                cell = given.get("negatives")
                if isinstance(cell, str) and cell.startswith("["):
                    given["negatives"] = _csv_list(cell, f"{path}, row {reader.line_num}")
                yield reader.line_num, given
        except csv.Error as error:
            raise SettingsError(f"{path}, row {reader.line_num} is not CSV: {error}.") from error


def _csv_list(cell: str, where: str) -> object:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: `negatives` is no JSON list: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SettingsError(
            "Parquet is read by pyarrow, which is missing; install it with: pip install 'shoal[import]'"
        ) from error
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        _check_columns(path, names)
        for batch in file.iter_batches(columns=[name for name in COLUMNS if name in names]):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"{path} cannot be read as Parquet: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """As UTF-8, with or without the mark that Excel writes first."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8: {error}.") from error


def _check_columns(path: Path, names: Iterable[str]) -> None:
    there = list(names)
    missing = [name for name in ("query", "positive") if name not in there]
    if missing:
        raise SettingsError(
            f"{path} has no column {' and no column '.join(missing)}; its columns are: "
            f"{', '.join(map(str, there)) or 'none'}."
        )


def _pair(row: Mapping[str, Any], where: str) -> Pair:
    negatives = row.get("negatives") or []
    if isinstance(negatives, str):
        negatives = [negatives]
    if not isinstance(negatives, list):
        raise SettingsError(f"{where}: `negatives` is neither a text nor a list of texts.")
    if len(negatives) > NEGATIVES_MAX:
        raise SettingsError(f"{where} has {len(negatives)} negatives; {NEGATIVES_MAX} are taken.")
    for name in ("query", "positive"):
        if name not in row:
            raise SettingsError(
                f"{where} has no `{name}`; its fields are: {', '.join(map(str, row)) or 'none'}."
            )
    return Pair(
        _text(row.get("query"), "query", where),
        _text(row.get("positive"), "positive", where),
        tuple(_text(text, "negatives", where) for text in negatives),
    )


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"{where}: `{name}` must be a text that is not empty.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:  # half of a pair, as in the JSON "\ud83d"
        raise SettingsError(f"{where}: `{name}` is no text in Unicode: {error}.") from error
    if size > TEXT_BYTES_MAX:
        raise SettingsError(f"{where}: `{name}` is longer than {TEXT_BYTES_MAX} bytes.")
    return value.strip()


# -- splitting ------------------------------------------------------------------------------------


def split_by_query(pairs: Sequence[Pair], *, queries: int, seed: int) -> Split:
    """Hold out all pairs of `queries` queries.

    Which ones depends on their texts and the seed only, not on their order. The model must not have
    seen the answers: pairs that have one leave the training side too, also those that ask the other way
    round (of two questions that mean the same, each may be the query), and so do negatives that are one.
    Raises SettingsError when fewer than half of the queries would be left to learn from.
    """
    every = sorted({pair.query for pair in pairs}, key=lambda query: _order(query, seed))
    if 2 * queries > len(every):
        raise SettingsError(
            f"The pairs have {len(every)} different queries, too few to hold out {queries}: give "
            "--held-out a smaller number, or bring more pairs."
        )
    chosen = set(every[:queries])
    held_out = [pair for pair in pairs if pair.query in chosen]
    unseen = chosen | {pair.positive for pair in held_out}
    train = [
        _without(pair, unseen)
        for pair in pairs
        if pair.query not in unseen and pair.positive not in unseen
    ]
    if not train:
        raise SettingsError("Every pair shares its query or positive with one that is held out.")
    return Split(train, held_out)


def _without(pair: Pair, unseen: AbstractSet[str]) -> Pair:
    if unseen.isdisjoint(pair.negatives):
        return pair
    left = tuple(text for text in pair.negatives if text not in unseen)
    return Pair(pair.query, pair.positive, left)


def judged_documents(split: Split, *, documents_max: int, seed: int) -> Judged:
    """The held-out queries with the documents to search: their positives, and negatives and positives
    of other pairs, drawn by the seed, until there are `documents_max` (or no more)."""
    relevant = positives_by_query(split.held_out)
    documents = sorted({pair.positive for pair in split.held_out})
    others = {text for pair in split.held_out for text in pair.negatives}
    others |= {pair.positive for pair in split.train}
    fill = sorted(others.difference(documents), key=lambda text: _order(text, seed))
    documents += fill[: max(0, documents_max - len(documents))]
    place = {text: position for position, text in enumerate(documents)}
    queries = sorted(relevant)
    return Judged(
        queries, documents, [frozenset(place[text] for text in relevant[q]) for q in queries]
    )


def positives_by_query(pairs: Iterable[Pair]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for pair in pairs:
        found.setdefault(pair.query, set()).add(pair.positive)
    return found


def digest_of(pairs: Sequence[Pair]) -> str:
    """sha256 (hex) of all texts, in order: which data a model was trained on."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.query, pair.positive, *pair.negatives]).encode())
    return digest.hexdigest()


def _order(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(8, "little")).digest()


# -- batches --------------------------------------------------------------------------------------


class Batches:
    """Deals pairs into batches: every pair once an epoch, in an order of its own each time.

    `at(step)` needs nothing but the step, so there is no state to save: resuming is asking for a later
    step, on whatever layout.
    """

    def __init__(
        self, pairs: Sequence[Pair], *, batch_pairs: int, negatives_per_pair: int, seed: int
    ) -> None:
        if len(pairs) < batch_pairs:
            raise SettingsError(
                f"{len(pairs)} pairs are left for training and a batch takes {batch_pairs}: give "
                "--batch-pairs a smaller number."
            )
        self._pairs, self._size, self._seed = pairs, batch_pairs, seed
        self._negatives = negatives_per_pair
        self.batches_per_epoch = len(pairs) // batch_pairs
        self._epoch = -1
        self._dealt = np.empty(0, np.int64)

    def at(self, step: int) -> list[Pair]:
        """The batch of a step, from 0: `batch_pairs` pairs, each with `negatives_per_pair` negatives;
        where a pair has fewer, positives of others fill up. Cost O(batch); O(pairs) once an epoch."""
        must(step >= 0, "steps are counted from 0")
        epoch, place = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, 0, epoch))
            self._dealt, self._epoch = order.permutation(len(self._pairs)), epoch
        dice = np.random.default_rng((self._seed, 1, step))
        chosen = self._dealt[place * self._size : (place + 1) * self._size]
        return [self._filled(self._pairs[index], dice) for index in chosen]

    def _filled(self, pair: Pair, dice: np.random.Generator) -> Pair:
        if not self._negatives:
            return Pair(pair.query, pair.positive)
        own = list(pair.negatives)
        if len(own) > self._negatives:
            own = [own[i] for i in dice.choice(len(own), self._negatives, replace=False)]
        while len(own) < self._negatives:
            own.append(self._pairs[int(dice.integers(len(self._pairs)))].positive)
        return Pair(pair.query, pair.positive, tuple(own))
