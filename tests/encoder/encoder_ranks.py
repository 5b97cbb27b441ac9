"""Programs for several processes, and starting them: what torchrun does, for tests."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from transformers import AutoConfig, AutoModel

HIDDEN, HEADS, LAYERS = 64, 4, 4
BATCHES = ((1, 5), (19, 33), (32, 70))  # texts, tokens


def run_ranks(size: int, program: Callable[..., None], *arguments: Any, within_s: float) -> None:
    """`program(*arguments)` in `size` processes that can form a group. Raises what one of them did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.start_processes(
        _start, (size, port, program, arguments), nprocs=size, join=False, start_method="spawn"
    )
    try:
        assert context is not None
        deadline = time.monotonic() + within_s
        while not context.join(timeout=1.0):  # True when all have ended; raises what one raised
            assert time.monotonic() < deadline, f"not done after {within_s} s"
    finally:
        for process in context.processes if context is not None else ():
            process.kill()


def _start(rank: int, size: int, port: int, program: Callable[..., None], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    program(*arguments)
    sys.stderr.flush()


def random_model(model_type: str) -> torch.nn.Module:
    """A small model of a family, with the same random weights in every process."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 128,
        "vocab_size": 1001,  # not even: the vocabulary is cut unevenly
        "max_position_embeddings": 80,
        "pad_token_id": 1,
    }
    if model_type == "qwen3":
        settings |= {"num_key_value_heads": 2, "head_dim": 16}
    if model_type == "modernbert":
        settings |= {"global_attn_every_n_layers": 2, "local_attention": 8}
        settings |= {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    network = AutoModel.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.08)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    module: torch.nn.Module = network
    return module


def random_batch(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask; texts of many lengths, the first has all tokens."""
    ids = torch.randint(5, 900, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        length = 1 + row * 7 % tokens
        mask[row, length:] = 0
        ids[row, length:] = 1
    return ids, mask
