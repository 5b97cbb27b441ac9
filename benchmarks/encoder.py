"""Texts a CPU second, against sentence-transformers. Goal: 3 times as many, at a cosine of at least 0.999
to its vectors; and a model over several processes equal to one process within 1e-5.

Glosses of WordNet, all-MiniLM-L6-v2, one thread for everybody. In each round every variant embeds the
same texts, in turning order; CPU time is that of the process, tokenizer included. Vectors of
sentence-transformers, in float32, are the measure of the others. For the layouts each process is one
rank on gloo; CPU time is summed over ranks, and parameters are what each rank holds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import asyncio
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray

from benchmarks.data import _glosses
from benchmarks.harness import Report, interleave, method, mid, options, spread
from encoder.batching import plan_batches
from encoder.families import family_of
from encoder.model import ModelFolder, TextTokenizer, bundled_model_path, load_network, pad
from encoder.parallel import (
    Layout,
    ParallelModel,
    build_stage,
    join_group,
    make_mesh,
    parameter_bytes,
    whole_stage,
)
from encoder.service import LocalEncoder
from shoal.encoder_api import DEFAULT_MODEL
from shoal.settings import EncoderSettings

TEXTS = 256
GOAL_TIMES, GOAL_COSINE, GOAL_DIFFERENCE = 3.0, 0.999, 1e-5
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))  # tp, pp
BATCH_TOKENS = 2_048

Vectors = NDArray[np.float32]


def _sentence_transformers() -> Callable[[Sequence[str]], Vectors]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bundled_model_path()), device="cpu")

    def embed(texts: Sequence[str]) -> Vectors:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), np.float32)

    return embed


def _shoal(
    loop: asyncio.AbstractEventLoop, precision: Any
) -> tuple[LocalEncoder, Callable[[Sequence[str]], Vectors]]:
    encoder = LocalEncoder(EncoderSettings(encoder_precision=precision, encoder_threads=1))

    def embed(texts: Sequence[str]) -> Vectors:
        return loop.run_until_complete(encoder.embed(texts, DEFAULT_MODEL))

    return encoder, embed


def _rates(texts: list[str], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Texts a CPU second, one figure a round; and the smallest cosine to sentence-transformers."""
    torch.set_num_threads(1)
    loop = asyncio.new_event_loop()
    encoders, ways = [], {"sentence-transformers": _sentence_transformers()}
    for name, precision in (("Shoal, float32", "float32"), ("Shoal, as it chooses", "auto")):
        encoder, ways[name] = _shoal(loop, precision)
        encoders.append(encoder)
    expected = ways["sentence-transformers"](texts)
    cosines = {
        name: float((embed(texts).astype(np.float64) * expected).sum(1).min())
        for name, embed in ways.items()
    }

    def timed(embed: Callable[[Sequence[str]], Vectors]) -> Callable[[int], float]:
        def once(_: int) -> float:
            before = time.process_time()
            embed(texts)
            return len(texts) / (time.process_time() - before)

        return once

    rates = interleave({name: timed(embed) for name, embed in ways.items()}, rounds)
    for encoder in encoders:
        loop.run_until_complete(encoder.close())
    loop.close()
    return rates, cosines


# -- layouts ---------------------------------------------------------------------------------------
def _rank(rank: int, port: int, tp: int, pp: int, texts: list[str], rounds: int, out: Any) -> None:
    """One process of a group."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tp * pp), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    join_group(timeout_s=120, device="cpu")
    mesh = make_mesh(Layout(pp=pp, tp=tp), "cpu")
    path = bundled_model_path()
    assert path is not None
    folder = ModelFolder.read(path)
    network = load_network(folder)
    if tp * pp > 1:
        stage = build_stage(network, family_of("bert"), mesh, folder.pooling)
    else:
        stage = whole_stage(network, folder.pooling)
    model = ParallelModel(stage, mesh, hidden=folder.dim, autocast=False)
    tokens = [text.token_ids for text in TextTokenizer(folder).tokenize(texts)]
    batches = plan_batches([len(t) for t in tokens], tokens_max=BATCH_TOKENS, rows_max=128)

    def once() -> Vectors:
        vectors = np.empty((len(texts), folder.dim), np.float32)
        for batch in batches:
            ids, mask = pad([tokens[place] for place in batch], folder.pad_token_id)
            vectors[batch] = model.forward(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        return vectors

    vectors = once()
    rates = []
    for _ in range(rounds):
        dist.barrier()
        before = time.process_time()
        once()
        spent = torch.tensor(time.process_time() - before)
        dist.all_reduce(spent)
        rates.append(len(texts) / float(spent))
    held: list[Any] = [None] * (tp * pp)
    dist.all_gather_object(held, parameter_bytes(stage))
    if rank == 0:
        out.put((vectors, rates, held))
    dist.barrier()
    dist.destroy_process_group()


def _layout(tp: int, pp: int, texts: list[str], rounds: int) -> tuple[Vectors, list[float], Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_rank, (port, tp, pp, texts, rounds, out), nprocs=tp * pp, join=False)
    found: tuple[Vectors, list[float], Any] = out.get()
    while not context.join():
        continue
    return found


def main() -> None:
    quick = options(__doc__).quick
    rounds, count = (2, 64) if quick else (5, TEXTS)
    texts = [gloss.text for gloss in _glosses()[:count]]
    report = Report(
        "encoder",
        "Texts to vectors",
        method(
            __doc__, f"{count} texts, {rounds} interleaved rounds; median (smallest to largest)."
        ),
        quick=quick,
        columns=["what", "texts a CPU second", "times sentence-transformers", "smallest cosine"],
    )
    rates, cosines = _rates(texts, rounds)
    base = rates["sentence-transformers"]
    for name, figures in rates.items():
        times = [own / theirs for own, theirs in zip(figures, base, strict=True)]
        report.rows.append([name, spread(figures), spread(times, 2), f"{cosines[name]:.6f}"])
    chosen = "Shoal, as it chooses"
    times = [own / theirs for own, theirs in zip(rates[chosen], base, strict=True)]
    report.claim("texts a CPU second, to sentence-transformers'", mid(times), ">=", GOAL_TIMES, "x")
    report.claim("smallest cosine to its vectors", cosines[chosen], ">=", GOAL_COSINE, "")
    report.raw = {"texts_per_cpu_s": rates, "cosine_min": cosines, "layouts": {}}

    expected: Vectors | None = None
    worst = 0.0
    for tp, pp in LAYOUTS:
        vectors, figures, held = _layout(tp, pp, texts, max(2, rounds // 2))
        expected = vectors if expected is None else expected
        difference = float(np.abs(vectors - expected).max())
        worst = max(worst, difference)
        megabytes = ", ".join(f"{size / 1e6:.1f}" for size in held)
        report.notes.append(
            f"tp={tp} pp={pp}, float32: {spread(figures)} texts a CPU second of all ranks together; "
            f"parameters {megabytes} MB a rank; largest difference to one process {difference:.1e}"
        )
        report.raw["layouts"][f"tp{tp}pp{pp}"] = {
            "texts_per_cpu_s": figures,
            "parameter_bytes": held,
            "difference_max": difference,
        }
    report.claim("difference of any layout to one process", worst, "<=", GOAL_DIFFERENCE, "")
    report.write()


if __name__ == "__main__":
    main()
