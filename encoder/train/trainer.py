"""The model of a run in this process: cut by the mesh, wrapped for data parallelism, and one step of it.

    mesh (dp, pp, tp) ─▶ Stage (encoder/parallel.py) ─▶ DDP with a hook, or FSDP2 ─▶ AdamW

A step: gradients of `accumulate` batches, averaged over data-parallel processes with the last one;
clipped by their length over the whole model; learning rate set; AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from encoder.families import family_of
from encoder.model import ModelFolder, TextTokenizer, load_network, pad
from encoder.parallel import ParallelModel, Stage, build_stage
from encoder.train.data import Pair
from encoder.train.loss import BatchShape, blocked_candidates, gradient_of_rows
from encoder.train.passes import Passes
from encoder.train.settings import TrainSettings
from shoal.errors import must

__all__ = ["StepFigures", "Trainer", "learning_rate"]

EVAL_ROWS = 64
POWERSGD_START = 10  # first steps are sent whole: approximations of early gradients are worse


@dataclass(frozen=True, slots=True)
class StepFigures:
    loss: float
    gradient_norm: float
    lr: float


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """For step 0, 1, ...: up on a line to `peak` over the warm-up, then down on a line; never 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / max(1, steps - warmup_steps)


class Trainer:
    """settings   of the run. positives_of: what is known to fit each query, for the loss.

    All methods are collective over the mesh, in the same order in every process.
    """

    def __init__(
        self,
        settings: TrainSettings,
        folder: ModelFolder,
        mesh: DeviceMesh,
        positives_of: Mapping[str, set[str]],
    ) -> None:
        self.settings, self.mesh, self._positives_of = settings, mesh, positives_of
        self.folder = replace(folder, max_tokens=min(folder.max_tokens, settings.max_tokens))
        self._tokenizer = TextTokenizer(self.folder)
        self.texts_read = self.texts_cut = 0  # for training, here
        self.device = torch.device(mesh.device_type)
        self._places = {name: mesh[name].get_local_rank() for name in ("dp", "pp", "tp")}
        self._powersgd: powerSGD_hook.PowerSGDState | None = None
        self.stage = self._build_stage()
        self.module = self._wrapped()
        self._in_all_stages = self._shared_parameters()
        self._per_head = [
            parameter
            for name, parameter in self.stage.network.named_parameters()
            if settings.tp > 1 and any(fnmatch(name, f"{path}.*") for path in self.family.per_head)
        ]
        self.optimizer = _adamw(self.stage, settings)
        self._averaging = self._local_sgd() if settings.mode == "local-sgd" else None
        autocast = settings.precision == "bfloat16"
        self.passes = Passes(
            self.stage,
            self.module,
            mesh,
            hidden=folder.dim,
            schedule=settings.schedule,
            chunk_rows=settings.chunk_rows,
            autocast=autocast,
        )
        self._judged = ParallelModel(self.stage, mesh, hidden=folder.dim, autocast=autocast)

    # -- building ---------------------------------------------------------------------------------

    def _build_stage(self) -> Stage:
        network = load_network(self.folder)
        network.requires_grad_(True)
        _set_dropout(network, self.settings.dropout)
        self.family = family_of(str(self.folder.config.get("model_type")))
        network.to(self.device)
        return build_stage(network, self.family, self.mesh, self.folder.pooling)

    def _wrapped(self) -> nn.Module:
        settings, group = self.settings, self.mesh["dp"].get_group()
        if settings.dp == 1 or settings.mode == "parameter-server":
            return self.stage
        if settings.sharded:
            # In a pipeline parameters stay whole between micro-batches: gathering them each time
            # would cost more than it saves.
            again = settings.pp == 1
            layers = self.stage.network.get_submodule(self.family.layers)
            for layer in layers.children():
                fully_shard(layer, mesh=self.mesh["dp"], reshard_after_forward=again)
            return cast(
                nn.Module,
                fully_shard(self.stage, mesh=self.mesh["dp"], reshard_after_forward=again),
            )
        wrapped = DistributedDataParallel(self.stage, process_group=group)
        if settings.compress == "fp16":
            wrapped.register_comm_hook(group, default_hooks.fp16_compress_hook)
        elif settings.compress == "powersgd":
            self._powersgd = powerSGD_hook.PowerSGDState(
                group,
                matrix_approximation_rank=settings.powersgd_rank,
                start_powerSGD_iter=POWERSGD_START,
                random_seed=settings.seed,
            )
            wrapped.register_comm_hook(self._powersgd, powerSGD_hook.powerSGD_hook)
        return wrapped

    def _local_sgd(self) -> tuple[PostLocalSGDState, PeriodicModelAverager]:
        settings, group = self.settings, self.mesh["dp"].get_group()
        state = PostLocalSGDState(  # type: ignore[no-untyped-call]
            process_group=group,
            subgroup=None,
            start_localSGD_iter=settings.warmup_steps,
            post_local_gradient_allreduce=False,
        )
        cast(DistributedDataParallel, self.module).register_comm_hook(state, post_localSGD_hook)
        averager = PeriodicModelAverager(
            period=settings.local_period, warmup_steps=settings.warmup_steps, process_group=group
        )
        return state, averager

    def _shared_parameters(self) -> list[nn.Parameter]:
        """Parameters that every stage of the pipeline uses, such as MPNet's position biases: each has
        them, and a part of their gradient."""
        own = dict(self.stage.network.named_parameters())
        stages = self.settings.pp
        if stages == 1:
            return []
        names: list[set[str]] = [set() for _ in range(stages)]
        dist.all_gather_object(names, set(own), group=self.mesh["pp"].get_group())
        return [own[name] for name in sorted(set.intersection(*names))]

    # -- checkpoints ------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Any] | None:
        """What this process must keep beside parameters and moments, to go on on the same layout:
        what PowerSGD has not sent yet, and the matrices that it starts from. None: nothing."""
        state = self._powersgd
        if state is None:
            return None
        return {
            "rank": state.matrix_approximation_rank,
            "iter": state.iter,
            "errors": state.error_dict,
            "p": state.p_memory_dict,
            "q": state.q_memory_dict,
        }

    def continue_at(
        self, step: int, own: Mapping[str, Any], batches: Sequence[Sequence[Pair]]
    ) -> None:
        """After a checkpoint was loaded: counters that torch's parts keep for themselves.

        own       `own_state` as it was then; {} when there is none. PowerSGD then starts anew, as with
                  another rank: its matrices would not fit.
        batches   of the step to come.
        """
        if isinstance(self.module, DistributedDataParallel):
            # DDP puts gradients into other buckets after its first step. Sums over more than two
            # processes, and what PowerSGD keeps, depend on them, so that step is taken here.
            self.gradients(step, batches)
        if self._averaging is not None:
            state, averager = self._averaging
            state.iter = averager.step = step
        if self._powersgd is not None:
            if own.get("rank") != self._powersgd.matrix_approximation_rank:
                own = {}
            self._powersgd.iter = own.get("iter", 0)
            self._powersgd.error_dict = dict(own.get("errors", {}))
            self._powersgd.p_memory_dict = dict(own.get("p", {}))
            self._powersgd.q_memory_dict = dict(own.get("q", {}))

    # -- one step ---------------------------------------------------------------------------------

    def step(self, step: int, batches: Sequence[Sequence[Pair]]) -> StepFigures:
        """batches: those of this step, `accumulate` of them, the same in all processes."""
        loss = self.gradients(step, batches)
        norm = self.clip()
        lr = self.set_learning_rate(step)
        self.optimizer.step()
        if self._averaging is not None:
            self._averaging[1].average_parameters(iter(self.stage.parameters()))
        return StepFigures(loss, norm, lr)

    def set_learning_rate(self, step: int) -> float:
        settings = self.settings
        lr = learning_rate(
            step, peak=settings.lr, warmup_steps=settings.warmup_steps, steps=settings.steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def gradients(self, step: int, batches: Sequence[Sequence[Pair]]) -> float:
        """Fill the parameters' gradients, from nothing; the mean loss of the batches."""
        self.stage.train()
        self.optimizer.zero_grad()
        # Processes that share a stage must drop the same activations, others must not.
        torch.manual_seed(_dice(self.settings.seed, step, self._places["dp"], self._places["pp"]))
        losses: list[torch.Tensor] = []
        for batch in batches:
            last = len(losses) == len(batches) - 1
            losses.append(self._one_batch(batch, share=1 / len(batches), last=last))
        loss = torch.stack(losses).mean()
        _add_up(self._in_all_stages, self.mesh["pp"].get_group())
        _add_up(self._per_head, self.mesh["tp"].get_group())
        if self.settings.pp > 1:
            dist.broadcast(loss, group=self.mesh["pp"].get_group(), group_src=self.settings.pp - 1)
        return float(loss)

    def _one_batch(self, batch: Sequence[Pair], *, share: float, last: bool) -> torch.Tensor:
        settings = self.settings
        workers = settings.workers
        place = self._places["dp"] - (settings.dp - workers)
        each = len(batch) // workers
        own = batch[place * each : (place + 1) * each]
        shape = BatchShape(each, len(own[0].negatives))
        together = settings.mode == "sync"
        blocked = self._blocked(batch if together else own)
        ids, mask = self.tokens(
            [p.query for p in own]
            + [p.positive for p in own]
            + [text for p in own for text in p.negatives]
        )
        found = torch.zeros((), device=self.device)

        def gradient_of(vectors: torch.Tensor) -> torch.Tensor:
            nonlocal found
            gradient = gradient_of_rows(
                vectors,
                shape,
                blocked,
                scale=settings.scale,
                symmetric=settings.symmetric,
                group=self.mesh["dp"].get_group() if together and settings.dp > 1 else None,
            )
            found = gradient.loss
            return gradient.rows * share

        self.passes.run(ids, mask, gradient_of, last=last)
        return found

    def _blocked(self, batch: Sequence[Pair]) -> torch.Tensor:
        documents = [p.positive for p in batch] + [text for p in batch for text in p.negatives]
        blocked = blocked_candidates([p.query for p in batch], documents, self._positives_of)
        return torch.from_numpy(blocked).to(self.device)

    def tokens(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask, (n, longest) int64, on the device."""
        tokenized = self._tokenizer.tokenize(texts)
        if self.stage.training:
            self.texts_read += len(tokenized)
            self.texts_cut += sum(text.truncated for text in tokenized)
        ids, mask = pad([t.token_ids for t in tokenized], self.folder.pad_token_id)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def clip(self) -> float:
        """The length of the gradient over the whole model; a longer one than clip_norm is cut to it."""
        parameters = [p for p in self.stage.parameters() if p.grad is not None]
        total = torch.zeros((), device=self.device)
        shared = set(self._in_all_stages)
        for parameter in parameters:
            share = 1 / self.settings.pp if parameter in shared else 1.0
            total += share * _squares(cast(torch.Tensor, parameter.grad), self.settings)
        if self.settings.mode == "sync":
            dist.all_reduce(total)
        norm = float(total.sqrt())
        if 0 < self.settings.clip_norm < norm:
            for parameter in parameters:
                cast(torch.Tensor, parameter.grad).mul_(self.settings.clip_norm / norm)
        return norm

    def average_now(self) -> None:
        """Replicas of local SGD become equal, whatever step it is: parameters and AdamW's moments."""
        if self.settings.mode != "local-sgd":
            return
        moments = [
            value
            for state in self.optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        ]
        for tensor in [*self.stage.parameters(), *moments]:
            dist.all_reduce(tensor.data, dist.ReduceOp.SUM, self.mesh["dp"].get_group())
            tensor.data /= self.settings.dp

    # -- judging ----------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """n texts -> (n, dim) float32 of length 1, in every process; each data-parallel one computes
        its share."""
        self.stage.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        ranks = self.settings.dp
        mine = order[self._places["dp"] :: ranks]
        every = -(-len(texts) // ranks)
        mine += [order[-1]] * (every - len(mine))  # FSDP gathers for all: as many passes everywhere
        out = torch.zeros((len(texts), self.folder.dim), device=self.device)
        for start in range(0, every, EVAL_ROWS):
            rows = mine[start : start + EVAL_ROWS]
            out[rows] = self._judged.forward(*self.tokens([texts[i] for i in rows]))
        if ranks > 1:
            dist.all_reduce(out, group=self.mesh["dp"].get_group())
            out = nn.functional.normalize(out, dim=-1)  # a text that filled up was counted twice
        for module in self.stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return cast("NDArray[np.float32]", out.cpu().numpy())


def _adamw(stage: Stage, settings: TrainSettings) -> torch.optim.AdamW:
    """Biases and norms do not decay. foreach would refuse a mix of plain and distributed tensors."""
    named = list(stage.named_parameters())
    matrices = [p for _, p in named if p.ndim > 1]
    rest = [p for _, p in named if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, foreach=False)


def _set_dropout(network: nn.Module, share: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        elif isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = share


def _add_up(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Gradients of which each process of the group has a part."""
    for parameter in parameters:
        gradient = cast(torch.Tensor, parameter.grad)
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        dist.all_reduce(local, group=group)


def _dice(seed: int, *parts: int) -> int:
    return int(np.random.SeedSequence((seed, *parts)).generate_state(1, np.uint64)[0] >> 1)


def _squares(gradient: torch.Tensor, settings: TrainSettings) -> torch.Tensor:
    """This process's share of the sum of squares: what n processes hold alike counts one n-th."""
    alike = settings.dp * settings.tp if settings.mode == "sync" else 1
    local = gradient
    if isinstance(gradient, DTensor):
        must(
            not any(p.is_partial() for p in gradient.placements), "gradients must be summed by now"
        )
        local = gradient.to_local()
        for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
            alike //= 1 if placement.is_replicate() else size
    return local.float().square().sum() / alike
