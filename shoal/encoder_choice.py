"""`EitherEncoder`: rank groups of the cluster for the models that they serve, this process for others.

A coordinator without any group still takes texts, as `shoal serve` does; once `shoal encoder serve`
runs, its model is computed there and nowhere else, for as long as the group is registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.encoder_api import Embedding, Encoder, ModelInfo, resolve_model

__all__ = ["EitherEncoder"]


class EitherEncoder:
    """Implements `shoal.encoder_api.Encoder`. `close` closes both."""

    def __init__(self, groups: Encoder, local: Encoder | None) -> None:
        self._groups, self._local = groups, local

    async def embed(self, texts: Sequence[str], model: str) -> NDArray[np.float32]:
        return await self._for(model).embed(texts, model)

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        return await self._for(model).encode(texts, model, fingerprint)

    async def prepare(self, model: str) -> ModelInfo:
        return await self._for(model).prepare(model)

    def models(self) -> list[ModelInfo]:
        found = {info.name: info for info in (self._local.models() if self._local else [])}
        found |= {info.name: info for info in self._groups.models()}
        return [found[name] for name in sorted(found)]

    async def describe(self) -> list[dict[str, Any]]:
        return await self._groups.describe()

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in (self._groups, self._local) if part))

    def _for(self, model: str) -> Encoder:
        """Raises BadRequest for a model that neither knows, NotSupported where there is none."""
        if self._local is None:
            return self._groups
        known = {info.name: info.aliases for info in self.models()}
        if not known:
            return self._local  # says what to install
        name = resolve_model(model, known)
        served = {info.name for info in self._groups.models()}
        return self._groups if name in served else self._local
