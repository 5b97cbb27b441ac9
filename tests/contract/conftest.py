"""One member of etcd for all tests that only need one; each takes a prefix of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from etcd_server import EtcdCluster


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster.start(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd
