"""Training without waiting for each other: a parameter server with bounded staleness.

    worker 1 ──gradient──▶ server: one step of AdamW for each gradient ──parameters──▶ worker 1
    worker 2 ──gradient──▶   │
                             └ who is more than `staleness` steps ahead of the slowest gets its
                               parameters when the slowest has caught up

Rank 0 is the server, the others compute, up to a step at which all meet: to judge, to write a
checkpoint. With the parameters comes which step that is, so the server may call them together early.
Workers see their own negatives only: a gather would make them wait. The bound is that of stale
synchronous parallel (Ho et al. 2013). Messages are point to point, `send` and `recv` from anybody,
which gloo has and NCCL has not: on GPUs they go by the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from shoal.errors import must

__all__ = ["Clocks", "broadcast_state", "serve_parameters", "work"]

SERVER = 0


class Clocks:
    """Who has done how many steps, and who may start the next one. Pure.

    until   the step at which all meet.
    """

    def __init__(self, workers: Sequence[int], *, staleness: int, start: int, until: int) -> None:
        self.until = until
        self._done = dict.fromkeys(workers, start)
        self._staleness = staleness
        self._waiting: list[int] = []

    @property
    def slowest(self) -> int:
        return min(self._done.values())

    def finished(self, worker: int) -> list[int]:
        """A worker did a step; the workers that may go on now, longest waiting first."""
        self._done[worker] += 1
        self._waiting.append(worker)
        going = [w for w in self._waiting if self._done[w] - self.slowest <= self._staleness]
        self._waiting = [w for w in self._waiting if w not in going]
        return going

    def call_together(self) -> None:
        """All meet as soon as they can: at the greatest step that somebody has done or is doing."""
        reached = (done + (worker not in self._waiting) for worker, done in self._done.items())
        self.until = min(self.until, max(reached))

    @property
    def met(self) -> bool:
        return self.slowest >= self.until


def serve_parameters(
    parameters: Iterable[nn.Parameter],
    apply: Callable[[int], bool],
    *,
    workers: Sequence[int],
    start: int,
    until: int,
    staleness: int,
    on_step: Callable[[int, float, int], None],
) -> int:
    """The server's part: until every worker has done `until` steps, or has been called together
    earlier. How many they have done, all of them.

    apply     the step from the gradients that are now in the parameters; given the slowest's steps.
              False: call them together.
    on_step   called when the slowest has done another step: how many, the last loss that came, and
              the largest number of updates that a gradient missed since the call before.
    """
    held = list(parameters)
    clocks = Clocks(workers, staleness=staleness, start=start, until=until)
    inbox = torch.empty(sum(p.numel() for p in held) + 1, device="cpu")
    version, seen, worst = 0, dict.fromkeys(workers, 0), 0
    while not clocks.met:
        worker = dist.recv(inbox)
        _put_gradients(held, inbox[1:])
        before = clocks.slowest
        go_on = apply(before)
        worst = max(worst, version - seen[worker])
        version += 1
        going = clocks.finished(worker)
        if not go_on:
            clocks.call_together()
        message = _with(parameters_to_vector(held), clocks.until)
        for other in going:
            seen[other] = version
            dist.send(message, other)
        if clocks.slowest > before:
            on_step(clocks.slowest, float(inbox[0]), worst)
            worst = 0
    return clocks.until


def work(
    parameters: Iterable[nn.Parameter],
    compute: Callable[[int], float],
    *,
    start: int,
    until: int,
) -> int:
    """A worker's part. compute: put the gradient of its part of a step's batch into the parameters,
    from nothing; the loss. Returns as `serve_parameters` does."""
    held = list(parameters)
    message = _with(parameters_to_vector(held), until)
    step = start
    while step < until:
        loss = compute(step)
        gradients = [cast(torch.Tensor, p.grad).flatten().cpu() for p in held]
        dist.send(torch.cat([torch.tensor([loss]), *gradients]), SERVER)
        dist.recv(message, SERVER)
        vector_to_parameters(message[:-1].to(held[0].device), held)
        step, until = step + 1, int(message[-1])
    return until


def broadcast_state(parameters: Iterable[nn.Parameter], optimizer: torch.optim.AdamW) -> None:
    """The server's parameters and moments into all processes. Collective."""
    for parameter in parameters:
        dist.broadcast(parameter.data, SERVER)
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            dist.broadcast(state.setdefault(name, torch.zeros_like(parameter.data)), SERVER)
        dist.broadcast(state.setdefault("step", torch.zeros(())), SERVER)


def _with(weights: torch.Tensor, until: int) -> torch.Tensor:
    return torch.cat([weights.detach().cpu(), torch.tensor([float(until)])])


def _put_gradients(parameters: Sequence[nn.Parameter], flat: torch.Tensor) -> None:
    sizes = [p.numel() for p in parameters]
    must(sum(sizes) == len(flat), "a gradient of another model")
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.device, copy=True)
