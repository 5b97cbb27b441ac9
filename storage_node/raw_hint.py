"""A quick look at payload bytes before they are parsed: can this condition hold at all?

A string or number that a condition asks for must stand in the text of the payload as it is, unless
the text spells it with escapes. Searching bytes takes under a microsecond, parsing and testing a
long text thirty; for a rare word most rows end here. A hint may say yes wrongly, never no.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from shoal.api.filter import (
    FieldCondition,
    Filter,
    Match,
    MatchAny,
    MatchPhrase,
    MatchPrefix,
    MatchSubstring,
    MatchText,
    MatchTextAny,
    MatchValue,
    NestedCondition,
)
from storage_node.row_filter import tokens

__all__ = ["Hint", "hint_of"]

Hint = Callable[[bytes], bool]

_PLAIN = re.compile(r"[ !#-.0-\[\]-~]*")  # ASCII that JSON writes as itself, or as \\uXXXX
_ANY_VALUES_MAX = 16  # more needles take longer to look for than the payload to parse


def hint_of(condition: object) -> Hint | None:
    """False of a payload means that the condition does not hold of it. None: no hint is known."""
    match condition:
        case FieldCondition(match=match) if match is not None:
            return _match_hint(match)
        case NestedCondition(nested=nested):
            return _filter_hint(nested.filter)
        case _:
            return None


def _filter_hint(filter: Filter) -> Hint | None:
    """All of `must` have to hold, so the first hint decides; the rest is left to the test."""
    hints = (hint_of(condition) for condition in filter.must or ())
    return next((hint for hint in hints if hint is not None), None)


def _match_hint(match: Match) -> Hint | None:
    match match:
        case MatchValue(value=value):
            return None if isinstance(value, bool) else _exact([str(value)])
        case MatchAny(any=values):
            return _exact([str(value) for value in values])
        case MatchPrefix():
            return _exact([match.prefix])
        case MatchSubstring():
            return _exact([match.substring])
        case MatchText() | MatchPhrase():
            words = tokens(match.text if isinstance(match, MatchText) else match.phrase)
            return _words([word for word in words if word.isascii()], all)
        case MatchTextAny():
            words = tokens(match.text_any)
            return _words(words, any) if all(map(str.isascii, words)) else None
        case _:
            return None


def _exact(texts: list[str]) -> Hint | None:
    """One of the texts stands in the payload, case and all."""
    if not 0 < len(texts) <= _ANY_VALUES_MAX or not all(map(_PLAIN.fullmatch, texts)):
        return None
    needles = [text.encode() for text in texts]
    # "-0" is the number 0, but nobody writes it: it costs a yes.
    zero = "0" in texts
    return lambda raw: b"\\u" in raw or zero or any(needle in raw for needle in needles)


def _words(words: list[str], combine: Callable[[Iterable[bool]], bool]) -> Hint | None:
    """All or some of the lower-case ASCII words stand in the payload, in any case."""
    if not 0 < len(words) <= _ANY_VALUES_MAX:
        return None
    patterns = [_whole(word) for word in words]

    def hint(raw: bytes) -> bool:
        lower = raw.lower()
        found = (pattern.search(lower) is not None for pattern in patterns)
        return (
            combine(found)
            or b"\\u" in raw
            # The two letters beyond ASCII whose lower case is, or begins with, an ASCII letter.
            or b"\xe2\x84\xaa" in raw  # KELVIN SIGN
            or b"\xc4\xb0" in raw  # LATIN CAPITAL LETTER I WITH DOT ABOVE
        )

    return hint


def _whole(word: str) -> re.Pattern[bytes]:
    r"""The word with no ASCII letter or digit beside it, but for the letter of an escape (\n)."""
    raw = re.escape(word.encode())
    # The word comes first and is looked back over: then `re` searches for it as plain bytes.
    return re.compile(
        raw + rb"(?:(?<![0-9a-z]" + raw + rb")|(?<=\\[bfnrt]" + raw + rb"))(?![0-9a-z])"
    )
