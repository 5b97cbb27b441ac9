"""A run from its pairs to its model, in each of its processes.

    read, split ─▶ judge ─▶ [step, judge, checkpoint]* ─▶ judge ─▶ gate ─▶ save

A run that ends in the middle, and starts again with the same settings, on the same layout or another,
goes on from its last checkpoint. SIGTERM and SIGINT let it finish its step and write one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from encoder.model import quiet_and_offline
from encoder.parallel import Layout, device_type, join_group, make_mesh
from encoder.train.agreement import StopSignal, agreed, alike, any_of
from encoder.train.checkpoints import Checkpoints
from encoder.train.data import Pair
from encoder.train.errors import Stopped, TrainingFailed
from encoder.train.folder import claimed
from encoder.train.gate import Verdict, judge
from encoder.train.inputs import Inputs
from encoder.train.metrics import Quality, quality, ranks_of_relevant
from encoder.train.report import Report, model_card
from encoder.train.saving import save_model, whole_parameters
from encoder.train.server import SERVER, broadcast_state, serve_parameters, work
from encoder.train.settings import TrainSettings
from encoder.train.trainer import Trainer
from shoal.errors import SettingsError
from shoal.ranking import Interval

__all__ = ["Outcome", "train"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """model: the folder it was saved in; its name is `rejected` when --gate refused it."""

    model: Path
    verdict: Verdict
    before: dict[str, Interval]
    after: dict[str, Interval]


def train(settings: TrainSettings, on_step: Callable[[int], None] | None = None) -> Outcome:
    """Run it. Every process of the mesh calls this; all get the same outcome.

    on_step   called after each step and its checkpoint, with how many are done.
    Raises SettingsError when settings, pairs and model do not fit together; Stopped after a signal;
    TrainingFailed when the loss is no number any more, or the disk is full.
    """
    quiet_and_offline()
    with _process_group(settings):
        inputs = Inputs.read(settings)
        alike({**settings.of_all(), "pairs": inputs.digest})
        torch.manual_seed(settings.seed)
        with claimed(settings.out, settings.name, inputs.fixed(settings)), StopSignal() as stop:
            run = _Run(settings, inputs, stop, on_step)
            try:
                return run.whole()
            finally:
                run.close()


@contextlib.contextmanager
def _process_group(settings: TrainSettings) -> Iterator[None]:
    device = device_type()
    if "RANK" in os.environ:
        join_group(timeout_s=settings.timeout_s, device=device)
    else:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    try:
        if dist.get_world_size() != settings.processes:
            raise SettingsError(
                f"There are {dist.get_world_size()} processes, and dp × pp × tp is "
                f"{settings.processes}: let `shoal encoder train` start them, or make both equal."
            )
        yield
    finally:
        dist.destroy_process_group()


class _Run:
    def __init__(
        self,
        settings: TrainSettings,
        inputs: Inputs,
        stop: StopSignal,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._settings, self._inputs = settings, inputs
        self._stop, self._on_step = stop, on_step
        self._first = dist.get_rank() == 0
        mesh = make_mesh(Layout(settings.dp, settings.pp, settings.tp), device_type())
        self._trainer = Trainer(settings, inputs.source, mesh, inputs.positives_of)
        self._checkpoints = Checkpoints(settings.out)
        self._report: Report | None = None
        self._broken = False  # a gradient that a parameter server got

    def whole(self) -> Outcome:
        settings, trainer = self._settings, self._trainer
        resumed = self._checkpoints.load(trainer.stage.network, trainer.optimizer)
        start = resumed.step
        if start:
            trainer.continue_at(start, resumed.own, self._batches_of(start))
        if self._first:
            self._report = Report(
                settings.out, steps=settings.steps, start=start, shown=sys.stderr.isatty()
            )
            if start:
                self._report.say(f"Goes on after step {start} of {settings.steps}.")
            elif (unused := self._inputs.unused(settings)) is not None:
                self._report.say(unused)
        before = self._quality_before(start)
        if settings.mode == "parameter-server":
            self._asynchronous(start)
        else:
            self._together(start)
        if self._report is not None and trainer.texts_cut:
            self._report.say(
                f"Of {trainer.texts_read:,} texts that one process read, {trainer.texts_cut:,} were cut "
                f"after {trainer.folder.max_tokens} tokens: --max-tokens, or what the model reads."
            )
        after = self._evaluate(settings.steps)
        verdict = judge(before, after, seed=settings.seed)
        return self._saved(before, after, verdict)

    def close(self) -> None:
        if self._report is not None:
            self._report.close()

    # -- steps ------------------------------------------------------------------------------------

    def _batches_of(self, step: int) -> list[list[Pair]]:
        count = self._settings.accumulate
        return [self._inputs.batches.at(n) for n in range(step * count, (step + 1) * count)]

    def _together(self, start: int) -> None:
        settings, trainer = self._settings, self._trainer
        for step in range(start, settings.steps):
            began = time.monotonic()
            figures = trainer.step(step, self._batches_of(step))
            done = step + 1
            if self._report is not None:
                self._report.step(
                    done,
                    loss=figures.loss,
                    lr=figures.lr,
                    gradient_norm=figures.gradient_norm,
                    seconds=time.monotonic() - began,
                )
            broken = not (math.isfinite(figures.loss) and math.isfinite(figures.gradient_norm))
            self._between(done, broken=broken)
            if self._on_step is not None:
                self._on_step(done)
        trainer.average_now()

    def _between(self, done: int, *, broken: bool) -> None:
        """Judged before the checkpoint, so that whoever goes on from it has all figures up to it."""
        settings, trainer = self._settings, self._trainer
        broken, stopped = any_of((broken, self._stop.raised), trainer.device)
        if broken:
            raise TrainingFailed(
                f"The loss or its gradient is no number any more at step {done}. Give a smaller --lr, "
                "or --precision float32."
            )
        ended = done == settings.steps
        judged = not ended and _due(done, settings.eval_every)
        kept = stopped or (not ended and _due(done, settings.checkpoint_every))
        if judged or kept:
            trainer.average_now()
        if judged:
            self._evaluate(done)
        if kept:
            own = trainer.own_state()
            self._checkpoints.save(done, trainer.stage.network, trainer.optimizer, own)
        if stopped:
            raise Stopped(
                f"Stopped after step {done} of {settings.steps}. The same command goes on from there."
            )

    def _asynchronous(self, start: int) -> None:
        """Nobody waits for the others but where all are judged, or a checkpoint is written."""
        settings, trainer = self._settings, self._trainer
        parameters = list(trainer.stage.parameters())
        done = start
        while done < settings.steps:
            until = _next_due(done, settings)
            if dist.get_rank() != SERVER:
                done = work(
                    parameters,
                    lambda step: trainer.gradients(step, self._batches_of(step)),
                    start=done,
                    until=until,
                )
            else:
                done = serve_parameters(
                    parameters,
                    self._apply,
                    workers=range(1, settings.dp),
                    start=done,
                    until=until,
                    staleness=settings.staleness,
                    on_step=self._served,
                )
            broadcast_state(parameters, trainer.optimizer)
            self._between(done, broken=self._broken)
            if self._on_step is not None:
                self._on_step(done)

    def _apply(self, step: int) -> bool:
        self._broken |= not math.isfinite(self._trainer.clip())
        if not self._broken:
            self._trainer.set_learning_rate(min(step, self._settings.steps - 1))
            self._trainer.optimizer.step()
        return not (self._broken or self._stop.raised)

    def _served(self, done: int, loss: float, missed: int) -> None:
        if self._report is not None:
            self._report.step(done, loss=loss, updates_missed=missed)

    # -- judging and saving -----------------------------------------------------------------------

    def _quality_before(self, start: int) -> Quality:
        """Of the model that the run began with: kept in a file, because after a restart it is gone."""
        file = self._settings.out / "before.npz"
        if start and file.is_file():
            with np.load(file) as kept:
                return Quality(kept["recall"], kept["ndcg"], kept["reciprocal"])
        if start:
            raise SettingsError(
                f"{file} is gone, and with it how good the model was at first. Remove "
                f"{self._settings.out / 'checkpoints'} to start from the beginning."
            )
        before = self._evaluate(0)

        def keep() -> None:
            scratch = file.with_name("before.tmp.npz")
            np.savez(
                scratch,
                recall=before.recall_at_10,
                ndcg=before.ndcg_at_10,
                reciprocal=before.reciprocal_rank,
            )
            scratch.replace(file)

        _carried_out(keep)
        return before

    def _evaluate(self, step: int) -> Quality:
        judged = self._inputs.judged
        documents = self._trainer.embed(judged.documents)
        queries = self._trainer.embed(judged.queries)
        # Nothing compares with what is no number, so that every rank would be the first.
        if not (np.isfinite(documents).all() and np.isfinite(queries).all()):
            raise TrainingFailed(
                f"The model's vectors are no numbers at step {step}. Give a smaller --lr, or "
                "--precision float32."
            )
        found = quality(ranks_of_relevant(queries, documents, judged.relevant))
        if self._report is not None:
            self._report.evaluation(step, found.means())
        return found

    def _saved(self, before: Quality, after: Quality, verdict: Verdict) -> Outcome:
        settings, trainer, inputs = self._settings, self._trainer, self._inputs
        refused = settings.gate and not verdict.accepted
        outcome = Outcome(
            settings.out / ("rejected" if refused else settings.name),
            verdict,
            before.intervals(settings.seed),
            after.intervals(settings.seed),
        )
        parameters = whole_parameters(trainer.stage, trainer.mesh)

        def write() -> None:
            card = model_card(
                settings,
                data=inputs.facts(settings),
                before=outcome.before,
                after=outcome.after,
                verdict=verdict.sentence(),
            )
            save_model(
                inputs.source,
                parameters,
                outcome.model,
                family=inputs.family,
                tp=settings.tp,
                card=card,
            )
            self._write_result(outcome)

        _carried_out(write)
        return outcome

    def _write_result(self, outcome: Outcome) -> None:
        """OUT/result.json: for programs what the card says to people."""
        text = json.dumps(asdict(outcome) | {"model": outcome.model.name}, indent=1)
        (self._settings.out / "result.json").write_text(text + "\n", encoding="utf-8")


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _next_due(done: int, settings: TrainSettings) -> int:
    """The next step after which something is to be done together."""
    every = [n for n in (settings.eval_every, settings.checkpoint_every) if n > 0]
    return min([settings.steps, *(done - done % n + n for n in every)])


def _carried_out(does: Callable[[], None]) -> None:
    """In the first process; TrainingFailed in all when it could not. Collective."""
    problem = agreed(does)
    if problem is not None:
        raise TrainingFailed(
            f"{problem} When that is mended, the same command goes on from the last checkpoint."
        )
