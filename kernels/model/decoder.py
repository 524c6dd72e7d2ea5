"""The decoder of Qwen3, Qwen2.5, Llama 3 and Mistral: the last op. Where a cast stands and when a residual is added decide
bits as a tile order does.

Differs from Hugging Face's in rounding only: a norm rounds once (after the weight), a bias is added before the product is
rounded, logits stay float32, and the projections are fused ([q; k; v] and [gate; up] by rows, which changes no bit: output
columns are independent).

Activations, the residual stream among them, are rounded to the model's dtype after every op; sums inside an op are float32 on
the tree. Weights are in that dtype or are float32 masters, which every op rounds to it first: the same bits.

`config.ops` says whose matmul and attention run: all of the above is about `numerics=exact`. A layer is the blocks that
`kernels.model.blocks` names for it.
"""

from collections.abc import Callable
from typing import Any

import torch

from kernels.collectives import TreeGroup
from kernels.model.blocks import (
    Delta,
    Pass,
    Recompute,
    Routed,
    Weights,
    add_and_norm,
    blocks_of,
    no_recompute,
    not_told,
)
from kernels.model.config import ModelConfig
from kernels.model.layout import Layout, PagedCache
from kernels.model.parameters import OuterWeights, served
from kernels.ops import Mixture, Truncation, embedding, exclude_padding, rope_table
from kernels.tree import WHOLE, Shard


def position_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what rope reads: (cosine, sine), float32 [max_positions, head_dim / 2] on the CPU."""
    return rope_table(config.max_positions, config.head_dim, config.rope_theta, config.rope_scaling)


def decoder_layer(
    config: ModelConfig,
    group: TreeGroup,
    weights: Weights,
    index: int,
    x: torch.Tensor,
    delta: Delta,
    layout: Layout,
    cache: PagedCache | None,
    table: tuple[torch.Tensor, torch.Tensor],
    recompute: Recompute = no_recompute,
    routed: Routed = not_told,
) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
    """Runs the blocks of layer `index`: the residual stream, in and out, as x [T, H] and a delta that the next norm adds to it
    (None before the first layer).

    `cache`: where keys and values are kept; None in training, where they are those of the same tokens. `table` from
    position_table. The last layer returns what `layout` wants: [R, H]. Invariant to layout and to the size of `group`."""
    run = Pass(config, group, index, layout, cache, table, recompute, routed)
    for block in blocks_of(config, index):
        x, delta = block.forward(run, weights, x, delta)
    assert delta is not None
    return x, delta


def forward(
    config: ModelConfig,
    group: TreeGroup,
    outer: OuterWeights,
    run_layer: Callable[[int, torch.Tensor, Delta], tuple[torch.Tensor, torch.Tensor | Mixture]],
    token_ids: torch.Tensor,
    layout: Layout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Maps token_ids int64 [T] to final hidden states [T, H] (of the tokens that `layout` wants: [R, H]) in `dtype`,
    the model's.

    `run_layer(i, x, delta)` is `decoder_layer` on layer i, by whatever means the caller holds its weights (a list; FSDP
    modules)."""
    first = group.shard.rank * outer.embed.shape[0]
    rows = embedding(token_ids, outer.embed, first_id=first, groups=layout.groups, out_dtype=dtype)
    x = group.all_reduce(rows.float(), dtype)
    config.ops.seen(-1, "embedding", x)
    delta: Delta = None
    for i in range(config.layers):
        x, delta = run_layer(i, x, delta)
    hidden = add_and_norm(x, delta, outer.norm, config.rms_eps, layout)[0]
    config.ops.seen(config.layers, "norm", hidden)
    return hidden


def head_logits(config: ModelConfig, outer: OuterWeights, hidden: torch.Tensor, shard: Shard = WHOLE) -> torch.Tensor:
    """Returns float32 logits [R, vocab_rows / S] of this shard's part of the vocabulary: unrounded roots of the matmul
    tree, and
    -inf for what is no token."""
    logits = config.ops.matmul(hidden, outer.head, config.leaves, out_dtype=torch.float32)
    exclude_padding(logits, config.vocab_size, shard.rank * logits.shape[1])
    return logits


def token_logprobs(
    config: ModelConfig,
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    groups: torch.Tensor | None = None,
    truncation: Truncation | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Returns the log-probs float32 [R] of `targets` [R] given final hidden states [R, H], with their gradient: what a sampler
    computes from `head_logits`, whoever holds which part of them. `groups`, `truncation`: as of
    `kernels.ops.linear_logprob`; `low_rank`: A and B of the head's adapter, where it has one."""
    of_rows: tuple[Any, ...] = (targets, temperature, config.leaves, groups, truncation, config.vocab_size)
    if low_rank:
        assert config.adapter is not None
        of = next(p for p in served(config) if p.name == "head")
        of_rows = (*of_rows, (*low_rank, config.adapter.scale(of)))
    return config.ops.linear_logprob(hidden, head, *of_rows)


def token_values(
    config: ModelConfig, hidden: torch.Tensor, head: torch.Tensor, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns what a value head [value_rows, H] says of final hidden states [R, H], float32 [R], with its gradient: the product
    with its first row, an unrounded root of the matmul tree. `groups`: as of `kernels.ops.matmul`."""
    return config.ops.matmul(hidden, head, config.leaves, groups=groups, out_dtype=torch.float32)[:, 0].clone()
