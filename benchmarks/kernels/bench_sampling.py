"""How near to one read of the logits is sampling, and how far ahead of torch and FlashInfer?

Each row is one (kind of sampling, dtype, number of rows) on a vocabulary of 151,936; all rows of a batch draw alike,
except in `mixed`, where kinds take turns. `of_copy_rate` compares with reading every logit once. Logits are normal with
deviation 3, as peers were measured with, or `flat` with deviation 1, whose nuclei are a large part of the vocabulary.
Beside it, in the same run: torch (argmax; softmax and multinomial; a sort) and FlashInfer where it can be imported.
Before timing, every token must lie in the support that its definition gives in fp64, and the most likely token
must be drawn as often as its probability says.

    python benchmarks/kernels/bench_sampling.py [--kinds plain top_k_top_p] [--rows 1 64 256] [--dtypes bfloat16]
        [--stats 4096:8 2048:4] [--choose 1024:16:64]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report
from timing import DEVICE, compare, copy_bytes_per_us, num_sets

from flashtensors.kernels.logprobs_kernel import launch_token_logprobs
from flashtensors.kernels.penalties import Penalties
from flashtensors.kernels.penalties_kernel import launch_penalise
from flashtensors.kernels.sampling_launch import launch_sample
from flashtensors.kernels.sampling_rows import SamplingRows, token_probabilities

VOCAB = 151_936
NUM_TOP = 20
KINDS: dict[str, list[dict[str, float]]] = {
    "greedy": [{"temperature": 0.0}],
    "plain": [{"temperature": 0.8}],
    "top_k_top_p": [{"top_k": 50, "top_p": 0.95}],
    "top_k_1000": [{"top_k": 1000}],
    "top_p": [{"top_p": 0.95}],
    "min_p": [{"min_p": 0.05}],
    "mixed": [{"temperature": 0.0}, {}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.05}],
    "flat_top_p": [{"top_p": 0.95}],
    "logprobs_20": [{"temperature": 0.8}],
    "penalties": [{"temperature": 0.8}],
}


def make_rows(settings: list[dict[str, float]], num_rows: int, first_seed: int = 0) -> SamplingRows:
    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        values = [settings[row % len(settings)].get(name, default) for row in range(num_rows)]
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    return SamplingRows(
        temperature_S=column("temperature", 1.0, torch.float32),
        top_k_S=column("top_k", 0, torch.int64),
        top_p_S=column("top_p", 1.0, torch.float64),
        min_p_S=column("min_p", 0.0, torch.float32),
        seed_S=torch.arange(first_seed, first_seed + num_rows, device=DEVICE),
        position_S=torch.full((num_rows,), 100, device=DEVICE),
    )


def make_logits(kind: str, num_rows: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(num_rows, VOCAB, device=DEVICE) * (1 if kind.startswith("flat") else 3)).to(dtype)


def check_draws(kind: str, dtype: torch.dtype, options: dict[str, int]) -> None:
    """Draw one row with many seeds; stop unless support and frequencies are those of the definition."""
    num_draws = 2048
    logits = make_logits(kind, 1, dtype)
    settings = KINDS[kind]
    for setting in settings:
        expected = token_probabilities(logits.float(), make_rows([setting], 1))[0]
        rows = make_rows([setting], num_draws)
        drawn = launch_sample(logits.expand(num_draws, -1).contiguous(), rows, **options)
        counts = torch.bincount(drawn.token_ids_S, minlength=VOCAB).double() / num_draws
        likely = expected > 0.002
        spread_of_counts = (expected * (1 - expected) / num_draws).sqrt()
        is_off = (counts - expected).abs()[likely] > 5.5 * spread_of_counts[likely] + 1e-9
        # The last token of a nucleus may be another one: weights are summed in fp32.
        num_outside = int((counts[expected == 0] > 0).sum())
        if not drawn.is_valid_S.all() or is_off.any() or num_outside > 1:
            raise SystemExit(f"{kind} {setting} {dtype}: {int(is_off.sum())} frequencies off, {num_outside} outside")


def make_penalties(num_rows: int) -> Penalties:
    """Repetition and presence over 1,000 tokens of prompt and 1,000 of answer in every row."""
    return Penalties(
        rows_R=torch.arange(num_rows, device=DEVICE),
        token_ids_RL=torch.randint(0, VOCAB, (num_rows, 2000), device=DEVICE, dtype=torch.int32),
        num_prompt_tokens_R=torch.full((num_rows,), 1000, device=DEVICE),
        num_tokens_R=torch.full((num_rows,), 2000, device=DEVICE),
        repetition_R=torch.full((num_rows,), 1.1, device=DEVICE),
        presence_R=torch.full((num_rows,), 0.5, device=DEVICE),
        frequency_R=torch.zeros(num_rows, device=DEVICE),
    )


def measure(kind: str, dtype: torch.dtype, num_rows: int, copy_rate: float, options: dict[str, int]) -> dict[str, Any]:
    num_bytes = num_rows * VOCAB * dtype.itemsize
    sets = [make_logits(kind, num_rows, dtype) for _ in range(min(num_sets(num_bytes), 12))]
    rows = make_rows(KINDS[kind], num_rows)
    wanted = torch.full((num_rows,), NUM_TOP, dtype=torch.int32, device=DEVICE) if kind == "logprobs_20" else None
    penalties = make_penalties(num_rows)
    counts = torch.zeros(min(num_rows, 64), VOCAB, dtype=torch.int32, device=DEVICE)

    def ours(logits: Tensor) -> None:
        if kind == "penalties":
            launch_penalise(logits, penalties, counts_PV=counts)
        sampled = launch_sample(logits, rows, num_logprobs_S=wanted, **options)
        if wanted is not None:
            launch_token_logprobs(logits, sampled.token_ids_S, NUM_TOP, num_logprobs_S=wanted, stats=sampled.stats)

    def torch_draw(logits: Tensor) -> Tensor:
        if kind == "greedy":
            return logits.argmax(-1)
        if kind in ("plain", "mixed", "penalties"):
            return torch.softmax(logits.float() / 0.8, -1).multinomial(1)
        probs, order = torch.softmax(logits.float(), -1).sort(descending=True)
        is_out = (probs.cumsum(-1) - probs) >= 0.95
        return order.gather(1, probs.masked_fill_(is_out, 0.0).multinomial(1))

    def flashinfer_draw(logits: Tensor) -> Tensor:
        from flashinfer import sampling

        if kind == "top_k_top_p":
            return sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.95)
        if kind in ("top_p", "flat_top_p"):
            return sampling.top_p_sampling_from_probs(torch.softmax(logits, -1), 0.95)
        if kind == "plain":
            return sampling.sampling_from_logits(logits)
        raise ValueError(f"no equal of {kind}")

    wide = [x.float() for x in sets]
    peers = {
        "torch": [lambda x=x: torch_draw(x) for x in sets],
        "flashinfer": [lambda x=x: flashinfer_draw(x) for x in wide],
    }
    return compare([lambda x=x: ours(x) for x in sets], num_bytes, copy_rate, peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--stats", nargs="+", default=["4096:8"], help="logits of a program:warps, first launch")
    parser.add_argument(
        "--choose", nargs="+", default=["1024:16:32"], help="listed tokens at once:warps:blocks, last launch"
    )
    args = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    measured: list[dict[str, Any]] = []
    for kind, dtype_name in itertools.product(args.kinds, args.dtypes):
        dtype = getattr(torch, dtype_name)
        for stats, choose in itertools.product(args.stats, args.choose):
            tile, warps = (int(part) for part in stats.split(":"))
            list_tile, choose_warps, blocks_tile = (int(part) for part in choose.split(":"))
            options = {"stats_tile": tile, "stats_warps": warps, "list_tile": list_tile, "num_warps": choose_warps}
            options["blocks_tile"] = blocks_tile
            check_draws(kind, dtype, options)
            for num_rows in args.rows:
                row = measure(kind, dtype, num_rows, copy_rate, options)
                name = {"kind": kind, "dtype": dtype_name, "rows": num_rows, "stats": stats, "choose": choose}
                measured.append({**name, **row})
                print(measured[-1], flush=True)
    report("sampling", measured, copy_tb_per_s=round(copy_rate / 1e6, 3), vocab=VOCAB)


if __name__ == "__main__":
    main()
