"""storage_api <-> the messages of proto/shoal/node/v1. Pure: values in, values out.

Columns stay what they are (shoal.batch): packed bytes are handed over, never walked. A filter
travels as its JSON, and is the same filter on the other side; both ends remember the last ones,
because the shards of one search share theirs. What comes from the wire is checked here, once:
a message that cannot be meant raises BadRequest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from shoal import errors, limits
from shoal.api.filter import Filter
from shoal.batch import PointBatch
from shoal.errors import BadRequest, NotSupported, ShoalError, must
from shoal.files_api import FileChunk, FileSnapshot, SnapshotFile
from shoal.ids import PointIds
from shoal.metadata import contract
from shoal.node.v1 import node_pb2 as pb
from shoal.storage_api import (
    AlterVectors,
    ClearPayload,
    Delete,
    DeletePayload,
    DeleteVectors,
    Distance,
    Guard,
    Hits,
    OverwritePayload,
    ReplicaStatus,
    Scroll,
    Search,
    Selector,
    SetPayload,
    ShardInfo,
    ShardKey,
    ShardSpec,
    UpdateMode,
    UpdateVectors,
    Upsert,
    VectorSpec,
    Write,
    WriteResult,
)
from shoal.wire import ops_pb2 as wire

__all__ = [
    "ERROR_TYPES",
    "count_answer",
    "count_request",
    "decode_batch",
    "decode_chunk",
    "decode_error",
    "decode_filter",
    "decode_hits",
    "decode_info",
    "decode_key",
    "decode_result",
    "decode_retrieve",
    "decode_scroll",
    "decode_search",
    "decode_snapshot",
    "decode_spec",
    "decode_status",
    "decode_vectors",
    "decode_write",
    "encode_chunk",
    "encode_error",
    "encode_filter",
    "encode_key",
    "encode_snapshot",
    "encode_spec",
    "encode_status",
    "encode_vectors",
    "error_answer",
    "hits_answer",
    "info_answer",
    "info_request",
    "join_frames",
    "points_answer",
    "result_answer",
    "retrieve_request",
    "scroll_request",
    "search_request",
    "write_request",
]

M = TypeVar("M")
T = TypeVar("T")
WithVectors = bool | tuple[str, ...]
_FILTER_BYTES_KEPT_MAX = 4 * limits.KIB  # a longer one is parsed each time rather than remembered
_REQUESTS, _ANSWERS, _CANCELLED = (
    b"\x0a",
    b"\x12",
    b"\x1a",
)  # tags of Frames 1, 2, 3: a length follows


# -- frames ---------------------------------------------------------------------------------------
def join_frames(
    *, requests: Sequence[bytes] = (), answers: Sequence[bytes] = (), cancelled: Iterable[int] = ()
) -> bytes:
    """The bytes of one Frames message around messages that are serialised already: a message field is
    its tag, its length and its bytes, so nothing is copied twice."""
    parts: list[bytes] = []
    for tag, messages in ((_REQUESTS, requests), (_ANSWERS, answers)):
        for message in messages:
            parts += (tag, _varint(len(message)), message)
    packed = b"".join(map(_varint, cancelled))
    if packed:
        parts += (_CANCELLED, _varint(len(packed)), packed)
    return b"".join(parts)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _ONE_BYTE[number]
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_ONE_BYTE = [bytes((number,)) for number in range(0x80)]


# -- filters --------------------------------------------------------------------------------------
class _LastFilter:
    """A scatter encodes one filter for each shard: the same object, one after the other."""

    filter: Filter | None = None
    data = b""


def encode_filter(filter: Filter | None) -> bytes:
    """JSON, or b"" for none. Raises BadRequest for text that no UTF-8 can hold."""
    if filter is None:
        return b""
    if _LastFilter.filter is not filter:
        try:
            data = filter.model_dump_json(by_alias=True, exclude_none=True).encode()
        except (PydanticSerializationError, UnicodeError) as error:
            raise BadRequest(
                f"Wrong input: the filter holds text that is no Unicode: {error}"
            ) from None
        _LastFilter.filter, _LastFilter.data = filter, data
    return _LastFilter.data


def decode_filter(data: bytes) -> Filter | None:
    """The same filter. Short ones are remembered: equal bytes give the same object."""
    if not data:
        return None
    return _parse_kept(data) if len(data) <= _FILTER_BYTES_KEPT_MAX else _parse(data)


def _parse(data: bytes) -> Filter:
    # The sender checked size and depth (parse_filter); this is the same model.
    try:
        return Filter.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadRequest(
            f"Bad request: the filter from another node cannot be read ({first['msg']}): do all "
            "nodes run the same version?"
        ) from None


_parse_kept = lru_cache(maxsize=256)(_parse)


# -- requests -------------------------------------------------------------------------------------
def _request(id: int, shard: ShardKey, guard: Guard | None) -> pb.Request:
    if guard is None:
        return pb.Request(id=id, collection_id=shard.collection_id, shard=shard.shard)
    return pb.Request(
        id=id,
        collection_id=shard.collection_id,
        shard=shard.shard,
        min_applied=guard.min_applied,
        strong=guard.strong,
    )


def _set_vectors(message: pb.Search | pb.Scroll | pb.Retrieve, with_vectors: WithVectors) -> None:
    if with_vectors is True:
        message.all_vectors = True
    elif with_vectors is not False:
        message.some_vectors = True
        message.vectors.extend(with_vectors)


def _vectors(message: pb.Search | pb.Scroll | pb.Retrieve) -> WithVectors:
    return tuple(message.vectors) if message.some_vectors else message.all_vectors


def search_request(id: int, shard: ShardKey, query: Search, guard: Guard) -> bytes:
    request = _request(id, shard, guard)
    search = request.search
    search.vector = query.vector.astype("<f4", copy=False).tobytes()
    search.limit = query.limit
    if query.using:
        search.using = query.using
    if query.filter is not None:
        search.filter = encode_filter(query.filter)
    if query.exclude:
        PointIds.from_keys(query.exclude).fill(search.exclude)
    if query.score_threshold is not None:
        search.score_threshold = query.score_threshold
    if query.exact:
        search.exact = True
    if query.ef is not None:
        search.ef = query.ef
    if query.with_payload:
        search.with_payload = True
    if query.with_vectors is not False:
        _set_vectors(search, query.with_vectors)
    return request.SerializeToString()


def decode_search(search: pb.Search) -> Search:
    exclude: tuple[int, ...] = ()
    if search.HasField("exclude"):
        exclude = tuple(_decode_ids(search.exclude).keys())
    return Search(
        using=search.using,
        vector=_checked(_floats, search.vector),
        limit=search.limit,
        filter=decode_filter(search.filter),
        exclude=exclude,
        score_threshold=search.score_threshold if search.HasField("score_threshold") else None,
        exact=search.exact,
        ef=search.ef if search.HasField("ef") else None,
        with_payload=search.with_payload,
        with_vectors=_vectors(search),
    )


def retrieve_request(
    id: int,
    shard: ShardKey,
    ids: PointIds,
    with_payload: bool,
    with_vectors: WithVectors,
    guard: Guard,
) -> bytes:
    request = _request(id, shard, guard)
    ids.fill(request.retrieve.ids)
    request.retrieve.with_payload = with_payload
    _set_vectors(request.retrieve, with_vectors)
    return request.SerializeToString()


def decode_retrieve(message: pb.Retrieve) -> tuple[PointIds, bool, WithVectors]:
    return _decode_ids(message.ids), message.with_payload, _vectors(message)


def scroll_request(id: int, shard: ShardKey, query: Scroll, guard: Guard) -> bytes:
    request = _request(id, shard, guard)
    scroll = request.scroll
    scroll.limit = query.limit
    if query.start is not None:
        PointIds.from_keys([query.start]).fill(scroll.start)
    scroll.filter = encode_filter(query.filter)
    scroll.with_payload = query.with_payload
    _set_vectors(scroll, query.with_vectors)
    return request.SerializeToString()


def decode_scroll(message: pb.Scroll) -> Scroll:
    return Scroll(
        limit=message.limit,
        start=_one_key(message.start) if message.HasField("start") else None,
        filter=decode_filter(message.filter),
        with_payload=message.with_payload,
        with_vectors=_vectors(message),
    )


def _one_key(ids: wire.PointIds) -> int:
    keys = _decode_ids(ids).keys()
    if len(keys) != 1:
        raise BadRequest(f"Bad request: one point id was expected, not {len(keys)}")
    return keys[0]


def count_request(id: int, shard: ShardKey, filter: Filter | None, guard: Guard) -> bytes:
    request = _request(id, shard, guard)
    request.count.filter = encode_filter(filter)
    request.count.SetInParent()
    return request.SerializeToString()


def info_request(id: int, shard: ShardKey) -> bytes:
    request = _request(id, shard, None)
    request.info.SetInParent()
    return request.SerializeToString()


# -- writes ---------------------------------------------------------------------------------------
def write_request(id: int, shard: ShardKey, op: Write) -> bytes:
    request = _request(id, shard, None)
    _fill_write(request.write, op)
    return request.SerializeToString()


def _fill_write(message: pb.Write, op: Write) -> None:
    message.epoch = op.epoch
    match op:
        case Upsert():
            op.points.fill(message.upsert.points)
            message.upsert.update_filter = encode_filter(op.update_filter)
            message.upsert.mode = _MODE_NUMBER[op.mode]
        case UpdateVectors():
            op.points.fill(message.update_vectors.points)
            message.update_vectors.update_filter = encode_filter(op.update_filter)
            message.update_vectors.forget.extend(op.forget)
            if op.if_versions is not None:
                message.update_vectors.if_versions = op.if_versions.astype("<u8").tobytes()
        case Delete():
            _fill_where(message.delete.where, op.where)
        case DeleteVectors():
            _fill_where(message.delete_vectors.where, op.where)
            message.delete_vectors.names.extend(op.names)
        case SetPayload():
            _fill_where(message.set_payload.where, op.where)
            message.set_payload.payload = op.payload
            if op.key is not None:
                message.set_payload.key = op.key
            message.set_payload.forget.extend(op.forget)
        case OverwritePayload():
            _fill_where(message.overwrite_payload.where, op.where)
            message.overwrite_payload.payload = op.payload
            message.overwrite_payload.forget.extend(op.forget)
        case DeletePayload():
            _fill_where(message.delete_payload.where, op.where)
            message.delete_payload.keys.extend(op.keys)
            message.delete_payload.forget.extend(op.forget)
        case ClearPayload():
            _fill_where(message.clear_payload.where, op.where)
            message.clear_payload.forget.extend(op.forget)
        case AlterVectors():
            message.alter_vectors.add.extend(encode_vectors(op.add))
            message.alter_vectors.drop.extend(op.drop)
            message.alter_vectors.SetInParent()
        case _:
            assert_never(op)


def decode_write(message: pb.Write) -> Write:
    op = _decode_op(message)
    return replace(op, epoch=message.epoch) if message.epoch else op


def _decode_op(message: pb.Write) -> Write:
    kind = message.WhichOneof("op")
    match kind:
        case "upsert":
            return Upsert(
                _decode_points(message.upsert.points),
                decode_filter(message.upsert.update_filter),
                _mode(message.upsert.mode),
            )
        case "update_vectors":
            return _decode_update_vectors(message.update_vectors)
        case "delete":
            return Delete(_decode_where(message.delete.where))
        case "delete_vectors":
            drop = message.delete_vectors
            return DeleteVectors(_decode_where(drop.where), tuple(drop.names))
        case "set_payload":
            change = message.set_payload
            key = change.key if change.HasField("key") else None
            return SetPayload(
                _decode_where(change.where), change.payload, key, tuple(change.forget)
            )
        case "overwrite_payload":
            overwrite = message.overwrite_payload
            return OverwritePayload(
                _decode_where(overwrite.where), overwrite.payload, tuple(overwrite.forget)
            )
        case "delete_payload":
            remove = message.delete_payload
            return DeletePayload(
                _decode_where(remove.where), tuple(remove.keys), tuple(remove.forget)
            )
        case "clear_payload":
            clear = message.clear_payload
            return ClearPayload(_decode_where(clear.where), tuple(clear.forget))
        case "alter_vectors":
            alter = message.alter_vectors
            return AlterVectors(decode_vectors(alter.add), tuple(alter.drop))
        case None:
            raise _newer("a write")
        case _:
            assert_never(kind)


def _decode_update_vectors(message: pb.UpdateVectors) -> UpdateVectors:
    points, versions = _decode_points(message.points), None
    if message.HasField("if_versions"):
        versions = _checked(_versions, message.if_versions)
        if len(versions) != len(points):
            raise BadRequest(
                f"Bad request: {len(points)} points came with {len(versions)} versions"
            )
    return UpdateVectors(
        points, decode_filter(message.update_filter), versions, tuple(message.forget)
    )


_MODE_NUMBER = {
    UpdateMode.UPSERT: pb.UPSERT,
    UpdateMode.INSERT_ONLY: pb.INSERT_ONLY,
    UpdateMode.UPDATE_ONLY: pb.UPDATE_ONLY,
}
_MODE_OF_NUMBER: dict[int, UpdateMode] = {number: mode for mode, number in _MODE_NUMBER.items()}


def _mode(number: int) -> UpdateMode:
    if number not in _MODE_OF_NUMBER:
        raise _newer("an update mode")
    return _MODE_OF_NUMBER[number]


def _newer(what: str) -> NotSupported:
    return NotSupported(
        f"{what} came from another node that this version of Shoal does not know: update this node"
    )


def _fill_where(message: pb.Selector, where: Selector) -> None:
    if where.ids is not None:
        where.ids.fill(message.ids)
    else:
        must(where.filter is not None, "a selector holds ids or a filter")
        message.filter = encode_filter(where.filter)


def _decode_where(message: pb.Selector) -> Selector:
    match message.WhichOneof("where"):
        case "ids":
            return Selector(ids=_decode_ids(message.ids))
        case "filter" if message.filter:
            return Selector(filter=decode_filter(message.filter))
        case _:  # never "all points": that would be a filter, spelled out
            raise _newer("a selector")


def _decode_points(message: wire.PointBatch) -> PointBatch:
    return _checked(PointBatch.from_wire, message)


def _decode_ids(message: wire.PointIds) -> PointIds:
    return _checked(PointIds.from_wire, message)


def _floats(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f4")


def _versions(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(data, "<u8")


def _checked(decode: Callable[[M], T], message: M) -> T:
    try:
        return decode(message)
    except (ValueError, IndexError) as error:
        raise BadRequest(f"Bad request: data from another node does not fit: {error}") from None


# -- answers --------------------------------------------------------------------------------------
def hits_answer(id: int, hits: Hits, applied: int) -> bytes:
    answer = pb.Answer(id=id, applied=applied)
    hits.points.fill(answer.hits.points)
    answer.hits.scores = hits.scores.astype("<f4", copy=False).tobytes()
    return answer.SerializeToString()


def decode_hits(message: pb.Hits) -> Hits:
    points, scores = decode_batch(message.points), _checked(_floats, message.scores)
    if len(points) != len(scores):
        raise BadRequest(f"Bad request: {len(points)} hits came with {len(scores)} scores")
    return Hits(points, scores)


def points_answer(id: int, points: PointBatch, applied: int) -> bytes:
    answer = pb.Answer(id=id, applied=applied)
    points.fill(answer.points)
    return answer.SerializeToString()


def decode_batch(message: wire.PointBatch) -> PointBatch:
    """Points of an answer."""
    points = _decode_points(message)
    if points.versions is None and len(points) == 0:  # no bytes either way
        points.versions = np.empty(0, np.uint64)
    return points


def count_answer(id: int, count: int, applied: int) -> bytes:
    return pb.Answer(id=id, applied=applied, count=count).SerializeToString()


def info_answer(id: int, info: ShardInfo) -> bytes:
    return pb.Answer(id=id, info=_encode_info(info)).SerializeToString()


def result_answer(id: int, result: WriteResult) -> bytes:
    written = pb.WriteResult(sequence=result.sequence)
    if result.missing is not None:
        PointIds.from_keys([result.missing]).fill(written.missing)
    return pb.Answer(id=id, written=written).SerializeToString()


def decode_result(message: pb.WriteResult) -> WriteResult:
    missing = _one_key(message.missing) if message.HasField("missing") else None
    return WriteResult(message.sequence, missing)


def error_answer(id: int, error: ShoalError) -> bytes:
    return pb.Answer(id=id, error=encode_error(error)).SerializeToString()


def _encode_info(info: ShardInfo) -> pb.ShardInfo:
    return pb.ShardInfo(
        points=info.points,
        indexed_vectors=info.indexed_vectors,
        vectors=info.vectors,
        segments=info.segments,
        pending=info.pending,
        applied=info.applied,
        bytes_on_disk=info.bytes_on_disk,
        stopped=info.stopped,
    )


def decode_info(message: pb.ShardInfo) -> ShardInfo:
    return ShardInfo(
        points=message.points,
        indexed_vectors=message.indexed_vectors,
        vectors=dict(message.vectors),
        segments=message.segments,
        pending=message.pending,
        applied=message.applied,
        bytes_on_disk=message.bytes_on_disk,
        stopped=message.stopped if message.HasField("stopped") else None,
    )


# -- shards ---------------------------------------------------------------------------------------
def encode_key(key: ShardKey) -> pb.ShardKey:
    return pb.ShardKey(collection_id=key.collection_id, shard=key.shard)


def decode_key(message: pb.ShardKey) -> ShardKey:
    return ShardKey(message.collection_id, message.shard)


def encode_spec(spec: ShardSpec) -> pb.ShardSpec:
    return pb.ShardSpec(
        key=encode_key(spec.key),
        collection=spec.collection,
        dense=encode_vectors(spec.dense),
        sparse=spec.sparse,
    )


def decode_spec(message: pb.ShardSpec) -> ShardSpec:
    return ShardSpec(
        key=decode_key(message.key),
        collection=message.collection,
        dense=decode_vectors(message.dense),
        sparse=tuple(message.sparse),
    )


def encode_vectors(vectors: Mapping[str, VectorSpec]) -> list[wire.VectorSpec]:
    return [
        wire.VectorSpec(
            name=name,
            dim=vector.dim,
            distance=vector.distance.value,
            multi=vector.multi,
            hnsw_m=vector.hnsw_m,
            hnsw_ef_construct=vector.hnsw_ef_construct,
            index_bytes_min=vector.index_bytes_min,
        )
        for name, vector in vectors.items()
    ]


def decode_vectors(messages: Iterable[wire.VectorSpec]) -> dict[str, VectorSpec]:
    """By name, in their order. Raises NotSupported for a distance that only a newer version knows."""
    return {message.name: _decode_vector(message) for message in messages}


def _decode_vector(message: wire.VectorSpec) -> VectorSpec:
    try:
        distance = Distance(message.distance)
    except ValueError:
        raise _newer(f"the distance {message.distance!r}") from None
    return VectorSpec(
        dim=message.dim,
        distance=distance,
        multi=message.multi,
        hnsw_m=message.hnsw_m,
        hnsw_ef_construct=message.hnsw_ef_construct,
        index_bytes_min=message.index_bytes_min if message.HasField("index_bytes_min") else None,
    )


def encode_status(statuses: Iterable[ReplicaStatus]) -> pb.StatusReply:
    reply = pb.StatusReply()
    for status in statuses:
        reply.replicas.add(
            key=encode_key(status.key),
            node=status.node,
            role=status.role,
            term=status.term,
            durable=status.durable,
            committed=status.committed,
            writable=status.writable,
            info=_encode_info(status.info),
            metadata_lost_s=status.metadata_lost_s,
            unread=status.unread,
        )
    return reply


def decode_status(reply: pb.StatusReply) -> list[ReplicaStatus]:
    return [
        ReplicaStatus(
            node=status.node,
            role=status.role,
            term=status.term,
            durable=status.durable,
            committed=status.committed,
            writable=status.writable,
            key=decode_key(status.key),
            info=decode_info(status.info),
            metadata_lost_s=status.metadata_lost_s,
            unread=status.unread,
        )
        for status in reply.replicas
    ]


# -- files ----------------------------------------------------------------------------------------
def encode_snapshot(snapshot: FileSnapshot) -> pb.SnapshotReply:
    files = [pb.FileInfo(path=f.path, size=f.size, crc32c=f.crc32c) for f in snapshot.files]
    return pb.SnapshotReply(id=snapshot.id, manifest=snapshot.manifest, files=files)


def decode_snapshot(reply: pb.SnapshotReply) -> FileSnapshot:
    files = tuple(SnapshotFile(f.path, f.size, f.crc32c) for f in reply.files)
    return FileSnapshot(reply.id, reply.manifest, files)


def encode_chunk(chunk: FileChunk) -> pb.FileChunk:
    return pb.FileChunk(offset=chunk.offset, data=chunk.data, crc32c=chunk.crc32c)


def decode_chunk(message: pb.FileChunk) -> FileChunk:
    """The checksum is compared by who writes the file, and again with that of the whole."""
    return FileChunk(message.offset, message.data, message.crc32c)


# -- errors ---------------------------------------------------------------------------------------
def _types() -> dict[str, type[ShoalError]]:
    found = {}
    for module in (errors, contract):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, ShoalError):
                found[value.__name__] = value
    return found


ERROR_TYPES = _types()
_OF_STATUS: dict[int, type[ShoalError]] = {
    400: errors.BadRequest,
    404: errors.NotFound,
    408: errors.TimedOut,
    429: errors.Busy,
    501: errors.NotSupported,
    503: errors.Unavailable,
    507: errors.StorageFull,
}


def encode_error(error: ShoalError) -> pb.Error:
    return pb.Error(
        type=type(error).__name__,
        message=error.message,
        status=error.status_code,
        retryable=error.retryable,
        maybe_applied=error.maybe_applied,
        retry_after_s=getattr(error, "retry_after_s", None),
    )


def decode_error(message: pb.Error) -> ShoalError:
    """The same error. A type that only a newer version knows becomes the one of its status."""
    kind = ERROR_TYPES.get(message.type) or _OF_STATUS.get(message.status, ShoalError)
    error = kind(message.message)
    for name, value in (
        ("status_code", message.status),
        ("retryable", message.retryable),
        ("maybe_applied", message.maybe_applied),
    ):
        if getattr(error, name) != value:
            setattr(error, name, value)
    if message.HasField("retry_after_s"):
        error.retry_after_s = message.retry_after_s  # type: ignore[attr-defined]
    return error
