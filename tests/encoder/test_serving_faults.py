"""What may happen to `shoal encoder serve`, done to it: ended and stopped at every stage, its files
changed, its port taken, memory and metadata gone, callers that vanish and callers that flood it.

Over a small model; needs etcd."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etcd_server import EtcdCluster
from fakes.text_models import make_coarse_model, make_text_model
from harness import wait_until
from served_groups import ServedGroup, client, served

pytest.importorskip("torch")

from encoder.model import cpu_computes_bfloat16
from shoal.errors import BadRequest, Busy, ShoalError, Unavailable
from shoal.rpc.encoder import EncoderClient
from shoal.serving import bound_socket

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

BACK_S_MAX = 120.0
FLOAT32: dict[str, Any] = {"tp": 2, "encoder_precision": "float32"}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster.start(tmp_path_factory.mktemp("etcd"), members=1) as cluster:
        yield cluster


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_text_model(tmp_path / "models/tiny", dim=32)


@contextmanager
def started(folder: Path, etcd: EtcdCluster, **settings: Any) -> Iterator[ServedGroup]:
    """A group that may not become ready."""
    given = {"cluster_name": folder.name, **FLOAT32, **settings}
    group = ServedGroup(folder, list(etcd.endpoints), "e1", **given)
    try:
        yield group
    finally:
        group.close()


def no_more_memory(pid: int) -> None:
    """It cannot allocate more than it has."""
    status = Path(f"/proc/{pid}/status").read_text()
    size = 1024 * int(status.partition("VmSize:")[2].split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


async def soon(there: Callable[[], Any], what: str) -> None:
    """Wait for a condition, which may be a coroutine's."""
    async with asyncio.timeout(BACK_S_MAX):
        while True:
            found = there()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.05)


async def ranks(encoder: EncoderClient, group: str = "e1") -> list[dict[str, Any]]:
    for described in await encoder.describe():
        if described["id"] == group:
            found: list[dict[str, Any]] = described.get("ranks", [])
            return found
    return []


@asynccontextmanager
async def formed_anew(encoder: EncoderClient, text: str = "word1") -> AsyncIterator[int]:
    """Inside, the test breaks something; afterwards all processes are others, and answers are right."""
    before = {rank["pid"] for rank in await ranks(encoder)}
    expected = await encoder.embed([text], "tiny")
    yield max(before)

    async def back() -> bool:
        now = {rank["pid"] for rank in await ranks(encoder)}
        if not now or now & before:
            return False
        try:
            return bool(np.allclose(await encoder.embed([text], "tiny"), expected, atol=1e-5))
        except ShoalError as error:
            assert error.retryable, error.message  # noqa: PT017, all that may come
            return False

    await soon(back, "the group to form anew")


# -- the start -------------------------------------------------------------------------------------
STAGES: dict[str, Callable[[ServedGroup], bool]] = {
    "it reads its settings": lambda group: "rank_group_starts" in group.log(),
    "the fork server imports": lambda group: len(group.processes()) > 1,
    "ranks load": lambda group: len(group.ranks()) == 2,
    "it serves": lambda group: "encoder_serves" in group.log(),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stage", STAGES)
def test_ended_at_any_stage_nothing_of_it_is_left(
    stage: str, number: signal.Signals, tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    with started(tmp_path, etcd, model=model) as group:
        wait_until(lambda: STAGES[stage](group), within_s=120, what=stage)
        if number == signal.SIGINT:
            os.killpg(group.process.pid, number)  # as a terminal does
        else:
            group.process.send_signal(number)
        status = group.wait_ended()
        assert (
            status
            in {
                signal.SIGTERM: [0],
                signal.SIGINT: [0, 130],
                signal.SIGKILL: [-signal.SIGKILL],
            }[number]
        )
        assert "Traceback" not in group.log(), group.log()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_while_it_loads_does_not_keep_the_group_from_forming(
    number: int, rank: int, tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    with started(tmp_path, etcd, model=model) as group:
        wait_until(lambda: len(group.ranks()) == 2, within_s=120, what="two ranks")
        os.kill(group.ranks()[rank], number)
        group.wait_ready()
        assert "rank_group_broken" in group.log()


def test_what_would_fail_again_ends_the_group_with_a_sentence(
    tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    damaged = tmp_path / "models/damaged"
    shutil.copytree(model, damaged)
    (damaged / "model.safetensors").write_bytes(b"\0" * 64)
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        for number, (settings, told) in enumerate(
            [
                ({"model": tmp_path / "nothing"}, "neither"),
                ({"model": model, "tp": 3}, "give tp one of 1, 2"),
                ({"model": model, "grpc_port": taken.getsockname()[1]}, "Another program listens"),
                ({"model": damaged}, "cannot be loaded"),
            ]
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            with started(folder, etcd, **settings) as group:
                assert group.wait_ended(120) == 2, group.log()
                assert told in group.log().splitlines()[-1]
                assert "attempt=1" not in group.log()


def test_a_second_process_of_one_id_takes_over_and_the_first_one_ends(
    tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    with started(tmp_path, etcd, model=model) as first:
        first.wait_ready()
        (tmp_path / "again").mkdir()
        given = {"cluster_name": tmp_path.name, "model": model, **FLOAT32}
        second = ServedGroup(tmp_path / "again", list(etcd.endpoints), "e1", **given)
        try:
            second.wait_ready()
            assert first.wait_ended() == 2
            assert "Another process registered as e1" in first.log()

            async def ask() -> None:
                async with client(tmp_path, etcd) as encoder:
                    assert len(await encoder.embed(["word1"], "tiny")) == 1

            asyncio.run(ask())
        finally:
            second.close()


# -- the files -------------------------------------------------------------------------------------
def test_a_group_serves_what_it_was_started_with_or_ends(
    tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    async def remove_then_break(group: ServedGroup) -> None:
        async with client(tmp_path, etcd) as encoder:
            expected = await encoder.encode(["word1"], "tiny")
            (model / "model.safetensors").write_bytes(b"\1" * 1000)  # under a mapping: SIGBUS
            shutil.rmtree(model)
            again = await encoder.encode(["word1"], "tiny")
            assert again.fingerprint == expected.fingerprint
            assert np.array_equal(again.vectors, expected.vectors)
            make_text_model(model, seed=7, dim=32)
            os.kill((await ranks(encoder))[1]["pid"], signal.SIGKILL)
            assert await asyncio.to_thread(group.wait_ended) == 2
            assert "not those that this group was started with" in group.log()

    with served(tmp_path, etcd, e1={"model": model, **FLOAT32}) as groups:
        asyncio.run(remove_then_break(groups["e1"]))


@pytest.mark.skipif(not cpu_computes_bfloat16(), reason="float32 is all that there is here")
def test_weights_that_bfloat16_spoils_are_served_in_float32(
    tmp_path: Path, etcd: EtcdCluster
) -> None:
    async def ask() -> None:
        async with client(tmp_path, etcd) as encoder:
            assert len(await encoder.embed(["word1"], "coarse")) == 1
            assert [d["precision"] for d in await encoder.describe()] == ["float32"]

    coarse = make_coarse_model(tmp_path / "models/coarse")
    with served(tmp_path, etcd, e1={"model": coarse, "tp": 2}) as groups:
        asyncio.run(ask())
        assert "bfloat16_too_coarse" in groups["e1"].log()


def test_two_weights_of_one_name_are_two_models(tmp_path: Path, etcd: EtcdCluster) -> None:
    old = make_text_model(tmp_path / "old/notes", seed=1)
    new = make_text_model(tmp_path / "new/notes", seed=2)

    async def ask(groups: dict[str, ServedGroup]) -> None:
        async with client(tmp_path, etcd) as encoder:
            by_group = {d["id"]: d["fingerprint"] for d in await encoder.describe()}
            assert {m.fingerprint for m in encoder.models()} == set(by_group.values())
            for fingerprint in by_group.values():
                said = await encoder.encode(["word1"], "notes", fingerprint)
                assert said.fingerprint == fingerprint
            with pytest.raises(BadRequest, match="several weights"):
                await encoder.encode(["word1"], "notes")
            groups["e1"].process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(groups["e1"].wait_ended)
            await soon(lambda: len(encoder.models()) == 1, "e1 to be gone")
            with pytest.raises(Unavailable, match=by_group["e1"]):
                await encoder.encode(["word1"], "notes", by_group["e1"])
            assert (await encoder.encode(["word1"], "notes", by_group["e2"])).tokens.tolist() == [3]

    with served(tmp_path, etcd, e1={"model": old}, e2={"model": new}) as groups:
        asyncio.run(ask(groups))


# -- while it serves -------------------------------------------------------------------------------
def test_troubles_of_a_group_that_serves(tmp_path: Path, etcd: EtcdCluster, model: Path) -> None:
    """One group, since each start takes seconds."""

    async def idle_hang(encoder: EncoderClient) -> None:
        async with formed_anew(encoder) as pid:
            os.kill(pid, signal.SIGSTOP)

    async def all_at_once(encoder: EncoderClient) -> None:
        pids = [rank["pid"] for rank in await ranks(encoder)]
        async with formed_anew(encoder):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    async def no_memory(encoder: EncoderClient, rank: int) -> None:
        pid = (await ranks(encoder))[rank]["pid"]
        async with formed_anew(encoder):
            no_more_memory(pid)
            with pytest.raises(ShoalError) as caught:
                await asyncio.gather(*(encoder.embed(["word1 " * 30] * 999, "tiny") for _ in "123"))
            assert caught.value.retryable

    async def fork_server_gone(encoder: EncoderClient, group: ServedGroup) -> None:
        found = group.processes()
        (server,) = {found[pid] for pid in group.ranks()}
        async with formed_anew(encoder):
            os.kill(server, signal.SIGKILL)

    async def first_process_stopped(encoder: EncoderClient, group: ServedGroup) -> None:
        attempts = [d["attempt"] for d in await encoder.describe()]
        group.process.send_signal(signal.SIGSTOP)
        try:
            assert len(await encoder.embed(["word2"], "tiny")) == 1
        finally:
            group.process.send_signal(signal.SIGCONT)
        assert [d["attempt"] for d in await encoder.describe()] == attempts

    async def all_of_it(group: ServedGroup) -> None:
        async with client(tmp_path, etcd) as encoder:
            await idle_hang(encoder)
            await all_at_once(encoder)
            for rank in (0, 1):
                await no_memory(encoder, rank)
            await fork_server_gone(encoder, group)
            await first_process_stopped(encoder, group)

    with served(tmp_path, etcd, e1={"model": model, **FLOAT32}) as groups:
        asyncio.run(all_of_it(groups["e1"]))
        groups["e1"].process.send_signal(signal.SIGTERM)
        assert groups["e1"].wait_ended() == 0


def test_metadata_that_is_gone_for_longer_than_the_lease(
    tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    async def ask(group: ServedGroup) -> None:
        async with client(tmp_path, etcd) as encoder:
            etcd.freeze(0)
            try:
                await soon(lambda: "silent for" in group.log(), "the group to miss it")
                assert len(await encoder.embed(["word1"], "tiny")) == 1
            finally:
                etcd.thaw(0)
            await soon(lambda: "registered_again" in group.log(), "a new lease")
            await soon(lambda: len(encoder.models()) == 1, "the group to be known")
            assert len(await encoder.embed(["word1"], "tiny")) == 1

    with served(tmp_path, etcd, e1={"model": model, "node_lease_s": 2, **FLOAT32}) as groups:
        asyncio.run(ask(groups["e1"]))


# -- callers ---------------------------------------------------------------------------------------
FLOOD = """
import asyncio, sys
from shoal.encoder.v1 import encoder_pb2 as pb
from shoal.rpc.channel import RpcSettings, node_metadata, open_channel

async def main(address):
    channel = open_channel(address, RpcSettings())
    call = channel.stream_stream(
        "/shoal.encoder.v1.Encoder/Embed",
        request_serializer=pb.EmbedRequest.SerializeToString,
        response_deserializer=pb.EmbedReply.FromString,
    )(metadata=node_metadata("e1"))
    texts = ["word1 word2 " * (1 + n % 15) for n in range(200)]
    for number in range(1, 301):
        await call.write(pb.EmbedRequest(id=number, model="tiny", texts=texts))
    print("sent", flush=True)
    await asyncio.sleep(600)  # and reads nothing

asyncio.run(main(sys.argv[1]))
"""


def test_a_caller_that_floods_and_vanishes(tmp_path: Path, etcd: EtcdCluster, model: Path) -> None:
    async def ask() -> None:
        async with client(tmp_path, etcd) as encoder:
            (described,) = await encoder.describe()
            flood = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", FLOOD, described["grpc"]),
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            try:
                assert flood.stdout is not None
                assert await flood.stdout.readline() == b"sent\n"
                (busy,) = await encoder.describe()
                for _ in range(20):
                    assert len(await encoder.embed(["word1"], "tiny")) == 1  # never Busy
            finally:
                flood.kill()
                await flood.wait()
            print(f"{busy['waiting_texts']} texts waited")

            async def nothing_waits() -> bool:
                return [d["waiting_texts"] for d in await encoder.describe()] == [0]

            await soon(nothing_waits, "its texts to be dropped")

    with served(tmp_path, etcd, e1={"model": model, "queue_tokens_max": 20_000, **FLOAT32}):
        asyncio.run(ask())


@pytest.mark.parametrize("signals", [1, 2])
def test_work_in_flight_is_finished_at_the_end_unless_there_is_no_time(
    signals: int, tmp_path: Path, etcd: EtcdCluster, model: Path
) -> None:
    async def ask(group: ServedGroup) -> None:
        async with client(tmp_path, etcd) as encoder:
            texts = ["word1 word2 word3 " * 10] * 250
            asked = [asyncio.ensure_future(encoder.embed(texts, "tiny")) for _ in range(12)]
            await soon(lambda: any(task.done() for task in asked), "a first answer")
            for _ in range(signals):
                group.process.send_signal(signal.SIGTERM)
                await soon(lambda: group.log().count("server stopping") >= 1, "the signal")
            answers = await asyncio.gather(*asked, return_exceptions=True)
            failed = [answer for answer in answers if isinstance(answer, BaseException)]
            assert all(isinstance(error, Unavailable | Busy) for error in failed)
            assert signals == 2 or not failed, failed[0]
            assert await asyncio.to_thread(group.wait_ended) == 0

    with served(tmp_path, etcd, e1={"model": model, **FLOAT32}) as groups:
        asyncio.run(ask(groups["e1"]))
