"""Whether a trained model may take the place of the one before: only when it is surely better. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from encoder.train.metrics import Quality
from shoal.ranking import Interval, bootstrap_mean

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """gain: of nDCG@10 on the held-out queries, after - before, paired by query."""

    accepted: bool
    gain: Interval

    def sentence(self) -> str:
        if self.accepted:
            return f"Accepted: held-out nDCG@10 gains {self.gain}."
        if self.gain.high < 0:
            return f"Not accepted: held-out nDCG@10 got worse, its gain is {self.gain}."
        return (
            f"Not accepted: held-out nDCG@10 gains {self.gain}, which may be chance. Train longer, on "
            "more pairs, or hold out more queries."
        )


def judge(before: Quality, after: Quality, *, seed: int) -> Verdict:
    """Accepted when the 95 % interval of the gain lies above 0. Both on the same queries, in order."""
    gain = bootstrap_mean(after.ndcg_at_10 - before.ndcg_at_10, seed)
    return Verdict(accepted=gain.low > 0, gain=gain)
