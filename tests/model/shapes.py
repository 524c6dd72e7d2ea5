"""Small models whose weights leave no part of the decoder idle: norms that are not one, logits of a few units."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kernels.collectives import TreeGroup
from kernels.model import (
    Delta,
    Layout,
    ModelConfig,
    Parameter,
    decoder_layer,
    forward,
    head_logits,
    layer_weights,
    outer_weights,
    position_table,
    served,
)
from kernels.model.experts import Experts
from kernels.model.known import BENCH
from kernels.ops import Mixture
from kernels.ops.norm_rope import RopeScaling

TINY = replace(BENCH, vocab_size=64, max_positions=96, leaves=2)
TINY = replace(TINY, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2, head_dim=16)
EIGHT = replace(TINY, heads=8, kv_heads=8, intermediate_size=128, leaves=8)
"""Can be cut into 1, 2, 4 and 8 shards."""
WIDE = replace(BENCH, hidden_size=512, intermediate_size=1024, layers=2, head_dim=64, max_positions=512, leaves=2)
WIDE = replace(WIDE, vocab_size=1208)  # a last tile of 56 columns
"""Whose kernels on a GPU are those of real widths."""
FP8 = replace(TINY, hidden_size=256, intermediate_size=256, heads=2, kv_heads=2, head_dim=128, format="fp8_block")
"""Whose leaves are one block of 128."""
SHAPES = {
    "tiny": TINY,
    "eight": EIGHT,
    "tied": replace(TINY, tied=True, leaves=4),
    "one leaf, no groups": replace(TINY, kv_heads=4, leaves=1),
    "multi-query": replace(TINY, kv_heads=1, layers=1, leaves=1),
    "wide heads, odd widths": replace(TINY, hidden_size=40, intermediate_size=56, head_dim=48, vocab_size=96, leaves=8),
    "narrow heads": replace(
        TINY, hidden_size=128, heads=2, kv_heads=1, layers=1, rope_theta=1e6, rms_eps=1e-5, leaves=4
    ),
    "three layers": replace(TINY, layers=3, heads=6, kv_heads=2, tied=True),
    "61 ids": replace(TINY, vocab_size=61, kv_heads=4, leaves=4),  # 64 are held, and the last leaf ends in padding
    "37 ids, tied": replace(
        TINY, vocab_size=37, tied=True, kv_heads=4, leaves=8
    ),  # 64 are held: three leaves are padding
    "experts": replace(TINY, model_type="qwen3_moe", experts=Experts(8, 2, 24, True)),
    "experts, dense layers": replace(
        EIGHT, model_type="qwen3_moe", layers=3, experts=Experts(16, 3, 16, False, 1, (1,))
    ),
    "all experts": replace(TINY, model_type="qwen3_moe", layers=1, leaves=1, experts=Experts(4, 4, 16)),
    "qwen2": replace(TINY, model_type="qwen2", tied=True, heads=6, kv_heads=2),
    "llama": replace(TINY, model_type="llama", head_dim=32),
    "llama 3.1": replace(
        TINY, model_type="llama", layers=1, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), rms_eps=1e-5
    ),
    "mistral": replace(TINY, model_type="mistral", head_dim=48),
}


def noise(seed: int, name: str, shape: Sequence[int]) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + zlib.crc32(name.encode())))


def random_weights(config: ModelConfig, seed: int = 0) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Float32: matrices of standard deviation 2 / sqrt(columns), embedding and norms around 1."""
    for p in served(config):
        x = noise(seed, p.name, p.shape)
        x = 2 * x / p.columns**0.5 if p.columns else 1 + 0.2 * x
        yield p, p.from_files(x[: sum(p.stored)])


def prompts(config: ModelConfig, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def packed_logits(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    sequences: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """float32 [tokens of all sequences, V]: the whole model on one rank, as the trainer lays it out."""
    layout = Layout.packed([len(s) for s in sequences], [len(sequences)])
    outer = outer_weights(weights)
    table = position_table(config)

    def run_layer(i: int, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
        return decoder_layer(config, TreeGroup(), layer_weights(weights, i), i, x, delta, layout, None, table)

    ids = torch.tensor([t for s in sequences for t in s])
    logits = head_logits(config, outer, forward(config, TreeGroup(), outer, run_layer, ids, layout, dtype))
    assert (logits[:, config.vocab_size :] == -torch.inf).all()
    return logits[:, : config.vocab_size]
