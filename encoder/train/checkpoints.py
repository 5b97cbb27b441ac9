"""Checkpoints that any layout can go on from (torch.distributed.checkpoint).

    OUT/checkpoints/step-000100/   one file per process, names of parameters as in the whole model
    OUT/checkpoints/latest.json    which one counts; swapped in after all processes have written theirs

What is kept: parameters, AdamW's moments, and the step. The learning rate, the order of the pairs and
the dice of dropout are functions of the step and the seed. The error feedback of PowerSGD is not kept:
after a restart it starts from nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from shoal.errors import SettingsError

__all__ = ["Checkpoints"]

# Flat names for AdamW's state: stages of a pipeline have different parameters, and the lists of a
# nested one would overwrite each other.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpoints:
    """folder     of the run. fixed: what a checkpoint must agree on with the run that loads it.

    Every process calls the methods in the same order.
    """

    def __init__(self, folder: Path, fixed: dict[str, Any]) -> None:
        self._folder = folder / "checkpoints"
        self._latest = self._folder / "latest.json"
        self._fixed = fixed

    def save(self, step: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Returns when the checkpoint counts: a crash from then on goes on from it."""
        name = f"step-{step:06d}"
        model, moments = get_state_dict(network, optimizer, options=_OPTIONS)
        alone = not dist.is_initialized()
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {"model": model, "optimizer": moments}
        state_dict_saver.save(state, checkpoint_id=self._folder / name, no_dist=alone)
        if alone or dist.get_rank() == 0:
            note = {"step": step, "name": name, "run": self._fixed}
            scratch = self._latest.with_suffix(".tmp")
            with scratch.open("w", encoding="utf-8") as file:
                json.dump(note, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self._latest)
            for old in self._folder.glob("step-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        if not alone:
            dist.barrier()

    def load(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Put the last checkpoint into both; the step that it was made after, 0 when there is none.
        Raises SettingsError when it is of another run."""
        if not self._latest.is_file():
            return 0
        note = json.loads(self._latest.read_text(encoding="utf-8"))
        for key, value in self._fixed.items():
            if note["run"].get(key) != value:
                raise SettingsError(
                    f"{self._folder.parent} holds a run with another {key}: {note['run'].get(key)!r} "
                    f"there, {value!r} here. Give the same, or another --out."
                )
        model, moments = get_state_dict(network, optimizer, options=_OPTIONS)
        state: dict[str, Any] = {"model": model, "optimizer": moments}
        alone = not dist.is_initialized()
        state_dict_loader.load(state, checkpoint_id=self._folder / note["name"], no_dist=alone)
        set_state_dict(
            network,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_OPTIONS,
        )
        return int(note["step"])
