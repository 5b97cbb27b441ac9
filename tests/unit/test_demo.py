"""`shoal demo` without its seven thousand texts: what is sent, what is not sent twice, what is told."""

from __future__ import annotations

import asyncio
import io
import socket
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from harness import Server, run_shoal
from rich.console import Console

from shoal import demo
from shoal.corpus import CorpusEntry
from shoal.errors import ShoalError

CORPUS = [
    CorpusEntry(name, name.rpartition(".")[0], "function", f"{name}()", f"{name} does a thing.", 1)
    for name in ("os.path.split", "zlib.compress", "time.sleep")
]


def index(server: Server, corpus: list[CorpusEntry]) -> demo.Indexed:
    async def run() -> demo.Indexed:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            await demo.create_collection(http)
            return await demo.index_corpus(http, corpus, Console(file=io.StringIO()))

    return asyncio.run(run())


@pytest.fixture
def fresh(server: Server) -> Server:
    with server.http() as http:
        http.delete(f"/collections/{demo.COLLECTION}").raise_for_status()
    return server


def test_only_what_is_new_or_changed_is_sent(fresh: Server) -> None:
    assert index(fresh, CORPUS).texts_sent == 3
    again = index(fresh, CORPUS)
    assert (again.texts_total, again.texts_sent) == (3, 0)
    changed = [*CORPUS[:2], replace(CORPUS[2], doc="Waits for a while.")]
    assert index(fresh, changed).texts_sent == 1
    with fresh.http() as http:
        found = http.get(f"/collections/{demo.COLLECTION}/points/{CORPUS[2].id}").json()["result"]
    assert found["payload"]["summary"] == "Waits for a while."
    assert found["payload"]["package"] == "time"


def test_a_refusal_comes_with_the_sentence_of_the_server(fresh: Server) -> None:
    with fresh.http() as http:
        body = {"vectors": {"size": 3, "distance": "Dot"}}
        http.put(f"/collections/{demo.COLLECTION}", json=body).raise_for_status()
    with pytest.raises(ShoalError, match=r"refused PUT .* with 400: .*dim"):
        index(fresh, CORPUS)


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_shoal(["demo", "--data-dir", str(tmp_path), "--http-port", str(port)])
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "--http-port" in done.stderr


def test_a_data_folder_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    done = run_shoal(["demo", "--data-dir", str(tmp_path), "--http-port", "0"])
    assert done.returncode == 2
    assert "is not empty and is no data folder" in done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["holiday.jpg"]


def test_the_questions_are_about_things_that_exist() -> None:
    for question in demo.QUESTIONS:
        module = question.expected.split(".")[0]
        assert __import__(module)
