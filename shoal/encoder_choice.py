"""`EitherEncoder`: rank groups of the cluster for the models that they serve, this process for others.

A coordinator without any group still takes texts, as `shoal serve` does; once `shoal encoder serve`
runs, its model is computed there and nowhere else, for as long as the group is registered. Weights that
only one of the two has are computed by that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.encoder_api import Embedding, Encoder, ModelInfo, resolve_model, several_weights
from shoal.errors import BadRequest

__all__ = ["EitherEncoder", "Groups", "OwnModels"]


class Groups(Encoder, Protocol):
    """Rank groups, which come and go."""

    def fingerprints(self, model: str) -> set[str]:
        """Of a model, by its full name: those that groups serve, and those that are missing for the
        moment."""
        ...


class OwnModels(Encoder, Protocol):
    """Models of this process; each name has one fingerprint, for good."""

    async def fingerprint(self, model: str) -> str:
        """Of a model by its full name; reads its files the first time, and does not load it."""
        ...


class EitherEncoder:
    """Implements `shoal.encoder_api.Encoder`. `close` closes both."""

    def __init__(self, groups: Groups, local: OwnModels | None) -> None:
        self._groups, self._local = groups, local

    async def embed(self, texts: Sequence[str], model: str) -> NDArray[np.float32]:
        return (await self.encode(texts, model)).vectors

    async def encode(
        self, texts: Sequence[str], model: str, fingerprint: str | None = None
    ) -> Embedding:
        who = await self._for(model, fingerprint)
        return await who.encode(texts, model, fingerprint)

    async def prepare(self, model: str, fingerprint: str | None = None) -> ModelInfo:
        return await (await self._for(model, fingerprint)).prepare(model, fingerprint)

    def models(self) -> list[ModelInfo]:
        """A model of this process that groups serve, too, is listed once unless its weights are known
        to be others."""
        served = self._groups.models()
        known: dict[str, list[str | None]] = {}
        for info in served:
            known.setdefault(info.name, [None]).append(info.fingerprint)
        own = [
            info
            for info in (self._local.models() if self._local else [])
            if info.fingerprint not in known.get(info.name, [])
        ]
        return sorted([*served, *own], key=lambda info: (info.name, info.fingerprint or ""))

    async def describe(self) -> list[dict[str, Any]]:
        return await self._groups.describe()

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in (self._groups, self._local) if part))

    async def _for(self, model: str, fingerprint: str | None) -> Encoder:
        """Raises BadRequest for a model that neither knows, and where it was not said which of several
        weights are meant."""
        if self._local is None:
            return self._groups
        served = self._groups.models()
        aliases: dict[str, list[str]] = {}
        for info in (*served, *self._local.models()):
            aliases.setdefault(info.name, []).extend(info.aliases)
        if not aliases and fingerprint is None:
            return self._local  # says what to install
        try:
            name = resolve_model(model, aliases)
        except BadRequest:
            if fingerprint is None:
                raise
            return self._groups  # it was served once, and not here
        if all(info.name != name for info in self._local.models()):
            return self._groups
        expected = self._groups.fingerprints(name)
        if not expected and fingerprint is None:
            return self._local
        own = await self._local.fingerprint(name)
        if fingerprint is None and expected != {own}:
            raise several_weights(name, {own, *expected})
        if fingerprint in (None, own):
            there = any((info.name, info.fingerprint) == (name, own) for info in served)
            return self._groups if there else self._local
        return self._groups if expected else self._local  # who says what is wrong with it
