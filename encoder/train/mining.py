"""Pairs from a collection, and hard negatives for pairs: both asked of Shoal itself.

`shoal encoder mine` takes the points of a collection that have both payload fields, or pairs from a
file, searches the collection for each query, and writes what came out high and is not known to fit as
negatives:

    rank   0 .. skip        left out: near the top stand answers that nobody has written down
    rank   skip .. depth    drawn from, `negatives` of them
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.train.data import NEGATIVES_MAX, Pair, positives_by_query, read_pairs, write_pairs
from shoal.cli import Parser
from shoal.errors import SettingsError

if TYPE_CHECKING:
    from shoal.client import Client

__all__ = ["Mine", "choose_negatives", "mined", "pairs_of_collection", "run"]

SEARCH_TIMEOUT_S = 120.0  # the first query waits until the server has loaded the model


@dataclass(frozen=True, slots=True)
class Mine:
    """collection      to search. text_field: the payload field that holds a document's text.
    model, using    what embeds the queries, and the vector that is searched.
    negatives       of each pair; fewer where fewer are found.
    """

    collection: str
    text_field: str
    model: str = ""
    using: str = ""
    negatives: int = 4
    skip: int = 5
    depth: int = 50
    seed: int = 1


def pairs_of_collection(client: Client, mine: Mine, query_field: str) -> Iterator[Pair]:
    """The points whose payload has a text in both fields, by ascending id."""
    wanted = [query_field, mine.text_field]
    for point in client.iterate(mine.collection, with_payload=wanted):
        query, text = ((point.payload or {}).get(name) for name in wanted)
        if isinstance(query, str) and isinstance(text, str) and query.strip() and text.strip():
            yield Pair(query.strip(), text.strip())


def mined(client: Client, mine: Mine, pairs: Sequence[Pair]) -> Iterator[Pair]:
    """The same pairs with negatives. One search for each query."""
    known = positives_by_query(pairs)
    dice = random.Random(mine.seed)
    found: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.query not in found:
            hits = client.search(
                mine.collection,
                text=pair.query,
                model=mine.model,
                using=mine.using,
                limit=mine.depth,
                with_payload=[mine.text_field],
            )
            texts = [(hit.payload or {}).get(mine.text_field) for hit in hits]
            found[pair.query] = [text for text in texts if isinstance(text, str)]
        yield replace(
            pair, negatives=choose_negatives(found[pair.query], known[pair.query], mine, dice)
        )


def choose_negatives(
    found: Iterable[str], known: AbstractSet[str], mine: Mine, dice: random.Random
) -> tuple[str, ...]:
    """found: texts, best first; known: those that fit. Pure but for the dice that it is given."""
    fitting = {text.strip() for text in known}
    texts = dict.fromkeys(text.strip() for text in found)
    usable = [text for text in texts if text and text not in fitting][mine.skip :]
    return tuple(dice.sample(usable, min(mine.negatives, len(usable))))


def run(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = Parser(
        "shoal encoder mine",
        "Write pairs for `shoal encoder train`, with hard negatives from a collection.",
    )
    parser.add_argument(
        "--address", default="localhost:6334", help="gRPC [default localhost:6334]."
    )
    parser.add_argument("--api-key", help="Where the server asks for one.")
    parser.add_argument("--collection", required=True, help="What is searched.")
    parser.add_argument("--text-field", required=True, help="Payload field with a document's text.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, help="Pairs that lack negatives, as for `train`.")
    source.add_argument("--query-field", help="Payload field with a query for the same point.")
    parser.add_argument(
        "--model", default="", help="[default: the one that the vector is bound to]"
    )
    parser.add_argument("--using", default="", help="Name of the vector, where it has one.")
    parser.add_argument("--negatives", type=int, default=4, help="Of each pair [default 4].")
    parser.add_argument("--skip", type=int, default=5, help="Best answers left out [default 5].")
    parser.add_argument("--depth", type=int, default=50, help="Answers looked at [default 50].")
    parser.add_argument("--seed", type=int, default=1, help="[default 1]")
    parser.add_argument("--out", type=Path, required=True, help="A .jsonl file.")
    given = parser.parse_args(list(arguments))
    if not 0 <= given.negatives <= NEGATIVES_MAX:
        raise SettingsError(f"--negatives must be from 0 to {NEGATIVES_MAX}.")
    if not 0 <= given.skip < given.depth:
        raise SettingsError("--skip must be 0 or more, and less than --depth.")
    names = ("collection", "text_field", "model", "using", "negatives", "skip", "depth", "seed")
    mine = Mine(**{name: getattr(given, name) for name in names})
    from shoal.client import Client

    with Client(given.address, api_key=given.api_key, timeout_s=SEARCH_TIMEOUT_S) as client:
        if given.pairs is not None:
            pairs = read_pairs(given.pairs)
        else:
            pairs = list(pairs_of_collection(client, mine, given.query_field))
        if not pairs:
            raise SettingsError(
                f"No point of {mine.collection} has a text in both {given.query_field} and "
                f"{mine.text_field}."
            )
        write_pairs(given.out, mined(client, mine, pairs) if mine.negatives else pairs)
    return 0
