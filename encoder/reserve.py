"""Whether a batch fits in memory, asked before it is computed.

A process of a group that runs out of memory in the middle of a batch leaves the others waiting for
its part of a sum. So each looks first, and all agree: then the batch is computed, or rank 0 halves it.
On a CPU this also keeps the kernel from ending the process, which it does without asking.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Reserve", "activation_bytes", "is_out_of_memory", "memory_available_bytes"]

FAULT_VARIABLE = "SHOAL_FAULT_MEMORY_BYTES"  # tests: pretend that so much is free
_HEADROOM = 0.9


def activation_bytes(
    config: Mapping[str, Any], *, rows: int, tokens: int, tp: int, eager: bool = False
) -> int:
    """About the most that a forward pass holds besides weights, in one process, in float32: the states
    and what one layer makes of them. An upper bound.

    eager  attention is written out for every head. Else kernels are used that need only masks: 16
           bytes for a pair of tokens are what ModernBERT, with its two, was seen to take of 4,096
           tokens; BERT and Qwen3 took a quarter of that.
    """
    hidden = int(config.get("hidden_size") or 768)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    heads = int(config.get("num_attention_heads") or 12)
    states = rows * tokens * (6 * hidden + (4 * hidden + 3 * inner) // tp)
    attention = rows * tokens * tokens * (2 * max(1, heads // tp) if eager else 4)
    return 4 * (states + attention)


def memory_available_bytes(device: str) -> int:
    """What could be allocated now; a very large number where nobody says."""
    fault = os.environ.get(FAULT_VARIABLE)
    if fault:
        return int(fault)
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(_machine_bytes(), _cgroup_bytes())


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 1 << 62


def _cgroup_bytes() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        most = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        cached = [
            int(line.split()[1])
            for line in (folder / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        ]
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if most == "max" else int(most) - used + sum(cached)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(
        error, MemoryError | torch.OutOfMemoryError
    ) or "can't allocate memory" in str(error)


class Reserve:
    """Remembers what has fitted: smaller batches are not looked at again. Every process of a group
    sees the same batches and verdicts, so all remember the same.

    eager  see `activation_bytes`.
    """

    def __init__(
        self, config: Mapping[str, Any], *, tp: int, device: str, eager: bool = False
    ) -> None:
        self._config, self._tp, self._device, self._eager = config, tp, device, eager
        self._fitted = 0

    def _needed(self, rows: int, tokens: int) -> int:
        """On a CPU all processes of a stage take it from one memory, at the same time. Stages come one
        after the other, or each with a part of the batch."""
        each = activation_bytes(
            self._config, rows=rows, tokens=tokens, tp=self._tp, eager=self._eager
        )
        return each * self._tp if self._device == "cpu" else each

    def possible(self, rows: int, tokens: int) -> bool:
        """In this process."""
        needed = self._needed(rows, tokens)
        if needed <= self._fitted:
            return True
        fits = needed < _HEADROOM * memory_available_bytes(self._device)
        if fits:
            self._fitted = needed
        return fits

    def agreed(self, rows: int, tokens: int) -> bool:
        """In all processes. Collective, unless something as large has fitted before."""
        needed = self._needed(rows, tokens)
        if needed <= self._fitted:
            return True
        fits = needed < _HEADROOM * memory_available_bytes(self._device)
        verdict = torch.tensor(int(fits), device=self._device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        if int(verdict):
            self._fitted = needed
        return bool(int(verdict))
