"""The table of all operations: path, handler, models. `/openapi.json` is made from it.

`hot` routes are matched before FastAPI (coordinator/hot.py), the others by FastAPI.
"""

from __future__ import annotations

from coordinator import handlers
from coordinator.embeddings import EmbeddingsRequest, EmbeddingsResult, embed, embeddings
from coordinator.http import Route
from shoal.api import migration, models
from shoal.api.models import Envelope

__all__ = ["ROUTES", "UNSUPPORTED"]

_C = "/collections/{collection_name}"
_READ = ("consistency", "timeout")
_WRITE = ("wait", "ordering", "timeout")
_UPDATED = Envelope[models.UpdateResult]

_SERVER = (
    Route(
        "GET", "/", "root", handlers.version, "Name and version",
        result=models.VersionInfo, public=True, tag="server",
    ),
    Route("GET", "/healthz", "healthz", handlers.alive, "Is it there", public=True, tag="server"),
    Route("GET", "/livez", "livez", handlers.alive, "Is it there", public=True, tag="server"),
    Route("GET", "/readyz", "readyz", handlers.ready, "Does it answer", public=True, tag="server"),
    Route("GET", "/metrics", "metrics", handlers.metrics, "Prometheus metrics", tag="server"),
    Route("GET", "/shoal/v1/status", "status", handlers.status, "State of everything", tag="server"),
    Route(
        "GET", "/shoal/v1/cluster", "cluster_report", handlers.cluster_report,
        "Nodes, shards, terms, replicas in sync", result=Envelope[models.ClusterReport],
        tag="cluster",
    ),
    Route(
        "GET", "/cluster", "cluster_status", handlers.cluster_peers, "The nodes as clients know them",
        result=Envelope[models.ClusterPeers], tag="cluster",
    ),
    Route(
        "GET", f"{_C}/cluster", "collection_cluster_info", handlers.collection_cluster,
        "Where the replicas of a collection are",
        result=Envelope[models.CollectionCluster], tag="cluster",
    ),
    Route(
        "POST", "/v1/embeddings", "embeddings", embeddings, "Turn texts into vectors, as OpenAI does",
        request=EmbeddingsRequest, result=EmbeddingsResult, tag="server",
    ),
    Route(
        "POST", "/shoal/v1/embed", "embed", embed, "Turn texts into vectors",
        request=models.EmbedRequest, result=Envelope[models.EmbedResult],
        options=("timeout",), tag="server",
    ),
)  # fmt: skip

_COLLECTIONS = (
    Route(
        "GET", "/collections", "get_collections", handlers.list_collections, "List collections",
        result=Envelope[models.CollectionsResult], tag="collections",
    ),
    Route(
        "GET", _C, "get_collection", handlers.get_collection, "Settings, counts and state",
        result=Envelope[models.CollectionInfo], tag="collections",
    ),
    Route(
        "PUT", _C, "create_collection", handlers.create_collection, "Create a collection",
        request=models.CreateCollection, result=Envelope[bool], writes=True,
        options=("timeout",), tag="collections",
    ),
    Route(
        "DELETE", _C, "delete_collection", handlers.delete_collection,
        "Delete a collection; false when there is none",
        result=Envelope[bool], writes=True, options=("timeout",), tag="collections",
    ),
    Route(
        "GET", f"{_C}/exists", "collection_exists", handlers.collection_exists, "Does it exist",
        result=Envelope[models.ExistsResult], tag="collections",
    ),
    Route(
        "GET", "/aliases", "get_aliases", handlers.list_aliases, "List aliases",
        result=Envelope[models.AliasesResult], tag="collections",
    ),
    Route(
        "GET", f"{_C}/aliases", "get_collection_aliases", handlers.list_aliases,
        "List the aliases of a collection",
        result=Envelope[models.AliasesResult], tag="collections",
    ),
    Route(
        "PUT", f"{_C}/index", "create_field_index", handlers.create_index,
        "Declare a payload index",
        request=models.CreateFieldIndex, result=_UPDATED, writes=True, options=_WRITE,
        tag="collections",
    ),
    Route(
        "DELETE", f"{_C}/index/{{field_name:path}}", "delete_field_index", handlers.delete_index,
        "Remove a payload index",
        result=_UPDATED, writes=True, options=_WRITE, tag="collections",
    ),
)  # fmt: skip

_MIGRATED = Envelope[migration.MigrationStatus]
_M = f"{_C}/vectors/{{vector}}/migrate"

# `-` is the unnamed vector.
_MIGRATIONS = (
    Route(
        "POST", _M, "migrate_vector", handlers.migrate,
        "Begin to change the model of a vector, or change the rate of it",
        request=migration.MigrateRequest, result=_MIGRATED, writes=True, options=("timeout",),
        tag="migration",
    ),
    Route(
        "GET", _M, "migration_status", handlers.migration_status, "How far it is",
        result=_MIGRATED, options=("timeout",), tag="migration",
    ),
    Route(
        "POST", f"{_M}/compare", "compare_models", handlers.compare_models,
        "What both models answer to the same queries; recorded ones are other people's",
        request=migration.CompareRequest, result=Envelope[migration.Compared], writes=True,
        options=("timeout",), tag="migration",
    ),
    Route(
        "POST", f"{_M}/switch", "switch_model", handlers.switch_model,
        "From now on search with the new model",
        request=migration.SwitchRequest, result=_MIGRATED, writes=True, options=("timeout",),
        tag="migration",
    ),
    Route(
        "POST", f"{_M}/rollback", "rollback_model", handlers.rollback_model,
        "Search with the old model again",
        request=migration.RollbackRequest, result=_MIGRATED, writes=True,
        options=("timeout",), tag="migration",
    ),
    Route(
        "POST", f"{_M}/drop", "drop_model", handlers.drop_model,
        "End it: remove the vectors of the model that is not in use",
        request=migration.DropRequest, result=_MIGRATED, writes=True, options=("timeout",),
        tag="migration",
    ),
)  # fmt: skip

_READS = (
    Route(
        "POST", f"{_C}/points/query", "query_points", handlers.query, "The best points for a query",
        request=models.QueryRequest, result=Envelope[models.QueryResult], options=_READ, hot=True,
    ),
    Route(
        "POST", f"{_C}/points/scroll", "scroll_points", handlers.scroll, "Points by ascending id",
        request=models.ScrollRequest, result=Envelope[models.ScrollResult], options=_READ, hot=True,
    ),
    Route(
        "POST", f"{_C}/points", "get_points", handlers.retrieve, "Points by their ids",
        request=models.PointRequest, result=Envelope[list[models.Record]], options=_READ, hot=True,
    ),
    Route(
        "POST", f"{_C}/points/count", "count_points", handlers.count, "How many points match",
        request=models.CountRequest, result=Envelope[models.CountResult], options=_READ, hot=True,
    ),
    Route(
        "GET", f"{_C}/points/{{id}}", "get_point", handlers.get_point, "One point",
        result=Envelope[models.Record], options=_READ,
    ),
)  # fmt: skip

_WRITES = (
    Route(
        "PUT", f"{_C}/points", "upsert_points", handlers.upsert, "Insert or replace points",
        request=models.PointsList | models.PointsBatch, result=_UPDATED, writes=True,
        options=_WRITE, hot=True,
    ),
    Route(
        "PUT", "/shoal/v1" + _C + "/batches", "put_batch", handlers.put_batch,
        "Insert or replace points, given as a serialized PointBatch",
        request=bytes, result=Envelope[models.BatchResult], writes=True, options=_WRITE, hot=True,
    ),
    Route(
        "POST", f"{_C}/points/delete", "delete_points", handlers.delete_points, "Delete points",
        request=models.PointsSelector, result=_UPDATED, writes=True, options=_WRITE, hot=True,
    ),
    Route(
        "POST", f"{_C}/points/batch", "batch_update", handlers.batch_update,
        "Several operations in order",
        request=models.UpdateOperations, result=Envelope[list[models.UpdateResult]], writes=True,
        options=_WRITE, hot=True,
    ),
    Route(
        "POST", f"{_C}/points/payload", "set_payload", handlers.set_payload,
        "Merge into payloads",
        request=models.SetPayload, result=_UPDATED, writes=True, options=_WRITE,
    ),
    Route(
        "PUT", f"{_C}/points/payload", "overwrite_payload", handlers.overwrite_payload,
        "Replace payloads",
        request=models.SetPayload, result=_UPDATED, writes=True, options=_WRITE,
    ),
    Route(
        "POST", f"{_C}/points/payload/delete", "delete_payload", handlers.delete_payload,
        "Delete parts of payloads",
        request=models.DeletePayload, result=_UPDATED, writes=True, options=_WRITE,
    ),
    Route(
        "POST", f"{_C}/points/payload/clear", "clear_payload", handlers.clear_payload,
        "Delete whole payloads",
        request=models.PointsSelector, result=_UPDATED, writes=True, options=_WRITE,
    ),
    Route(
        "PUT", f"{_C}/points/vectors", "update_vectors", handlers.update_vectors,
        "Replace single vectors of points",
        request=models.UpdateVectors, result=_UPDATED, writes=True, options=_WRITE, hot=True,
    ),
    Route(
        "POST", f"{_C}/points/vectors/delete", "delete_vectors", handlers.delete_vectors,
        "Delete single vectors of points",
        request=models.DeleteVectors, result=_UPDATED, writes=True, options=_WRITE,
    ),
)  # fmt: skip

ROUTES: tuple[Route, ...] = (*_SERVER, *_COLLECTIONS, *_MIGRATIONS, *_READS, *_WRITES)


def _lacking(method: str, path: str) -> Route:
    return Route(method, path, "not_supported", handlers.not_supported, "", writes=method != "GET")


# Operations of the API that clients may know and this version lacks: 501 says so, where 404 would
# send people to look for a typing error.
UNSUPPORTED: tuple[Route, ...] = (
    _lacking("PATCH", _C),
    _lacking("POST", "/collections/aliases"),
    _lacking("POST", f"{_C}/points/query/batch"),
    _lacking("POST", f"{_C}/points/query/groups"),
    _lacking("POST", f"{_C}/points/search"),
    _lacking("POST", f"{_C}/points/search/{{rest:path}}"),
    _lacking("POST", f"{_C}/points/recommend"),
    _lacking("POST", f"{_C}/points/recommend/{{rest:path}}"),
    _lacking("POST", f"{_C}/points/discover"),
    _lacking("POST", f"{_C}/points/discover/{{rest:path}}"),
    _lacking("POST", f"{_C}/facet"),
    *(_lacking(method, f"{_C}/cluster") for method in ("POST", "PUT", "DELETE")),
    *(
        _lacking(method, path)
        for method in ("GET", "POST", "PUT", "DELETE")
        for path in (
            "/cluster/{rest:path}",
            "/snapshots",
            "/snapshots/{rest:path}",
            f"{_C}/snapshots",
            f"{_C}/snapshots/{{rest:path}}",
            f"{_C}/shards",
            f"{_C}/shards/{{rest:path}}",
            f"{_C}/vectors/{{rest:path}}",
        )
    ),
)
