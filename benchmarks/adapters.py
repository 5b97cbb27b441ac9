"""One search system behind a line of JSON each way; `benchmarks.compare` runs each in its own process.

Run with the interpreter of the competitors' virtual environment, so this file imports only the
standard library, numpy and the one system it is asked for. Commands on standard input, all answered
with seconds and CPU seconds too:
  {"do": "load"}       insert every row and wait until an index serves it
  {"do": "search", "first": query, "count": n, "filter": name or ""}  -> hits, latencies
  {"do": "usage"}      -> resident and disk bytes
Data comes from a folder of files that compare.py writes: vectors.npy, queries.npy, payloads.jsonl,
filters.json. Every system keeps word, gloss, domain and draw, and is asked for k = 10 with them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

K = 10
BATCH = 1_000
COLUMNS = ["id", "word", "gloss", "domain", "draw", "_distance"]  # what lancedb fetches


class System(Protocol):
    """load: insert all and wait for the index. search: k ids, best first, payload fetched."""

    def load(self, vectors: np.ndarray, payloads: list[dict[str, Any]]) -> None: ...

    def search(self, vector: np.ndarray, condition: dict[str, Any] | None) -> list[int]: ...


# condition: {"key": "domain", "any": [...]} or {"key": "draw", "lt": n}


class QdrantEdge:
    """qdrant-edge-py: Qdrant's engine in this process, cosine, its default HNSW (m 16, ef 100)."""

    def __init__(self, folder: Path) -> None:
        import qdrant_edge

        self.q = qdrant_edge
        self.folder = folder
        self.shard: Any = None

    def load(self, vectors: np.ndarray, payloads: list[dict[str, Any]]) -> None:
        q = self.q
        config = q.EdgeConfig(
            vectors={"v": q.EdgeVectorParams(size=vectors.shape[1], distance=q.Distance.Cosine)}
        )
        self.shard = q.EdgeShard.create(str(self.folder), config)
        self.shard.update(
            q.UpdateOperation.create_field_index("domain", q.PayloadSchemaType.Keyword)
        )
        self.shard.update(q.UpdateOperation.create_field_index("draw", q.PayloadSchemaType.Integer))
        for start in range(0, len(vectors), BATCH):
            points = [
                q.Point(start + i, {"v": v.tolist()}, p)
                for i, (v, p) in enumerate(
                    zip(
                        vectors[start : start + BATCH], payloads[start : start + BATCH], strict=True
                    )
                )
            ]
            self.shard.update(q.UpdateOperation.upsert_points(points))
        self.shard.flush()
        self.shard.optimize()

    def search(self, vector: np.ndarray, condition: dict[str, Any] | None) -> list[int]:
        q = self.q
        chosen = None
        if condition and "any" in condition:
            chosen = q.Filter(
                must=[q.FieldCondition(key="domain", match=q.MatchAny(any=condition["any"]))]
            )
        elif condition:
            chosen = q.Filter(
                must=[q.FieldCondition(key="draw", range=q.RangeFloat(lt=condition["lt"]))]
            )
        hits = self.shard.query(
            q.QueryRequest(
                query=q.Query.Nearest(vector.tolist(), using="v"),
                limit=K,
                filter=chosen,
                with_payload=True,
            )
        )
        return [int(h.id) for h in hits]


class Chroma:
    """chromadb, persistent in this process, cosine, its defaults (HNSW, ef_search 100)."""

    def __init__(self, folder: Path) -> None:
        import chromadb

        settings = chromadb.Settings(anonymized_telemetry=False)
        self.client = chromadb.PersistentClient(str(folder), settings)
        self.collection: Any = None

    def load(self, vectors: np.ndarray, payloads: list[dict[str, Any]]) -> None:
        self.collection = self.client.create_collection(
            "glosses", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )
        for start in range(0, len(vectors), BATCH):
            part = payloads[start : start + BATCH]
            self.collection.add(
                ids=[str(start + i) for i in range(len(part))],
                embeddings=vectors[start : start + BATCH],
                metadatas=part,
            )

    def search(self, vector: np.ndarray, condition: dict[str, Any] | None) -> list[int]:
        where = None
        if condition and "any" in condition:
            where = {"domain": {"$in": condition["any"]}}
        elif condition:
            where = {"draw": {"$lt": condition["lt"]}}
        found = self.collection.query(
            query_embeddings=vector[None, :], n_results=K, where=where, include=["metadatas"]
        )
        return [int(x) for x in found["ids"][0]]


class Lance:
    """lancedb in this process, cosine, IVF_HNSW_SQ with its defaults, ef 64, vectors refined."""

    def __init__(self, folder: Path) -> None:
        import lancedb

        self.db = lancedb.connect(str(folder))
        self.table: Any = None

    def load(self, vectors: np.ndarray, payloads: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(vectors).ravel())
        columns = {
            "id": pa.array(np.arange(len(vectors))),
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            **{key: pa.array([p[key] for p in payloads]) for key in payloads[0]},
        }
        data = pa.table(columns)
        self.table = self.db.create_table("glosses", data.slice(0, BATCH))
        for start in range(BATCH, len(vectors), 10 * BATCH):
            self.table.add(data.slice(start, 10 * BATCH))
        self.table.optimize()
        from lancedb.index import Bitmap, BTree, HnswSq

        self.table.create_index("vector", config=HnswSq(distance_type="cosine"))
        self.table.create_index("domain", config=Bitmap())
        self.table.create_index("draw", config=BTree())

    def search(self, vector: np.ndarray, condition: dict[str, Any] | None) -> list[int]:
        query = self.table.search(vector).distance_type("cosine").limit(K)
        query = query.ef(64).refine_factor(4).select(COLUMNS)
        if condition and "any" in condition:
            names = ", ".join(f"'{d}'" for d in condition["any"])
            query = query.where(f"domain IN ({names})", prefilter=True)
        elif condition:
            query = query.where(f"draw < {condition['lt']}", prefilter=True)
        return [int(x) for x in query.to_arrow()["id"].to_pylist()]


SYSTEMS = {"qdrant-edge-py": QdrantEdge, "chromadb": Chroma, "lancedb": Lance}


def cpu_seconds() -> float:
    """Of this process with all its threads, and of ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    name, inputs, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    vectors = np.load(inputs / "vectors.npy")
    queries = np.load(inputs / "queries.npy")
    conditions = json.loads((inputs / "filters.json").read_text())
    system: System = SYSTEMS[name](folder)
    answer = os.fdopen(os.dup(1), "w", buffering=1)  # what a library prints must not mix in
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        began, cpu = time.perf_counter(), cpu_seconds()
        out: dict[str, Any] = {}
        if command["do"] == "load":
            payloads = [json.loads(x) for x in (inputs / "payloads.jsonl").open()]
            began, cpu = time.perf_counter(), cpu_seconds()
            system.load(vectors, payloads)
            del payloads, vectors
        elif command["do"] == "search":
            condition = conditions[command["filter"]] if command["filter"] else None
            out["hits"], out["latency_ns"] = [], []
            for number in range(command["first"], command["first"] + command["count"]):
                started = time.perf_counter_ns()
                hits = system.search(queries[number % len(queries)], condition)
                out["latency_ns"].append(time.perf_counter_ns() - started)
                out["hits"].append(hits)
        elif command["do"] == "usage":
            files = [p for p in folder.rglob("*") if p.is_file()]
            out["disk"] = sum(p.stat().st_blocks * 512 for p in files)
            out["resident"] = resident_bytes()
        out["wall_s"], out["cpu_s"] = time.perf_counter() - began, cpu_seconds() - cpu
        answer.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
