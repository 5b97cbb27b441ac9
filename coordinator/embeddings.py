"""`POST /v1/embeddings`: texts to vectors, in the shape that OpenAI's clients send and read.

    {"model": "all-MiniLM-L6-v2", "input": "text" | ["text", …], "encoding_format": "float" | "base64"}

A field that would change the answer and is not understood is an error, never passed over. What this
answer has beyond that shape: `truncated`, the positions of texts that were longer than the model reads.
Errors have that shape, too: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, field_validator

from coordinator.http import Answer, Call
from coordinator.json_body import validate
from shoal.api.models import EmbedRequest, Strict
from shoal.encoder_api import Embedding
from shoal.errors import BadRequest, Busy, ShoalError
from shoal.limits import TEXTS_PER_REQUEST_MAX

__all__ = ["EmbeddingsRequest", "EmbeddingsResult", "embed", "embeddings"]

INLINE_NUMBERS_MAX = 32_768  # that become JSON in the event loop: less than 10 ms


class EmbeddingsRequest(Strict):
    """user: who asks, for statistics that are not kept here. dimensions: only the model's own."""

    input: str | list[str] = Field(
        json_schema_extra={"minItems": 1, "maxItems": TEXTS_PER_REQUEST_MAX}
    )
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None

    @field_validator("input")
    @classmethod
    def _some_and_not_too_many(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not 1 <= len(value) <= TEXTS_PER_REQUEST_MAX:
            raise ValueError(f"takes 1 to {TEXTS_PER_REQUEST_MAX} texts, not {len(value)}")
        return value


class EmbeddingObject(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="base64: float32, little-endian.")


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResult(BaseModel):
    """truncated: positions of texts whose end was cut off."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: Usage
    truncated: list[int]


async def embeddings(call: Call) -> Answer:
    try:
        request = validate(EmbeddingsRequest, call.body)
        texts = [request.input] if isinstance(request.input, str) else request.input
        embedded = await call.coordinator.encode(texts, request.model)
        dim = embedded.vectors.shape[1]
        if request.dimensions not in (None, dim):
            raise BadRequest(
                f"Wrong input: `dimensions` is {request.dimensions}, and the model {request.model} "
                f"makes vectors of {dim}: leave it out"
            )
    except ShoalError as error:
        return _refusal(error)
    return Answer(200, await _in_turns(embedded, partial(_rendered, request, embedded)))


async def embed(call: Call) -> bytes:
    """`POST /shoal/v1/embed`: the same with Shoal's envelope."""
    request = validate(EmbedRequest, call.body)
    embedded = await call.coordinator.encode(request.texts, request.model)
    return await _in_turns(embedded, partial(_enveloped, request, embedded))


async def _in_turns(embedded: Embedding, render: Callable[[], bytes]) -> bytes:
    if embedded.vectors.size <= INLINE_NUMBERS_MAX:
        return render()
    return await asyncio.to_thread(render)


def _enveloped(request: EmbedRequest, embedded: Embedding) -> bytes:
    return msgspec.json.encode(
        {
            "vectors": [msgspec.Raw(msgspec.json.encode(v.tolist())) for v in embedded.vectors],
            "model": request.model,
            "tokens": embedded.tokens.tolist(),
            "truncated": np.flatnonzero(embedded.truncated).tolist(),
        }
    )


def _rendered(request: EmbeddingsRequest, embedded: Embedding) -> bytes:
    """Vector by vector, so that other threads get their turn in between: 4,096 vectors of 384 numbers
    are 29 MB of JSON, and 0.4 s."""
    tokens = int(embedded.tokens.sum())
    as_text = request.encoding_format == "base64"
    data = [
        msgspec.Raw(
            msgspec.json.encode(
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _base64(vector) if as_text else vector.tolist(),
                }
            )
        )
        for index, vector in enumerate(embedded.vectors)
    ]
    result: dict[str, Any] = {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "truncated": np.flatnonzero(embedded.truncated).tolist(),
    }
    return msgspec.json.encode(result)


def _base64(vector: NDArray[np.float32]) -> str:
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()


def _refusal(error: ShoalError) -> Answer:
    kind = "invalid_request_error" if error.status_code < 429 else "server_error"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if isinstance(error, Busy):
        kind = "rate_limit_error"
        headers = ((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))),)
    body = {"error": {"message": error.message, "type": kind, "param": None, "code": None}}
    return Answer(error.status_code, msgspec.json.encode(body), headers=headers)
