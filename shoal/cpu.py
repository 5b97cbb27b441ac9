"""What must be in the environment before numpy, faiss and grpc are first imported.

The OpenBLAS inside the faiss-cpu wheel is old and takes CPUs that it does not know for ones of
2007: training is then four times slower. So it is told the kernels, unless the operator did that.
OpenMP threads that wait must sleep, not spin: others need the core. gRPC would run handlers around
the start of every child, which uses nothing of it, and write its own lines about lost connections.
"""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["core_type", "prepare_environment"]


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is not set yet. Too late, and without effect, once numpy, faiss or grpc is loaded."""
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if "OPENBLAS_CORETYPE" not in environ and platform.machine() in ("x86_64", "AMD64"):
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:
            return  # not Linux: OpenBLAS guesses
        if (found := core_type(cpuinfo)) is not None:
            environ["OPENBLAS_CORETYPE"] = found


def core_type(cpuinfo: str) -> str | None:
    """The OpenBLAS kernels for an x86-64 CPU, from its flags; None: leave the guess to OpenBLAS."""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    if "avx512f" in flags:
        return "SkylakeX"
    return "Haswell" if "avx2" in flags else None
