"""How a run can end other than with a model."""

from __future__ import annotations

from shoal.errors import ShoalError

__all__ = ["GateRefused", "Stopped", "TrainingFailed"]


class TrainingFailed(ShoalError):
    """The run cannot go on, and starting it again would not help by itself."""


class GateRefused(ShoalError):
    """--gate was given, and the model did not surely improve."""


class Stopped(ShoalError):
    """Somebody asked for the end, by SIGTERM or SIGINT, and the run has come to it in order."""
