"""Datetimes as the API reads them: RFC 3339 and its everyday looser forms.

    2024-02-29T12:30:00Z   2024-02-29 12:30:00.123456+01:00   2024-02-29T12:30:00+01
    2024-02-29T12:30:00 +0100   2024-02-29 12:30:00 UTC   2024-02-29T12:30   2024-02-29

Without an offset the time is UTC. Digits after the microsecond are dropped.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta, timezone

__all__ = ["DATETIME_TEXT_MAX", "microseconds", "midnight", "parse_datetime"]

DATETIME_TEXT_MAX = 128  # characters; anything longer is not taken for a datetime
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FORM = re.compile(
    r"""\s*
    (\d{4})-(1[0-2]|0?[1-9])-(3[01]|[12]\d|0[1-9]|\ ?[1-9])
    (?:
      (?:T|\s+)(2[0-3]|[01]?\d):([0-5]?\d)
      (?:
        :([0-5]?\d)(?:\.(\d+))?
        (?:
          \s*(?:
            (?-i:Z|z)
            | ([+-])(\d\d)(?:(:?)([0-5]\d)(?:\10([0-5]\d)(?:\.(\d{1,6}))?)?)?
          )
          | \s*(?-i:\ UTC)
        )?
      )?
    )?""",
    re.VERBOSE | re.IGNORECASE,
)


def parse_datetime(text: str) -> datetime | None:
    """A string -> an aware datetime, or None when it is none of the accepted forms."""
    if len(text) > DATETIME_TEXT_MAX:
        return None
    form = _FORM.fullmatch(text)
    if form is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, *offset = form.groups()
    try:
        zone = UTC if sign is None else _zone(sign, offset)
        return datetime(
            int(year),
            int(month),
            int(day),
            int(hour or 0),
            int(minute or 0),
            int(second or 0),
            int((fraction or "0")[:6].ljust(6, "0")),
            zone,
        )
    except ValueError:  # the form is right, the date is not: February 30th
        return None


def _zone(sign: str, offset: list[str | None]) -> timezone:
    hours, _, minutes, seconds, fraction = offset
    size = timedelta(
        hours=int(hours or 0),
        minutes=int(minutes or 0),
        seconds=int(seconds or 0),
        microseconds=int((fraction or "0").ljust(6, "0")),
    )
    return timezone(-size if sign == "-" else size)


def microseconds(value: datetime) -> int:
    """Microseconds since 1970-01-01T00:00:00Z of an aware datetime; exact, fits in 64 bits."""
    return (value - _EPOCH) // _MICROSECOND


def midnight(value: date) -> datetime:
    """The start of a day, in UTC."""
    return datetime.combine(value, time.min, UTC)
