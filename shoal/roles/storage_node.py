"""`shoal storage-node`: replicas of shards, asked over gRPC by coordinators and by each other."""

from __future__ import annotations

import asyncio

from index_node.builder import ProcessBuilder
from shoal import limits, telemetry
from shoal.announcement import NodeInfo
from shoal.data_dir import DataDirectory, Membership
from shoal.errors import StartupError
from shoal.metadata.identity import join_cluster
from shoal.metadata.schema import NodeRole
from shoal.metadata.session import Session
from shoal.roles.process import RoleProcess, check_port, patiently, run_role
from shoal.rpc.bus import Bus
from shoal.settings import StorageProcess
from storage_node.member import ClusterNode
from storage_node.service import serve_node

__all__ = ["run"]

_log = telemetry.logger("member")

CLOSE_S_MAX = 10.0  # others take over what this node leads: nobody should wait for it longer


def run(settings: StorageProcess) -> None:
    check_port(settings)
    with DataDirectory(settings.data_dir, of_node=True) as directory:
        NodeInfo.withdraw(directory.path)
        run_role(NodeRole.STORAGE, settings, lambda process: _storage_node(process, directory))


async def _storage_node(process: RoleProcess[StorageProcess], directory: DataDirectory) -> None:
    settings, stack = process.settings, process.stack
    member = directory.membership()
    if member is not None and settings.node_id not in (None, member.node_id):
        raise StartupError(
            f"The folder {directory.path} is of the storage node {member.node_id}, and --node-id is "
            f"{settings.node_id}: give another --data-dir, or leave --node-id out."
        )
    if member is not None:
        process.node_id = member.node_id
    await process.connect()
    cluster = await patiently(
        lambda: join_cluster(process.store, member.cluster_id if member is not None else None)
    )
    if member is None:
        directory.remember(Membership(process.node_id, cluster))
    builder = ProcessBuilder()
    stack.push_async_callback(builder.close)
    bus = Bus(process.nodes.address, own_id=process.node_id, settings=process.rpc)
    stack.push_async_callback(bus.close)
    session: Session | None = None

    def metadata_lost_s() -> float:
        return session.lost_for_s() if session is not None else 0.0

    node = ClusterNode(
        directory.shards,
        node_id=process.node_id,
        store=process.store,
        send=bus.send,
        sources=process.nodes.client,
        metadata_lost=metadata_lost_s,
        builder=builder,
        settings=settings,
    )
    stack.push_async_callback(node.close)
    await node.start()
    server = await serve_node(
        node.storage,
        settings.grpc_host,
        settings.grpc_port,
        node_id=process.node_id,
        deliver=node.deliver,
        files=node,
        tls=process.tls,
    )
    stack.push_async_callback(server.close, min(settings.shutdown_grace_s, CLOSE_S_MAX))
    session = await process.register(grpc=server.port)
    process.announce(grpc=server.port, folder=directory.path)
    await process.run_until_stopped()
    if not session.replaced and not process.stop.failed:
        leaving = asyncio.ensure_future(_hand_over(node, session))

        def hurry(at_once: bool) -> None:
            if at_once:
                leaving.cancel()

        process.stop.call(hurry)
        await asyncio.wait([leaving])


async def _hand_over(node: ClusterNode, session: Session) -> None:
    """Let others take over what this node does, for HAND_OVER_S_MAX at most: they would find out
    without us, too, but writes would wait for that."""
    shards = len(node.held_up)
    if not shards:
        return
    began_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(limits.HAND_OVER_S_MAX):
            await node.depart()
            await session.update(session.record.model_copy(update={"draining": True}))
            await node.until_spared()
    except Exception as error:  # also a bug must not keep the node from closing
        why = str(error) or f"not within {limits.HAND_OVER_S_MAX:g} s"
        _log.warning("not_handed_over", shards=len(node.held_up), of=shards, why=why)
    else:
        _log.info("handed_over", shards=shards, s=asyncio.get_running_loop().time() - began_s)
