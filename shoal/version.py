"""The version of this Shoal, from the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("shoal")
except PackageNotFoundError:  # run from a source tree that was not installed
    VERSION = "0.0.0+source"
