"""Which operations a run makes: writes that both sides must take alike, and reads to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qdrant_client import models as m
from world import PATHS, TAGS, Call, World

__all__ = ["any_read", "any_write", "bulk_upsert"]

Maker = Callable[[World], Call]

INDEX_SCHEMAS = [
    m.PayloadSchemaType.KEYWORD, m.PayloadSchemaType.INTEGER, m.PayloadSchemaType.FLOAT,
    m.PayloadSchemaType.BOOL, m.PayloadSchemaType.GEO, m.PayloadSchemaType.DATETIME,
    m.PayloadSchemaType.TEXT, m.PayloadSchemaType.UUID,
    m.IntegerIndexParams(type=m.IntegerIndexType.INTEGER, lookup=True, range=True),
    m.KeywordIndexParams(type=m.KeywordIndexType.KEYWORD, is_tenant=True),
]  # fmt: skip


def any_write(world: World) -> Call:
    weights = [weight for _, weight in WRITES]
    return world.rng.choices([maker for maker, _ in WRITES], weights)[0](world)


def any_read(world: World) -> Call:
    weights = [weight for _, weight in READS]
    return world.rng.choices([maker for maker, _ in READS], weights)[0](world)


def _write(method: str, **arguments: Any) -> Call:
    return Call(method, {**arguments, "wait": True}, writes=True)


# -- writes ---------------------------------------------------------------------------------------
def upsert_list(world: World) -> Call:
    points = [world.point() for _ in range(world.rng.randint(1, 12))]
    if world.chance(0.3):  # the same id twice in one request: the later one wins
        points.append(world.point().model_copy(update={"id": points[0].id}))
    return _write("upsert", points=points, **_update_conditions(world))


def bulk_upsert(world: World) -> Call:
    points = [world.point(all_vectors=True) for _ in range(world.rng.randint(30, 80))]
    return _write("upsert", points=points)


def upsert_batch(world: World) -> Call:
    return _write("upsert", points=_batch(world), **_update_conditions(world))


def _batch(world: World) -> m.Batch:
    ids = world.some_ids(10)
    names = world.shape.vector_names
    if names == [""] and world.chance(0.8):
        vectors: Any = [world.vector_of("") for _ in ids]
    else:
        chosen = [name for name in names if world.chance(0.7)] or names[:1]
        vectors = {name: [world.vector_of(name) for _ in ids] for name in chosen}
    payloads = [world.payload() or {} for _ in ids] if world.chance(0.9) else None
    return m.Batch(ids=ids, vectors=vectors, payloads=payloads)


def _update_conditions(world: World) -> dict[str, Any]:
    conditions: dict[str, Any] = {}
    if world.chance(0.15):
        conditions["update_filter"] = world.filter()
    if world.chance(0.2):
        conditions["update_mode"] = world.rng.choice(list(m.UpdateMode))
    return conditions


def delete_ids(world: World) -> Call:
    ids = world.some_ids(6)
    wrapped = world.chance(0.5)
    return _write("delete", points_selector=m.PointIdsList(points=ids) if wrapped else ids)


def delete_filter(world: World) -> Call:
    # A filter that matches everything would leave nothing to test with: narrow it by ids.
    narrow = m.Filter(must=[m.HasIdCondition(has_id=world.some_ids(40)), world.filter()])
    wrapped = world.chance(0.5)
    return _write("delete", points_selector=m.FilterSelector(filter=narrow) if wrapped else narrow)


def _selector(world: World) -> Any:
    if world.chance(0.5):
        return world.some_ids(5)
    return m.Filter(must=[m.HasIdCondition(has_id=world.some_ids(40)), world.filter()])


def _selector_fields(world: World) -> dict[str, Any]:
    chosen = _selector(world)
    return {"points": chosen} if isinstance(chosen, list) else {"filter": chosen}


def _payload_key(world: World) -> str | None:
    if world.chance(0.5):
        return None
    return world.rng.choice(
        ["deep", "deep.a", "deep.new", "items[0]", "items[]", "items[].k", '"odd key"', "mixed",
         "fresh", "fresh.path", "deep.list", "tags"]
    )  # fmt: skip


def set_payload(world: World) -> Call:
    payload = world.payload() or {"city": None}
    return _write("set_payload", payload=payload, points=_selector(world), key=_payload_key(world))


def overwrite_payload(world: World) -> Call:
    return _write("overwrite_payload", payload=world.payload() or {}, points=_selector(world))


def delete_payload(world: World) -> Call:
    keys = world.rng.sample(PATHS, world.rng.randint(1, 3))
    return _write("delete_payload", keys=keys, points=_selector(world))


def clear_payload(world: World) -> Call:
    return _write("clear_payload", points_selector=_selector(world))


def _point_vectors(world: World) -> list[m.PointVectors]:
    names = world.shape.vector_names
    made = []
    for id_ in world.some_ids(4):
        chosen = world.rng.sample(names, world.rng.randint(1, len(names)))
        if names == [""] and world.chance(0.7):
            made.append(m.PointVectors(id=id_, vector=world.vector_of("")))
        else:
            vectors = {name: world.vector_of(name) for name in chosen}
            made.append(m.PointVectors(id=id_, vector=vectors))
    return made


def update_vectors(world: World) -> Call:
    extra = {"update_filter": world.filter()} if world.chance(0.2) else {}
    return _write("update_vectors", points=_point_vectors(world), **extra)


def delete_vectors(world: World) -> Call:
    names = world.shape.vector_names
    chosen = world.rng.sample(names, world.rng.randint(1, min(2, len(names))))
    return _write("delete_vectors", vectors=chosen, points=_selector(world))


def batch_update_points(world: World) -> Call:
    makers: list[Callable[[], Any]] = [
        lambda: m.UpsertOperation(
            upsert=m.PointsList(
                points=[world.point() for _ in range(3)], **_update_conditions(world)
            )
        ),
        lambda: m.UpsertOperation(upsert=m.PointsBatch(batch=_batch(world))),
        lambda: m.DeleteOperation(delete=m.PointIdsList(points=world.some_ids(3))),
        lambda: m.SetPayloadOperation(
            set_payload=m.SetPayload(
                payload=world.payload() or {}, key=_payload_key(world), **_selector_fields(world)
            )
        ),
        lambda: m.OverwritePayloadOperation(
            overwrite_payload=m.SetPayload(payload=world.payload() or {}, **_selector_fields(world))
        ),
        lambda: m.DeletePayloadOperation(
            delete_payload=m.DeletePayload(
                keys=[world.rng.choice(PATHS)], **_selector_fields(world)
            )
        ),
        lambda: m.ClearPayloadOperation(clear_payload=m.PointIdsList(points=world.some_ids(3))),
        lambda: m.UpdateVectorsOperation(
            update_vectors=m.UpdateVectors(points=_point_vectors(world))
        ),
        lambda: m.DeleteVectorsOperation(
            delete_vectors=m.DeleteVectors(
                vector=[world.rng.choice(world.shape.vector_names)], **_selector_fields(world)
            )
        ),
    ]
    operations = [world.rng.choice(makers)() for _ in range(world.rng.randint(1, 5))]
    return _write("batch_update_points", update_operations=operations)


def create_payload_index(world: World) -> Call:
    key = world.rng.choice([path for path in PATHS if "[0]" not in path and "[1]" not in path])
    return _write(
        "create_payload_index", field_name=key, field_schema=world.rng.choice(INDEX_SCHEMAS)
    )


def delete_payload_index(world: World) -> Call:
    return _write("delete_payload_index", field_name=world.rng.choice(PATHS))


def refused(world: World) -> Call:
    """Wrong input: both sides must refuse it and change nothing."""
    names = world.shape.vector_names
    good = world.point(all_vectors=True)
    wrong: list[Call] = [
        _write("upsert", points=[good, m.PointStruct(id=1, vector={"no such vector": [1.0]})]),
        _write("upsert", points=[good, m.PointStruct(id="no uuid", vector=good.vector)]),
        _write("delete", points_selector=[]),
        _write("delete_vectors", vectors=["no such vector"], points=world.some_ids()),
        _write("set_payload", payload={"a": 1}, points=world.some_ids(), key="a..b"),
        _write("delete_payload", keys=["a["], points=world.some_ids()),
        _write("update_vectors", points=[]),
    ]
    for name, (dim, _) in world.shape.dense.items():
        vector = {name: world.floats(dim + 1)}
        wrong.append(_write("upsert", points=[good, m.PointStruct(id=2, vector=vector)]))
        wrong.append(_write("update_vectors", points=[m.PointVectors(id=2, vector=vector)]))
    for name in world.shape.multi:
        ragged = {name: [[1.0], [1.0, 2.0]]}
        wrong.append(_write("upsert", points=[good, m.PointStruct(id=2, vector=ragged)]))
    for name in world.shape.sparse:
        twice = {name: m.SparseVector(indices=[3, 3], values=[1.0, 2.0])}
        wrong.append(_write("upsert", points=[good, m.PointStruct(id=2, vector=twice)]))
    if names != [""]:
        wrong.append(_write("upsert", points=[good, m.PointStruct(id=2, vector=[1.0, 2.0])]))
    return world.rng.choice(wrong)


WRITES: list[tuple[Maker, float]] = [
    (upsert_list, 8),
    (bulk_upsert, 3),
    (upsert_batch, 5),
    (delete_ids, 3),
    (delete_filter, 2),
    (set_payload, 5),
    (overwrite_payload, 2),
    (delete_payload, 2),
    (clear_payload, 1),
    (update_vectors, 4),
    (delete_vectors, 2),
    (batch_update_points, 4),
    (create_payload_index, 1.5),
    (delete_payload_index, 0.5),
    (refused, 1.5),
]


# -- reads ----------------------------------------------------------------------------------------
def _with_payload(world: World) -> Any:
    return world.rng.choice(
        [
            True,
            True,
            False,
            ["city", "deep.a"],
            ["items[].k", "tags"],
            [],
            m.PayloadSelectorInclude(include=["deep", "items", '"odd key"']),
            m.PayloadSelectorExclude(exclude=["filler", "deep.b", "items[].v", "tags[]"]),
        ]
    )


def _with_vectors(world: World) -> bool | list[str]:
    if world.chance(0.6):
        return world.chance(0.5)
    names = world.shape.vector_names
    return world.rng.sample(names, world.rng.randint(0, len(names)))


def retrieve(world: World) -> Call:
    return Call(
        "retrieve",
        {
            "ids": world.some_ids(12),
            "with_payload": _with_payload(world),
            "with_vectors": _with_vectors(world),
        },
    )


def scroll(world: World) -> Call:
    return Call(
        "scroll",
        {
            "scroll_filter": world.maybe_filter(),
            "limit": world.rng.choice([1, 3, 10, 50]),
            "offset": world.id() if world.chance(0.5) else None,
            "with_payload": _with_payload(world),
            "with_vectors": _with_vectors(world),
        },
    )


def count(world: World) -> Call:
    return Call("count", {"count_filter": world.maybe_filter(0.95), "exact": True})


def query(world: World) -> Call:
    """By vector, by id, or without a query. Only dense vectors are searched on this level."""
    arguments: dict[str, Any] = {
        "query_filter": world.maybe_filter(),
        "limit": world.rng.choice([1, 3, 10, 40]),
        "offset": world.rng.choice([None, None, 0, 2, 15]),
        "with_payload": _with_payload(world),
        "with_vectors": _with_vectors(world),
    }
    kind = world.rng.random()
    if kind < 0.1 or not world.shape.dense:
        return Call("query_points", {"query": None, **arguments})
    name = world.rng.choice(sorted(world.shape.dense))
    arguments["using"] = name or None
    arguments["search_params"] = world.rng.choice(
        [None, m.SearchParams(exact=True), m.SearchParams(exact=True), m.SearchParams(hnsw_ef=200)]
    )
    if world.chance(0.3):
        arguments["score_threshold"] = _threshold(world, world.shape.dense[name][1])
    vector: Any = world.floats(world.shape.dense[name][0])
    if kind < 0.3:
        vector = world.id()
    elif kind < 0.5:
        vector = m.NearestQuery(nearest=vector)
    return Call("query_points", {"query": vector, **arguments})


def _threshold(world: World, distance: m.Distance) -> float:
    """Sums of whole numbers are exact on both sides, so such a threshold may be hit; elsewhere one
    that is hit would depend on the last bit of a score."""
    fractions = [-0.5, 0.13, 0.61, 3.3, 5.7, 21.3]
    whole = [-3.0, 0.0, 2.0, 4.0, 11.0]
    exact = distance in (m.Distance.DOT, m.Distance.MANHATTAN)
    return world.rng.choice(fractions + whole if exact else fractions)


def by_tag(world: World) -> Call:
    """One keyword only: the most common filter of all, from few to many matches."""
    tag = m.FieldCondition(key="tags", match=m.MatchValue(value=world.rng.choice(TAGS)))
    return Call("count", {"count_filter": m.Filter(must=[tag]), "exact": True})


READS: list[tuple[Maker, float]] = [(retrieve, 2), (scroll, 3), (count, 3), (query, 6), (by_tag, 1)]
