"""Kill the server while collections are made and deleted: the catalog and the shards agree."""

from __future__ import annotations

import itertools
import random
import threading
from pathlib import Path

import httpx
import pytest
from harness import Server, wait_until

pytestmark = pytest.mark.one_machine("it kills one process")

ROUNDS = 5
BODY = {"vectors": {"size": 2, "distance": "Dot"}, "shard_number": 2}


class Changer:
    """Makes and deletes collections, one at a time. `present` is what must exist; `unsure` is the
    collection of the request that got no answer."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.present: set[str] = set()
        self.unsure: str | None = None
        self.changes = 0
        self._numbers = itertools.count()

    def run(self, server: Server, stop: threading.Event) -> None:
        with server.http() as http:
            while not stop.is_set():
                try:
                    self._change(http)
                except httpx.TransportError:
                    return
                self.unsure = None
                self.changes += 1

    def _change(self, http: httpx.Client) -> None:
        if self.present and self.rng.random() < 0.45:
            name = self.rng.choice(sorted(self.present))
            self.unsure = name
            answer = http.delete(f"/collections/{name}")
            assert answer.json()["result"] is True, answer.text
            self.present.remove(name)
        else:
            # Half of the names were used before: an old collection must not shine through.
            name = f"c{next(self._numbers) // 2}"
            if name in self.present:
                return
            self.unsure = name
            http.put(f"/collections/{name}", json=BODY).raise_for_status()
            point = {"points": [{"id": 1, "vector": [1.0, 2.0], "payload": {"name": name}}]}
            self.present.add(name)
            self.unsure = None
            http.put(f"/collections/{name}/points?wait=true", json=point).raise_for_status()


@pytest.mark.parametrize("seed", [1])
def test_collections_survive_kills(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    server = Server(tmp_path / "data").start()
    changer = Changer(rng)
    try:
        for _ in range(ROUNDS):
            stop = threading.Event()
            worker = threading.Thread(target=changer.run, args=(server, stop), daemon=True)
            worker.start()
            goal = changer.changes + rng.randint(5, 40)
            wait_until(
                lambda goal=goal: changer.changes >= goal, within_s=60, what=f"{goal} changes"
            )
            server.exit_within(rng.random() * 0.02)
            server.kill9()
            stop.set()
            worker.join(60)
            assert not worker.is_alive()
            server.start()
            check(server, changer)
        assert server.stop() == 0
    finally:
        server.kill9()


def check(server: Server, changer: Changer) -> None:
    with server.http() as http:
        listed = http.get("/collections").json()["result"]["collections"]
        found = {collection["name"] for collection in listed}
        unsure = {changer.unsure} - {None}
        assert found - unsure == changer.present - unsure
        changer.present, changer.unsure = found, None
        for name in sorted(found):
            body = {"limit": 10, "with_vector": True}
            answer = http.post(f"/collections/{name}/points/scroll", json=body)
            assert answer.status_code == 200, answer.text
            points = answer.json()["result"]["points"]
            # a collection whose first point was not acknowledged may be empty, never another's
            assert [point["payload"]["name"] for point in points] in ([name], []), name
    folders = list(server.data_dir.glob("shards/*"))
    assert len(folders) == len(changer.present), "shards that nobody knows are gone"
