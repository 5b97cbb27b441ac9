"""One event, one line, whatever is in it."""

from __future__ import annotations

import asyncio
import io
import logging
import re

import pytest

from shoal import telemetry


@pytest.fixture
def stream():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    yield stream
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def test_line(stream):
    telemetry.setup("info", stream)
    telemetry.logger("storage").info("segment_sealed", shard="7/0", rows=4096, ms=12.5, why=None)
    line = stream.getvalue()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info storage segment_sealed "
        r"shard=7/0 rows=4096 ms=12\.5\n",
        line,
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", '"a b"'),
        ("", '""'),
        ('say "hi"', '"say \\"hi\\""'),
        ("a=b", '"a=b"'),
        ("two\nlines\r\u2028x", '"two\\nlines\\r\\u2028x"'),
        ("\x1b[31mred", '"\\x1b[31mred"'),
        ("käse", "käse"),
    ],
)
def test_values_cannot_break_the_line(stream, value, shown):
    telemetry.setup("info", stream)
    telemetry.logger("x").warning("e", v=value)
    assert stream.getvalue().endswith(f" e v={shown}\n")
    assert len(stream.getvalue().splitlines()) == 1


def test_levels_and_other_libraries(stream):
    telemetry.setup("warning", stream)
    telemetry.logger("x").info("hidden")
    logging.getLogger("other").info("hidden")
    logging.getLogger("other").warning("seen %d", 5)
    assert stream.getvalue().endswith('warning other log message="seen 5"\n')
    assert "hidden" not in stream.getvalue()


def test_errors_bring_their_traceback_in_one_line(stream):
    telemetry.setup("info", stream)
    try:
        raise ValueError("bad\nthing")
    except ValueError as error:
        telemetry.logger("x").error("failed", error=error, shard=1)
    line = stream.getvalue()
    assert len(line.splitlines()) == 1
    assert "Traceback" in line
    assert 'error="ValueError: bad\\nthing"' in line


def test_long_values_are_cut(stream):
    telemetry.setup("info", stream)
    telemetry.logger("x").info("e", v="y" * 100_000)
    assert len(stream.getvalue()) < 5_000


def test_setup_twice_writes_once(stream):
    telemetry.setup("info", stream)
    telemetry.setup("info", stream)
    telemetry.logger("x").info("e")
    assert stream.getvalue().count("\n") == 1


def test_errors_that_nobody_awaits_are_seen(stream):
    telemetry.setup("info", stream)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        telemetry.watch_loop(loop)
        loop.call_exception_handler({"message": "lost", "exception": KeyError("k")})

    asyncio.run(main())
    assert "unhandled_error what=lost" in stream.getvalue()
    assert "KeyError" in stream.getvalue()
