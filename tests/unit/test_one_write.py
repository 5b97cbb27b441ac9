"""An answer's head waits for its body; nothing is lost or reordered."""

from __future__ import annotations

from coordinator.one_write import _COPIED_BYTES_MAX, _OneWrite

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Recorder:
    """A transport that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("close")

    def pause_reading(self) -> None:
        self.told.append("pause")


def told(*writes: bytes, close: bool = False) -> list[bytes | str]:
    recorder = Recorder()
    transport = _OneWrite(recorder)  # type: ignore[arg-type]
    for data in writes:
        transport.write(data)
    if close:
        transport.close()
    return recorder.told


def test_head_and_body_become_one_write() -> None:
    assert told(HEAD, b"body") == [HEAD + b"body"]
    assert told(HEAD, b"") == [HEAD]
    assert told(HEAD, b"body", HEAD, b"more") == [HEAD + b"body", HEAD + b"more"]
    assert told(HEAD, b"4\r\nbody\r\n", b"0\r\n\r\n") == [HEAD + b"4\r\nbody\r\n", b"0\r\n\r\n"]


def test_a_long_body_is_not_copied() -> None:
    body = b"x" * (_COPIED_BYTES_MAX + 1)
    assert told(HEAD, body) == [HEAD, body]


def test_what_has_no_body_goes_at_once() -> None:
    assert told(CONTINUE) == [CONTINUE]
    assert told(HEAD, close=True) == [HEAD, "close"]
    assert told(HEAD, b"body", close=True) == [HEAD + b"body", "close"]


def test_a_head_without_a_body_goes_out_at_the_end_of_the_answer() -> None:
    recorder = Recorder()
    transport = _OneWrite(recorder)  # type: ignore[arg-type]
    transport.write(HEAD)
    transport.flush()
    transport.flush()
    assert recorder.told == [HEAD]


def test_everything_else_is_passed_on() -> None:
    recorder = Recorder()
    _OneWrite(recorder).pause_reading()  # type: ignore[arg-type]
    assert recorder.told == ["pause"]
