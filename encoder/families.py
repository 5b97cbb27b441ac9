"""What Shoal must know about a family of models to split it over processes: one small table.

    tensor parallel    which matrices are cut by output rows (colwise), which by input columns
                       (rowwise), where the vocabulary is. Between a colwise and the rowwise matrix
                       after it every process works on heads, or neurons, of its own.
    pipeline parallel  where the list of layers is, what stands before it and what after it. A stage
                       is the model itself with some of these taken out, so that masks, rotary angles
                       and position biases are computed by the family's own code in every stage.

Paths are those of `transformers.AutoModel`; `*` stands for the number of a layer. The key of the table
is `model_type` in config.json. Parity of every family with one process: tests/encoder/test_parallel.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shoal.errors import NotSupported, SettingsError

__all__ = ["FAMILIES", "Family", "check_layout", "family_of", "positions_from", "split_layers"]


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one `model_type` are split.

    colwise, rowwise   matrices; a bias of a rowwise one is added once, after the sum.
    fused              colwise matrices that hold several side by side -> how many: cut in two,
                       [q|k|v] must become [q0|k0|v0] and [q1|k1|v1], not [q|k0] and [k1|v].
    vocabulary         the embedding of tokens, cut by rows: about half of a small model.
    layers             the list of layers, the part that a pipeline cuts.
    before             what only the first stage needs; it takes `inputs_embeds` where it is absent.
    after              what only the last stage needs, or "".
    head_counts        settings that the number of tensor-parallel processes must divide.
    divided            attributes of modules that count heads or their numbers: each process has its
                       part of them.
    per_head           modules that are not cut and see one process's heads only: what each process
                       learns of them is a part, which training adds up.
    positions_from     the first position that a text takes; earlier ones are for padding.
    """

    colwise: tuple[str, ...]
    rowwise: tuple[str, ...]
    vocabulary: str
    layers: str
    before: str
    after: str = ""
    fused: tuple[tuple[str, int], ...] = ()
    head_counts: tuple[str, ...] = ("num_attention_heads",)
    divided: tuple[tuple[str, str], ...] = ()
    per_head: tuple[str, ...] = ()
    positions_from: int = 0


def _bert_like(*, positions_from: int) -> Family:
    layer = "encoder.layer.*."
    return Family(
        colwise=(
            layer + "attention.self.query",
            layer + "attention.self.key",
            layer + "attention.self.value",
            layer + "intermediate.dense",
        ),
        rowwise=(layer + "attention.output.dense", layer + "output.dense"),
        vocabulary="embeddings.word_embeddings",
        layers="encoder.layer",
        before="embeddings",
        positions_from=positions_from,
    )


FAMILIES: Mapping[str, Family] = {
    "bert": _bert_like(positions_from=0),
    "roberta": _bert_like(positions_from=2),
    "xlm-roberta": _bert_like(positions_from=2),
    "mpnet": Family(
        colwise=(
            "encoder.layer.*.attention.attn.q",
            "encoder.layer.*.attention.attn.k",
            "encoder.layer.*.attention.attn.v",
            "encoder.layer.*.intermediate.dense",
            "encoder.relative_attention_bias",  # one column for each head, shared by all layers
        ),
        rowwise=("encoder.layer.*.attention.attn.o", "encoder.layer.*.output.dense"),
        vocabulary="embeddings.word_embeddings",
        layers="encoder.layer",
        before="embeddings",
        divided=(("encoder.layer.*.attention.attn", "all_head_size"),),
        positions_from=2,
    ),
    "modernbert": Family(
        colwise=(),
        fused=(("layers.*.attn.Wqkv", 3), ("layers.*.mlp.Wi", 2)),
        rowwise=("layers.*.attn.Wo", "layers.*.mlp.Wo"),
        vocabulary="embeddings.tok_embeddings",
        layers="layers",
        before="embeddings",
        after="final_norm",
    ),
    "qwen3": Family(
        colwise=(
            "layers.*.self_attn.q_proj",
            "layers.*.self_attn.k_proj",
            "layers.*.self_attn.v_proj",
            "layers.*.mlp.gate_proj",
            "layers.*.mlp.up_proj",
        ),
        rowwise=("layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"),
        vocabulary="embed_tokens",
        layers="layers",
        before="embed_tokens",
        after="norm",
        head_counts=("num_attention_heads", "num_key_value_heads"),
        per_head=("layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"),
    ),
}


# As RoBERTa counts them; served with one process.
_POSITIONS_FROM_2 = (
    *("camembert", "data2vec-text", "longformer", "roberta-prelayernorm"),
    *("xlm-roberta-xl", "xmod"),
)


def positions_from(model_type: str) -> int:
    """The first position that a text takes, of any model: a text that is read further than the last
    one would fail."""
    family = FAMILIES.get(model_type)
    if family is not None:
        return family.positions_from
    return 2 if model_type in _POSITIONS_FROM_2 else 0


def family_of(model_type: str) -> Family:
    """Raises NotSupported, naming the families that are known."""
    family = FAMILIES.get(model_type)
    if family is None:
        raise NotSupported(
            f"Models of the type {model_type!r} cannot be split over processes; known are "
            f"{', '.join(sorted(FAMILIES))}. Serve it with --tp 1 --pp 1."
        )
    return family


def check_layout(config: Mapping[str, Any], *, tp: int, pp: int) -> None:
    """config: config.json. Raises SettingsError when this model cannot be split so."""
    family = family_of(str(config.get("model_type")))
    for name in (*family.head_counts, "intermediate_size"):
        count = config.get(name)
        if isinstance(count, int) and count % tp:
            fitting = [n for n in range(1, count + 1) if count % n == 0][:6]
            raise SettingsError(
                f"The model has {count} {name} and tp is {tp}, which does not divide them: "
                f"give tp one of {', '.join(map(str, fitting))}."
            )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and pp > layers:
        raise SettingsError(
            f"The model has {layers} layers and pp is {pp}: a stage needs one layer or more."
        )


def split_layers(count: int, stages: int) -> list[range]:
    """Layers of each stage, in order, as even as it goes; what is over goes to later stages, because
    the first one also has the embeddings.

    >>> split_layers(7, 2)
    [range(0, 3), range(3, 7)]
    """
    cuts = [count * stage // stages for stage in range(stages + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]
