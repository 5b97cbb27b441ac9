"""Pairs to try fine-tuning with: words and their definitions, from WordNet.

    apt-get install wordnet-base
    python examples/wordnet_pairs.py pairs.jsonl
    shoal encoder train --pairs pairs.jsonl --out runs/wordnet --gate

A definition that has the word in it is left out, and so are the examples behind a definition.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path


def pairs(folder: Path) -> Iterator[tuple[str, str]]:
    """(word, definition) of the first word of every set of synonyms; wndb(5WN) says how to read them."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            head, _, tail = line.partition(" | ")
            word = re.sub(r"\(.*\)", "", head.split(" ")[4]).replace("_", " ")
            definition = re.sub(r"\s+", " ", tail).split('; "')[0].strip()
            if definition and word.lower() not in definition.lower():
                yield word, definition


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a .jsonl file")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--count", type=int, default=40_000, help="pairs, drawn at random")
    given = parser.parse_args()
    if not (given.wordnet / "data.noun").is_file():
        print(f"{given.wordnet} has no data.noun: apt-get install wordnet-base", file=sys.stderr)
        return 1
    found = list(pairs(given.wordnet))
    random.Random(1).shuffle(found)
    with given.out.open("w", encoding="utf-8") as file:
        for word, definition in found[: given.count]:
            file.write(json.dumps({"query": word, "positive": definition}) + "\n")
    print(f"{min(given.count, len(found)):,} of {len(found):,} pairs are in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
