"""The load test itself, small, against a cluster of processes: both ways in, all is answered, and the
report is written. What the figures are is no test's business."""

from __future__ import annotations

import asyncio
import os

import pytest
import uvloop
from etcd_server import etcd_binary
from experiment import ALONE, DURING, Plan, local_target, measure, write

TINY = Plan(rates=(20.0,), run_s=1.5, drain_s=20.0, points=300, budget_s=200.0, seed=3)


@pytest.mark.cluster
def test_searches_and_inserts_are_answered_over_both_ways(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "ETCD_BIN", etcd_binary())
    with local_target() as target:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measure(target, TINY))
        write(tmp_path, target, TINY, found)
    assert list(found) == ["HTTP", "gRPC"]
    for loads in found.values():
        assert [len(loads[load]) for load in (ALONE, DURING, "inserts")] == [1, 1, 1]
        for rows in loads.values():
            assert rows[0].errors == {}
            assert rows[0].answered == rows[0].arrivals > 0
    report = (tmp_path / "load.md").read_text()
    assert "gRPC, searches during inserts" in report
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "load.json").exists()
