"""The profile `encoder` of the compose file: a model over two processes that both coordinators use,
lost and found again, alone and beside another.

TORCH_FLAGS says where PyTorch for CPUs comes from, as for `make install`; without it the image would have
CUDA in it, 6 GB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from compose_harness import Compose, run
from harness import wait_until

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.skipif(
        "TORCH_FLAGS" not in os.environ, reason="TORCH_FLAGS does not say where PyTorch comes from"
    ),
]

MODEL = "all-MiniLM-L6-v2"
BACK_S_MAX = 180.0
FACTS = [
    "The Rhine flows into the North Sea.",
    "Bread is baked from flour.",
    "Tin is a soft metal.",
]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with Compose("shoal-test-encoder", ["encoder"]).running() as compose:
        yield compose


@pytest.fixture(scope="module")
def facts(compose: Compose) -> None:
    vectors = {"size": 384, "distance": "Cosine", "shoal_model": MODEL}
    ask(compose, "c1", "PUT", "/collections/facts", {"vectors": vectors})
    points = [
        {"id": n, "vector": {"text": text, "model": MODEL}, "payload": {"text": text}}
        for n, text in enumerate(FACTS)
    ]
    ask(compose, "c1", "PUT", "/collections/facts/points", {"points": points})


def ask(compose: Compose, coordinator: str, method: str, path: str, body: Any = None) -> Any:
    answer = httpx.request(
        method, compose.url(coordinator) + path, json=body, trust_env=False, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]


def groups(compose: Compose) -> list[dict[str, Any]]:
    found = ask(compose, "c2", "GET", "/shoal/v1/cluster")["encoders"]
    return [group for group in found if group["state"] == "up"]


def nearest(compose: Compose, coordinator: str) -> tuple[int, int]:
    """Status and the best hit of a question about rivers; -1 for none."""
    body = {"query": {"text": "Which sea does the river reach?", "model": MODEL}, "limit": 1}
    answer = httpx.post(
        compose.url(coordinator) + "/collections/facts/points/query",
        json=body,
        trust_env=False,
        timeout=60,
    )
    points = answer.json()["result"]["points"] if answer.status_code == 200 else []
    return answer.status_code, points[0]["id"] if points else -1


def containers(compose: Compose) -> list[str]:
    return sorted(compose("ps", "-q", "encoder").split())


def test_both_coordinators_use_the_group(compose: Compose, facts: None) -> None:
    (group,) = groups(compose)
    assert (group["tp"], len(group["ranks"])) == (2, 2)
    print([(rank["parameters"], rank["resident_bytes"]) for rank in group["ranks"]])
    assert nearest(compose, "c1") == nearest(compose, "c2") == (200, 0)


def test_a_rank_that_is_killed_is_replaced_inside_the_container(
    compose: Compose, facts: None
) -> None:
    (before,) = groups(compose)
    (container,) = containers(compose)
    run(
        "docker",
        "exec",
        container,
        "python",
        "-c",
        f"import os; os.kill({before['ranks'][1]['pid']}, 9)",
    )

    def back() -> bool:
        status, best = nearest(compose, "c1")
        assert status in (200, 503)
        assert best in (0, -1)
        return status == 200 and [g["attempt"] for g in groups(compose)] > [before["attempt"]]

    wait_until(back, within_s=BACK_S_MAX, what="the group to form anew")
    assert containers(compose) == [container]


def test_a_container_that_is_killed_is_missed_and_comes_back(compose: Compose, facts: None) -> None:
    (container,) = containers(compose)
    run("docker", "kill", "-s", "KILL", container)
    assert nearest(compose, "c1") == (503, -1)
    run("docker", "start", container)
    wait_until(
        lambda: nearest(compose, "c2") == (200, 0), within_s=BACK_S_MAX, what="texts to be embedded"
    )


def test_a_second_group_takes_over(compose: Compose, facts: None) -> None:
    compose.up("--scale", "encoder=2", "--no-recreate")
    wait_until(lambda: len(groups(compose)) == 2, within_s=BACK_S_MAX, what="two groups")
    run("docker", "kill", "-s", "KILL", containers(compose)[0])
    for _ in range(20):
        assert nearest(compose, "c1") == nearest(compose, "c2") == (200, 0)


def test_it_stops_cleanly(compose: Compose) -> None:
    running = containers(compose)
    compose("stop", "encoder")
    for container in running:
        assert run("docker", "inspect", "-f", "{{.State.ExitCode}}", container).strip() == "0"
