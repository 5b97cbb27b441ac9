"""A server that is killed, restarted or stopped under a client that goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import numpy as np
import pytest
from harness import MakeServer, wait_until

from shoal.client import AsyncClient, Batch, Client, VectorParams
from shoal.errors import TimedOut, Unavailable

DIM = 16


def batches(count: int, size: int):
    dice = np.random.default_rng(3)
    for first in range(0, count * size, size):
        yield Batch(np.arange(first, first + size), dice.normal(size=(size, DIM)))


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_an_upload_survives_a_kill(make_server: MakeServer):
    server = make_server(encoder_model="none")
    port = port_of(server.grpc)
    with Client(server.grpc) as client:
        client.create_collection("c", VectorParams(DIM, "Dot"))
        a_third = threading.Event()
        go_on = threading.Event()

        def source():
            for number, batch in enumerate(batches(60, 200)):
                if number == 20:
                    a_third.set()
                    assert go_on.wait(60)
                yield batch

        done: list[int] = []

        def upload() -> None:
            done.append(client.upload("c", source()).points)

        thread = threading.Thread(target=upload)
        thread.start()
        assert a_third.wait(60)
        server.kill9()
        go_on.set()
        server.settings["grpc_port"] = port  # the same address, as after a real restart
        server.start()
        thread.join(120)
        assert done == [12_000]
        assert client.count("c") == 12_000


def test_reads_go_on_after_a_kill(make_server: MakeServer):
    server = make_server(encoder_model="none")
    server.settings["grpc_port"] = port_of(server.grpc)
    with Client(server.grpc, timeout_s=60) as client:
        client.create_collection("c", VectorParams(2, "Dot"))
        client.upsert("c", [1, 2], [[1, 0], [0, 1]])
        assert client.search("c", [1, 0]).ids == [1, 2]
        server.restart(kill=True)
        assert client.search("c", [1, 0]).ids == [1, 2]
        assert client.count("c") == 2
        server.restart()
        assert client.search("c", [0, 1]).ids == [2, 1]
        # the connection is known to be lost, or nothing was sent: so a write may go on as well
        client.upsert("c", [3], [[1, 1]])
        assert client.count("c") == 3


def test_a_server_that_stays_away(make_server: MakeServer):
    server = make_server(encoder_model="none")
    with Client(server.grpc, timeout_s=3, connect_timeout_s=0.3) as client:
        client.create_collection("c", VectorParams(2, "Dot"))
        server.kill9()
        with pytest.raises(Unavailable, match="no server answers") as caught:
            client.search("c", [1, 0])
        with pytest.raises(Unavailable) as caught:
            client.upsert("c", [1], [[1, 0]])
        assert not caught.value.maybe_applied


def test_nothing_that_was_acknowledged_is_lost_and_nothing_is_invented(make_server: MakeServer):
    """Writers that never repeat a write in doubt: what was acknowledged is there, what certainly did
    not happen is not."""
    server = make_server(encoder_model="none")
    server.settings["grpc_port"] = port_of(server.grpc)
    acknowledged: set[int] = set()
    refused: set[int] = set()
    doubtful: set[int] = set()

    async def main() -> None:
        async with AsyncClient(server.grpc, timeout_s=60) as client:
            await client.create_collection("c", VectorParams(2, "Dot"))

            async def write(number: int) -> None:
                for key in range(number * 1_000, number * 1_000 + 40):
                    try:
                        await client.upsert("c", [key], [[1, key]])
                        acknowledged.add(key)
                    except Unavailable as error:
                        (doubtful if error.maybe_applied else refused).add(key)

            writers = [asyncio.create_task(write(number)) for number in range(8)]
            while len(acknowledged) < 60:
                await asyncio.wait(writers, timeout=0.005)
            server.kill9()
            await asyncio.to_thread(server.start)
            await asyncio.gather(*writers)
            there = {point.id async for point in client.iterate("c")}
            assert acknowledged <= there
            assert there.isdisjoint(refused)
            assert there <= acknowledged | doubtful
            assert len(acknowledged) + len(doubtful) + len(refused) == 320

    asyncio.run(main())


def test_a_server_that_hangs_costs_no_more_than_the_timeout(make_server: MakeServer):
    server = make_server(encoder_model="none")
    with Client(server.grpc) as client:
        client.create_collection("c", VectorParams(2, "Dot"))
        client.upsert("c", [1], [[1, 0]])
        client.search("c", [1, 0])
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for read in (
                lambda: client.search("c", [1, 0], timeout_s=0.3),
                lambda: client.count("c", timeout_s=0.3),
            ):
                with pytest.raises(TimedOut) as caught:
                    read()
                assert not caught.value.maybe_applied
            with pytest.raises(TimedOut) as caught:
                client.upsert("c", [2], [[1, 0]], timeout_s=0.3)
            assert caught.value.maybe_applied
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert client.search("c", [1, 0], limit=1).ids == [1]


def test_sigterm_answers_what_is_under_way_and_ends(make_server: MakeServer):
    server = make_server(encoder_model="none")
    with Client(server.grpc) as client:
        client.create_collection("c", VectorParams(2, "Dot"))
        client.search("c", [1, 0])  # leaves a stream open, which must not hold the server up
        assert server.stop() == 0
    wait_until(lambda: not server.running, within_s=10, what="the end")
    assert "Traceback" not in server.log()
