"""One function per operation of the API: a `Call` in, the JSON of `result` out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec
from google.protobuf.message import DecodeError

from coordinator import requests
from coordinator.catalog import Collection
from coordinator.creation import index_params
from coordinator.describe import describe_collection, describe_status
from coordinator.freshness import read_wanted
from coordinator.http import Answer, Call
from coordinator.json_body import validate
from coordinator.metrics import CONTENT_TYPE
from coordinator.migrations import UNNAMED
from coordinator.parse import PointsWrite, check_batch, parse_update_vectors, parse_upsert
from coordinator.render import (
    render_hits,
    render_model,
    render_points,
    render_record,
    render_scroll,
)
from coordinator.requests import AnyWrite, Retrieve
from coordinator.service import Written
from shoal.api import migration, models
from shoal.api.filter import parse_filter
from shoal.batch import PointBatch
from shoal.errors import BadRequest, BodyTooLarge, NotFound, NotSupported
from shoal.ids import PointIds, format_id, parse_id
from shoal.json_path import parse_path
from shoal.limits import CONFIG_BYTES_MAX, MIB
from shoal.storage_api import Read
from shoal.vectors import VectorFields
from shoal.version import VERSION
from shoal.wire import ops_pb2 as wire

__all__: list[str] = []  # coordinator/routes.py takes them all by name

# The REST API version that we answer to; clients warn when theirs is more than one minor off.
API_VERSION = "1.19.0"
# Larger bodies are parsed in another thread, so that searches get a turn in between: 4 MiB take
# about 8 ms. Smaller ones are not worth the hop.
_PARSE_INLINE_BYTES_MAX = 4 * MIB

W = TypeVar("W")


async def _collection(call: Call) -> Collection:
    return await call.coordinator.catalog.find(call.params["collection_name"])


def _vectors_of(write: AnyWrite) -> Iterable[str]:
    return write.points.dense if isinstance(write, PointsWrite) else ()


def _fresh(call: Call, collection: Collection) -> Read:
    """How fresh the answer must be: see coordinator/freshness.py."""
    return read_wanted(call.options.consistency, call.token(), collection.replication_factor)


# -- the server -----------------------------------------------------------------------------------
async def version(call: Call) -> Answer:
    """Without the envelope, as clients expect it."""
    info = models.VersionInfo(
        title="shoal - vector database",
        version=API_VERSION,
        commit=None,
        server=models.ServerVersion(name="shoal", version=VERSION),
    )
    return Answer(200, info.model_dump_json().encode())


async def alive(call: Call) -> Answer:
    return Answer(200, b"healthz check passed", b"text/plain; charset=utf-8")


async def ready(call: Call) -> Answer:
    report = call.health()
    if report.ready:
        return Answer(200, b"all shards are ready", b"text/plain; charset=utf-8")
    text = "not ready: starting or stopping; " + "; ".join(report.reasons)
    return Answer(503, text.encode(), b"text/plain; charset=utf-8")


async def metrics(call: Call) -> Answer:
    coordinator = call.coordinator
    text = call.metrics.render(call.health(), coordinator.extra_requests(), coordinator.copying())
    return Answer(200, text, CONTENT_TYPE)


async def status(call: Call) -> bytes:
    coordinator = call.coordinator
    return msgspec.json.encode(
        describe_status(
            call.health(), coordinator.catalog.collections(), VERSION, coordinator.models()
        )
    )


async def cluster_report(call: Call) -> bytes:
    return msgspec.json.encode(await call.coordinator.describe_cluster())


async def cluster_peers(call: Call) -> bytes:
    return msgspec.json.encode(await call.coordinator.describe_peers())


# -- collections ----------------------------------------------------------------------------------
async def list_collections(call: Call) -> bytes:
    names = call.coordinator.catalog.names()
    return msgspec.json.encode({"collections": [{"name": name} for name in names]})


async def collection_exists(call: Call) -> bytes:
    try:
        await _collection(call)
    except NotFound:
        return b'{"exists":false}'
    return b'{"exists":true}'


async def create_collection(call: Call) -> bytes:
    request = validate(models.CreateCollection, _small(call.body))
    await call.coordinator.catalog.create(call.params["collection_name"], request)
    return b"true"


def _small(body: bytes) -> bytes:
    """The body of a change of the catalog. Checking one of many MiB would hold everybody else."""
    if len(body) > CONFIG_BYTES_MAX:
        raise BodyTooLarge(
            f"Payload too large: a collection's configuration may have {CONFIG_BYTES_MAX} bytes"
        )
    return body


async def delete_collection(call: Call) -> bytes:
    deleted = await call.coordinator.catalog.delete(call.params["collection_name"])
    return b"true" if deleted else b"false"


async def get_collection(call: Call) -> bytes:
    collection = await _collection(call)
    infos = await call.coordinator.infos(collection)
    points_by_index = {}
    if all(info.stopped is None for info in infos):
        for field in collection.record.payload_schema:
            has_value = parse_filter({"must_not": [{"is_empty": {"key": field}}]})
            points_by_index[field] = await call.coordinator.count(collection, has_value)
    return render_model(describe_collection(collection, infos, points_by_index))


async def collection_cluster(call: Call) -> bytes:
    collection = await _collection(call)
    return msgspec.json.encode(await call.coordinator.describe_replicas(collection))


# -- changing the model of a vector ---------------------------------------------------------------
async def migrate(call: Call) -> bytes:
    collection, vector = await _vector(call)
    request = validate(migration.MigrateRequest, _small(call.body))
    return render_model(await call.coordinator.migrations.start(collection, vector, request))


async def migration_status(call: Call) -> bytes:
    return render_model(await call.coordinator.migrations.status(*await _vector(call)))


async def compare_models(call: Call) -> bytes:
    collection, vector = await _vector(call)
    request = validate(migration.CompareRequest, _small(call.body) or b"{}")
    return render_model(await call.coordinator.migrations.compare(collection, vector, request))


async def switch_model(call: Call) -> bytes:
    collection, vector = await _vector(call)
    request = validate(migration.SwitchRequest, _small(call.body) or b"{}")
    return render_model(await call.coordinator.migrations.switch(collection, vector, request))


async def rollback_model(call: Call) -> bytes:
    collection, vector = await _vector(call)
    validate(migration.RollbackRequest, _small(call.body) or b"{}")
    return render_model(await call.coordinator.migrations.rollback(collection, vector))


async def drop_model(call: Call) -> bytes:
    collection, vector = await _vector(call)
    request = validate(migration.DropRequest, _small(call.body))
    return render_model(await call.coordinator.migrations.drop(collection, vector, request))


async def _vector(call: Call) -> tuple[Collection, str]:
    collection, name = await _collection(call), call.params["vector"]
    return collection, "" if name == UNNAMED and name not in collection.fields else name


async def list_aliases(call: Call) -> bytes:
    if "collection_name" in call.params:
        await _collection(call)
    return b'{"aliases":[]}'


async def create_index(call: Call) -> bytes:
    collection = await _collection(call)
    request = validate(models.CreateFieldIndex, _small(call.body))
    parse_path(request.field_name)
    await call.coordinator.catalog.set_index(
        collection.name, request.field_name, index_params(request)
    )
    return _updated(call, 0)


async def delete_index(call: Call) -> bytes:
    collection = await _collection(call)
    await call.coordinator.catalog.set_index(collection.name, call.params["field_name"], None)
    return _updated(call, 0)


# -- points: reads --------------------------------------------------------------------------------
async def query(call: Call) -> bytes:
    collection = await _collection(call)
    request = requests.parse_query(call.body)
    if request.vector is not None:
        texts, declared = call.coordinator.texts, call.header(b"shoal-model")
        collection = texts.numbers_of(collection, declared)
        texts.check_numbers(collection, declared, (request.using,), reading=True)
    hits = await call.coordinator.query(collection, request, _fresh(call, collection))
    return render_hits(hits, with_vectors=request.with_vectors is not False)


async def scroll(call: Call) -> bytes:
    collection = await _collection(call)
    request = requests.parse_scroll(call.body)
    read = _fresh(call, collection)
    points, following = await call.coordinator.scroll(collection, request, read)
    return render_scroll(points, following, with_vectors=request.with_vectors is not False)


async def retrieve(call: Call) -> bytes:
    collection = await _collection(call)
    request = requests.parse_retrieve(call.body)
    points = await call.coordinator.retrieve(collection, request, _fresh(call, collection))
    return render_points(points, with_vectors=request.with_vectors is not False)


async def get_point(call: Call) -> bytes:
    collection = await _collection(call)
    text = call.params["id"]
    key = parse_id(int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else text)
    found = await call.coordinator.retrieve(
        collection, Retrieve(PointIds.from_keys([key]), True, True), _fresh(call, collection)
    )
    if not len(found):
        raise NotFound(f"Not found: No point with id {format_id(key)} found")
    return render_record(found)


async def count(call: Call) -> bytes:
    collection = await _collection(call)
    request = validate(models.CountRequest, call.body)
    read = _fresh(call, collection)
    return b'{"count":%d}' % await call.coordinator.count(collection, request.filter, read)


# -- points: writes -------------------------------------------------------------------------------
async def upsert(call: Call) -> bytes:
    return await _write(call, parse_upsert)


async def update_vectors(call: Call) -> bytes:
    return await _write(call, parse_update_vectors)


async def delete_points(call: Call) -> bytes:
    return await _write(call, requests.delete_points)


async def delete_vectors(call: Call) -> bytes:
    return await _write(call, requests.delete_vectors)


async def set_payload(call: Call) -> bytes:
    return await _write(call, requests.set_payload)


async def overwrite_payload(call: Call) -> bytes:
    return await _write(call, requests.overwrite_payload)


async def delete_payload(call: Call) -> bytes:
    return await _write(call, requests.delete_payload)


async def clear_payload(call: Call) -> bytes:
    return await _write(call, requests.clear_payload)


async def batch_update(call: Call) -> bytes:
    collection = await _written_to(call)
    writes = await _parsed(call, requests.parse_operations, collection.fields)
    _check_model(call, collection, [name for write in writes for name in _vectors_of(write)])
    done = await call.coordinator.write_all(collection, writes)
    return b"[" + b",".join([_written(call, one) for one in done]) + b"]"


async def put_batch(call: Call) -> bytes:
    """A serialized PointBatch: what `shoal import` sends, four times cheaper than JSON."""
    collection = await _written_to(call)
    points = await _parsed(call, _batch_of, collection.fields)
    write = PointsWrite(points)
    _check_model(call, collection, points.dense)
    done = await call.coordinator.write(collection, write)
    return b'{"points":%d,%b' % (len(points), _written(call, done)[1:])


def _batch_of(body: bytes, fields: VectorFields) -> PointBatch:
    try:
        points = PointBatch.from_wire(wire.PointBatch.FromString(body))
    except (DecodeError, ValueError) as error:
        raise BadRequest(f"Wrong input: the body is no serialized PointBatch: {error}") from None
    return check_batch(points, fields)


async def _written_to(call: Call) -> Collection:
    """The header `shoal-model` says which model the numbers of a request are of."""
    collection = await _collection(call)
    return call.coordinator.texts.numbers_of(collection, call.header(b"shoal-model"))


def _check_model(call: Call, collection: Collection, vectors: Iterable[str]) -> None:
    call.coordinator.texts.check_numbers(collection, call.header(b"shoal-model"), vectors)


async def _write(call: Call, parse: Callable[[bytes, VectorFields], AnyWrite]) -> bytes:
    collection = await _written_to(call)
    request = await _parsed(call, parse, collection.fields)
    _check_model(call, collection, _vectors_of(request))
    return _written(call, await call.coordinator.write(collection, request))


async def _parsed(call: Call, parse: Callable[[bytes, VectorFields], W], fields: VectorFields) -> W:
    if len(call.body) > _PARSE_INLINE_BYTES_MAX:
        return await asyncio.to_thread(parse, call.body, fields)
    return parse(call.body, fields)


def _written(call: Call, done: Written) -> bytes:
    """Several writes in one request follow each other: a later one has the larger numbers."""
    call.written.update(done.sequences)
    return _updated(call, done.operation)


def _updated(call: Call, operation: int) -> bytes:
    said = b"completed" if call.options.wait else b"acknowledged"
    return b'{"operation_id":%d,"status":"%b"}' % (operation, said)


# -- what this version lacks ----------------------------------------------------------------------
async def not_supported(call: Call) -> bytes:
    raise NotSupported(
        "Not supported: this version of Shoal cannot do this operation yet; /docs lists what it can"
    )
