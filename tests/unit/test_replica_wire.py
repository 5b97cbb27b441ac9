"""What replicas say to each other survives the wire, whoever it is said to."""

from __future__ import annotations

import pytest

from shoal.errors import BadRequest
from storage_node.replica import (
    Append,
    Appended,
    Entry,
    NeedFiles,
    Position,
    Probe,
    Refused,
    Released,
)
from storage_node.replica_wire import decode_message, encode_message

ENTRIES = (Entry(8, 2, b"x" * 1_000), Entry(9, 3, b""))
MESSAGES = [
    Append(3, 7, 2, ENTRIES, 6, 12.5),
    Append(3, 7, 2, ENTRIES, 6, 13.5),
    Append(3, 7, 2, (Entry(8, 2, b"y" * 1_000), ENTRIES[1]), 6, 13.5),
    Append(3, 0, -1, (), 0, 0.0),
    Appended(3, 9, 12.5),
    Probe(4, 1.0),
    Position(4, 2**63 - 1, 9, 7, ((1, 1), (3, 6)), 0.25),
    Refused(5),
    NeedFiles(5, 17),
    Released(6),
]


def test_every_message_survives() -> None:
    for message in [*MESSAGES, *MESSAGES[:3], MESSAGES[0], MESSAGES[2]]:
        assert decode_message(encode_message(message)) == message


def test_what_is_said_to_every_follower_is_encoded_once() -> None:
    one, other = (Append(3, 7, 2, ENTRIES, 6, 14.0) for _ in range(2))
    assert encode_message(one) is encode_message(other)


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x08\x03"])
def test_what_no_replica_says_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_message(data)
