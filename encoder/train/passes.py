"""Forward and backward over the texts of one batch, on whatever layout.

    vectors of all texts ──▶ the loss says d loss / d vectors ──▶ backward through the model

A contrastive loss needs all vectors of the batch at once, so it cannot be computed where a part of
the batch is. Three ways to the same gradient:

    it fits          run the model once, keep the graph, go back
    it does not      run it in parts without a graph; then again, part by part, each with its share
                     of d loss / d vectors (GradCache)
    pipeline         the same: once forward only, once forward and backward by the schedule (GPipe,
                     1F1B), whose loss of a micro-batch is (vectors · d loss / d vectors).sum()

Dropout must drop the same in both runs: the state of the dice is put back in between. Texts of like
length go together, so that little is spent on padding.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from encoder.parallel import Stage
from encoder.train.settings import Schedule

__all__ = ["GradientOf", "Passes"]

SCHEDULES_MAX = 32  # shapes of batches whose schedules are kept
TOKENS_STEP = 8  # lengths are rounded up to it in a pipeline, so that there are few shapes
# What the loss says: (rows, dim) float32 vectors, detached -> the gradient on them.
GradientOf = Callable[[torch.Tensor], torch.Tensor]


class Passes:
    """module   the stage, or DDP around it. One per process; collective over the mesh."""

    def __init__(
        self,
        stage: Stage,
        module: nn.Module,
        mesh: DeviceMesh,
        *,
        hidden: int,
        schedule: Schedule,
        chunk_rows: int,
        autocast: bool,
    ) -> None:
        self._stage, self._module, self._mesh = stage, module, mesh
        self._hidden, self._chunk_rows, self._autocast = hidden, chunk_rows, autocast
        self._kind = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
        self._device = torch.device(mesh.device_type)
        self._stages = mesh["pp"].size()
        self._schedules: OrderedDict[tuple[int, int, bool], Any] = OrderedDict()

    def run(
        self, ids: torch.Tensor, mask: torch.Tensor, gradient_of: GradientOf, *, last: bool
    ) -> None:
        """Add the gradient of one batch to the parameters.

        ids, mask    (rows, tokens) int64; the same on all processes of a pipeline and of tensor
                     parallelism.
        gradient_of  called once, in the last stage only.
        last         whether gradients are averaged over data-parallel processes now, or later.
        """
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            if self._stages > 1:
                self._through_pipeline(ids, mask, gradient_of, last=last)
            elif len(ids) <= self._chunk_rows:
                self._at_once(ids, mask, gradient_of, last=last)
            else:
                self._in_parts(ids, mask, gradient_of, last=last)

    # -- one stage --------------------------------------------------------------------------------

    def _at_once(
        self, ids: torch.Tensor, mask: torch.Tensor, gradient_of: GradientOf, *, last: bool
    ) -> None:
        # FSDP gathers parameters for each forward; the others run short and long texts apart.
        count = 1 if isinstance(self._module, FSDPModule) else 2
        parts = _by_length(mask, -(-len(ids) // count))
        with self._synchronised(last):
            vectors = [self._module(*_cut(ids, mask, rows)) for rows in parts]
            gradient = gradient_of(_joined([v.detach() for v in vectors], parts))
            torch.autograd.backward(vectors, [gradient[rows] for rows in parts])

    def _in_parts(
        self, ids: torch.Tensor, mask: torch.Tensor, gradient_of: GradientOf, *, last: bool
    ) -> None:
        parts = _by_length(mask, self._chunk_rows)
        dice = self._dice()
        with torch.no_grad():
            vectors = [self._module(*_cut(ids, mask, rows)) for rows in parts]
        gradient = gradient_of(_joined(vectors, parts))
        self._put_back(dice)
        for rows in parts:
            with self._synchronised(last and rows is parts[-1]):
                self._module(*_cut(ids, mask, rows)).backward(gradient[rows])

    def _dice(self) -> list[torch.Tensor]:
        """What dropout draws from, on the CPU and on this process's GPU."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state())
        return states

    def _put_back(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1])

    @contextlib.contextmanager
    def _synchronised(self, now: bool) -> Iterator[None]:
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(now)
            yield
        elif isinstance(self._module, DistributedDataParallel) and not now:
            with self._module.no_sync():
                yield
        else:
            yield

    # -- a pipeline -------------------------------------------------------------------------------

    def _through_pipeline(
        self, ids: torch.Tensor, mask: torch.Tensor, gradient_of: GradientOf, *, last: bool
    ) -> None:
        parts = max(self._stages, -(-len(ids) // self._chunk_rows))
        rows = len(ids)
        ids, mask = _padded(ids, mask, rows=-rows % parts, tokens=-ids.shape[1] % TOKENS_STEP)
        given = (ids,) if self._stage.first else ()
        dice = self._dice()
        with torch.no_grad():
            out = self._schedule(len(ids) // parts, ids.shape[1], parts, train=False).eval(
                *given, mask=mask
            )
        gradient = None
        if self._stage.last:
            gradient = torch.zeros_like(out)  # nothing comes from the rows that only fill up
            gradient[:rows] = gradient_of(out[:rows].detach())
        self._put_back(dice)
        schedule = self._schedule(len(ids) // parts, ids.shape[1], parts, train=True)
        schedule.step(*given, target=gradient, mask=mask, return_outputs=False)

    def _schedule(self, rows: int, tokens: int, parts: int, *, train: bool) -> Any:
        key = (rows * parts, tokens, train)
        schedule = self._schedules.get(key)
        if schedule is None:
            stage = PipelineStage(
                self._module,
                self._mesh["pp"].get_local_rank(),
                self._stages,
                self._device,
                group=self._mesh["pp"].get_group(),
            )
            kind = self._kind if train else ScheduleGPipe
            schedule = self._schedules[key] = kind(
                stage, parts, loss_fn=_product if train else None, scale_grads=False
            )
            if len(self._schedules) > SCHEDULES_MAX:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return schedule


def _product(vectors: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient on the vectors is `gradient`."""
    return (vectors * gradient).sum()


def _by_length(mask: torch.Tensor, rows_max: int) -> list[torch.Tensor]:
    """Positions of rows, short texts first, at most `rows_max` in each part."""
    return list(torch.split(torch.argsort(mask.sum(1), stable=True), rows_max))


def _cut(
    ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = int(mask[rows].sum(1).max())
    return ids[rows, :longest], mask[rows, :longest]


def _joined(vectors: list[torch.Tensor], parts: list[torch.Tensor]) -> torch.Tensor:
    """The vectors of all parts in the order of the batch."""
    together = torch.cat(vectors)
    return torch.empty_like(together).index_copy_(0, torch.cat(parts), together)


def _padded(
    ids: torch.Tensor, mask: torch.Tensor, *, rows: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = (nn.functional.pad(t, (0, tokens)) for t in (ids, mask))
    if rows:
        ids, mask = (torch.cat([t, t[-1:].expand(rows, -1)]) for t in (ids, mask))
    return ids, mask
