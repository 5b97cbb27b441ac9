"""A full disk: writes get 507 and change nothing, reads go on, and writes come back with the space.

One shard: a write that concerns several shards may find the disk full for some of them only, and
its answer is 507 then, too.

The real thing needs a small file system of its own, so it needs root; without root the same
behaviour is driven by the setting for the least free space.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from harness import MakeServer, Server
from ledger import Content
from writers import create_collection, read_all

pytestmark = pytest.mark.one_machine("it fills the disk of one server")

DISK_BYTES = 48 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of DISK_BYTES."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode != 0:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def upsert(http: httpx.Client, ids: range, version: int) -> httpx.Response:
    points = [Content(version, version).point_json(id_) for id_ in ids]
    return http.put("/collections/full/points?wait=true", json={"points": points})


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 507, f"{answer.status_code} {answer.text}"
    error = answer.json()["status"]["error"]
    assert "free" in error.lower(), error


def assert_reads_work(http: httpx.Client, points: dict[int, int]) -> None:
    found = read_all(http, "full")
    assert {id_: point["payload"]["version"] for id_, point in found.items()} == points
    vector = Content(1, 1).vectors_json(3)["a"]
    query = {"query": vector, "using": "a", "limit": 5}
    assert (
        len(http.post("/collections/full/points/query", json=query).json()["result"]["points"]) == 5
    )
    assert http.get("/healthz").status_code == 200


class Ballast:
    """Takes space away from a small file system, and gives it back."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "ballast"

    def leave(self, free_bytes: int) -> None:
        with self._path.open("ab") as file, contextlib.suppress(OSError):
            while (surplus := shutil.disk_usage(self._folder).free - free_bytes) > 0:
                file.write(bytes(min(surplus, 1 << 20)))
                file.flush()

    def drop(self) -> None:
        self._path.unlink()


@pytest.mark.parametrize("reserve", ["0", "8MiB"])
def test_writes_end_when_the_disk_is_full_and_come_back(
    make_server: MakeServer, small_disk: Path, reserve: str
) -> None:
    """reserve 0: the disk is full to the last byte, in the middle of whatever is written."""
    server: Server = make_server(
        start=False,
        data_dir=small_disk / "data",
        seal_bytes=262_144,
        disk_free_bytes_min=reserve,
    )
    server.log_path = small_disk.parent / "server.log"  # not on the disk that gets full
    server.start()
    create_collection(server, "full", shards=1)
    ballast = Ballast(small_disk)
    points = dict.fromkeys(range(200), 1)
    with server.http() as http:
        assert upsert(http, range(200), 1).status_code == 200
        ballast.leave(4 << 20 if reserve == "0" else 10 << 20)
        refused = None
        for start in range(1_000, 100_000, 200):
            refused = upsert(http, range(start, start + 200), 1)
            if refused.status_code != 200:
                break
            points.update(dict.fromkeys(range(start, start + 200), 1))
        assert refused is not None
        assert_refused(refused)
        keep_full(http, ballast, points)
        assert_reads_work(http, points)
        ballast.drop()
        answer = upsert(http, range(200), 3)
        assert answer.status_code == 200, f"space is back: {answer.text}"
        points.update(dict.fromkeys(range(200), 3))
        assert_reads_work(http, points)
    server.restart(kill=True)
    with server.http() as http:
        assert_reads_work(http, points)


def keep_full(http: httpx.Client, ballast: Ballast, points: dict[int, int]) -> None:
    """Until three writes in a row were refused: a seal or merge that was under way may end and
    give a little space back, which the next write then rightly takes."""
    in_a_row = 0
    for _ in range(100):
        ballast.leave(0)
        answer = upsert(http, range(200), 2)
        if answer.status_code == 200:
            points.update(dict.fromkeys(range(200), 2))
            in_a_row = 0
            continue
        assert_refused(answer)
        in_a_row += 1
        if in_a_row == 3:
            return
    raise AssertionError("a full disk went on taking writes")


def test_writes_are_refused_below_the_least_free_space(make_server: MakeServer) -> None:
    """Needs no root: more free space is asked for than any disk has."""
    server: Server = make_server()
    create_collection(server, "full", shards=1)
    with server.http() as http:
        assert upsert(http, range(50), 1).status_code == 200
    server.settings["disk_free_bytes_min"] = 2**60
    server.restart()
    points = dict.fromkeys(range(50), 1)
    with server.http() as http:
        assert_refused(upsert(http, range(50), 2))
        assert_refused(http.post("/collections/full/points/delete", json={"points": [1]}))
        assert_reads_work(http, points)
    del server.settings["disk_free_bytes_min"]
    server.restart()
    with server.http() as http:
        assert_reads_work(http, points)
        assert upsert(http, range(50), 2).status_code == 200
