"""`make_cluster`: a factory of private clusters; a test that fails prints the ends of their logs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "crash"))  # the ledger

from cluster_harness import Cluster

# A run that is ended by SIGTERM takes its clusters down, as one that is ended by Ctrl-C.
signal.signal(signal.SIGTERM, signal.default_int_handler)

_CLUSTERS: pytest.StashKey[list[Cluster]] = pytest.StashKey()
MakeCluster = Callable[..., Cluster]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    if report.failed:
        for used in item.stash.get(_CLUSTERS, []):
            report.sections.append((f"logs of the cluster in {used.folder}", used.logs()))
    return report


@pytest.fixture
def note_cluster(request: pytest.FixtureRequest) -> Callable[[Cluster], None]:
    """note_cluster(cluster): print the ends of its logs if this test fails."""
    return request.node.stash.setdefault(_CLUSTERS, []).append


@pytest.fixture
def make_cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeCluster]:
    """make_cluster(layout=…, settings=…) -> Cluster, started."""
    made = request.node.stash.setdefault(_CLUSTERS, [])

    def make(**arguments: Any) -> Cluster:
        cluster = Cluster(tmp_path / f"cluster{len(made)}", **arguments)
        made.append(cluster)
        cluster.start()
        return cluster

    yield make
    for cluster in made:
        for process in cluster.processes.values():
            process.resume()
        cluster.kill9()
