"""What every part of Shoal and its users share: contracts, settings, errors, limits, the command.

`shoal.Client` and `shoal.AsyncClient` are imported when they are first asked for: the command and the
servers need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from shoal import client

        return getattr(client, name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
