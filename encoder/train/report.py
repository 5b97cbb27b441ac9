"""What a run shows while it goes, and leaves behind.

    OUT/history.jsonl   one line a step (loss, learning rate, length of the gradient) and one for each
                        evaluation
    OUT/curves.png      both, drawn (needs matplotlib)
    OUT/tensorboard/    both, for TensorBoard (needs tensorboard)
    README.md           in the model's folder: the card

Only rank 0 reports. The curves survive a restart: lines after the checkpoint are dropped and made again.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.ranking import Interval
from shoal.version import VERSION

__all__ = ["Report", "commit", "draw_curves", "model_card", "read_history"]


class Report:
    """steps: of the whole run; start: where it begins, after a checkpoint more than 0."""

    def __init__(self, out: Path, *, steps: int, start: int, shown: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._out = out
        self._history = out / "history.jsonl"
        kept = [line for line in read_history(self._history) if line["step"] <= start]
        self._history.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._history.open("a", encoding="utf-8")
        self._board = _tensorboard(out / "tensorboard", start)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._metrics = ""
        self._progress.start()
        self._task = self._progress.add_task("training", total=steps, completed=start)

    def step(self, step: int, **figures: float) -> None:
        """step: how many are done. figures: loss, lr, gradient_norm, seconds."""
        self._write(step, "train", figures)
        text = f"loss {figures['loss']:.4f}{self._metrics}"
        self._progress.update(self._task, completed=step, description=text)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """figures: recall@10, ndcg@10, mrr on the held-out queries."""
        self._write(step, "held-out", figures)
        self._metrics = f"  recall@10 {figures['recall@10']:.3f}  nDCG@10 {figures['ndcg@10']:.3f}"

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Draw the curves and end the progress bar. Idempotent."""
        if self._file.closed:
            return
        self._file.close()
        self._progress.stop()
        if self._board is not None:
            self._board.close()
        draw_curves({"": [self._history]}, self._out / "curves.png")

    def _write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)


def _tensorboard(folder: Path, start: int) -> Any:
    """None where the package is not installed: the other files say the same."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


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
    colour. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    # Of one run all figures are shown; of several, one is enough to compare them by.
    metrics = ("ndcg@10",) if len(histories) > 1 else ("ndcg@10", "recall@10", "mrr")
    for number, (name, files) in enumerate(histories.items()):
        for file in files:
            lines = read_history(file)
            steps = [line for line in lines if line["kind"] == "train"]
            judged = [line for line in lines if line["kind"] == "held-out"]
            label = name if file is files[0] else None
            losses = _smooth([line["loss"] for line in steps])
            left.plot([line["step"] for line in steps], losses, color=f"C{number}", label=label)
            for metric, dash in zip(metrics, ("-", "--", ":"), strict=False):
                values = [line[metric] for line in judged]
                named = None if label is None else f"{name} {metric}".strip()
                places = [line["step"] for line in judged]
                right.plot(places, values, dash, marker=".", color=f"C{number}", label=named)
    left.set(xlabel="step", ylabel="loss (InfoNCE, smoothed)")
    right.set(xlabel="step", ylabel="held-out queries")
    right.legend(fontsize=7)
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
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"shoal {VERSION}"
    return f"shoal {VERSION}, commit {found}"


def model_card(
    settings: Mapping[str, Any],
    *,
    data: Mapping[str, Any],
    before: Mapping[str, Interval],
    after: Mapping[str, Interval],
    verdict: str,
) -> str:
    """The README.md of a trained model. data: what is known of the pairs."""
    rows = [f"| {name} | {before[name]} | {after[name]} |" for name in before]
    facts = [f"| {name} | {value} |" for name, value in data.items()]
    chosen = [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n".join(
        [
            "---",
            "library_name: sentence-transformers",
            "pipeline_tag: sentence-similarity",
            "tags: [sentence-transformers, feature-extraction]",
            "---",
            "# A fine-tuned text encoder",
            "",
            f"Trained from `{settings['model']}` by `shoal encoder train` ({commit()}), "
            f"seed {settings['seed']}. {verdict}",
            "",
            "## Held-out queries",
            "",
            "Mean and 95 % bootstrap interval over queries that were not trained on, nor were their",
            "answers.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *rows,
            "",
            "## Data",
            "",
            "| | |",
            "|---|---|",
            *facts,
            "",
            "## Settings",
            "",
            "| | |",
            "|---|---|",
            *chosen,
            "",
        ]
    )
