"""The plot of a load test: latency against offered rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from openloop import PERCENTILES, Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

__all__ = ["draw"]

_SHOWN = {50.0: "#1b6ca8", 99.0: "#d9822b", 99.9: "#a3262a"}
_STYLES = ("-", "--", ":")


def draw(panels: Mapping[str, Mapping[str, Sequence[Row]]], title: str, path: Path) -> None:
    """One panel for each way in, one line for each percentile and sort of load. Both axes are
    logarithmic. A percentile of arrivals without a good answer is a cross at the upper edge; a run
    whose generator fell behind has hollow marks.

    panels  way in -> sort of load -> rows by rate
    """
    finite = [
        value
        for lines in panels.values()
        for rows in lines.values()
        for row in rows
        for value in row.percentiles
        if np.isfinite(value)
    ]
    top = 10 ** np.ceil(np.log10(max(finite, default=1.0) * 1.01))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), sharey=True, squeeze=False
    )
    for axis, (way, lines) in zip(axes[0], panels.items(), strict=True):
        for style, (load, rows) in zip(_STYLES, lines.items(), strict=False):
            for percent, colour in _SHOWN.items():
                _line(axis, rows, percent, colour, style, f"p{percent:g}, {load}", top)
        axis.set(xscale="log", yscale="log", title=way, xlabel="offered searches a second")
        rates = sorted({row.offered_per_s for rows in lines.values() for row in rows})
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_ylim(min(finite, default=0.1) / 2, top * 1.3)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("latency from the moment of arrival, ms")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _line(
    axis: plt.Axes,
    rows: Sequence[Row],
    percent: float,
    colour: str,
    style: str,
    label: str,
    top: float,
) -> None:
    number = PERCENTILES.index(percent)
    rates = np.array([row.offered_per_s for row in rows])
    values = np.array([row.percentiles[number] for row in rows])
    good = np.isfinite(values)
    axis.plot(rates[good], values[good], style, color=colour, label=label, linewidth=1.4)
    for row, value in zip(rows, values, strict=True):
        if np.isfinite(value):
            face = "white" if row.behind else colour
            axis.plot(row.offered_per_s, value, "o", color=colour, markerfacecolor=face, ms=4)
        else:
            axis.plot(row.offered_per_s, top, "x", color=colour, ms=6)
