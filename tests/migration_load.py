"""Clients that read and write a collection all through a change of its model, and check every answer.

    TwoModels    two small models of random weights, 16 and 24 numbers, and what they make of a text
    Http, Qdrant, Grpc   one way each to talk to a coordinator
    Reader       asks all the time; every answer must be whole and of one model
    Writer       writes all the time, and knows what must be there
    Migrate      the operations of a migration, over HTTP

A point says in its payload what its vectors should be: the old model's is made of `made_of`, the new
one's of `text`. They differ where a payload was changed after the vectors were made, which the new
model's vectors follow and the old one's do not. So a vector of the wrong model, of another point or of
another time is seen in any single answer.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fakes.text_models import WORDS, make_text_model
from harness import wait_until
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models

import shoal
from shoal.client import Batch, Texts

__all__ = [
    "DIMS",
    "NAME",
    "Found",
    "Grpc",
    "Http",
    "Migrate",
    "Point",
    "Qdrant",
    "Reader",
    "TwoModels",
    "Writer",
    "check_points",
    "create",
    "fill",
    "scroll",
]

NAME = "notes"
DIMS = {"old": 16, "new": 24}
IDS_PER_WRITER = 10_000
LIMIT = 10  # points of an answer
APART_MAX = 1e-4  # of the same vector, computed twice
PAUSE_S = 0.01  # of a client between two requests: the machine has others to serve
Array = NDArray[np.float32]


# -- the models -----------------------------------------------------------------------------------
class TwoModels:
    """What each of them makes of a text; safe to ask from many threads."""

    def __init__(self, folder: Path) -> None:
        from encoder.model import ModelFolder, TextModel

        self._models: dict[str, TextModel] = {}
        self._known: dict[tuple[str, str], Array] = {}
        self._lock = threading.Lock()
        self.folders = {
            name: make_text_model(folder / name, seed=seed, dim=DIMS[name])
            for seed, name in enumerate(DIMS, 1)
        }
        for name, made in self.folders.items():
            self._models[name] = TextModel.load(ModelFolder.read(made), precision="float32")
        first, second = (self.vector("old", text) for text in ("word1 word2", "word3 word4"))
        assert np.abs(first - second).max() > 100 * APART_MAX, "texts must be far from each other"

    @property
    def settings(self) -> dict[str, object]:
        """Of a server that has both."""
        return {
            "encoder_model": ",".join(map(str, self.folders.values())),
            "encoder_precision": "float32",
            "encoder_threads": 1,
        }

    def vector(self, model: str, text: str) -> Array:
        """(DIMS[model],) of length 1."""
        with self._lock:
            found = self._known.get((model, text))
            if found is None:
                tokens = self._models[model].tokenize([text])[0].token_ids
                found = self._models[model].forward([tokens])[0]
                self._known[model, text] = found
            return found


def some_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 7)))


@dataclass(frozen=True, slots=True)
class Point:
    """made_of, text: as in the payload, see above. number: of the write."""

    made_of: str
    text: str
    number: int

    @property
    def payload(self) -> dict[str, Any]:
        return {"made_of": self.made_of, "text": self.text, "number": self.number}


@dataclass(frozen=True, slots=True)
class Found:
    id: int
    score: float
    vectors: Mapping[str, Array]
    payload: Mapping[str, Any]


# -- ways to talk to a coordinator ----------------------------------------------------------------
class Http:
    """Plain HTTP."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/collections/{NAME}", timeout=60, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def send(self, method: str, path: str, body: Any, model: str = "") -> Any:
        headers = {"shoal-model": model} if model else {}
        answer = self._http.request(method, path, json=body, headers=headers)
        if answer.status_code != 200:
            raise AssertionError(f"{method} {path}: {answer.status_code} {answer.text[:600]}")
        return answer.json()["result"]

    def query(self, query: Any, model: str, limit: int, only: Any = None) -> list[Found]:
        if isinstance(query, str):
            query, model = {"text": query} | ({"model": model} if model else {}), ""
        elif not isinstance(query, int):
            query = query.tolist()
        body = {"query": query, "using": "v", "limit": limit, "filter": only}
        body |= {"with_vector": True, "with_payload": True}
        hits = self.send("POST", "/points/query", body, model)["points"]
        return [
            Found(
                hit["id"],
                hit["score"],
                {name: np.array(v, np.float32) for name, v in hit["vector"].items()},
                hit["payload"],
            )
            for hit in hits
        ]

    def put(self, points: Mapping[int, Point], vectors: Sequence[Any], model: str) -> None:
        """vectors: texts, or numbers of `model`."""
        body = {
            "points": [
                {"id": id_, "vector": {"v": _json(vector)}, "payload": point.payload}
                for (id_, point), vector in zip(points.items(), vectors, strict=True)
            ]
        }
        self.send("PUT", "/points?wait=true", body, model)

    def delete(self, ids: Sequence[int]) -> None:
        self.send("POST", "/points/delete?wait=true", {"points": list(ids)})

    def set_payload(self, id_: int, payload: Mapping[str, Any]) -> None:
        self.send("POST", "/points/payload?wait=true", {"payload": payload, "points": [id_]})


def _json(vector: Any) -> Any:
    return {"text": vector} if isinstance(vector, str) else vector.tolist()


class Qdrant:
    """The Qdrant client, one for each model that its numbers may be of."""

    def __init__(self, url: str) -> None:
        self._clients = {
            model: QdrantClient(
                url=url,
                timeout=60,
                cloud_inference=True,
                check_compatibility=False,
                headers={"shoal-model": model} if model else {},
            )
            for model in ("", *DIMS)
        }

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def query(self, query: Any, model: str, limit: int, only: Any = None) -> list[Found]:
        if isinstance(query, str):
            query, model = models.Document(text=query, model=model), ""
        elif not isinstance(query, int):
            query = query.tolist()
        answer = self._clients[model].query_points(
            NAME,
            query=query,
            using="v",
            limit=limit,
            query_filter=None if only is None else models.Filter(**only),
            with_vectors=True,
            with_payload=True,
        )
        return [
            Found(
                int(hit.id),
                hit.score,
                {name: np.array(v, np.float32) for name, v in (hit.vector or {}).items()},  # type: ignore[union-attr]
                hit.payload or {},
            )
            for hit in answer.points
        ]

    def put(self, points: Mapping[int, Point], vectors: Sequence[Any], model: str) -> None:
        made = [
            models.PointStruct(
                id=id_,
                vector={
                    "v": models.Document(text=vector, model=model)
                    if isinstance(vector, str)
                    else vector.tolist()
                },
                payload=point.payload,
            )
            for (id_, point), vector in zip(points.items(), vectors, strict=True)
        ]
        self._clients[model].upsert(NAME, made, wait=True)

    def delete(self, ids: Sequence[int]) -> None:
        self._clients[""].delete(NAME, list(ids), wait=True)

    def set_payload(self, id_: int, payload: Mapping[str, Any]) -> None:
        self._clients[""].set_payload(NAME, dict(payload), points=[id_], wait=True)


class Grpc:
    """Shoal's own client."""

    def __init__(self, address: str) -> None:
        self._client = shoal.Client(address)

    def close(self) -> None:
        self._client.close()

    def query(self, query: Any, model: str, limit: int, only: Any = None) -> list[Found]:
        if isinstance(query, str):
            how = {"text": query, "model": model}
        elif isinstance(query, int):
            how = {"point": query}
        else:
            how = {"vector": query, "model": model}
        hits = self._client.search(
            NAME, using="v", limit=limit, filter=only, with_vectors=True, with_payload=True, **how
        )
        return [Found(h.id, h.score, _named(h.vectors), h.payload or {}) for h in hits]

    def put(self, points: Mapping[int, Point], vectors: Sequence[Any], model: str) -> None:
        payloads = [point.payload for point in points.values()]
        if isinstance(vectors[0], str):
            self._client.upsert(NAME, list(points), {"v": Texts(vectors, model)}, payloads)
        else:
            numbers = Batch(list(points), {"v": np.stack(vectors)}, payloads)
            self._client.upload(NAME, numbers, model=model, idempotent=False)

    def delete(self, ids: Sequence[int]) -> None:
        self._client.delete(NAME, list(ids))

    def set_payload(self, id_: int, payload: Mapping[str, Any]) -> None:
        self._client.set_payload(NAME, dict(payload), [id_])


def _named(vectors: Any) -> dict[str, Array]:
    assert isinstance(vectors, Mapping), vectors
    return dict(vectors)


# -- the clients ----------------------------------------------------------------------------------
class _Client:
    """A thread that works until `stop`. What goes wrong in it is raised by `check` and `stop`.

    speak   makes a way to talk; again after an error that `told` takes for the fault that the test
            makes (the thing talked to was killed).
    """

    def __init__(
        self, name: str, speak: Callable[[], Any], told: Callable[[Exception], bool] | None = None
    ) -> None:
        self.name, self._speak = name, speak
        self._told = told or (lambda error: False)
        self.failure: BaseException | None = None
        self.errors: list[str] = []
        self.turn = threading.Lock()  # held for one request; who has it may change what comes next
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        voice: Any = None
        try:
            while not self._ended.wait(PAUSE_S):
                if voice is None:
                    voice = self._speak()
                with self.turn:
                    try:
                        self._once(voice)
                    except Exception as error:
                        if not self._told(error):
                            raise
                        self.errors.append(f"{type(error).__name__}: {error}"[:200])
                        voice.close()
                        voice = None
        except BaseException as error:
            self.failure = error
        finally:
            if voice is not None:
                voice.close()

    def check(self) -> None:
        if self.failure is not None:
            raise AssertionError(f"{self.name}: {self.failure!r}") from self.failure

    def give_up(self) -> None:
        """Begin to stop; nobody waits."""
        self._ended.set()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(90)
            assert not self._thread.is_alive(), f"{self.name} hangs"
        self.check()

    def _once(self, voice: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Answer:
    began: float
    ended: float
    asked: str  # for which model; "" for whichever it is
    model: str


class Reader(_Client):
    """still: the points that nobody changes. One question in eight is for all of these at once."""

    def __init__(
        self,
        name: str,
        speak: Callable[[], Any],
        meant: TwoModels,
        still: Mapping[int, Point],
        seed: int,
        **told: Any,
    ) -> None:
        super().__init__(name, speak, **told)
        self._meant, self._rng = meant, random.Random(f"{seed}/{name}")
        self._still = still
        self._asks: tuple[str, ...] = ("", "old")
        self.answers: list[Answer] = []
        self.slowest_s = 0.0

    def ask_for(self, *asks: str) -> None:
        """Models to name from now on, in turn; "" names none."""
        with self.turn:
            self._asks = asks

    def _once(self, voice: Any) -> None:
        asked = self._rng.choice(self._asks)
        text = some_text(self._rng)
        query: Any = text
        kind = self._rng.choice(["text", "numbers", "point"])
        if kind == "point" and not asked:
            query = self._rng.randrange(len(self._still))
            text = self._still[query].text
        elif kind == "numbers" and asked:
            query = self._meant.vector(asked, text)
        limit, only = LIMIT, None
        if isinstance(query, str) and self._rng.random() < 1 / 8:
            limit, only = len(self._still), {"must": [{"key": "number", "match": {"value": 0}}]}
        began = time.monotonic()
        found = voice.query(query, asked, limit, only)
        ended = time.monotonic()
        assert len(found) == limit, f"{len(found)} of {limit} points for {query!r}"
        model = self.judge(found, text, asked)
        self.slowest_s = max(self.slowest_s, ended - began)
        self.answers.append(Answer(began, ended, asked, model))

    def judge(self, found: Sequence[Found], text: str, asked: str) -> str:
        """The model that the whole answer is of. Raises AssertionError."""
        model = model_of(found)
        assert asked in ("", model), f"asked {asked}, answered by {model}"
        query = self._meant.vector(model, text)
        exact = [float(query @ hit.vectors["v"]) for hit in found]
        assert np.allclose(exact, [hit.score for hit in found], atol=APART_MAX), (model, found)
        assert all(a.score >= b.score for a, b in pairwise(found)), found
        for hit in found:
            wrong = difference(self._meant, model, hit.vectors["v"], hit.payload)
            assert wrong is None, f"point {hit.id}: {wrong}"
        return model

    def models_between(self, began: float, ended: float) -> set[str]:
        """That answered who asked for none, of questions that lay between these moments."""
        with self.turn:
            answers = list(self.answers)
        return {
            answer.model
            for answer in answers
            if not answer.asked and began <= answer.began and answer.ended <= ended
        }


def model_of(found: Iterable[Found]) -> str:
    """By the dimensions of the vectors; they must agree, and no stored name may be seen."""
    names = {name for hit in found for name in hit.vectors}
    assert names == {"v"}, names
    dims = {len(hit.vectors["v"]) for hit in found}
    by_dim = {dim: model for model, dim in DIMS.items()}
    assert len(dims) == 1, f"vectors of several models in one answer: {dims}"
    return by_dim[dims.pop()]


def difference(
    meant: TwoModels, model: str, vector: Array, payload: Mapping[str, Any]
) -> str | None:
    """What is wrong with this vector of this model in a point with this payload."""
    text = payload["made_of" if model == "old" else "text"]
    apart = float(np.abs(vector - meant.vector(model, text)).max())
    return (
        None
        if apart < APART_MAX
        else f"its {model} vector is not that of {text!r} (by {apart:.3f})"
    )


class Writer(_Client):
    """Writes ids of its own, one request at a time. Change `declares` and `retexts` only with `turn`
    held.

    declares  models that numbers may be said to be of; none: texts only.
    retexts   payloads may get another text. Not around a switch: what is searched is not made anew
              when a payload changes.
    there     what was acknowledged. doubtful: ids of requests whose end is not known.
    """

    def __init__(
        self, number: int, speak: Callable[[], Any], meant: TwoModels, seed: int, **told: Any
    ) -> None:
        super().__init__(f"writer {number}", speak, **told)
        self._meant, self._rng = meant, random.Random(f"{seed}/writer {number}")
        self.ids = range((number + 1) * IDS_PER_WRITER, (number + 2) * IDS_PER_WRITER)
        self.there: dict[int, Point] = {}
        self.doubtful: set[int] = set()
        self.declares: tuple[str, ...] = ()
        self.retexts = True
        self.writes = 0
        self._number = 0

    def allow(self, *declares: str, retexts: bool) -> None:
        with self.turn:
            self.declares, self.retexts = declares, retexts

    def _once(self, voice: Any) -> None:
        self._number += 1
        kinds = ["put", "put", "put", "note", "delete", *(["text"] if self.retexts else [])]
        kind, mine = self._rng.choice(kinds), sorted(self.there)
        if kind == "put" or len(mine) < 40:
            change: dict[int, Point | None] = {**self._new_points()}
        elif kind == "delete":
            change = dict.fromkeys(self._rng.sample(mine, 3))
        else:
            id_ = self._rng.choice(mine)
            was = self.there[id_]
            text = some_text(self._rng) if kind == "text" else was.text
            change = {id_: Point(was.made_of, text, self._number)}
        try:
            self._send(voice, kind if len(mine) >= 40 else "put", change)
        except Exception:
            for id_ in change:
                self.there.pop(id_, None)
            self.doubtful |= change.keys()
            raise
        for id_, point in change.items():
            if point is None:
                del self.there[id_]
            else:
                self.there[id_] = point
        self.writes += 1

    def _new_points(self) -> dict[int, Point]:
        ids = self._rng.sample(self.ids[:400], self._rng.choice([1, 2, 8]))
        texts = [some_text(self._rng) for _ in ids]
        return {
            id_: Point(text, text, self._number)
            for id_, text in zip(ids, texts, strict=True)
            if id_ not in self.doubtful
        } or {self.ids[400 + self._number % 9_000]: Point(texts[0], texts[0], self._number)}

    def _send(self, voice: Any, kind: str, change: Mapping[int, Point | None]) -> None:
        points = {id_: point for id_, point in change.items() if point is not None}
        if not points:
            voice.delete(list(change))
        elif kind == "put":
            texts: list[Any] = [point.text for point in points.values()]
            declared = self._rng.choice(["", *self.declares])
            if declared and self._rng.random() < 0.7:
                texts = [self._meant.vector(declared, text) for text in texts]
            voice.put(points, texts, declared)
        else:
            ((id_, point),) = points.items()
            changed = point.payload if kind == "text" else {"number": point.number}
            voice.set_payload(id_, changed)


# -- the collection -------------------------------------------------------------------------------
def create(http: httpx.Client, **settings: Any) -> None:
    vectors = {"v": {"size": DIMS["old"], "distance": "Dot", "shoal_model": "old"}}
    body = {"vectors": vectors, **settings}
    http.put(f"/collections/{NAME}", json=body).raise_for_status()


def fill(http: Http, count: int, seed: int) -> dict[int, Point]:
    """Points 0, 1, …, all of number 0."""
    rng = random.Random(f"{seed}/fill")
    texts = [some_text(rng) for _ in range(count)]
    points = {id_: Point(text, text, 0) for id_, text in enumerate(texts)}
    for first in range(0, count, 200):
        part = {id_: points[id_] for id_ in range(first, min(first + 200, count))}
        http.put(part, [point.text for point in part.values()], "")
    return points


def scroll(http: httpx.Client) -> dict[int, Found]:
    """Every point, as the primaries have it."""
    found: dict[int, Found] = {}
    offset: Any = None
    while True:
        body = {"limit": 1000, "offset": offset, "with_payload": True, "with_vector": True}
        answer = http.post(
            f"/collections/{NAME}/points/scroll", params={"consistency": "all"}, json=body
        )
        assert answer.status_code == 200, answer.text[:600]
        page = answer.json()["result"]
        for point in page["points"]:
            vectors = {n: np.array(v, np.float32) for n, v in point["vector"].items()}
            found[point["id"]] = Found(point["id"], 0.0, vectors, point["payload"])
        if (offset := page["next_page_offset"]) is None:
            return found


def check_points(
    found: Mapping[int, Found],
    expected: Mapping[int, Point],
    model: str,
    meant: TwoModels,
    doubtful: Iterable[int] = (),
) -> None:
    """Each point is there as it was written, with the vector of that model and no other. Those in
    doubt may be there or not, but not be wrong."""
    left_out = set(doubtful)
    lost = sorted(expected.keys() - found.keys() - left_out)
    strangers = sorted(found.keys() - expected.keys() - left_out)
    assert not lost, f"{len(lost)} points are lost: {lost[:10]}"
    assert not strangers, f"{len(strangers)} points that nobody wrote: {strangers[:10]}"
    wrong = []
    for id_, point in found.items():
        if id_ not in left_out and point.payload != expected[id_].payload:
            wrong.append(f"point {id_}: {point.payload}, and not {expected[id_].payload}")
        elif point.vectors.keys() != {"v"} or len(point.vectors["v"]) != DIMS[model]:
            sizes = {name: len(vector) for name, vector in point.vectors.items()}
            wrong.append(f"point {id_} has {sizes}")
        elif told := difference(meant, model, point.vectors["v"], point.payload):
            wrong.append(f"point {id_}: {told}")
    assert not wrong, f"{len(wrong)} of {len(found)} points are wrong:\n" + "\n".join(wrong[:10])


# -- the migration --------------------------------------------------------------------------------
class Migrate:
    """One migration, asked over HTTP. `ask` answers the result, or the message of the error that was
    expected."""

    def __init__(self, url: str, vector: str = "v", collection: str = NAME) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self._path = f"/collections/{collection}/vectors/{vector}/migrate"

    def close(self) -> None:
        self._http.close()

    def ask(self, action: str = "", body: Any = None, status: int = 200) -> Any:
        path = f"{self._path}/{action}" if action else self._path
        answer = self._http.post(path, json=body if body is not None else {})
        assert answer.status_code == status, f"{action}: {answer.status_code} {answer.text[:600]}"
        said = answer.json()
        return said["result"] if status == 200 else said["status"]["error"]

    def start(self, points_per_second: float | None = None) -> dict[str, Any]:
        """Or give the one under way another rate. None: no bound."""
        body = {"model": "new", "text_field": "text", "points_per_second": points_per_second}
        result: dict[str, Any] = self.ask("", body)
        return result

    def status(self) -> dict[str, Any] | None:
        """None: over, or never begun."""
        answer = self._http.get(self._path)
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, answer.text[:600]
        result: dict[str, Any] = answer.json()["result"]
        return result

    def until(
        self, done: Callable[[dict[str, Any]], bool], *clients: _Client, within_s: float = 60.0
    ) -> dict[str, Any]:
        """Wait for a status; a client that fails meanwhile ends the wait."""
        last: list[dict[str, Any]] = []

        def there() -> bool:
            for client in clients:
                client.check()
            status = self.status()
            assert status is not None, "there is no migration"
            last[:] = [status]
            return done(status)

        try:
            wait_until(there, within_s=within_s, what="a status")
        except AssertionError as error:
            raise AssertionError(f"{error}; the last one: {last}") from error
        return last[0]

    def until_over(self, *clients: _Client, within_s: float = 60.0) -> None:
        def over() -> bool:
            for client in clients:
                client.check()
            return self.status() is None

        wait_until(over, within_s=within_s, what="the end of the migration")
