"""`shoal encoder serve`: a group of processes that hold one text model, asked over gRPC.

This process starts and watches the others; the first of them speaks to the cluster.
"""

from __future__ import annotations

from encoder.group import run_group
from shoal import telemetry
from shoal.roles.process import check_port
from shoal.settings import EncoderProcess

__all__ = ["run"]


def run(settings: EncoderProcess) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartupError."""
    check_port(settings)
    telemetry.setup(settings.log_level)
    run_group(settings)
