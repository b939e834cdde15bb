"""What do fp8 weights and an fp8 KV cache cost in accuracy, on a real model and real text?

Every row predicts the same windows of English prose. The base is the model's own weights computed in fp32; rows differ
from it in one thing or two: arithmetic in bf16, projections in fp8 with a scale for each row (as `flash pull --quantize
fp8` stores them), rows of activations in fp8 too (as a GPU multiplies), keys and values in fp8 with a factor of 1 (as
`kv_cache_dtype=fp8` keeps them). `kl` is the mean over tokens of KL(base || row) in nats, `same_top1` how often the
likeliest token is the same. Runs on a CPU, through the references of the kernels.

    python benchmarks/engine/bench_fp8_accuracy.py [--model smollm2:135m] [--windows 24]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pydoc_data.topics
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report

from flashtensors.checkpoint.architecture import ModelConfig, read_model_config
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.quantize import quantize_checkpoint
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.config import load_settings
from flashtensors.kernels.attention.batch import AttentionBatch
from flashtensors.kernels.fp8 import FP8_DTYPE, FP8_MAX
from flashtensors.kernels.fp8_linear import dequantize, round_rows_reference
from flashtensors.memory.arena import Arena
from flashtensors.models import layers
from flashtensors.models.decoder import Decoder
from flashtensors.models.registry import build_model, weight_layout
from flashtensors.text.tokenizer import Tokenizer
from flashtensors.transfer.load_plan import make_load_plan
from flashtensors.transfer.pipeline import load

WINDOW = 256
BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class RoundedLinear:
    """A projection whose rows are rounded to fp8 before it, as a GPU does."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """`x Wᵀ + b` of the rounded rows."""
        rounded_TI, scale_T1 = round_rows_reference(x_TI)
        return F.linear((rounded_TI.float() * scale_T1).to(x_TI.dtype), self.weight_OI, self.bias_O)


class Predictor:
    """A model that gives log-probabilities of whole windows."""

    def __init__(self, folder: Path, dtype: str, *, rounds_rows: bool = False, rounds_cache: bool = False) -> None:
        self.config = read_model_config(folder)
        self.dtype = getattr(torch, dtype)
        self.rounds_cache = rounds_cache
        plan = make_load_plan(weight_layout(self.config), open_checkpoint(folder), dtype)
        self.weight_bytes = plan.num_bytes
        with Arena.allocate(plan.num_bytes) as arena:
            load(plan, arena)
            weights = {name: tensor.clone() for name, tensor in plan.tensors(arena).items()}
        model = build_model(self.config, weights, dtype=self.dtype)
        assert isinstance(model, Decoder), "another kind of model"
        self.model = round_projections(model, weights, self.dtype) if rounds_rows else model
        shape = (WINDOW // BLOCK, self.config.num_key_value_heads, BLOCK, self.config.head_dim)
        num_layers = self.config.num_hidden_layers
        self.caches = [
            (torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype)) for _ in range(num_layers)
        ]

    def log_probs(self, token_ids_T: Tensor) -> Tensor:
        """`[T, V]` in fp32: of the token after each."""
        positions_T = torch.arange(WINDOW)
        batch = AttentionBatch(
            query_starts=torch.tensor([0, WINDOW], dtype=torch.int32),
            kv_lengths=torch.tensor([WINDOW], dtype=torch.int32),
            block_tables=torch.arange(WINDOW // BLOCK, dtype=torch.int32)[None],
            slot_mapping=positions_T,
            spans=((0, WINDOW, WINDOW),),
            works=None,
        )
        with rounded_appends() if self.rounds_cache else contextlib.nullcontext():
            logits_TV = self.model.forward(token_ids_T, positions_T, self.caches, batch, None)
        return logits_TV.float().log_softmax(-1)


def round_projections(model: Decoder, weights: dict[str, Tensor], dtype: torch.dtype) -> Decoder:
    def rounded(name: str) -> RoundedLinear:
        wide = dequantize(weights[f"{name}.weight"], weights[f"{name}.scale"], dtype)
        return RoundedLinear(weight_OI=wide, bias_O=weights.get(f"{name}.bias"))

    def rounded_layer(index: int, layer: layers.DecoderLayer) -> layers.DecoderLayer:
        at, mlp = f"layers.{index}", layer.mlp
        assert isinstance(mlp, layers.GatedMlp), "experts are not quantised"
        attention = replace(layer.attention, qkv=rounded(f"{at}.attention.qkv"), out=rounded(f"{at}.attention.out"))
        mlp = replace(mlp, gate_up=rounded(f"{at}.mlp.gate_up"), down=rounded(f"{at}.mlp.down"))
        return replace(layer, attention=attention, mlp=mlp)

    return replace(model, layers=tuple(rounded_layer(*pair) for pair in enumerate(model.layers)))


@contextlib.contextmanager
def rounded_appends() -> Iterator[None]:
    """Let keys and values pass through fp8 on their way to the cache."""
    append: Callable[..., None] = layers.append_kv

    def through_fp8(values: Tensor) -> Tensor:
        return values.clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE).to(values.dtype)

    def rounded(k_TKD: Tensor, v_TKD: Tensor, *rest: object) -> None:
        append(through_fp8(k_TKD), through_fp8(v_TKD), *rest)

    with mock.patch.object(layers, "append_kv", rounded):
        yield


def read_windows(tokenizer: Tokenizer, config: ModelConfig, count: int) -> list[Tensor]:
    """Token ids of prose from Python's own manual, without its examples and markup."""
    paragraphs = [text for topic in sorted(pydoc_data.topics.topics.values(), key=len) for text in topic.split("\n\n")]
    prose = [" ".join(text.split()) for text in paragraphs if re.match(r"[A-Z][a-z]", text) and len(text) > 200]
    ids = tokenizer.encode("\n\n".join(prose)[: count * WINDOW * 8])
    assert len(ids) >= count * WINDOW, "too little text"
    assert max(ids) < config.vocab_size
    return list(torch.tensor(ids[: count * WINDOW]).split(WINDOW))


def compare(base: Predictor, others: dict[str, Predictor], windows: list[Tensor]) -> list[dict[str, object]]:
    """A row for each predictor, the base first."""
    predictors = {"fp32 (base)": base, **others}
    losses, divergences, same = ({name: 0.0 for name in predictors} for _ in range(3))
    for window_T in windows:
        expected_TV = base.log_probs(window_T)[:-1]
        for name, predictor in predictors.items():
            found_TV = expected_TV if predictor is base else predictor.log_probs(window_T)[:-1]
            losses[name] += float(F.nll_loss(found_TV, window_T[1:], reduction="sum"))
            divergences[name] += float((expected_TV.exp() * (expected_TV - found_TV)).sum())
            same[name] += float((expected_TV.argmax(-1) == found_TV.argmax(-1)).sum())
    count = len(windows) * (WINDOW - 1)
    return [
        {
            "variant": name,
            "perplexity": round(math.exp(losses[name] / count), 4),
            "kl": round(divergences[name] / count, 6),
            "same_top1": round(same[name] / count, 4),
            "weight_mb": round(predictor.weight_bytes / 1e6, 1),
        }
        for name, predictor in predictors.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--windows", type=int, default=24)
    arguments = parser.parse_args()
    catalog = Catalog(load_settings().store)
    record = catalog.find(arguments.model) or pull(catalog, arguments.model)
    with tempfile.TemporaryDirectory() as scratch:
        fp8 = Path(scratch) / "fp8"
        quantize_checkpoint(record.path, fp8)
        base = Predictor(record.path, "float32")
        others = {
            "bf16": Predictor(record.path, "bfloat16"),
            "fp8 KV cache": Predictor(record.path, "float32", rounds_cache=True),
            "fp8 weights": Predictor(fp8, "float32"),
            "fp8 weights and rows": Predictor(fp8, "float32", rounds_rows=True),
            "fp8 weights and rows, bf16": Predictor(fp8, "bfloat16", rounds_rows=True),
            "fp8 weights, rows and KV cache, bf16": Predictor(fp8, "bfloat16", rounds_rows=True, rounds_cache=True),
        }
        windows = read_windows(Tokenizer.from_folder(record.path), base.config, arguments.windows)
        rows = compare(base, others, windows)
    report("fp8-accuracy", rows, model=record.source, tokens=len(windows) * (WINDOW - 1))


if __name__ == "__main__":
    main()
