"""Damaged files: found, told with file and place, and nothing else lost.

Each test builds a data directory by a real server, stops it, damages files, and starts it again.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import MakeServer, Server, run_shoal, wait_until
from ledger import Content
from writers import create_collection, read_all

pytestmark = pytest.mark.one_machine("it damages the folder of one server")

SEAL_BYTES = 65_536
SETTLE_S_MAX = 60.0


def fill(http: httpx.Client, name: str, ids: range, version: int = 1) -> None:
    points = [Content(version, version).point_json(id_) for id_ in ids]
    for start in range(0, len(points), 100):
        body = {"points": points[start : start + 100]}
        http.put(f"/collections/{name}/points?wait=true", json=body).raise_for_status()


def expected(ids: Iterable[int], version: int = 1) -> dict[int, Any]:
    return {id_: Content(version, version).point_json(id_) for id_ in ids}


def contents(http: httpx.Client, name: str) -> dict[int, Any]:
    found = read_all(http, name)
    return {
        id_: {key: point[key] for key in ("id", "vector", "payload")}
        for id_, point in found.items()
    }


def new_folders(data_dir: Path, make: Callable[[], None]) -> list[Path]:
    """The folders of the shards that `make` creates."""
    before = set(data_dir.glob("shards/*/*"))
    make()
    return sorted(set(data_dir.glob("shards/*/*")) - before)


def ask(http: httpx.Client, name: str) -> httpx.Response:
    return http.post(f"/collections/{name}/points/scroll", json={"limit": 10})


def assert_healthy(http: httpx.Client, name: str, ids: range) -> None:
    """All points are there, and it takes new ones."""
    assert contents(http, name) == expected(ids)
    fill(http, name, range(90_000, 90_001))
    assert http.get(f"/collections/{name}/points/90000").status_code == 200


# -- the log --------------------------------------------------------------------------------------
def only_log(shards: list[Path]) -> Path:
    """The log file with the most in it."""
    return max((p for shard in shards for p in shard.glob("log/*")), key=lambda p: p.stat().st_size)


def test_torn_tail_is_cut(make_server: MakeServer) -> None:
    """A group that a crash left half written was never acknowledged: it is cut, silently."""
    server: Server = make_server()
    shards = new_folders(server.data_dir, lambda: create_collection(server, "torn"))
    with server.http() as http:
        fill(http, "torn", range(40))
    server.kill9()
    log = only_log(shards)
    whole = log.read_bytes()
    log.write_bytes(whole + whole[-500:-100])  # the salt is right, the rest is not
    server.start()
    with server.http() as http:
        assert contents(http, "torn") == expected(range(40))
        fill(http, "torn", range(40, 60))
    server.restart(kill=True)
    with server.http() as http:
        assert contents(http, "torn") == expected(range(60))


def test_log_cut_within_its_last_group(make_server: MakeServer) -> None:
    server: Server = make_server()
    shards = new_folders(server.data_dir, lambda: create_collection(server, "torn"))
    with server.http() as http:
        for id_ in range(20):
            fill(http, "torn", range(id_, id_ + 1))
    server.kill9()
    log = only_log(shards)
    log.write_bytes(log.read_bytes()[:-5])
    server.start()
    with server.http() as http:
        found = contents(http, "torn")
        assert found.items() <= expected(range(20)).items()
        assert len(found) == 19  # the other shard lost nothing, this one its last group


def test_damage_in_the_middle_of_a_log_stops_that_shard_alone(make_server: MakeServer) -> None:
    server: Server = make_server()
    shards = new_folders(server.data_dir, lambda: create_collection(server, "damaged"))
    create_collection(server, "healthy")
    with server.http() as http:
        for start in range(0, 100, 10):
            fill(http, "damaged", range(start, start + 10))
        fill(http, "healthy", range(30))
    server.kill9()
    log = only_log(shards)
    data = bytearray(log.read_bytes())
    place = len(data) // 3
    data[place] ^= 0xFF
    log.write_bytes(data)
    server.start()
    with server.http() as http:
        answer = ask(http, "damaged")
        assert answer.status_code == 503, answer.text
        error = answer.json()["status"]["error"]
        assert str(log) in error or str(log.relative_to(server.data_dir)) in error
        assert "offset" in error
        offset = int(error.split("offset ")[1].split(",")[0].split()[0])
        assert offset <= place, "the damaged group begins at or before the damaged byte"
        write = http.put(
            "/collections/damaged/points?wait=true", json={"points": [Content(2, 2).point_json(1)]}
        )
        assert write.status_code in (200, 503)  # the other shard of the collection still works
        assert_healthy(http, "healthy", range(30))
        assert "damaged" in http.get("/collections").text
        assert log.name in server.log(), "the operator finds it in the log of the server too"
    assert log.read_bytes() == bytes(data), "nothing was cut away from the damaged file"


# -- segments -------------------------------------------------------------------------------------
KINDS = [
    "rows.arr",
    "columns.arr",
    "payload.bin",
    "vectors.0",
    "vectors.1",
    "tombstones.*",
    "index.*",
]
ROWS = range(600)
GONE = range(100)
LATER = range(10_000, 10_600)
LEFT = [*range(GONE.stop, ROWS.stop), *LATER]


def build_segments(server: Server, http: httpx.Client, name: str) -> list[Path]:
    """A collection with sealed segments, dead rows in them, and a graph."""
    shards = new_folders(server.data_dir, lambda: create_collection(server, name))
    fill(http, name, ROWS)
    body = {"points": list(GONE)}
    http.post(f"/collections/{name}/points/delete?wait=true", json=body).raise_for_status()
    fill(http, name, LATER)  # seals again: a checkpoint with tombstones
    return shards


def present(shards: list[Path], kind: str) -> list[Path]:
    """Files of a kind that a manifest names; others are left-overs that the next start deletes."""
    named: list[Path] = []
    for shard in shards:
        manifest = json.loads((shard / "MANIFEST").read_text().splitlines()[0])
        for record in manifest["segments"]:
            folder = shard / "segments" / str(record["segment_id"])
            named += [folder / name for name in record["files"] if fnmatch(name, kind)]
    return sorted(path for path in named if path.exists() and path.stat().st_size)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]
)
def test_a_flipped_byte_in_any_segment_file_is_found(make_server: MakeServer, seed: int) -> None:
    """One collection for each kind of file. What can be built again (an index) is; everything else
    stops the shard with an error that names the file; what is not damaged goes on."""
    server: Server = make_server(seal_bytes=SEAL_BYTES)
    rng = random.Random(seed)
    names = {kind: f"damaged{number}" for number, kind in enumerate(KINDS)}
    with server.http() as http:
        built = {kind: build_segments(server, http, name) for kind, name in names.items()}
        build_segments(server, http, "healthy")
    remaining = {name: set(expected(LEFT)) for name in names.values()}
    stop_with_all_kinds(server, built, names, remaining)
    damaged = {kind: _flip(rng, rng.choice(present(built[kind], kind))) for kind in KINDS}
    server.start()
    with server.http() as http:
        for kind, name in names.items():
            path = damaged[kind]
            if kind == "index.*":
                assert set(contents(http, name)) == remaining[name]
            else:
                answer = ask(http, name)
                assert answer.status_code == 503, f"{kind}: {answer.status_code} {answer.text}"
                assert path.name in answer.json()["status"]["error"], answer.text
            assert str(path.relative_to(server.data_dir)) in server.log(), f"{kind} is not logged"
        assert contents(http, "healthy") == expected(LEFT)
        assert http.get("/healthz").status_code == 200


def green(http: httpx.Client, name: str) -> bool:
    return bool(http.get(f"/collections/{name}").json()["result"]["status"] == "green")


def stop_with_all_kinds(
    server: Server,
    built: dict[str, list[Path]],
    names: dict[str, str],
    remaining: dict[str, set[int]],
) -> None:
    """Stop at a moment when each collection has a file of its kind. An index is built once writes
    have ended; tombstones are there from a seal until a merge, which comes soon after writes."""
    with server.http() as http:
        for name in names.values():
            wait_until(lambda name=name: green(http, name), within_s=SETTLE_S_MAX, what="green")
        kind = "tombstones.*"
        victims = iter(sorted(remaining[names[kind]]))
        fresh = itertools.count(20_000, 300)
        while not present(built[kind], kind):
            gone = list(itertools.islice(victims, 5))
            body = {"points": gone}
            path = f"/collections/{names[kind]}/points/delete?wait=true"
            http.post(path, json=body).raise_for_status()
            start = next(fresh)
            fill(http, names[kind], range(start, start + 300))
            remaining[names[kind]] = remaining[names[kind]] - set(gone) | set(
                range(start, start + 300)
            )
    assert server.stop() == 0
    for kind, shards in built.items():
        assert present(shards, kind), f"no file {kind} to damage"


def _flip(rng: random.Random, path: Path) -> Path:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path


def test_damaged_manifest_stops_that_shard_alone(make_server: MakeServer) -> None:
    server: Server = make_server(seal_bytes=SEAL_BYTES)
    with server.http() as http:
        shards = build_segments(server, http, "damaged")
        build_segments(server, http, "healthy")
    assert server.stop() == 0
    manifest = _flip(random.Random(2), shards[0] / "MANIFEST")
    server.start()
    with server.http() as http:
        answer = ask(http, "damaged")
        assert answer.status_code == 503, answer.text
        assert manifest.name in answer.json()["status"]["error"]
        assert ask(http, "healthy").status_code == 200


def test_a_missing_segment_file_is_found(make_server: MakeServer) -> None:
    server: Server = make_server(seal_bytes=SEAL_BYTES)
    with server.http() as http:
        shards = build_segments(server, http, "damaged")
    assert server.stop() == 0
    path = present(shards, "payload.bin")[0]
    path.unlink()
    server.start()
    with server.http() as http:
        answer = ask(http, "damaged")
        assert answer.status_code == 503, answer.text
        assert path.name in answer.json()["status"]["error"]


# -- the data directory ---------------------------------------------------------------------------
def test_data_of_a_newer_format_is_refused(make_server: MakeServer) -> None:
    server: Server = make_server()
    assert server.stop() == 0
    stamp = server.data_dir / "FORMAT"
    newer = stamp.read_text().replace("format 1", "format 999")
    stamp.write_text(newer)
    ended = run_shoal(["serve", "--data-dir", str(server.data_dir), "--http-port", "0"])
    assert ended.returncode == 2, ended.stderr
    assert "999" in ended.stderr
    assert "newer" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert stamp.read_text() == newer


def test_second_server_on_one_data_directory_is_refused(make_server: MakeServer) -> None:
    server: Server = make_server()
    ended = run_shoal(["serve", "--data-dir", str(server.data_dir), "--http-port", "0"])
    assert ended.returncode == 2, ended.stderr
    assert str(server.pid) in ended.stderr, "it says who holds the directory"
    assert server.url in ended.stderr
    assert "Traceback" not in ended.stderr
    with server.http() as http:
        assert http.get("/healthz").status_code == 200
    said = json.loads((server.data_dir / "server.json").read_text())
    assert said["pid"] == server.pid


def test_lock_of_a_killed_server_does_not_stay(make_server: MakeServer) -> None:
    server: Server = make_server()
    server.restart(kill=True)
    assert server.stop() == 0
    assert not (server.data_dir / "server.json").exists()


@pytest.mark.parametrize(
    "flags", [["--seal-bytes", "5"], ["--http-port", "x"], ["--nonsense", "1"]]
)
def test_wrong_settings_end_with_2_and_a_sentence(tmp_path: Path, flags: list[str]) -> None:
    ended = run_shoal(["serve", "--data-dir", str(tmp_path / "data"), *flags])
    assert ended.returncode == 2, ended.stderr
    assert flags[0].strip("-").replace("-", "_") in ended.stderr.replace("-", "_")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()
