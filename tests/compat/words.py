"""A text embedding for tests: deterministic, needs no model, and texts that share words are near."""

from __future__ import annotations

import math
import re
import zlib

__all__ = ["DIM", "TEXTS", "embed"]

DIM = 128

TEXTS = {
    "6ba7b810-9dad-11d1-80b4-00c04fd430c8": (
        "I had chocolate chip pancakes and scrambled eggs for breakfast this morning.",
        "tweet",
    ),
    "6ba7b811-9dad-11d1-80b4-00c04fd430c8": (
        "The weather forecast for tomorrow is cloudy and overcast, with a high of 62 degrees.",
        "news",
    ),
    "6ba7b812-9dad-11d1-80b4-00c04fd430c8": (
        "Robbers broke into the city bank and stole one million in cash.",
        "news",
    ),
    "6ba7b814-9dad-11d1-80b4-00c04fd430c8": (
        "Wow! That was an amazing movie. I cannot wait to see it again.",
        "tweet",
    ),
}


def embed(text: str) -> list[float]:
    """Each longer word adds one to its own place; (DIM,) of length 1."""
    vector = [1e-3] * DIM  # so that an empty text has a direction too
    for word in re.findall(r"\w{4,}", text.lower()):
        vector[zlib.crc32(word.encode()) % DIM] += 1.0
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]
