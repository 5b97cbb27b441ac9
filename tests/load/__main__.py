"""`make load`: latency against offered rate, open loop, over HTTP and gRPC.

    python tests/load                      a cluster of its own on this machine: 1 etcd, 1 coordinator,
                                           3 storage nodes, 1 monitor, all on 127.0.0.1
    python tests/load --http 127.0.0.1:6333 --grpc 127.0.0.1:6334      one that runs already (compose)
    python tests/load --quick              small, in less than 40 s

The collection has 3 shards with 3 replicas each (fewer where there are fewer nodes), cosine distance
and payloads. For each way in and each rate two runs: searches alone, and searches while points are
replaced through the same way in. Each run plays a schedule that was drawn before it began. Writes
load.md, load.json and load.png. Ends with 1 when nothing was answered at the lowest rate.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvloop
from experiment import ALONE, QUICK, ROOT, Plan, Target, local_target, measure, write

from shoal.errors import ShoalError


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no host:port")
    return host, int(port)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster is stopped on the way
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small; figures mean nothing")
    parser.add_argument("--http", type=_address, help="host:port of a cluster that runs")
    parser.add_argument("--grpc", type=_address, help="the same for gRPC; without, HTTP only")
    parser.add_argument("--rates", help="searches a second, with commas between")
    parser.add_argument("--out", type=Path, help="folder for the results")
    given = parser.parse_args()
    plan = QUICK if given.quick else Plan()
    if given.rates:
        plan = replace(plan, rates=tuple(map(float, given.rates.split(","))))
    if given.grpc and not given.http:
        parser.error("--grpc needs --http beside it")
    folder = ROOT / "benchmarks/results" / ("quick" if given.quick else "")
    target: Any = local_target()
    if given.http:
        key = os.environ.get("SHOAL_API_KEY", "")
        host, port = given.http
        target = nullcontext(Target(given.http, given.grpc, f"http://{host}:{port}", key))
    try:
        with target as where:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                found = runner.run(measure(where, plan))
            write(given.out or folder, where, plan, found)
    except (ShoalError, httpx.HTTPError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0 if found["HTTP"][ALONE] and found["HTTP"][ALONE][0].answered else 1


if __name__ == "__main__":
    sys.exit(main())
