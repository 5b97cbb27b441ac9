"""What the rest of Shoal knows about text encoders: the contract between the coordinator, which has
texts, and whoever turns them into vectors (in this process, or a group of processes elsewhere).

    coordinator ──texts, model name──▶ Encoder ──(n, dim) float32, unit length──▶ coordinator

Names of models. The full name is what a vector is bound to and what `models()` lists. A caller may
also use an alias, and upper or lower case does not matter: "all-MiniLM-L6-v2" and
"sentence-transformers/all-minilm-l6-v2" are one model. `resolve_model` is the only place that
decides this; it answers the full name or raises BadRequest naming what is known.

Weights. Under one name there may be several, told apart by their fingerprints: a model that was
fine-tuned in place beside the one that it was made of. Who has a fingerprint, of a bound vector for
instance, gets those weights or an error. Who has none is refused while there are several: which ones
answer must not be an accident.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import BadRequest, Unavailable
from shoal.limits import TEXT_BYTES_MAX, TEXTS_PER_REQUEST_MAX

__all__ = [
    "DEFAULT_MODEL",
    "Embedding",
    "Encoder",
    "ModelInfo",
    "Precision",
    "check_texts",
    "closing",
    "resolve_model",
    "several_weights",
    "wrong_weights",
]

DEFAULT_MODEL = "sentence-transformers/all-minilm-l6-v2"

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model that this encoder can use; name and fingerprint together tell it from others."""

    name: str
    """The full name, lower case; what `resolve_model` answers."""
    dim: int
    """Length of its vectors."""
    max_tokens: int
    """Tokens of a text that are read, the two special ones included; the rest is cut off."""
    fingerprint: str | None
    """sha256 (hex) over weights, tokenizer and configuration: equal fingerprints give equal
    vectors up to rounding. None until the files have been read, on first use."""
    aliases: tuple[str, ...] = ()
    loaded: bool = False
    """Whether the weights are in memory; if not, the next request waits for that (seconds)."""
    precision: str | None = None
    """float32 or bfloat16 once loaded."""
    texts_total: int = 0
    """Texts embedded since the process started."""
    truncated_total: int = 0
    """Of these, texts that were longer than `max_tokens` and lost their end."""
    busy_s_total: float = 0.0
    """Seconds spent on them, in the tokenizer and in forward passes; loading is not in it."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer for n texts, in their order.

    vectors    (n, dim) float32, C-contiguous, each row of length 1.
    tokens     (n,) int32: tokens read, special ones included; at most max_tokens.
    truncated  (n,) bool: the text was longer than that, and its end does not count.
    fingerprint  of the model that computed them.
    """

    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    fingerprint: str | None = None


class Encoder(Protocol):
    """Turns texts into vectors. Many tasks may call at once; their texts are batched together."""

    async def embed(self, texts: Sequence[str], model: str) -> NDArray[np.float32]:
        """n texts -> (n, dim) float32, C-contiguous, rows of length 1, in the order of `texts`.

        n may be 0. Few texts (a query) overtake many (an indexing batch) between forward passes.
        A text longer than the model reads is cut; use `encode` to learn which ones were.

        BadRequest    unknown model, a text that is too large, or too many texts at once.
        Busy          the queue is full; nothing was embedded.
        NotSupported  this installation has no encoder; the message says what to install.
        Unavailable   the encoder is closing.
        """
        ...

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        """As `embed`, and says how many tokens were read and which texts were cut.

        fingerprint  of the model that must compute it, where several of one name are served.
                     BadRequest when nobody has it (`wrong_weights`), and without it while there
                     are several (`several_weights`); Unavailable when who had it is gone for the
                     moment.
        """
        ...

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        """Load the model now, so that the first request need not wait; answers its full info,
        fingerprint included. Same errors as `encode`: without a fingerprint and with several to
        choose from, the message names all of them."""
        ...

    def models(self) -> list[ModelInfo]:
        """Every model that can be used here, by name and fingerprint: a name is there more than once
        while several weights are served under it. Cheap; loads nothing."""
        ...

    async def describe(self) -> list[dict[str, Any]]:
        """Every rank group, as it says itself, for people: its processes, what each of them holds, what
        waits. None in a process that computes for itself."""
        ...

    async def close(self) -> None:
        """Answer what waits with Unavailable and end the encoder's threads. Idempotent."""
        ...


def resolve_model(name: str, aliases_by_model: Mapping[str, Iterable[str]]) -> str:
    """The full name for `name`, which may be a full name or an alias, in any case.

    aliases_by_model  full name (lower case) -> its aliases. BadRequest when nothing fits, or an alias
                      fits several.
    """
    wanted = name.strip().lower()
    if wanted in aliases_by_model:
        return wanted
    fitting = [
        full_name
        for full_name, aliases in sorted(aliases_by_model.items())
        if any(wanted == alias.lower() for alias in aliases)
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise BadRequest(
            f"Wrong input: the model {name!r} may be any of {', '.join(fitting)}: name it in full"
        )
    known = ", ".join(sorted(aliases_by_model)) or "none; this server has no encoder"
    raise BadRequest(
        f"Wrong input: model {name!r} is not known here; models of this server: {known}"
    )


def wrong_weights(model: str, wanted: str, *served: str | None) -> BadRequest:
    """A model is there under its name, and is another one, or others."""
    return BadRequest(
        f"Wrong input: these vectors are of {model} with the fingerprint {wanted}, and what is served "
        f"under that name has {' and '.join(sorted(map(str, served)))}. Vectors of different weights "
        "cannot be compared: serve the model with the old weights, or make the collection anew with "
        "the new ones"
    )


def closing() -> Unavailable:
    """An encoder ends: for whoever waits for it, and whoever comes later."""
    return Unavailable("The encoder is closing; send the request again in a moment.")


def several_weights(model: str, served: Iterable[str]) -> BadRequest:
    """A model is there under its name more than once, and nobody said which is meant."""
    return BadRequest(
        f"Wrong input: {model} is served with several weights, of the fingerprints "
        f"{' and '.join(sorted(served))}, and it was not said which are meant. Bind the vector to the "
        "model and its fingerprint, or serve one of them under another name: --model NAME=FOLDER"
    )


def check_texts(texts: Sequence[str]) -> int:
    """Bytes of all texts together; BadRequest when one is too large, or there are too many."""
    if len(texts) > TEXTS_PER_REQUEST_MAX:
        raise BadRequest(
            f"Wrong input: {len(texts)} texts in one request; at most {TEXTS_PER_REQUEST_MAX} "
            "are embedded at once, so send several requests"
        )
    total = 0
    for position, text in enumerate(texts):
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise BadRequest(
                f"Wrong input: text {position} holds half a surrogate pair and is no valid Unicode"
            ) from error
        if size > TEXT_BYTES_MAX:
            raise BadRequest(
                f"Wrong input: text {position} has {size} bytes; at most {TEXT_BYTES_MAX} are "
                "taken. Models read only the first few hundred words: send a passage"
            )
        total += size
    return total
