"""Which cluster this is: an id that the metadata of a cluster gets when its first node starts.

A storage node deletes what its cluster does not know. Were etcd lost, and a new and empty one put in
its place, that would be everything. So a node remembers the id of its cluster beside its data, and
does not start in another one.
"""

from __future__ import annotations

import uuid

from shoal.errors import StartupError
from shoal.metadata.contract import Compare, MetadataStore, Uncertain
from shoal.metadata.schema import Record

__all__ = ["CLUSTER_KEY", "ClusterRecord", "join_cluster"]

CLUSTER_KEY = "cluster/identity"


class ClusterRecord(Record):
    """id: 32 hexadecimal digits, made by chance."""

    id: str


async def join_cluster(store: MetadataStore, known: str | None) -> str:
    """The id of the cluster whose metadata this is.

    known    the id that the node remembers; None: it is new, and gives the cluster an id if it has
             none.
    Raises   StartupError when that is another cluster; Unavailable, Uncertain.
    """
    found = await store.get(CLUSTER_KEY)
    if found is None and known is None:
        record = ClusterRecord(id=uuid.uuid4().hex)
        try:
            await store.txn([Compare(CLUSTER_KEY, 0)], {CLUSTER_KEY: record.to_bytes()})
        except Uncertain:
            pass  # reading it tells
        return await join_cluster(store, None)
    if found is None:
        raise StartupError(
            f"This data folder belongs to the cluster {known}, and the metadata store knows no "
            "cluster by this name. If etcd was lost, restore it from its backup: an empty one would "
            "make this node delete its data. If the cluster is meant to be new, give a new "
            "--data-dir."
        )
    cluster = ClusterRecord.from_bytes(CLUSTER_KEY, found.value).id
    if known is not None and cluster != known:
        raise StartupError(
            f"This data folder belongs to the cluster {known}, and the metadata store is of the "
            f"cluster {cluster}. Check --metadata and --cluster-name, or give another --data-dir."
        )
    return cluster
