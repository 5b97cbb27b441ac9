"""Fixtures of the whole suite: a server of one's own, and one that is shared.

`make_server`   a factory of private servers, for tests that stop, kill or damage them.
`server`        one server for the whole run; tests take a collection name of their own.
`client`        a real QdrantClient on `server`.
`collection`    a name that no other test uses.

Under `pytest --cluster` all of these are whole clusters on this machine (cluster_harness.py), and the
tests run as they are. Those marked `one_machine` are left out; the mark says why.

A test that fails prints the end of the log of every server that it used.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from harness import MakeServer, Server
from qdrant_client import QdrantClient


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cluster",
        action="store_true",
        help="run the tests of one server against whole clusters on this machine",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--cluster"):
        for item in items:
            mark = item.get_closest_marker("one_machine")
            if mark is not None:
                item.add_marker(pytest.mark.skip(reason=f"not for a cluster: {mark.args[0]}"))


def _server_class(config: pytest.Config) -> type[Server]:
    if not config.getoption("--cluster"):
        return Server
    from cluster_harness import ClusterServer

    return cast("type[Server]", ClusterServer)  # the part of its face that tests of clusters use


_SERVERS: pytest.StashKey[list[Server]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if report.failed:
        for used in item.stash.get(_SERVERS, []):
            report.sections.append((f"log of the server on {used.data_dir}", used.log_tail()))
    return report


def _remember(request: pytest.FixtureRequest, server: Server) -> None:
    request.node.stash.setdefault(_SERVERS, []).append(server)


@pytest.fixture
def make_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeServer]:
    """make_server(**settings) -> Server, started; `start=False` leaves that to the test,
    `data_dir=` names the folder, `fault=` sets a fault point."""
    made: list[Server] = []

    def make(
        *,
        start: bool = True,
        data_dir: Path | None = None,
        fault: str | None = None,
        **settings: Any,
    ) -> Server:
        folder = data_dir if data_dir is not None else tmp_path / f"data{len(made)}"
        server = _server_class(request.config)(folder, settings=settings, fault=fault)
        made.append(server)
        _remember(request, server)
        return server.start() if start else server

    yield make
    for server in made:
        server.kill9()


@pytest.fixture(scope="session")
def shared_server(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    server = _server_class(pytestconfig)(
        tmp_path_factory.mktemp("shared") / "data", settings={"seal_bytes": 65_536}
    )
    server.start()
    try:
        yield server
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill9()


@pytest.fixture
def server(request: pytest.FixtureRequest, shared_server: Server) -> Server:
    _remember(request, shared_server)
    if not shared_server.running:
        raise shared_server.failed(
            f"the shared server died (exit {shared_server.returncode}) in an earlier test"
        )
    return shared_server


@pytest.fixture
def client(server: Server) -> Iterator[QdrantClient]:
    client = server.client()
    yield client
    client.close()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


@pytest.fixture
def collection(request: pytest.FixtureRequest) -> str:
    return f"{request.node.originalname}-{uuid.uuid4().hex[:8]}"[-80:]
