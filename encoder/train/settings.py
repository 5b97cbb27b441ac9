"""What a training run can be told, and the flags that tell it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from shoal.cli import Parser
from shoal.errors import SettingsError

__all__ = ["Compression", "Mode", "Schedule", "Shard", "TrainSettings", "parse"]

Mode = Literal["sync", "local-sgd", "parameter-server"]
Compression = Literal["none", "fp16", "powersgd"]
Schedule = Literal["gpipe", "1f1b"]
Shard = Literal["auto", "ddp", "fsdp"]
Precision = Literal["float32", "bfloat16"]

BUNDLED = "bundled"
SEED_MAX = 2**32 - 1  # what all the dice take

# What two runs must share for the one to go on where the other stopped. The layout is not in it.
_SAME_TO_RESUME = (
    *("model", "mode", "steps", "batch_pairs", "accumulate", "negatives", "lr", "warmup_steps"),
    *(
        "weight_decay",
        "clip_norm",
        "dropout",
        "scale",
        "symmetric",
        "max_tokens",
        "seed",
        "held_out",
        "documents",
    ),
)

# What each machine may have in a place of its own, and how patient it is.
_OF_A_MACHINE = ("model", "pairs", "out", "max_restarts", "timeout_s")

# The least that a number may be, and names in --out that no model may take.
_AT_LEAST: dict[int, tuple[str, ...]] = {
    8: ("max_tokens",),
    1: (
        *("dp", "pp", "tp", "steps", "batch_pairs", "accumulate", "chunk_rows"),
        *("held_out", "documents", "local_period", "powersgd_rank"),
    ),
    0: (
        *("negatives", "warmup_steps", "weight_decay", "clip_norm", "dropout", "seed"),
        *("eval_every", "checkpoint_every", "staleness", "max_restarts"),
    ),
}
_MORE_THAN_0 = ("lr", "scale", "timeout_s")
_TAKEN = {
    *("checkpoints", "tensorboard", "rejected", "lock"),
    *("run.json", "result.json", "history.jsonl", "curves.png", "before.npz"),
}


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """model        a folder with a model, or "bundled" for all-MiniLM-L6-v2.
    pairs        file with pairs; see encoder/train/data.py.
    out          folder of this run. A run that finds its own checkpoint there goes on from it.
    steps        optimizer steps.
    batch_pairs  pairs whose texts are each other's negatives, over all processes.
    accumulate   batches for one step.
    negatives    hard negatives taken of each pair.
    chunk_rows   texts in memory at once; a batch with more is computed twice, in parts (GradCache).
    """

    model: str
    pairs: Path
    out: Path
    dp: int = 1
    pp: int = 1
    tp: int = 1
    mode: Mode = "sync"
    shard: Shard = "auto"
    compress: Compression = "none"
    schedule: Schedule = "1f1b"
    steps: int = 300
    batch_pairs: int = 64
    accumulate: int = 1
    negatives: int = 0
    chunk_rows: int = 256
    max_tokens: int = 128
    lr: float = 3e-5
    warmup_steps: int = 30
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    dropout: float = 0.0
    scale: float = 20.0
    symmetric: bool = False
    precision: Precision = "float32"
    seed: int = 1
    held_out: int = 400
    documents: int = 2_000
    eval_every: int = 100
    checkpoint_every: int = 100
    local_period: int = 8
    staleness: int = 4
    powersgd_rank: int = 8
    max_restarts: int = 0
    timeout_s: float = 300.0
    gate: bool = False
    name: str = "model"

    def __post_init__(self) -> None:
        """Raises SettingsError when parts do not fit together."""
        self._check_numbers()
        if Path(self.name).name != self.name or self.name.startswith(".") or self.name in _TAKEN:
            raise SettingsError(
                f"--name {self.name!r} cannot name the model's folder in --out: give a plain name, "
                f"none of {', '.join(sorted(_TAKEN))}."
            )
        if self.mode == "parameter-server" and self.dp < 2:
            raise SettingsError(
                "--mode parameter-server needs --dp 2 or more: one process keeps the parameters."
            )
        if self.batch_pairs % self.workers:
            raise SettingsError(
                f"--batch-pairs {self.batch_pairs} cannot be dealt evenly to {self.workers} "
                "data-parallel processes: give a multiple of that."
            )
        together = self.batch_pairs if self.mode == "sync" else self.batch_pairs // self.workers
        if together == 1 and not self.negatives:
            raise SettingsError(
                "A query with one text has nothing to tell apart: give a larger --batch-pairs, or "
                "--negatives."
            )
        alone = self.pp == self.tp == 1
        if self.compress != "none" and not (alone and self.shard != "fsdp" and self.mode == "sync"):
            raise SettingsError(
                "--compress works on DDP's buckets: it needs --mode sync, --pp 1, --tp 1 and not "
                "--shard fsdp."
            )
        if self.shard == "ddp" and not alone:
            raise SettingsError("--shard ddp does not go with --pp or --tp; fsdp does.")
        if self.mode != "sync" and (not alone or self.shard == "fsdp"):
            raise SettingsError(f"--mode {self.mode} needs --pp 1, --tp 1 and not --shard fsdp.")

    def _check_numbers(self) -> None:
        for least, names in _AT_LEAST.items():
            for name in names:
                if not getattr(self, name) >= least:
                    raise SettingsError(f"--{_flag(name)} must be {least} or more.")
        for name in _MORE_THAN_0:
            if not getattr(self, name) > 0:
                raise SettingsError(f"--{_flag(name)} must be more than 0.")
        if not self.dropout < 1:
            raise SettingsError("--dropout must be less than 1.")
        if self.seed > SEED_MAX:
            raise SettingsError(f"--seed must be {SEED_MAX} or less.")

    @property
    def processes(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def workers(self) -> int:
        """Data-parallel processes that compute gradients."""
        return self.dp - 1 if self.mode == "parameter-server" else self.dp

    @property
    def sharded(self) -> bool:
        """FSDP2, which goes with every layout; DDP where it is enough, for its hooks."""
        if self.dp == 1 or self.mode != "sync":
            return False
        return self.shard == "fsdp" or (self.shard == "auto" and self.pp * self.tp > 1)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on from a checkpoint of another."""
        values = asdict(self)
        return {name: values[name] for name in _SAME_TO_RESUME}

    def of_all(self) -> dict[str, Any]:
        """What must be equal in all processes of a run."""
        return {_flag(k): v for k, v in asdict(self).items() if k not in _OF_A_MACHINE}

    def flags(self, *, without: Sequence[str] = ()) -> list[str]:
        """The flags that say what differs from the defaults, and the seed; paths by their last
        name only, because a card travels and folders do not."""
        given: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in without or (value == field.default and field.name != "seed"):
                continue
            if field.name in ("model", "pairs"):
                value = Path(value).name
            if isinstance(value, bool):
                given.append(f"--{_flag(field.name)}")
            elif (field.name, value) != ("model", BUNDLED):
                given += [f"--{_flag(field.name)}", str(value)]
        return given


_ABOUT = {
    "model": f"Folder of the model to start from, or {BUNDLED}: all-MiniLM-L6-v2.",
    "pairs": "File with query, positive[, negatives]: .jsonl, .csv or .parquet.",
    "out": "Folder of this run: checkpoints, curves, and the model at the end.",
    "dp": "Data-parallel processes.",
    "pp": "Stages of the pipeline.",
    "tp": "Tensor-parallel processes of each stage.",
    "mode": "sync: all take each step together. local-sgd: parameters are averaged every "
    "--local-period steps. parameter-server: one keeps them, the others are never more than "
    "--staleness steps apart.",
    "shard": "Data parallel by DDP or by FSDP2; auto: DDP where --pp and --tp are 1.",
    "compress": "Gradients between DDP processes as fp16, or as low-rank matrices (powersgd).",
    "schedule": "Order of the pipeline's work; 1f1b keeps fewer activations than gpipe.",
    "steps": "Optimizer steps.",
    "batch_pairs": "Pairs of one batch, over all processes; each other's negatives.",
    "accumulate": "Batches for one step.",
    "negatives": "Hard negatives taken of each pair.",
    "chunk_rows": "Texts in the memory of a process at once; larger batches are computed in parts, "
    "with the same gradient.",
    "max_tokens": "Longer texts are cut; never more than the model reads.",
    "lr": "Learning rate after warm-up; it falls to zero on a line from there.",
    "warmup_steps": "Steps on which the learning rate grows.",
    "weight_decay": "Of AdamW.",
    "clip_norm": "Longest gradient; 0 leaves gradients as they are.",
    "dropout": "Share of activations that are dropped.",
    "scale": "Cosines are multiplied by it before the softmax: 1 / temperature.",
    "symmetric": "Learn also to find the query for a positive.",
    "precision": "bfloat16: autocast, parameters stay float32.",
    "seed": "Of the split, the order of pairs and dropout.",
    "held_out": "Queries that are kept for judging.",
    "documents": "Documents that the held-out queries are searched in.",
    "eval_every": "Steps between evaluations; 0: only before and after.",
    "checkpoint_every": "Steps between checkpoints; 0: none.",
    "local_period": "Steps between averagings, with --mode local-sgd.",
    "staleness": "Steps that a process may be ahead of the slowest, with --mode parameter-server.",
    "powersgd_rank": "Rank of the matrices that stand for gradients, with --compress powersgd.",
    "max_restarts": "How often all processes are started again from the last checkpoint when one ends.",
    "timeout_s": "Seconds after which a process that does not answer counts as lost.",
    "gate": "Accept the model only if held-out nDCG@10 surely improved; else exit with status 1.",
    "name": "Folder of the model in --out, and by it its name where it is served.",
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "shard": get_args(Shard),
    "compress": get_args(Compression),
    "schedule": get_args(Schedule),
    "precision": get_args(Precision),
}
_REQUIRED = ("pairs", "out")


def parse(arguments: Sequence[str]) -> TrainSettings:
    """Flags -> settings. Raises SettingsError; exits with status 2 on flags that are not known."""
    parser = Parser(
        "shoal encoder train",
        "Fine-tune a text encoder on pairs of texts. Under torchrun, which this command starts by "
        "itself for\nseveral processes: torchrun ... -m encoder.train with the same flags.",
    )
    for field in fields(TrainSettings):
        given: dict[str, Any] = {"help": _ABOUT[field.name]}
        if field.name == "model":
            given["default"] = BUNDLED
        elif field.name in _REQUIRED:
            given |= {"type": Path, "required": True}
        elif field.default is False:
            given |= {"action": argparse.BooleanOptionalAction, "default": False}
        else:
            given |= {"default": field.default}
            given |= (
                {"choices": list(_CHOICES[field.name])}
                if field.name in _CHOICES
                else {"type": type(field.default)}
            )
        given["help"] = given["help"].replace("%", "%%")
        if given.get("default") not in (None, False):
            given["help"] += f" [default {given['default']}]"
        parser.add_argument(f"--{_flag(field.name)}", **given)
    return TrainSettings(**vars(parser.parse_args(list(arguments))))


def _flag(name: str) -> str:
    return name.replace("_", "-")
