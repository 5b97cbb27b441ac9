"""Checkpoints that any layout can go on from (torch.distributed.checkpoint).

    OUT/checkpoints/step-000100/   one file per process, names of parameters as in the whole model
                  ... /own-0-of-2.pt   what only this process has, of use to the same layout only
    OUT/checkpoints/latest.json    which one counts; swapped in after all processes have written theirs

What is kept: parameters, AdamW's moments, and the step. The learning rate, the order of the pairs and
the dice of dropout are functions of the step and the seed. A process's own is what PowerSGD has not
sent yet (encoder/train/trainer.py).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from encoder.train.agreement import agreed
from encoder.train.errors import TrainingFailed
from shoal.errors import SettingsError

__all__ = ["Checkpoints", "Resumed"]

# Flat names for AdamW's state: stages of a pipeline have different parameters, and the lists of a
# nested one would overwrite each other.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, slots=True)
class Resumed:
    """step: how many are done. own: what this process kept for itself; {} after another layout."""

    step: int
    own: dict[str, Any]


class Checkpoints:
    """folder: of the run. Every process calls the methods in the same order, in one process group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "checkpoints"
        self._latest = self._folder / "latest.json"

    def save(
        self,
        step: int,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        own: dict[str, Any] | None = None,
    ) -> None:
        """Returns when the checkpoint counts: a crash from then on goes on from it.

        own   tensors and numbers that this process alone has; all give some, or none does.
        Raises TrainingFailed, in all processes, when it cannot be written, to a full disk say: the
        one before counts then.
        """
        target = self._folder / f"step-{step:06d}"
        problem = agreed(lambda: _empty_folder(target))
        if problem is None:
            problem = self._write(target, network, optimizer, own)
        if problem is None:
            problem = agreed(lambda: self._swap_in(step, target.name))
        if problem is not None:
            free = shutil.disk_usage(self._folder.parent).free >> 20  # torch does not say it
            agreed(lambda: shutil.rmtree(target, ignore_errors=True))  # frees the disk
            raise TrainingFailed(
                f"The checkpoint of step {step} could not be written to {self._folder}, on a disk with "
                f"{free} MiB free: {problem} When that is mended, the same command goes on from the "
                "one before."
            )

    def _write(
        self,
        target: Path,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        own: dict[str, Any] | None,
    ) -> str | None:
        """What went wrong in one of the processes, or None; the same everywhere."""
        model, moments = get_state_dict(network, optimizer, options=_OPTIONS)
        found: list[str | None] = [None] * dist.get_world_size()
        if own is not None:
            dist.all_gather_object(found, _write_own(_own_file(target), own))
        try:
            state_dict_saver.save({"model": model, "optimizer": moments}, checkpoint_id=target)
        except CheckpointException as error:
            found += [_sentence(cause) for cause, _ in error.failures.values()]
        return next((problem for problem in found if problem is not None), None)

    def _swap_in(self, step: int, name: str) -> None:
        scratch = self._latest.with_suffix(".tmp")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump({"step": step, "name": name}, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._latest)
        for old in self._folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> Resumed:
        """Put the last checkpoint into both; step 0 when there is none. Raises SettingsError when
        it cannot be read."""
        written = self._note()
        if not written:
            return Resumed(0, {})
        model, moments = get_state_dict(network, optimizer, options=_OPTIONS)
        state: dict[str, Any] = {"model": model, "optimizer": moments}
        try:
            note = json.loads(written)
            step, source = int(note["step"]), self._folder / note["name"]
            state_dict_loader.load(state, checkpoint_id=source)
        except (CheckpointException, OSError, ValueError, KeyError) as error:
            causes = getattr(error, "failures", {0: (error, None)}).values()
            raise SettingsError(
                f"The checkpoint in {self._folder} cannot be read: "
                f"{_sentence(next(iter(causes))[0])} Remove that folder to start from the beginning."
            ) from error
        own = _read_own(_own_file(source))
        found: list[dict[str, Any] | str] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, own if isinstance(own, str) else dict.fromkeys(own))
        # One process that raises, or starts anew, would leave the others waiting.
        for theirs in found:
            if isinstance(theirs, str):
                raise SettingsError(
                    f"The checkpoint in {self._folder} cannot be read: {theirs} Remove that folder to "
                    "start from the beginning."
                )
        if isinstance(own, str) or not all(found):
            own = {}
        set_state_dict(
            network,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        return Resumed(step, own)

    def _note(self) -> str:
        """What the first process reads in latest.json, in all; "" when there is none. A disk over the
        network may show others for a while what was there before, and they would start elsewhere."""
        found = [""]

        def read() -> None:
            if self._latest.is_file():
                found[0] = self._latest.read_text(encoding="utf-8", errors="replace")

        problem = agreed(read)
        if problem is not None:
            raise SettingsError(f"The checkpoint in {self._folder} cannot be read: {problem}")
        dist.broadcast_object_list(found, src=0)
        return found[0]


def _empty_folder(folder: Path) -> None:
    """What a crash left of an earlier attempt at the same step goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_own(target: Path, own: dict[str, Any]) -> str | None:
    try:
        with target.open("wb") as file:
            torch.save(own, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        return _sentence(error)
    return None


def _read_own(file: Path) -> dict[str, Any] | str:
    """What was kept, {} when nothing was; a sentence when it cannot be read."""
    try:
        found: dict[str, Any] = torch.load(file, weights_only=True) if file.is_file() else {}
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        return _sentence(error)
    return found


def _own_file(folder: Path) -> Path:
    return folder / f"own-{dist.get_rank()}-of-{dist.get_world_size()}.pt"


def _sentence(error: BaseException) -> str:
    """The first line of an error; torch's own go on with where in its source it was."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
