"""Rank groups without processes: a model of the test's own behind a real engine and a real gRPC server,
registered as groups are; and the client of coordinators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from encoder.engine import Engine, OutOfMemory
from encoder.model import TokenizedText
from encoder.server import EncoderServer
from shoal.encoder.v1 import encoder_pb2 as pb
from shoal.encoder_api import ModelInfo
from shoal.errors import Unavailable
from shoal.health_server import HealthServer
from shoal.metadata.contract import KeyValue
from shoal.metadata.schema import EncoderFacts, NodeRecord, NodeRole
from shoal.rpc.encoder import EncoderClient

__all__ = ["DIM", "INFO", "Group", "Lengths", "client", "engine_over", "group", "until"]

DIM = 4
INFO = ModelInfo("lengths", DIM, 8, "f" * 64, ("len",), loaded=True, precision="float32")


class Lengths:
    """A vector is (number of tokens, first token, 0, 0). Batches of more than `fits` padded tokens run
    out of memory; while `gate` is closed nothing is computed."""

    def __init__(self, fits: int = 1 << 30) -> None:
        self.fits = fits
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.at_work = threading.Event()
        self.fails: Exception | None = None

    def forward(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        self.at_work.set()
        assert self.gate.wait(30)
        if self.fails is not None:
            raise self.fails
        if len(token_ids) * max(map(len, token_ids)) > self.fits:
            raise OutOfMemory
        self.batches.append([len(ids) for ids in token_ids])
        return np.array([[len(ids), ids[0], 0, 0] for ids in token_ids], np.float32)

    def idle(self) -> None:
        self.batches.append([])


def engine_over(
    model: Lengths, *, queue_tokens_max: int = 10_000
) -> tuple[Engine, list[Exception]]:
    broken: list[Exception] = []
    engine = Engine(
        model,
        dim=DIM,
        batch_tokens_max=64,
        queue_tokens_max=queue_tokens_max,
        broken=broken.append,
    )
    return engine, broken


class Words:
    """One token a word, eight at most."""

    def tokenize(self, texts: Sequence[str]) -> list[TokenizedText]:
        words = [[len(word) for word in text.split()] or [1] for text in texts]
        return [TokenizedText(w[:8], len(w) > 8) for w in words]


class Group(SimpleNamespace):
    """A registered encoder: its model, engine, gRPC face, server and entry in the metadata."""


@asynccontextmanager
async def group(name: str, info: ModelInfo = INFO) -> AsyncIterator[Group]:
    model = Lengths()
    engine, _ = engine_over(model, queue_tokens_max=100)
    server = EncoderServer(
        engine,
        Words(),  # type: ignore[arg-type]
        info,
        node_id=name,
        describe=lambda reply: reply.ranks.extend([pb.Rank(rank=0, parameter_bytes=64)]),
    )
    port = await HealthServer.start("127.0.0.1", 0, None, [server.handlers()])
    record = NodeRecord(
        version=2,
        id=name,
        role=NodeRole.ENCODER,
        incarnation="1",
        grpc=f"127.0.0.1:{port.port}",
        encoder=EncoderFacts(
            model=info.name,
            aliases=list(info.aliases),
            dim=info.dim,
            max_tokens=info.max_tokens,
            fingerprint=info.fingerprint or "",
            precision="float32",
        ),
    )
    entry = KeyValue(record.key, record.to_bytes(), 1)
    try:
        yield Group(model=model, engine=engine, face=server, server=port, entry=entry)
    finally:
        model.gate.set()
        await asyncio.to_thread(engine.close, Unavailable("end"))
        await server.finish(5)
        await port.close()


@asynccontextmanager
async def client(*groups: Group) -> AsyncIterator[EncoderClient]:
    made = EncoderClient({g.entry.key: g.entry for g in groups})
    try:
        yield made
    finally:
        await made.close()


async def until(there: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not there():  # noqa: ASYNC110, what is waited for happens in a thread
            await asyncio.sleep(0.01)
