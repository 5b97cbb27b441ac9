"""What a crash test knows: which content each point must have, by every acknowledged operation.

Pure. A point's content follows from its id and two version numbers, so what a server returns can be
checked to the last bit. An operation that was sent and not acknowledged may have happened or not,
for each of its points alone (they may live in different shards), but nothing in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DIM_A", "DIM_B", "Change", "Content", "Ledger"]

DIM_A, DIM_B = 16, 4


@dataclass(frozen=True)
class Content:
    """The versions of a point's vectors and of its payload."""

    vectors: int
    payload: int

    def vectors_json(self, id_: int) -> dict[str, list[float]]:
        # Small multiples of 1/16: exact in float32, so they must come back exactly.
        return {
            "a": [((id_ * 31 + self.vectors * 17 + i * 7) % 997) / 16 for i in range(DIM_A)],
            "b": [((id_ * 13 + self.vectors * 29 + i * 3) % 499) / 16 for i in range(DIM_B)],
        }

    def payload_json(self, id_: int) -> dict[str, Any]:
        text = f"{id_}/{self.payload} " * ((id_ + self.payload) % 30)
        return {"id": id_, "version": self.payload, "odd": id_ % 2 == 1, "text": text}

    def point_json(self, id_: int) -> dict[str, Any]:
        return {
            "id": id_,
            "vector": self.vectors_json(id_),
            "payload": self.payload_json(id_),
        }


Change = Mapping[int, Content | None]  # id -> its content from now on; None = deleted


@dataclass
class Ledger:
    """acknowledged: the content of every point that must exist. pending: what the one operation
    in flight would make of its points."""

    acknowledged: dict[int, Content] = field(default_factory=dict)
    pending: dict[int, Content | None] = field(default_factory=dict)
    operations: int = 0

    def sent(self, change: Change) -> None:
        assert not self.pending, "one operation at a time"
        self.pending = dict(change)

    def answered(self) -> None:
        """The operation in flight was acknowledged."""
        for id_, content in self.pending.items():
            if content is None:
                self.acknowledged.pop(id_, None)
            else:
                self.acknowledged[id_] = content
        self.pending = {}
        self.operations += 1

    def check(self, points: Mapping[int, Mapping[str, Any]]) -> list[str]:
        """Compare with all points that a server has, and learn what became of the operation that
        was in flight. Returns a sentence for each point that is wrong."""
        wrong = []
        for id_ in sorted(self.acknowledged.keys() | self.pending.keys() | points.keys()):
            allowed = {self.acknowledged.get(id_)}
            if id_ in self.pending:
                allowed.add(self.pending[id_])
            found = points.get(id_)
            fits = [content for content in allowed if _is(found, id_, content)]
            if not fits:
                wrong.append(_sentence(id_, allowed, found))
            elif fits[0] is None:
                self.acknowledged.pop(id_, None)
            else:
                self.acknowledged[id_] = fits[0]
        self.pending = {}
        return wrong


def _is(found: Mapping[str, Any] | None, id_: int, content: Content | None) -> bool:
    if content is None or found is None:
        return content is None and found is None
    return found["payload"] == content.payload_json(id_) and found[
        "vector"
    ] == content.vectors_json(id_)


def _sentence(id_: int, allowed: set[Content | None], found: Mapping[str, Any] | None) -> str:
    expected = " or ".join(
        "no point" if content is None else str(content) for content in sorted(allowed, key=repr)
    )
    if found is None:
        return f"point {id_} is lost: expected {expected}"
    payload, vector = found["payload"], found["vector"]
    return (
        f"point {id_}: expected {expected}, found version {payload.get('version')!r} with "
        f"payload {str(payload)[:120]} and vectors {str(vector)[:160]}"
    )
