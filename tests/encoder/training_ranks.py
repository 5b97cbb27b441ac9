"""Training in several processes on this machine, without torchrun: a server that has torch in memory
forks them, so that eight processes start in a second."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import string
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from encoder.train.data import Pair, write_pairs

__all__ = ["run_ranks", "tiny_model", "tiny_pairs"]

WORDS = 400
TIMEOUT_S = 240.0


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Call `function(*arguments)` in `count` processes that can form a group. Their exit codes; all
    are dead when this returns."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["encoder.train.loop", "transformers.models.bert.modeling_bert"])
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_rank, args=(rank, count, store.port, function, arguments))
        for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
            if process.exitcode != 0:  # the others wait for it
                break
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(
    rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store lives in the parent
    }
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads may still wait for others


def words() -> list[str]:
    dice = random.Random(7)
    return ["".join(dice.choices(string.ascii_lowercase, k=6)) for _ in range(WORDS)]


def tiny_model(folder: Path, model_type: str = "bert") -> Path:
    """A random model: 4 layers of 4 heads, 64 wide, with a tokenizer for `words`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(3)
    chosen: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if model_type == "qwen3":
        chosen |= {"num_key_value_heads": 2, "head_dim": 16}
    if model_type == "modernbert":
        chosen |= {"global_attn_every_n_layers": 2, "local_attention": 8}
        chosen |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    config = transformers.AutoConfig.for_model(model_type, **chosen)
    network = transformers.AutoModel.from_config(config)
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    with torch.no_grad():  # as far from each other as trained ones are
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    network.save_pretrained(folder)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Transformer"}, {"type": "x.Pooling"}])
    )
    return folder


def tiny_pairs(file: Path, count: int = 400, *, negatives: int = 0, seed: int = 5) -> list[Pair]:
    """Queries of three words and a text of nine that has them in it: what a model can learn."""
    dice = random.Random(seed)
    vocabulary = words()
    pairs = []
    for _ in range(count):
        some = dice.sample(vocabulary, 3)
        text = some + dice.choices(vocabulary, k=6)
        dice.shuffle(text)
        wrong = tuple(" ".join(dice.choices(vocabulary, k=9)) for _ in range(negatives))
        pairs.append(Pair(" ".join(some), " ".join(text), wrong))
    write_pairs(file, pairs)
    return pairs
