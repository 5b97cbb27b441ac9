"""Pairs and hard negatives from a collection, asked of a real server."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from encoder.train import mining
from encoder.train.data import Pair, read_pairs
from encoder.train.mining import Mine, choose_negatives, mined
from shoal.client import Client, Texts, VectorParams
from shoal.errors import SettingsError

NOTES = {
    "How do I fix the radiator?": "Bleed the radiator when it stays cold at the top.",
    "Where is my passport?": "The passport lies in the second drawer.",
    "What do we eat on Friday?": "On Fridays there is fish with potatoes.",
    "Who repairs bicycles?": "The shop at the corner repairs bicycles and prams.",
    "When does the boiler need service?": "The boiler is serviced every autumn.",
}


def test_negatives_are_near_and_not_known_to_fit():
    mine = Mine("c", "text", negatives=2, skip=1)
    found = ["answer", "unwritten answer", "near", "near", " other ", "", "nearer"]
    for seed in range(20):
        chosen = choose_negatives(found, {"answer"}, mine, random.Random(seed))
        assert len(chosen) == 2 == len(set(chosen))
        assert set(chosen) <= {"near", "other", "nearer"}
    assert choose_negatives(["answer"], {"answer"}, mine, random.Random(1)) == ()


def test_a_payload_without_a_text_is_no_negative():
    hits = [SimpleNamespace(payload=p) for p in (None, {}, {"t": None}, {"t": 7}, {"t": "near"})]
    client: Any = SimpleNamespace(search=lambda *_, **__: hits)
    found = list(mined(client, Mine("c", "t", negatives=9, skip=0), [Pair("q", "p")]))
    assert found == [Pair("q", "p", ("near",))]


@pytest.mark.parametrize(
    ("flags", "told"),
    [("--negatives 65", "from 0 to 64"), ("--skip -1", "0 or more"), ("--skip 50", "less than")],
)
def test_numbers_that_make_no_sense_are_told(tmp_path, flags, told):
    given = f"--collection c --text-field t --query-field q --out {tmp_path / 'out.jsonl'} {flags}"
    with pytest.raises(SettingsError, match=told):
        mining.run(given.split())


@pytest.mark.slow
def test_pairs_of_a_collection_get_negatives_from_it(server, collection, tmp_path):
    payloads = [{"question": q, "text": t} for q, t in NOTES.items()] + [{"text": "no question"}]
    with Client(server.grpc) as client:
        client.create_collection(collection, VectorParams(384))
        texts = [p["text"] for p in payloads]
        client.upsert(collection, range(len(texts)), Texts(texts), payloads, timeout_s=120)
    flags = ["--address", server.grpc, "--collection", collection, "--text-field", "text"]
    flags += ["--negatives", "2", "--skip", "1", "--out", str(tmp_path / "pairs.jsonl")]
    assert mining.run([*flags, "--query-field", "question"]) == 0
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert {p.query: p.positive for p in pairs} == NOTES
    for pair in pairs:
        assert len(pair.negatives) == 2
        assert pair.positive not in pair.negatives
        assert set(pair.negatives) <= set(texts)
    # The same for pairs that come from a file.
    again = tmp_path / "again.jsonl"
    flags[-1] = str(again)
    bare = tmp_path / "bare.jsonl"
    from encoder.train.data import write_pairs

    write_pairs(bare, [Pair(p.query, p.positive) for p in pairs])
    assert mining.run([*flags, "--pairs", str(bare)]) == 0
    assert read_pairs(again) == pairs
