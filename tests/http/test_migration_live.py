"""The model of a live collection is changed under load: see tests/migration_load.py for how a wrong
answer is seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from harness import MakeServer, Server, wait_until
from migration_load import (
    DIMS,
    NAME,
    Found,
    Grpc,
    Http,
    Migrate,
    Point,
    Qdrant,
    Reader,
    TwoModels,
    Writer,
    check_points,
    create,
    fill,
    scroll,
)

SEED = 1
POINTS = 500
ANSWERS = 20  # of each reader, in every phase


@pytest.fixture(scope="module")
def meant(tmp_path_factory: pytest.TempPathFactory) -> TwoModels:
    return TwoModels(tmp_path_factory.mktemp("models"))


class Load:
    """Readers and writers of every kind on one server."""

    def __init__(self, server: Server, meant: TwoModels, still: dict[int, Point]) -> None:
        ways = {
            "http": lambda: Http(server.url),
            "qdrant": lambda: Qdrant(server.url),
            "grpc": lambda: Grpc(server.grpc),
        }
        self.readers = [Reader(f"reader {n}", way, meant, still, SEED) for n, way in ways.items()]
        self.writers = [Writer(n, way, meant, SEED) for n, way in enumerate(ways.values())]
        self.clients = [*self.readers, *self.writers]
        for client in self.clients:
            client.start()

    def go_on(self) -> None:
        """Until every reader has had some more answers, and every writer done something."""
        answers = {r.name: len(r.answers) + ANSWERS for r in self.readers}
        writes = {w.name: w.writes + 3 for w in self.writers}

        def went_on() -> bool:
            for client in self.clients:
                client.check()
            return all(len(r.answers) >= answers[r.name] for r in self.readers) and all(
                w.writes >= writes[w.name] for w in self.writers
            )

        wait_until(went_on, within_s=60, what="answers")

    def ask_for(self, *asks: str) -> None:
        for reader in self.readers:
            reader.ask_for(*asks)

    def write(self, *declares: str, retexts: bool) -> None:
        for writer in self.writers:
            writer.allow(*declares, retexts=retexts)

    def answered_by(self, began: float) -> set[str]:
        """Who answered the questions without a model since then."""
        return {m for r in self.readers for m in r.models_between(began, time.monotonic())}

    def there(self) -> dict[int, Point]:
        return {id_: point for writer in self.writers for id_, point in writer.there.items()}

    def stop(self) -> None:
        for client in self.clients:
            client.give_up()
        for client in self.clients:
            client.stop()


def test_no_query_fails_and_no_answer_mixes_models(
    make_server: MakeServer, meant: TwoModels
) -> None:
    print("seed", SEED)
    server = make_server(seal_bytes=65_536, **meant.settings)
    with server.http() as plain:
        create(plain, shard_number=2)
    with talking(server) as (http, migrate):
        still = fill(http, POINTS, SEED)
        load = Load(server, meant, still)
        try:
            load.go_on()
            copy(migrate, load)
            check_metrics(server)
            switch_and_roll_back(migrate, load)
            switch_and_drop(migrate, load)
        finally:
            load.stop()
    check_points(scrolled(server), still | load.there(), "new", meant)
    with server.http() as plain:
        info = plain.get(f"/collections/{NAME}").json()["result"]
    assert info["config"]["params"]["vectors"]["v"]["size"] == DIMS["new"]
    print({r.name: (len(r.answers), round(r.slowest_s, 3)) for r in load.readers})
    print({w.name: w.writes for w in load.writers})
    assert server.stop() == 0, server.log_tail()


def copy(migrate: Migrate, load: Load) -> None:
    """To the end, at three rates, with a switch that comes too early."""
    assert "not being changed" in migrate.ask("switch", status=404)
    migrate.start(points_per_second=0)
    status = migrate.until(lambda s: s["phase"] == "copying", *load.clients)
    load.write("old", "new", retexts=True)
    load.go_on()
    assert status["left"] >= POINTS
    assert "have no vector of new yet" in migrate.ask("switch", status=400)
    migrate.start(points_per_second=2)
    migrate.until(lambda s: s["done"] > 0, *load.clients)
    began = time.monotonic()
    load.go_on()
    assert load.answered_by(began) == {"old"}
    migrate.start(points_per_second=5_000)
    migrate.until(lambda s: s["left"] < POINTS // 4, *load.clients)
    load.go_on()  # payloads change beside the copy
    load.write("old", "new", retexts=False)
    migrate.until(lambda s: s["left"] == 0, *load.clients)
    compared = migrate.ask("compare", {"limit": 5, "exact": True})
    assert (compared["source"], compared["left"]) == ("recorded", 0)
    assert compared["queries"] > ANSWERS


def check_metrics(server: Server) -> None:
    with server.http() as plain:
        lines = plain.get("/metrics").text.splitlines()
    shown = dict(line.rsplit(" ", 1) for line in lines if line.startswith("shoal_migration_"))
    labels = f'{{collection="{NAME}",vector="v"}}'
    assert float(shown[f"shoal_migration_copied_total{labels}"]) > 0
    assert float(shown[f"shoal_migration_points_per_second{labels}"]) >= 0
    assert shown[f"shoal_migration_without_text{labels}"] == "0"
    assert shown[f"shoal_migration_failing{labels}"] == "0"


def switch_and_roll_back(migrate: Migrate, load: Load) -> None:
    switched = migrate.ask("switch")
    assert switched["current"]["model"] == "new"
    load.ask_for("", "old", "new")  # from here on both may be named
    began = time.monotonic()
    load.go_on()
    assert load.answered_by(began) == {"new"}
    migrate.ask("rollback")
    began = time.monotonic()
    load.go_on()
    assert load.answered_by(began) == {"old"}


def switch_and_drop(migrate: Migrate, load: Load) -> None:
    migrate.until(lambda s: s["left"] == 0, *load.clients)
    migrate.ask("switch")
    load.ask_for("", "new")
    load.write("new", retexts=False)
    migrate.ask("drop", {"model": "old"})
    began = time.monotonic()
    migrate.until_over(*load.clients)
    load.go_on()
    assert load.answered_by(began) == {"new"}


@pytest.mark.slow  # a coordinator that dies between any two steps is in tests/unit, too
def test_a_restart_goes_on_where_it_was(make_server: MakeServer, meant: TwoModels) -> None:
    """Asked to end or killed, in the middle of copying and after the switch."""
    server = make_server(seal_bytes=65_536, **meant.settings)
    with server.http() as plain:
        create(plain, shard_number=2)
    with talking(server) as (http, migrate):
        there = fill(http, 400, SEED)
        migrate.start(points_per_second=100)
        done = migrate.until(lambda s: s["done"] >= 64)["done"]
        for key in range(400, 420):  # numbers: the other vector comes by the same write
            there[key] = Point(f"word{key - 400}", f"word{key - 400}", 1)
            http.put({key: there[key]}, [meant.vector("old", there[key].text)], "old")
        there[7] = replace(there[7], text="word1 word2")
        http.set_payload(7, {"text": "word1 word2"})
        http.delete([8])
        del there[8]
    for kill in (False, True):
        server.restart(kill=kill)
        with talking(server) as (http, migrate):
            status = migrate.status()
            assert status is not None
            assert (status["phase"], status["points_per_second_max"]) == ("copying", 100)
            assert status["left"] > 0
            assert done <= status["done"]
            done = migrate.until(lambda s, done=done: s["done"] >= done + 64)["done"]
            check_points(scrolled(server), there, "old", meant)
    with talking(server) as (http, migrate):
        migrate.start()
        migrate.until(lambda s: s["left"] == 0)
        migrate.ask("switch")
    server.restart(kill=True)
    with talking(server) as (http, migrate):
        check_points(scrolled(server), there, "new", meant)
        migrate.ask("rollback")
    server.restart(kill=True)
    check_points(scrolled(server), there, "old", meant)
    assert server.stop() == 0, server.log_tail()


@contextmanager
def talking(server: Server) -> Iterator[tuple[Http, Migrate]]:
    with closing(Http(server.url)) as http, closing(Migrate(server.url)) as migrate:
        yield http, migrate


def scrolled(server: Server) -> dict[int, Found]:
    with server.http() as plain:
        return scroll(plain)
