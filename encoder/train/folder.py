"""--out, the folder of a run: whose it is, and that one run at a time writes to it.

OUT/run.json     what a run must share with the one that was here before, to go on from it
OUT/seen-*       for a moment: whether all processes see the same folder
OUT/lock         held by flock while a run writes; the kernel frees it when the process ends
OUT/NAME/        the model at the end (encoder/train/saving.py)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from encoder.train.agreement import agreed, any_of
from shoal.errors import SettingsError

__all__ = ["claimed"]


@contextlib.contextmanager
def claimed(out: Path, name: str, fixed: Mapping[str, Any]) -> Iterator[None]:
    """Hold the folder for this run. Collective; the first process does it.

    fixed   what a run must agree on with one that was here before, as JSON knows it.
    Raises SettingsError, in all processes, when another run's files are here, another run is at work,
    OUT/NAME is something else than a model of this run, nothing can be written, or a process on another
    machine does not see what the first one writes.
    """
    locks: list[int] = []
    mark: list[str] = [f"seen-{uuid.uuid4().hex}"]  # no disk can remember that it was not there
    dist.broadcast_object_list(mark, src=0)

    def claim() -> None:
        out.mkdir(parents=True, exist_ok=True)
        locks.append(_lock(out / "lock"))
        _check_run(out, fixed)
        for place in (name, "rejected"):
            _check_place(out, place)
        scratch = out / "run.json.tmp"
        scratch.write_text(json.dumps(dict(fixed), indent=1) + "\n", encoding="utf-8")
        scratch.replace(out / "run.json")
        (out / mark[0]).touch()

    try:
        problem = agreed(claim)
        if problem is not None:
            raise SettingsError(problem)
        (lost,) = any_of((not (out / mark[0]).is_file(),), torch.device("cpu"))
        agreed((out / mark[0]).unlink)
        if lost:
            raise SettingsError(
                f"What process 0 writes to {out} is not seen by all. Give an --out on a disk that all "
                "machines share: a checkpoint is of use only when all of its parts are there."
            )
        yield
    finally:
        for lock in locks:
            os.close(lock)


def _lock(file: Path) -> int:
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode().strip()
        os.close(lock)
        raise SettingsError(
            f"Process {holder or '(unknown)'} is training in {file.parent}. Wait for it, or give "
            "another --out."
        ) from None
    except OSError:
        return lock  # a disk that knows no locks: shared ones may not
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _check_run(out: Path, fixed: Mapping[str, Any]) -> None:
    file = out / "run.json"
    if not file.is_file():
        if (out / "checkpoints/latest.json").is_file():
            raise SettingsError(
                f"{out} holds a checkpoint and no run.json, which would say of which run. Give another "
                "--out."
            )
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        there = {}
    for key, value in fixed.items():
        if key not in there or there[key] != value:
            raise SettingsError(
                f"{out} holds a run with another {key}: {there.get(key)!r} there, {value!r} here. "
                "Give the same, or another --out."
            )


def _check_place(out: Path, name: str) -> None:
    """The model takes the place of what is there: of an earlier one of this run, of nothing else."""
    place = out / name
    ours = (out / "run.json").is_file() and (place / "model.safetensors").is_file()
    if place.exists() and not ours:
        raise SettingsError(
            f"{place} is there and is no model of this run, so it is left alone. Give another --out, "
            "or --name."
        )
