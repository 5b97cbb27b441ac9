"""The log: one line per event, `key=value`, to standard error.

    2026-11-21T09:00:00.123Z info storage segment_sealed shard=7/0 rows=4096 took_ms=12.5

Any part writes such a line with `logger("storage").info("segment_sealed", shard=..., rows=...)`.
Records of other libraries come out in the same form. A value never breaks the line: blanks and
quotes are quoted, line ends escaped. What goes in is the caller's duty: never a request's body, a
payload, a vector or a key.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import TextIO

__all__ = ["Logger", "logger", "setup", "watch_loop"]

_ROOT = "shoal"
_VALUE_LENGTH_MAX = 4_000  # of one value: a payload by mistake does not flood the log
_VALUE_HEAD_LENGTH = 1_000  # of a longer one; the end is kept, where a traceback says what it was


class Logger:
    """Writes events of one component. Values are shown with str(); None is left out."""

    __slots__ = ("_log",)

    def __init__(self, component: str) -> None:
        self._log = logging.getLogger(f"{_ROOT}.{component}")

    def debug(self, event: str, **fields: object) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, *, error: BaseException | None = None, **fields: object) -> None:
        """`error` adds its type, text and traceback."""
        if error is not None:
            fields |= {
                "error": f"{type(error).__name__}: {error}",
                "trace": "".join(traceback.format_exception(error)),
            }
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        if self._log.isEnabledFor(level):
            self._log.log(level, event, extra={"fields": fields})


def logger(component: str) -> Logger:
    return Logger(component)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        component = record.name.removeprefix(_ROOT + ".")
        head = f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z {record.levelname.lower()}"
        fields: dict[str, object] | None = getattr(record, "fields", None)
        if fields is None:
            fields, event = {"message": record.getMessage().strip()}, "log"
        else:
            event = record.getMessage()
        if record.exc_info:
            fields = fields | {"trace": self.formatException(record.exc_info)}
        parts = [f"{key}={_value(value)}" for key, value in fields.items() if value is not None]
        return " ".join([head, component, event, *parts])


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if len(text) > _VALUE_LENGTH_MAX:
        tail = _VALUE_LENGTH_MAX - _VALUE_HEAD_LENGTH
        text = text[:_VALUE_HEAD_LENGTH] + " … " + text[-tail:]
    if text.isprintable() and text and not any(c in ' "=' for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in escaped) + '"'


def setup(level: str = "info", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (standard error) in our form. Repeatable.

    Libraries speak from warning on: their info lines are about themselves.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(level.upper())
    logging.captureWarnings(True)


def watch_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Errors that no task awaits go to the log instead of nowhere."""
    log = logger("loop")

    def report(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        log.error(
            "unhandled_error",
            what=context.get("message"),
            error=error if isinstance(error, BaseException) else None,
        )

    loop.set_exception_handler(report)
