"""A model over several processes: tensor × pipeline parallel on one device mesh ("dp", "pp", "tp").

    ids, mask ─▶ stage 0: embeddings, layers 0..2 ─▶ stage 1: layers 3..5, pooling ─▶ unit vectors
                   │ each stage over tp processes: heads and neurons divided, sums by all-reduce
                   └ micro-batches follow each other, so that stages work at the same time

All of it is torch's own: `parallelize_module`, `torch.distributed.pipelining`, DTensor. This file says
which module is which (from encoder/families.py) and keeps one schedule for each shape of batch.
Serving and training use the same `Stage` on the same mesh. gloo on CPUs, NCCL on GPUs.

Every process of a group calls `forward` with the same batch; what it costs above one process is two
all-reduces a layer for tensor parallelism, and one send a micro-batch for the pipeline.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from encoder.families import Family, split_layers
from encoder.model import Pooling, pool_unit
from shoal.errors import must
from shoal.limits import MIB

__all__ = [
    "Layout",
    "ParallelModel",
    "Stage",
    "build_stage",
    "device_type",
    "join_fused",
    "join_group",
    "make_mesh",
    "name_of_attempt",
    "parameter_bytes",
    "parameter_count",
    "split_fused",
    "whole_stage",
]

SCHEDULES_MAX = 64  # shapes of batches whose schedules are kept
SCHEDULE_BYTES_MAX = 64 * MIB  # of the states that they keep: what came in, and what went out last
MICRO_BATCH_ROWS_MIN = 8  # smaller products waste more than the pipeline wins
HELLO_S = 0.2  # for a word of the first process, then its name is read anew
_DIMENSIONS = ("dp", "pp", "tp")


@dataclass(frozen=True, slots=True)
class Layout:
    """How many processes share what: dp × pp × tp of them."""

    dp: int = 1
    pp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        return self.dp * self.pp * self.tp


def device_type() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def join_group(*, timeout_s: float, device: str) -> None:
    """Form the process group that torchrun's variables describe.

    The keys of each attempt have a prefix of their own: after a restart a process could otherwise
    read the address of one that is dead from the store, and wait for it.
    """
    store, rank, size = next(rendezvous("env://"))
    attempt = name_of_attempt(store, rank, size, timeout_s=timeout_s)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        # What stays in the memory of the CPU, such as a parameter server's messages, goes by gloo.
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=PrefixStore(attempt, store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def name_of_attempt(store: Store, rank: int, size: int, *, timeout_s: float) -> str:
    """A new name that all processes of this attempt get, and none of another. Collective; processes of
    the attempt before are dead, what they wrote is still in the store.

        rank 0   name = N               waits for hello/N/1 = A    welcome/A
        rank 1   reads name, hello/N/1 = A, until there is welcome/A; else reads name again

    torchrun's own count would not do over several machines: an agent whose processes are well when one
    ends elsewhere starts them again without counting (tried: they never meet).
    """
    store.set_timeout(datetime.timedelta(seconds=timeout_s))
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("name", own)
        for other in range(1, size):
            store.set(f"welcome/{store.get(f'hello/{own}/{other}').decode()}", own)
        return own
    began = time.monotonic()
    while True:
        name = store.get("name").decode()
        store.set(f"hello/{name}/{rank}", own)
        with contextlib.suppress(dist.DistStoreError):  # not yet
            store.wait([f"welcome/{own}"], datetime.timedelta(seconds=HELLO_S))
            return store.get(f"welcome/{own}").decode()
        if time.monotonic() > began + timeout_s:
            raise dist.DistStoreError(
                f"Timed out after {timeout_s:g} s: the first process is away."
            )


def make_mesh(layout: Layout, device: str) -> DeviceMesh:
    """Ranks in order: tp varies fastest, so that the processes that speak most sit together."""
    return init_device_mesh(device, (layout.dp, layout.pp, layout.tp), mesh_dim_names=_DIMENSIONS)


class Stage(nn.Module):
    """The part of a model that one pipeline stage computes.

    forward(x, mask)  x: (n, tokens) int64 ids in the first stage, (n, tokens, hidden) elsewhere;
                      mask: (n, tokens) int64, 1 for tokens. Returns (n, tokens, hidden), from the last
                      stage (n, hidden) float32 of length 1.
    Names of parameters are those of the whole model.
    """

    def __init__(self, network: nn.Module, pooling: Pooling, *, first: bool, last: bool) -> None:
        super().__init__()
        self.network, self.pooling, self.first, self.last = network, pooling, first, last

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": x} if self.first else {"inputs_embeds": x}
        states: torch.Tensor = self.network(**given, attention_mask=mask)[0]
        return pool_unit(states, mask, self.pooling) if self.last else states


class _PassOn(nn.Module):
    """Where embeddings were: the states that came from the stage before."""

    def forward(self, inputs_embeds: torch.Tensor, **_: object) -> torch.Tensor:
        return inputs_embeds


def build_stage(network: nn.Module, family: Family, mesh: DeviceMesh, pooling: Pooling) -> Stage:
    """Cut `network`, a whole model, down to what this process holds. It is changed; what is cut off
    is freed when nobody else holds it."""
    tp, pp = mesh["tp"].size(), mesh["pp"].size()
    place = mesh["pp"].get_local_rank()
    config: Any = network.config
    config.use_cache = False  # of keys and values, for texts that grow: it counts layers itself
    if tp > 1:
        split_fused(network, family, tp)
        _divide(network, family, tp)
        parallelize_module(network, mesh["tp"], _plan(family), src_data_rank=None)
    layers = network.get_submodule(family.layers)
    held = split_layers(len(cast(nn.ModuleList, layers)), pp)[place]
    first, last = place == 0, place == pp - 1
    if pp > 1:
        _cut_layers(network, family, held)
        if not first:
            _replace(network, family.before, _PassOn())
        if family.after and not last:
            _replace(network, family.after, nn.Identity())
    return Stage(network, pooling, first=first, last=last)


def _plan(family: Family) -> dict[str, ParallelStyle]:
    colwise = [*family.colwise, *(path for path, _ in family.fused)]
    plan: dict[str, ParallelStyle] = {path: ColwiseParallel() for path in colwise}
    plan |= {path: RowwiseParallel() for path in family.rowwise}
    plan[family.vocabulary] = RowwiseParallel(input_layouts=Replicate())
    return plan


def _divide(network: nn.Module, family: Family, tp: int) -> None:
    for path, attribute in family.divided:
        for module in _matching(network, path):
            setattr(module, attribute, getattr(module, attribute) // tp)


def split_fused(network: nn.Module, family: Family, tp: int) -> None:
    """Reorder the rows of fused matrices so that cutting them into `tp` gives whole parts."""
    _reorder_fused(network, family, tp, back=False)


def join_fused(network: nn.Module, family: Family, tp: int) -> None:
    """Undo `split_fused`: the order of rows in which a model is saved."""
    _reorder_fused(network, family, tp, back=True)


def _reorder_fused(network: nn.Module, family: Family, tp: int, *, back: bool) -> None:
    for path, parts in family.fused:
        for module in _matching(network, path):
            for tensor in module.parameters(recurse=False):
                rows = tensor.shape[0]
                must(rows % (parts * tp) == 0, f"{path} cannot be cut in {parts} × {tp}")
                outer, inner = (tp, parts) if back else (parts, tp)
                view = tensor.data.view(outer, inner, rows // (parts * tp), *tensor.shape[1:])
                tensor.data = view.transpose(0, 1).reshape(tensor.shape)


def _matching(network: nn.Module, path: str) -> Iterator[nn.Module]:
    """Modules whose name fits `path`, where * is the number of a layer."""
    wanted = path.split(".")
    for name, module in network.named_modules():
        parts = name.split(".")
        if len(parts) == len(wanted) and all(
            w == p or (w == "*" and p.isdigit()) for w, p in zip(wanted, parts, strict=True)
        ):
            yield module


def _cut_layers(network: nn.Module, family: Family, held: range) -> None:
    """Keep the layers of `held`, under the numbers that they have in the whole model."""
    layers = cast(nn.ModuleList, network.get_submodule(family.layers))
    kept = nn.ModuleList()
    for number in held:
        kept.add_module(str(number), layers[number])
    _replace(network, family.layers, _NumberedLayers(kept))
    config: Any = network.config
    if getattr(config, "layer_types", None):  # some families look up the kind by their own count
        config.layer_types = list(config.layer_types)[held.start : held.stop]
    config.num_hidden_layers = len(held)


class _NumberedLayers(nn.ModuleList):
    """A list whose items keep their numbers as names: layer 3 of a model is `3` in stage 1 too."""

    def __init__(self, kept: nn.ModuleList) -> None:
        super().__init__()
        for name, module in kept.named_children():
            self.add_module(name, module)

    def __getitem__(self, index: int | slice) -> Any:
        items = list(self._modules.values())
        return items[index]


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent) if parent else network, name, module)


def parameter_bytes(module: nn.Module) -> int:
    """Bytes that the parameters of this process hold."""
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(t.untyped_storage().nbytes() for t in tensors)


def parameter_count(module: nn.Module) -> int:
    """Numbers that this process holds."""
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(t.numel() for t in tensors)


def whole_stage(network: nn.Module, pooling: Pooling) -> Stage:
    """A model that one process holds; it need not be of a known family."""
    config: Any = network.config
    config.use_cache = False
    return Stage(network, pooling, first=True, last=True)


class ParallelModel:
    """The forward pass of a group; one per process. Not thread-safe.

    hidden   length of vectors.
    """

    def __init__(self, stage: Stage, mesh: DeviceMesh, *, hidden: int, autocast: bool) -> None:
        self.stage, self.mesh, self._hidden, self.autocast = stage, mesh, hidden, autocast
        self._device = torch.device(mesh.device_type)
        self._stages = mesh["pp"].size()
        self._schedules: OrderedDict[tuple[int, int, bool], ScheduleGPipe] = OrderedDict()

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, tokens) int64 ids and mask -> (n, hidden) float32, rows of length 1, in every process
        of the pipeline. Collective: all processes of the group call it with the same batch."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.autocast):
            if self._stages == 1:
                return cast(torch.Tensor, self.stage(ids, mask))
            return self._through_pipeline(ids, mask)

    def _through_pipeline(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, tokens = ids.shape
        parts = micro_batches(rows, self._stages)
        missing = -rows % parts
        if missing:  # equal parts: repeat the last row, drop its results
            ids = torch.cat([ids, ids[-1:].expand(missing, -1)])
            mask = torch.cat([mask, mask[-1:].expand(missing, -1)])
        schedule = self._schedule(len(ids) // parts, tokens, parts)
        given = (ids,) if self.stage.first else ()
        out = schedule.eval(*given, mask=mask)
        vectors = (
            out if self.stage.last else torch.empty((len(ids), self._hidden), device=self._device)
        )
        dist.broadcast(vectors, group=self.mesh["pp"].get_group(), group_src=self._stages - 1)
        return cast(torch.Tensor, vectors[:rows])

    def _schedule(self, rows: int, tokens: int, parts: int) -> ScheduleGPipe:
        key = (rows * parts, tokens, self.autocast)
        schedule = self._schedules.get(key)
        if schedule is None:
            states = torch.empty((rows, tokens, self._hidden), device="meta")
            ids = torch.empty((rows, tokens), dtype=torch.int64, device="meta")
            unit = torch.empty((rows, self._hidden), device="meta")
            stage = PipelineStage(
                self.stage,
                self.mesh["pp"].get_local_rank(),
                self._stages,
                self._device,
                input_args=ids if self.stage.first else states,
                output_args=unit if self.stage.last else states,
                group=self.mesh["pp"].get_group(),
            )
            schedule = self._schedules[key] = ScheduleGPipe(stage, parts)
            sizes = [8 * rows * tokens * self._hidden for rows, tokens, _ in self._schedules]
            for _ in range(surplus(sizes)):
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return schedule


def surplus(sizes: Sequence[int]) -> int:
    """How many of the schedules that were not used for longest are to go. sizes: bytes of each, the one
    that was just made last; that one stays."""
    kept, left = 0, SCHEDULE_BYTES_MAX
    for size in reversed(sizes):
        left -= size
        if kept and (left < 0 or kept == SCHEDULES_MAX):
            break
        kept += 1
    return len(sizes) - kept


def micro_batches(rows: int, stages: int) -> int:
    """Into how many parts a batch is cut: up to two for each stage, none of less than
    MICRO_BATCH_ROWS_MIN rows."""
    return max(1, min(2 * stages, rows // MICRO_BATCH_ROWS_MIN))
