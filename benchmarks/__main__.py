"""`python -m benchmarks [--quick] [NAME ...]`: all benchmarks, or the named ones, one after another.

Each runs in a process of its own with a time limit and writes benchmarks/results/NAME.md and .json;
a table of all claims goes to benchmarks/results/README.md. Ends with 1 when one failed to run; a
claim that was not kept is written down, not hidden, and is no failure of the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from benchmarks.harness import RESULTS, ROOT

# name -> seconds it may take; most take a third of that. An hour or more together on two cores.
BENCHMARKS = {
    "search_http": 900,
    "search_grpc": 900,
    "recall": 900,
    "insert": 900,
    "filters": 900,
    "shards": 1_500,
    "rpc": 300,
    "encoder": 900,
    "migration": 900,
    "training": 7_200,
    "cluster": 900,
    "compare": 1_800,
    "memory": 2_400,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small sizes; figures mean nothing")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    failed = []
    for name in given.names or BENCHMARKS:
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            *(["--quick"] if given.quick else []),
        ]
        child = subprocess.Popen(command, cwd=ROOT)
        try:
            status = child.wait(BENCHMARKS[name])
        except subprocess.TimeoutExpired:
            child.terminate()  # it stops its server and removes its data
            child.wait()
            status = 124
        took = time.monotonic() - began
        print(f"{name}: {f'failed ({status})' if status else 'done'} in {took:.0f} s", flush=True)
        if status != 0:
            failed.append(name)
    if not given.quick:
        summary()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def summary() -> None:
    """All claims of the results that are there, one table."""
    out = [
        "# What was measured",
        "",
        "`make bench` writes this folder. Each file says on which machine, at which commit, and how.",
        "",
        "| benchmark | claim | goal | measured | kept | when, commit |",
        "|---|---|---|---|---|---|",
    ]
    for name in BENCHMARKS:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        about = f"{found['about']['date']}, {found['about']['commit']}"
        link = f"[{name}]({name}.md)"
        if not found["claims"]:
            out.append(f"| {link} | {found['title']} | | (a table) | | {about} |")
        for claim in found["claims"]:
            sign = {"<=": "≤", ">=": "≥"}[claim["relation"]]
            kept = "yes" if claim["kept"] else "**no**"
            out.append(
                f"| {link} | {claim['what']} | {sign} {claim['goal']:,g} {claim['unit']} | "
                f"{claim['figure']:,.5g} {claim['unit']} | {kept} | {about} |"
            )
    (RESULTS / "README.md").write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    sys.exit(main())
