"""`shoal serve` as a process: what it refuses, what it says, what it leaves behind."""

from __future__ import annotations

import json
import re
import signal
import socket

import httpx
import pytest
from harness import run_shoal

pytestmark = pytest.mark.one_machine("it is about `shoal serve`, its folder and its process")


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_shoal(["serve", "--data-dir", str(tmp_path / "d"), "--http-port", str(port)])
    assert done.returncode == 2
    assert f"Another program listens on 127.0.0.1, port {port}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours(tmp_path, host):
    flags = ["--data-dir", str(tmp_path / "d"), "--http-port", "0", "--http-host", host]
    done = run_shoal(["serve", *flags])
    assert done.returncode == 2
    assert host in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_lost_catalog_does_not_cost_the_shards(make_server):
    server = make_server(encoder_model="none")
    with server.http() as http:
        config = {"vectors": {"size": 2, "distance": "Dot"}}
        assert http.put("/collections/c", json=config).status_code == 200
    assert server.stop() == 0
    shards = sorted(path.name for path in server.data_dir.rglob("*"))
    for file in server.data_dir.glob("metadata.sqlite*"):
        file.rename(server.data_dir.parent / file.name)
    done = run_shoal(["serve", "--data-dir", str(server.data_dir), "--http-port", "0"])
    assert done.returncode == 2
    assert "Restore the catalog" in done.stderr
    (server.data_dir.parent / "metadata.sqlite").rename(server.data_dir / "metadata.sqlite")
    server.start()
    with server.http() as http:
        assert http.get("/collections/c/exists").json()["result"]["exists"]
    assert server.stop() == 0
    assert sorted(path.name for path in server.data_dir.rglob("*")) == shards


def test_a_clean_stop_leaves_no_announcement_and_a_killed_one_is_overwritten(make_server):
    server = make_server(encoder_model="none")
    announced = json.loads((server.data_dir / "server.json").read_text())
    assert announced["pid"] == server.pid
    assert httpx.get(f"http://127.0.0.1:{announced['http_port']}/readyz").status_code == 200
    server.restart(kill=True)
    assert json.loads((server.data_dir / "server.json").read_text())["pid"] == server.pid
    assert server.stop() == 0
    assert not (server.data_dir / "server.json").exists()


def test_the_log_has_neither_keys_nor_bodies(make_server):
    server = make_server(api_key="key-of-gold", encoder_model="none", log_level="debug")
    with server.http(headers={"api-key": "key-of-gold"}) as http:
        config = {"vectors": {"size": 2, "distance": "Dot"}}
        assert http.put("/collections/c", json=config).status_code == 200
        points = [{"id": 1, "vector": [1, 2], "payload": {"diary": "dear-diary"}}]
        answer = http.put("/collections/c/points?wait=true", json={"points": points})
        assert answer.status_code == 200
        broken = http.put("/collections/c/points", content=b'{"dear-diary')
        assert broken.status_code == 400
    with server.http(headers={"api-key": "wrong-key"}) as http:
        assert http.get("/collections").status_code == 401
    assert server.stop() == 0
    log = server.log()
    for secret in ("key-of-gold", "wrong-key", "dear-diary"):
        assert secret not in log
    line = re.compile(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warning|error) \S+ \S+.*"
    )
    for said in log.splitlines():
        assert line.fullmatch(said), said


def test_sigint_is_as_good_as_sigterm(make_server):
    server = make_server(encoder_model="none")
    server.process.send_signal(signal.SIGINT)
    assert server.exit_within(30) == 0
    assert "stopped" in server.log_tail(1)


def test_settings_come_from_a_file(make_server, tmp_path):
    file = tmp_path / "shoal.toml"
    file.write_text('encoder_model = "none"\napi_key = "from-the-file"\n')
    server = make_server(config=file)
    assert httpx.get(f"{server.url}/collections").status_code == 401
    answer = httpx.get(f"{server.url}/collections", headers={"api-key": "from-the-file"})
    assert answer.status_code == 200


def test_no_encoder_is_said(make_server):
    server = make_server(encoder_model="none")
    answer = httpx.post(f"{server.url}/shoal/v1/embed", json={"texts": ["x"], "model": "m"})
    assert answer.status_code == 501
    assert "encoder" in answer.json()["status"]["error"]
