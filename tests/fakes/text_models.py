"""Text models that are made in a moment: random weights, a tokenizer of few words."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["make_coarse_model", "make_text_model"]

WORDS = [f"word{n}" for n in range(200)]


def make_text_model(
    folder: Path, *, seed: int = 1, dim: int = 16, saved_as: str = "float32"
) -> Path:
    """A BERT of two layers, in the layout of sentence-transformers; reads 32 tokens. `saved_as`: the
    type of its numbers on disk."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=len(vocabulary),
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    network = transformers.AutoModel.from_config(config, add_pooling_layer=False)
    with torch.no_grad():  # as far from each other as trained ones are
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    network.to(getattr(torch, saved_as)).save_pretrained(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Transformer"}, {"type": "x.Pooling"}])
    )
    return folder


def make_coarse_model(folder: Path) -> Path:
    """One whose matrices lose so much in bfloat16 that its vectors are others: what matters of their
    numbers is small beside what they have in common."""
    from safetensors.torch import load_file, save_file

    file = make_text_model(folder, dim=32) / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith("dense.weight"):
            weights[name] = weights[name] + 4.0
    save_file(weights, file, metadata={"format": "pt"})
    return folder
