"""What a run shows while it goes, and leaves behind.

    OUT/history.jsonl   one line a step (loss, learning rate, length of the gradient) and one for each
                        evaluation
    OUT/curves.png      both, drawn (needs matplotlib)
    OUT/tensorboard/    both, for TensorBoard (needs tensorboard)
    README.md           in the model's folder: the card

Only rank 0 reports. The curves survive a restart: lines after the checkpoint are dropped and made again.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from encoder.train.settings import BUNDLED, TrainSettings
from shoal.ranking import Interval
from shoal.version import VERSION

__all__ = ["Report", "commit", "draw_curves", "model_card", "read_history"]


BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # what `bundled` is known as
LINE_EVERY_S = 30
METRIC_NAMES = {"recall@10": "recall@10", "ndcg@10": "nDCG@10", "mrr": "MRR"}
# What has no part in what comes out, or is the business of one machine. Where not all take each step
# together, they do at evaluations and checkpoints: then those have a part.
_NOT_IN_CARD = (
    "out",
    "name",
    "max_restarts",
    "timeout_s",
    "gate",
)
_NOT_IN_CARD_OF_SYNC = (*_NOT_IN_CARD, "checkpoint_every", "eval_every")


class Report:
    """steps: of the whole run; start: where it begins, after a checkpoint more than 0. shown: with a
    bar; else, as in a log, a line from time to time.

    A disk that is full ends no run here: what cannot be written is told once, and the next checkpoint
    says the rest.
    """

    def __init__(self, out: Path, *, steps: int, start: int, shown: bool) -> None:
        self._out = out
        self._history = out / "history.jsonl"
        kept = [x for x in read_history(self._history) if x["step"] <= start] if start else []
        scratch = out / "history.tmp"
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        scratch.replace(self._history)
        self._file = self._history.open("a", encoding="utf-8")
        self._board = _tensorboard(out / "tensorboard", start)
        self._silent = False
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._metrics = ""
        self._steps = steps
        self._next_line = math.inf if shown else time.monotonic() + LINE_EVERY_S
        self._progress.start()
        self._task = self._progress.add_task("training", total=steps, completed=start)

    def step(self, step: int, **figures: float) -> None:
        """step: how many are done. figures: loss, lr, gradient_norm, seconds."""
        self._write(step, "train", figures)
        text = f"loss {figures['loss']:.4f}{self._metrics}"
        self._progress.update(self._task, completed=step, description=text)
        if time.monotonic() >= self._next_line:
            self.say(f"Step {step} of {self._steps}: {text}")
            self._next_line = time.monotonic() + LINE_EVERY_S

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """figures: recall@10, ndcg@10, mrr on the held-out queries."""
        self._write(step, "held-out", figures)
        self._metrics = f"  recall@10 {figures['recall@10']:.3f}  nDCG@10 {figures['ndcg@10']:.3f}"

    def say(self, text: str) -> None:
        """A line for whoever started the run."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the curves and end the progress bar. Idempotent."""
        if self._file.closed:
            return
        self._progress.stop()
        with self._told():
            self._file.close()
        with self._told():
            if self._board is not None:
                self._board.close()
        with self._told():
            draw_curves({"": [self._history]}, self._out / "curves.png")

    def _write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        with self._told():
            self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
            self._file.flush()
        with self._told():
            if self._board is not None:
                for name, value in figures.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._silent:
                self.say(f"What is shown of this run cannot be written to {self._out}: {error}")
            self._silent = True


def _tensorboard(folder: Path, start: int) -> Any:
    """None where the package is not installed: the other files say the same."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What an attempt before this one wrote after its last checkpoint does not count.
    return SummaryWriter(str(folder), purge_step=start + 1 if start else 0)


def read_history(file: Path) -> list[dict[str, Any]]:
    """Lines of a history; a last one that a crash cut off is left out."""
    lines: list[dict[str, Any]] = []
    if file.is_file():
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def draw_curves(histories: Mapping[str, Sequence[Path]], out: Path) -> bool:
    """Loss and held-out figures of runs as a PNG; those of one name, such as several seeds, in one
    colour. Of one run all figures are shown; of several, nDCG@10, to compare them by. False where
    matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    several = len(histories) > 1
    for number, (name, files) in enumerate(histories.items()):
        # Curves that lie upon each other: the first are broad, so that all are seen.
        width = 1.0 + 5.0 * 0.6**number if several else 1.5
        for file in files:
            lines = read_history(file)
            given: dict[str, Any] = {"color": f"C{number}", "lw": width}
            label = name if file is files[0] else None
            steps = [line for line in lines if line["kind"] == "train"]
            places, losses = [x["step"] for x in steps], [x["loss"] for x in steps]
            if not several:
                left.plot(places, losses, color="C0", alpha=0.3, lw=0.8, label="of each step")
            left.plot(places, _smooth(losses), label=label if several else "smoothed", **given)
            judged = [line for line in lines if line["kind"] == "held-out"]
            places = [line["step"] for line in judged]
            for place, metric in enumerate(("ndcg@10",) if several else METRIC_NAMES):
                if not several:
                    given["color"], label = f"C{place}", METRIC_NAMES[metric]
                right.plot(places, [x[metric] for x in judged], marker=".", label=label, **given)
    left.set(xlabel="step", ylabel="loss (InfoNCE)" + (", smoothed" if several else ""))
    right.set(
        xlabel="step", ylabel="nDCG@10 on held-out queries" if several else "on held-out queries"
    )
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    (right if several else left).legend(fontsize=8)
    if not several:
        right.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return True


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean, of about ten steps."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else 0.9 * smooth[-1] + 0.1 * value)
    return smooth


def commit() -> str:
    """Version and, in a checkout, the commit of the code that trains."""
    root = Path(__file__).resolve().parents[2]
    # Where Shoal is installed, git would look further up, and name the commit of another project.
    if not (root / ".git").exists():
        return f"shoal {VERSION}"
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"shoal {VERSION}"
    return f"shoal {VERSION}, commit {found}"


def model_card(
    settings: TrainSettings,
    *,
    data: Mapping[str, object],
    before: Mapping[str, Interval],
    after: Mapping[str, Interval],
    verdict: str,
) -> str:
    """The README.md of a trained model. data: what is known of the pairs."""
    without = _NOT_IN_CARD_OF_SYNC if settings.mode == "sync" else _NOT_IN_CARD
    source = BASE_MODEL if settings.model == BUNDLED else Path(settings.model).name
    return "\n".join(
        [
            "---",
            "library_name: sentence-transformers",
            "pipeline_tag: sentence-similarity",
            *([f"base_model: {source}"] if settings.model == BUNDLED else []),
            "tags: [sentence-transformers, feature-extraction]",
            "---",
            f"# {settings.name}",
            "",
            f"A text encoder: `{source}`, fine-tuned by `shoal encoder train` ({commit()}), seed "
            f"{settings.seed}. {verdict}",
            "",
            "```sh",
            f"shoal serve --encoder-model {settings.name}",
            "```",
            "",
            "## Held-out queries",
            "",
            "Mean and 95 % bootstrap interval over queries that were not trained on, nor were their",
            "answers.",
            "",
            *_table(
                ("", "before", "after"),
                [(METRIC_NAMES[name], before[name], after[name]) for name in before],
            ),
            "",
            "## Data",
            "",
            *_table(("", ""), list(data.items())),
            "",
            "## Again",
            "",
            "```sh",
            "shoal encoder train " + shlex.join(settings.flags(without=without)),
            "```",
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
