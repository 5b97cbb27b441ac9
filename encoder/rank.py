"""One process of a rank group, as torchrun's agent starts it.

    rank 0    tokens ──queue──▶ broadcast ──▶ its part of the model ──▶ vectors ──▶ callers (gRPC)
    the rest  wait for a batch ─────────────▶ their parts of the model

Each batch begins with a header of three numbers from rank 0: what to do, texts, tokens of the longest.
A heartbeat is a header that asks for nothing. Rank 0 registers the group in the metadata; the others
know nothing of the cluster. How a dead or hanging process is found: encoder/liveness.py.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from encoder.engine import Engine, OutOfMemory
from encoder.families import family_of
from encoder.link import LINK_VARIABLE, PARENT_VARIABLE, TICK_S, Link, Work
from encoder.model import (
    PROBE_COSINE_MIN,
    PROBE_TEXTS,
    ModelFolder,
    TextTokenizer,
    cast_linear_weights,
    cosine_min,
    cpu_computes_bfloat16,
    find_model,
    load_network,
    own_weights,
    pad,
    quiet_and_offline,
)
from encoder.parallel import (
    Layout,
    ParallelModel,
    build_stage,
    device_type,
    join_group,
    make_mesh,
    parameter_bytes,
    parameter_count,
    whole_stage,
)
from encoder.reserve import Reserve, is_out_of_memory
from encoder.server import EncoderServer
from shoal import telemetry
from shoal.encoder.v1 import encoder_pb2 as pb
from shoal.encoder_api import ModelInfo, closing
from shoal.errors import ShoalError, StartupError, Unavailable
from shoal.health_server import HealthServer
from shoal.metadata.schema import EncoderFacts, NodeRole
from shoal.roles.process import RoleProcess, run_role
from shoal.settings import EncoderProcess
from shoal.telemetry import logger

__all__ = ["FINGERPRINT_VARIABLE", "SETTINGS_VARIABLE", "run_rank"]

SETTINGS_VARIABLE = "SHOAL_RANK_SETTINGS"  # JSON, from the parent
FINGERPRINT_VARIABLE = "SHOAL_RANK_FINGERPRINT"  # of the weights that the group was started with
GROUP_TIMEOUT_S = 600.0  # of torch's own; ours is in encoder/liveness.py
FLUSH_S = 0.3  # for errors to leave after the group broke
EXIT_BROKEN = 17
_IDLE, _BATCH, _STOP = 0, 1, 2

_log = logger("encoder")


@dataclass(frozen=True, slots=True)
class RankFacts:
    """What one process holds, for people."""

    rank: int
    tp: int
    pp: int
    pid: int
    parameters: int
    parameter_bytes: int
    resident_bytes: int
    device: str


class Member:
    """One process's part of the group: it steps through batches with the others."""

    def __init__(self, settings: EncoderProcess, work: Work) -> None:
        self.work = work
        self.device = device_type()
        if self.device == "cuda":
            check_gpus(torch.cuda.device_count(), settings.tp * settings.pp)
        quiet_and_offline()
        torch.set_num_threads(settings.threads)
        join_group(timeout_s=GROUP_TIMEOUT_S, device=self.device)
        self.rank = dist.get_rank()
        self.mesh = make_mesh(Layout(pp=settings.pp, tp=settings.tp), self.device)
        self.name, self.aliases, path = find_model(settings.model)
        self.folder = ModelFolder.read(path)
        self.tokenizer = TextTokenizer(self.folder)
        self.model = self._build(autocast=False)
        self._choose_precision(settings.encoder_precision)
        own_weights(self.model.stage)
        self._check_files()
        self._reserve = Reserve(
            self.folder.config,
            tp=settings.tp,
            device=self.device,
            eager=_writes_attention_out(self.model.stage.network),
        )
        self.facts = self._gather_facts()

    def _check_files(self) -> None:
        """That all processes have read what the group was started with. Raises StartupError in all."""
        whole = torch.tensor(int(not self.folder.changed()), device=self.device)
        if self.rank == 0 and self.folder.fingerprint() != os.environ[FINGERPRINT_VARIABLE]:
            whole.zero_()
        dist.all_reduce(whole, op=dist.ReduceOp.MIN)
        if not int(whole):
            raise StartupError(
                f"The files of the model in {self.folder.path} are not those that this group was started "
                "with. Put them back, or start the group again: it then serves the new ones."
            )

    @property
    def precision(self) -> str:
        return "bfloat16" if self.model.autocast else "float32"

    def _build(self, *, autocast: bool) -> ParallelModel:
        network = load_network(self.folder)
        if self.mesh.size() > 1:
            family = family_of(str(self.folder.config.get("model_type")))
            stage = build_stage(network, family, self.mesh, self.folder.pooling)
        else:
            stage = whole_stage(network, self.folder.pooling)
        stage.to(self.device)
        return ParallelModel(stage, self.mesh, hidden=self.folder.dim, autocast=autocast)

    def _choose_precision(self, wanted: str) -> None:
        """As TextModel: bfloat16 where the hardware has it and the probe texts bear it. All processes
        see the same vectors; rank 0 decides all the same."""
        if wanted == "float32" or (wanted == "auto" and not self._has_bfloat16()):
            return
        probe = [text.token_ids for text in self.tokenizer.tokenize(PROBE_TEXTS)]
        before = self._compute(*pad(probe, self.folder.pad_token_id))
        cast_linear_weights(self.model.stage)
        self.model.autocast = True
        cosine = cosine_min(before, self._compute(*pad(probe, self.folder.pad_token_id)))
        verdict = torch.tensor(int(cosine >= PROBE_COSINE_MIN), device=self.device)
        dist.broadcast(verdict, 0)
        if not int(verdict):
            if self.rank == 0:
                kept = wanted == "bfloat16"
                _log.warning(
                    "bfloat16_too_coarse", cosine=cosine, wanted=PROBE_COSINE_MIN, kept=kept
                )
            if wanted == "auto":
                self.model = self._build(autocast=False)

    def _has_bfloat16(self) -> bool:
        if self.device == "cuda":
            return bool(torch.cuda.is_bf16_supported())
        return cpu_computes_bfloat16()

    def _gather_facts(self) -> list[RankFacts]:
        own = RankFacts(
            rank=self.rank,
            tp=self.mesh["tp"].get_local_rank(),
            pp=self.mesh["pp"].get_local_rank(),
            pid=os.getpid(),
            parameters=parameter_count(self.model.stage),
            parameter_bytes=parameter_bytes(self.model.stage),
            resident_bytes=_resident_bytes(),
            device=self.device,
        )
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, asdict(own))
        return [RankFacts(**facts) for facts in everybody]

    def _compute(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        given = torch.from_numpy(np.stack([ids, mask])).to(self.device)
        return self._run(given)

    def _run(self, given: torch.Tensor) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.model.forward(given[0], given[1]).cpu().numpy()
        return vectors

    def _header(self, *numbers: int) -> list[int]:
        header = torch.tensor(numbers or (0, 0, 0), device=self.device)
        dist.broadcast(header, 0)
        return [int(number) for number in header.tolist()]

    def _step(self, given: torch.Tensor) -> NDArray[np.float32]:
        """One batch, in every process. Raises OutOfMemory in all of them or in none."""
        if dist.get_world_size() > 1:
            dist.broadcast(given, 0)
            if not self._reserve.agreed(given.shape[1], given.shape[2]):
                raise OutOfMemory
        elif not self._reserve.possible(given.shape[1], given.shape[2]):
            raise OutOfMemory
        try:
            return self._run(given)
        except (RuntimeError, MemoryError) as error:
            if dist.get_world_size() == 1 and is_out_of_memory(error):
                raise OutOfMemory from error
            raise  # the others wait for a sum that will not come: the group must be formed anew

    # -- rank 0: the Forward of an Engine ---------------------------------------------------------
    def forward(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        ids, mask = pad(token_ids, self.folder.pad_token_id)
        self.work.begin(ids.size)
        try:
            if dist.get_world_size() > 1:
                self._header(_BATCH, *ids.shape)
            return self._step(torch.from_numpy(np.stack([ids, mask])).to(self.device))
        finally:
            self.work.end()

    def idle(self) -> None:
        if dist.get_world_size() > 1:
            self._header(_IDLE, 0, 0)

    def stop(self) -> None:
        """The last thing that rank 0 says."""
        if dist.get_world_size() > 1:
            self._header(_STOP, 0, 0)

    # -- the other ranks --------------------------------------------------------------------------
    def follow(self) -> None:
        """Do what rank 0 says until it stops."""
        while True:
            operation, rows, tokens = self._header()
            if operation == _STOP:
                return
            if operation == _IDLE:
                continue
            self.work.begin(rows * tokens)
            try:
                self._step(torch.empty((2, rows, tokens), dtype=torch.int64, device=self.device))
            except OutOfMemory:
                continue  # rank 0 sends it again in parts
            finally:
                self.work.end()


async def serve(process: RoleProcess[EncoderProcess], member: Member, stop_all: StopAll) -> None:
    """Rank 0 of a group that is loaded: answer until SIGTERM."""
    settings, stack = process.settings, process.stack
    # Until everything else is closed: who is not heard while it finishes its work counts as hanging.
    ticking = asyncio.create_task(_tick(member.work), name="tick")
    stack.callback(ticking.cancel)
    info = ModelInfo(
        name=member.name,
        dim=member.folder.dim,
        max_tokens=member.folder.max_tokens,
        fingerprint=os.environ[FINGERPRINT_VARIABLE],
        aliases=member.aliases,
        loaded=True,
        precision=member.precision,
    )
    engine = Engine(
        member,
        dim=info.dim,
        batch_tokens_max=settings.batch_tokens_max,
        queue_tokens_max=settings.queue_tokens_max,
        broken=lambda error: stop_all(f"the computing thread of rank 0 failed: {error}"),
    )
    stop_all.engine = engine
    stack.push_async_callback(asyncio.to_thread, engine.close, closing())
    await process.connect()
    service = EncoderServer(
        engine,
        member.tokenizer,
        info,
        node_id=process.node_id,
        describe=lambda reply: _describe(reply, settings, member),
    )
    server = await HealthServer.start(
        settings.grpc_host, settings.grpc_port, process.tls, [service.handlers()]
    )
    stack.push_async_callback(server.close)
    stack.push_async_callback(service.finish, settings.shutdown_grace_s)
    process.stop.call(lambda at_once: service.hurry() if at_once else None)
    facts = EncoderFacts(
        model=info.name,
        aliases=list(info.aliases),
        dim=info.dim,
        max_tokens=info.max_tokens,
        fingerprint=info.fingerprint or "",
        precision=member.precision,
        tp=settings.tp,
        pp=settings.pp,
    )
    member.work.ready = True
    await process.register(grpc=server.port, encoder=facts)
    process.announce(grpc=server.port, pid=int(os.environ[PARENT_VARIABLE]))
    _log.info(
        "encoder_serves",
        model=info.name,
        tp=settings.tp,
        pp=settings.pp,
        precision=member.precision,
    )
    await process.run_until_stopped()


async def _tick(work: Work) -> None:
    while True:
        work.tick()
        await asyncio.sleep(TICK_S)


def _describe(reply: pb.StatusReply, settings: EncoderProcess, member: Member) -> None:
    reply.tp, reply.pp = settings.tp, settings.pp
    reply.attempt = _attempt()
    reply.ranks.extend(pb.Rank(**asdict(facts)) for facts in member.facts)


class StopAll:
    """Ends this process when the group is over, whatever its other threads wait for."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.broken = False
        self.over = False  # an orderly end: what follows is no failure

    def __call__(self, why: str) -> None:
        if self.over:
            return
        self.broken = True
        if self.engine is not None:
            self.engine.fail(
                Unavailable(
                    f"The encoder lost a process ({why}) and is being started again; send the "
                    "request again in a few seconds."
                )
            )
            threading.Event().wait(FLUSH_S)
        os._exit(EXIT_BROKEN)


def check_gpus(count: int, processes: int) -> None:
    """Raises StartupError where there is no GPU for each: started again there would still be none."""
    if count < processes:
        raise StartupError(
            f"The group has {processes} processes, and this machine {count} GPU"
            f"{'' if count == 1 else 's'} that they may use; each needs one of its own. Give a smaller "
            "--tp or --pp, or let them compute on the CPU with CUDA_VISIBLE_DEVICES= (nothing after it)."
        )


def _writes_attention_out(network: torch.nn.Module) -> bool:
    """MPNet adds a bias to it that no kernel of torch takes; what is not known counts as that."""
    config: Any = network.config
    return getattr(config, "_attn_implementation", "eager") == "eager"


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_rank() -> None:
    """The whole life of one process, as encoder/group.py has it started. Ends the process."""
    try:
        status = _live()
    except Exception as error:
        _log.error("rank_failed", error=error)
        status = EXIT_BROKEN
    sys.stderr.flush()
    os._exit(status)  # to return would mean to wait for the parent, which may be gone


def _live() -> int:
    settings = EncoderProcess.model_validate_json(os.environ[SETTINGS_VARIABLE])
    telemetry.setup(settings.log_level)
    rank, work, stop_all = int(os.environ["RANK"]), Work(), StopAll()
    try:
        link = Link(
            os.environ[LINK_VARIABLE], rank=rank, attempt=_attempt(), work=work, on_abort=stop_all
        )
    except OSError:  # the parent ended meanwhile
        return EXIT_BROKEN
    # The parent's signal is for rank 0, which tells the others when it is done. While it is still being
    # loaded it just ends, and they see that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if rank else signal.SIG_DFL)
    try:
        member = Member(settings, work)
        # What is here now stays: a collection that walked all of it would hold everybody for long.
        gc.collect()
        gc.freeze()
        if rank:
            work.ready = True
            member.follow()
        else:
            run_role(NodeRole.ENCODER, settings, lambda process: serve(process, member, stop_all))
            if stop_all.broken:
                return EXIT_BROKEN
            member.stop()
    except (StartupError, ShoalError) as error:
        link.fatal(error.message)
        return 2
    stop_all.over = True
    link.close()
    dist.destroy_process_group()
    return 0
