"""What all processes of a run must see alike: that one of them cannot go on, and that it shall end.

A process that raises alone leaves the others waiting for it. So what only the first one does, such as
writing a file, is told to all (`agreed`), and before each step is counted all hear of a signal that one
of them got, and of a loss that is no number (`StopSignal`, `any_of`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from shoal.errors import SettingsError, ShoalError

__all__ = ["StopSignal", "agreed", "alike", "any_of"]


def agreed(does: Callable[[], None]) -> str | None:
    """Let the first process do something, and tell everybody what went wrong; None: nothing.

    does   raises OSError or ShoalError. Collective.
    """
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            does()
        except ShoalError as error:
            found[0] = error.message
        except OSError as error:
            found[0] = f"{error}."
    dist.broadcast_object_list(found, src=0)
    return found[0]


def alike(values: Mapping[str, Any]) -> None:
    """Raises SettingsError, in all processes, when not all were told the same. Collective.

    Somebody starts them on each machine: other flags there, or another file with pairs, would not stop
    the run. It would learn something else, or what is held out.
    """
    every: list[Mapping[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, values)
    for rank, theirs in enumerate(every):
        for key, value in every[0].items():
            if theirs.get(key) != value:
                raise SettingsError(
                    f"Process 0 was started with {key} {value!r}, process {rank} with "
                    f"{theirs.get(key)!r}. Give all the same flags, and the same files."
                )


def any_of(flags: tuple[bool, ...], device: torch.device) -> tuple[bool, ...]:
    """For each flag whether one of the processes has raised it. Collective: one all-reduce of a few
    bytes, under a millisecond beside a step that takes hundreds."""
    if dist.get_world_size() == 1:
        return flags
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in together.tolist())


class StopSignal:
    """From SIGTERM and SIGINT to a question: shall we end? While it is entered.

    A second signal ends the process at once; not under torchrun, which passes on what its group has
    had already. A process whose parent has ended shall end too: nobody else would tell it.
    """

    def __init__(self) -> None:
        self._asked = False
        self._launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid()
        self._before: dict[int, Any] = {}

    @property
    def raised(self) -> bool:
        return self._asked or (self._launched and os.getppid() != self._parent)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _hear(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        if not self._launched:
            signal.signal(number, self._before[number])
