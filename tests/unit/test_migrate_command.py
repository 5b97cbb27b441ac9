"""`shoal migrate`: what it asks a server, and what it says of the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal import migrating

OLD, NEW = {"model": "old"}, {"model": "new"}
DONE = {
    "phase": "copying",
    "switched": False,
    "current": OLD,
    "other": NEW,
    "text_field": "text",
    "points": 3,
    "done": 3,
    "left": 0,
}
PAUSED = DONE | {"done": 1, "left": 2, "points_per_second_max": 0.0, "points_per_second": 50.0}
START = ("start", "c", "--model", "new", "--text-field", "text")


class Server:
    """Answers every request with `answer`, and remembers the bodies."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.answer = answer
        self.asked: dict[str, Any] = {}

    def request(self, method: str, path: str, body: bytes | None, kind: str) -> dict[str, Any]:
        if body is not None:
            self.asked[path.rpartition("/")[2]] = json.loads(body)
        return {"result": self.answer}

    def close(self) -> None:
        pass


def run(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], *argv: str) -> dict[str, Any]:
    server = Server(answer)
    monkeypatch.setattr(migrating, "Server", lambda url, key: server)
    assert migrating.run(argv) == 0
    return server.asked


def test_a_copy_that_was_paused_is_not_waited_for(monkeypatch, capsys):
    asked = run(monkeypatch, PAUSED, *START, "--points-per-second", "0")
    assert asked["migrate"]["points_per_second"] == 0
    said = capsys.readouterr().out
    assert "paused" in said
    assert "50 points/s" not in said
    assert "`inf`" in said


def test_no_bound_is_null(monkeypatch):
    asked = run(monkeypatch, DONE, *START, "--points-per-second", "inf")
    assert asked["migrate"]["points_per_second"] is None
    assert "points_per_second" not in run(monkeypatch, DONE, *START)["migrate"]


def test_what_comes_next_after_a_switch_is_no_switch(monkeypatch, capsys):
    run(monkeypatch, DONE, *START)
    assert "then `switch`" in capsys.readouterr().out
    run(monkeypatch, DONE | {"switched": True, "current": NEW, "other": OLD}, *START)
    said = capsys.readouterr().out
    assert "switched: searched with new, old kept" in said
    assert "drop" in said
    assert "then `switch`" not in said


def test_vectors_that_are_being_removed_are_not_missed(monkeypatch, capsys):
    run(monkeypatch, DONE | {"phase": "dropping", "done": 0, "left": 3}, "status", "c")
    assert capsys.readouterr().out == (
        "dropping: searched with old, the vectors of new are being removed\n"
    )


def test_drop_and_switch_say_what_may_be_missing(monkeypatch):
    for action, given in (("drop", ["--model", "old"]), ("switch", [])):
        for flag in ([], ["--allow-missing"]):
            asked = run(monkeypatch, DONE, action, "c", *given, *flag)
            assert asked[action]["allow_missing"] is bool(flag)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["switch", "c", "--model", "new"], "`switch` takes no --model, .* for `start` and `drop`"),
        (["status", "c", "--queries", "q.jsonl"], "takes no --queries"),
        (["rollback", "c", "--allow-missing"], "takes no --allow-missing"),
        (["start", "c", "--limit", "0"], "takes no --limit"),
        (["compare", "c", "--points-per-second", "0"], "takes no --points-per-second"),
    ],
)
def test_a_flag_that_the_action_does_not_read_is_refused(monkeypatch, argv, said):
    monkeypatch.setattr(migrating, "Server", lambda url, key: Server(DONE))
    with pytest.raises(migrating.MigrateFailed, match=said):
        migrating.run(argv)
