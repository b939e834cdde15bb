"""Random tiny models of transformers, and ours made from their weights through the weight layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from flashtensors.checkpoint.architecture import ModelConfig, parse_config
from flashtensors.kernels.attention.batch import AttentionBatch
from flashtensors.models.registry import Model, build_model, weight_layout

if TYPE_CHECKING:
    from flashtensors.kernels.attention.work import AttentionWork

BLOCK_SIZE = 16


def make_oracle(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """A random model whose norms and biases, too, differ from their neutral values."""
    torch.manual_seed(0)
    oracle = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in oracle.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
        else:  # small embeddings: else a tied, scaled one (Gemma) repeats its token for ever
            deviation = 0.03 if "embed_tokens" in name else 1.5 * parameter.shape[1] ** -0.5
            parameter.data = torch.randn_like(parameter) * deviation
    return oracle.to(dtype=dtype, device=device)


def make_config(oracle: PreTrainedModel) -> ModelConfig:
    """Its configuration, as our parser reads it from what transformers writes to `config.json`."""
    return parse_config(oracle.config.to_dict(), None, where="config.json")


def fused_weights(oracle: PreTrainedModel, config: ModelConfig) -> dict[str, Tensor]:
    """Its weights, joined as the layout says; every tensor of the checkpoint must be asked for."""
    checkpoint = revert_weight_conversion(oracle, dict(oracle.state_dict()))  # to the names and shapes of files
    if config.tie_word_embeddings:
        del checkpoint["lm_head.weight"]
    weights = {}
    for weight in weight_layout(config).weights:
        sources = [checkpoint.pop(name) for name in weight.sources]
        assert [tuple(source.shape) for source in sources] == list(weight.source_shapes)
        weights[weight.name] = torch.cat(sources)
        assert weights[weight.name].shape == weight.shape
    assert not checkpoint, f"the layout leaves out {sorted(checkpoint)}"
    return weights


@dataclass
class PagedModel:
    """A model with caches of NaN and block tables in random order, stepped as a runner would."""

    model: Model
    config: ModelConfig
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    blocks_per_sequence: int = 8
    is_fused: bool = False
    """Attend with kernels over planned work, as in a captured graph."""
    lengths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, num_blocks = self.config, 8 * self.blocks_per_sequence
        shape = (num_blocks, config.num_key_value_heads, BLOCK_SIZE, config.head_dim)
        self.kv_caches = [
            tuple(torch.full(shape, float("nan"), dtype=self.dtype, device=self.device) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(-1, self.blocks_per_sequence).int()

    def step(self, spans: dict[int, list[int]], sample_rows: list[int] | None = None) -> Tensor:
        """Feed each sequence its tokens; logits of all rows, or of `sample_rows`."""
        tokens, positions, slots, starts, host_spans = [], [], [], [0], []
        for sequence, new in spans.items():
            past = self.lengths.get(sequence, 0)
            self.lengths[sequence] = past + len(new)
            host_spans.append((len(tokens), len(new), past + len(new)))
            for position, token in enumerate(new, start=past):
                block, offset = divmod(position, BLOCK_SIZE)
                slots.append(int(self.tables[sequence, block]) * BLOCK_SIZE + offset)
                positions.append(position)
                tokens.append(token)
            starts.append(len(tokens))
        batch = AttentionBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            kv_lengths=torch.tensor([span[2] for span in host_spans], dtype=torch.int32, device=self.device),
            block_tables=self.tables[list(spans)].to(self.device),
            slot_mapping=torch.tensor(slots, device=self.device),
            spans=tuple(host_spans),
            works=self._plan_works() if self.is_fused else None,
        )
        for work in (batch.works or {}).values():
            work.plan(batch.query_starts, batch.kv_lengths)
        rows = list(range(len(tokens))) if sample_rows is None else sample_rows
        return self.model.forward(
            torch.tensor(tokens, device=self.device),
            torch.tensor(positions, device=self.device),
            self.kv_caches,  # pyright: ignore
            batch,
            torch.tensor(rows, dtype=torch.int64, device=self.device),
            rotations=self.model.make_rotations(256) if self.is_fused else None,
        )

    def _plan_works(self) -> dict[int | None, AttentionWork]:
        from flashtensors.kernels.attention.work import AttentionWork

        config = self.config
        return {
            window: AttentionWork(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                max_seqs=8,
                max_tokens=256,
                device=self.device,
                dtype=self.dtype,
                sliding_window=window,
            )
            for window in {None, config.sliding_window}
        }


def make_paged(
    oracle: PreTrainedModel, *, dtype: torch.dtype = torch.float32, device: str = "cpu", is_fused: bool = False
) -> PagedModel:
    """Our model with the oracle's weights."""
    config = make_config(oracle)
    model = build_model(config, fused_weights(oracle, config), dtype=dtype)
    return PagedModel(model, config, dtype=dtype, device=device, is_fused=is_fused)
