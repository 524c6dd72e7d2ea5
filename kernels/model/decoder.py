"""The decoder of Qwen3, Qwen2.5, Llama 3 and Mistral: the last op. Where a cast stands and when a residual is added decide
bits as a tile order does.

Differs from Hugging Face's in rounding only: a norm rounds once (after the weight), a bias is added before the product is
rounded, logits stay float32, and the projections are fused ([q; k; v] and [gate; up] by rows, which changes no bit: output
columns are independent).

Activations, the residual stream among them, are rounded to the model's dtype after every op; sums inside an op are float32 on
the tree. Weights are in that dtype or are float32 masters, which every op rounds to it first: the same bits.

`config.ops` says whose matmul and attention run: all of the above is about `numerics=exact`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.collectives import TreeGroup
from kernels.model.config import ModelConfig
from kernels.model.layout import Layout, PagedCache, attend
from kernels.ops import (
    Truncation,
    add_bias,
    add_rms_norm,
    embedding,
    exclude_padding,
    norm_rope,
    rms_norm,
    rope_table,
    swiglu,
)
from kernels.tree import WHOLE, Shard


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights on one shard of size S; H hidden, D head_dim, Q / K heads and kv heads of the whole model."""

    attn_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [(Q + 2 K) D / S, H], query rows, then key rows, then value rows
    qkv_bias: torch.Tensor | None  # [(Q + 2 K) D / S]; None in families without one
    q_norm: torch.Tensor | None  # [D]; likewise
    k_norm: torch.Tensor | None  # [D]
    o: torch.Tensor  # [H, Q D / S]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 I / S, H], gate rows, then up rows
    down: torch.Tensor  # [H, I / S]


@dataclass(frozen=True)
class OuterWeights:
    """What stands outside the layers, on one shard."""

    embed: torch.Tensor  # [V / S, H]; V the rows that are held (`ModelConfig.vocab_rows`)
    norm: torch.Tensor  # [H]
    head: torch.Tensor  # [V / S, H]


Again = Callable[..., None]
"""again(outputs, function, *inputs): `outputs` are function(*inputs), which is cheap: a trainer that is short of memory may
forget them, and compute them again, to the same bits, when it needs them."""


def remembered(*_: object) -> None:
    """The `Again` of whoever keeps everything, or nothing."""


def position_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What rope reads: (cosine, sine), float32 [max_positions, head_dim / 2] on the CPU."""
    return rope_table(config.max_positions, config.head_dim, config.rope_theta, config.rope_scaling)


def decoder_layer(
    config: ModelConfig,
    group: TreeGroup,
    weights: LayerWeights,
    index: int,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    layout: Layout,
    cache: PagedCache | None,
    table: tuple[torch.Tensor, torch.Tensor],
    again: Again = remembered,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream, in and out, as x [T, H] and a delta [T, H] that the next norm adds to it (None before the first
    layer). `cache`: where keys and values are kept; None in training, where they are those of the same tokens. `table` from
    position_table. The last layer returns what `layout` wants: [R, H]. Invariant to layout and to the size of `group`."""
    size, groups = group.shard.size, layout.groups
    heads, kv_heads, D = config.heads // size, config.kv_heads // size, config.head_dim
    matmul, attention = config.ops.matmul, config.ops.attention

    def row_parallel(y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        unrounded = torch.float32 if size > 1 else x.dtype  # on one rank the kernel rounds
        partial = matmul(y, w, config.leaves // size, groups=groups, out_dtype=unrounded)
        return group.all_reduce(partial, x.dtype)

    h, x = _add_and_norm(x, delta, weights.attn_norm, config, layout)
    again((h,), _norm, x, weights.attn_norm, config.rms_eps)
    if weights.qkv_bias is None:
        qkv = matmul(h, weights.qkv, config.leaves, groups=groups)
    else:
        root = matmul(h, weights.qkv, config.leaves, groups=groups, out_dtype=torch.float32)
        qkv = add_bias(root, weights.qkv_bias, x.dtype, groups=groups)
    qkv = qkv.view(-1, heads + 2 * kv_heads, D)
    norms = None if weights.q_norm is None or weights.k_norm is None else (weights.q_norm, weights.k_norm)
    qk, v = qkv.split((heads + kv_heads, kv_heads), 1)
    turned = (qk, norms, config.rms_eps, table, layout.positions, kv_heads)
    q, k = norm_rope(*turned, groups=groups)
    again((q, k), norm_rope, *turned)
    held = cache.keep(index, (k, v), layout) if cache else (k, v)
    if layout.wanted is not None and index == config.layers - 1:  # of the others only keys and values are read
        x, q, layout = x[layout.wanted], q[layout.wanted], layout.ends(layout.wanted)
    a = attend(attention, q, (k, v), held, layout, math.sqrt(1 / D))
    delta = row_parallel(a.reshape(-1, heads * D), weights.o)

    h, x = _add_and_norm(x, delta, weights.mlp_norm, config, layout)
    again((h,), _norm, x, weights.mlp_norm, config.rms_eps)
    gate_up = matmul(h, weights.gate_up, config.leaves, groups=groups)
    y = swiglu(gate_up)
    again((y,), _gated, gate_up)
    del gate_up  # the largest activation: a server has no use for it any more
    return x, row_parallel(y, weights.down)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor]:
    return (rms_norm(x, weight, eps),)


def _gated(gate_up: torch.Tensor) -> tuple[torch.Tensor]:
    return (swiglu(gate_up),)


def _add_and_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, config: ModelConfig, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm, residual stream)."""
    if delta is None:
        return rms_norm(x, weight, config.rms_eps, groups=layout.groups), x
    return add_rms_norm(x, delta, weight, config.rms_eps, groups=layout.groups)


def forward(
    config: ModelConfig,
    group: TreeGroup,
    outer: OuterWeights,
    run_layer: Callable[[int, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]],
    token_ids: torch.Tensor,
    layout: Layout,
    dtype: torch.dtype,
) -> torch.Tensor:
    """token_ids int64 [T] -> final hidden states [T, H] (of the tokens that `layout` wants: [R, H]) in `dtype`, the model's.
    `run_layer(i, x, delta)` is `decoder_layer` on layer i, by whatever means the caller holds its weights (a list; FSDP
    modules)."""
    first = group.shard.rank * outer.embed.shape[0]
    rows = embedding(token_ids, outer.embed, first_id=first, groups=layout.groups, out_dtype=dtype)
    x = group.all_reduce(rows.float(), dtype)
    delta = None
    for i in range(config.layers):
        x, delta = run_layer(i, x, delta)
    return _add_and_norm(x, delta, outer.norm, config, layout)[0]


def head_logits(config: ModelConfig, outer: OuterWeights, hidden: torch.Tensor, shard: Shard = WHOLE) -> torch.Tensor:
    """float32 logits [R, vocab_rows / S] of this shard's part of the vocabulary: unrounded roots of the matmul tree, and -inf
    for what is no token."""
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
) -> torch.Tensor:
    """float32 [R]: log-probs of `targets` [R] given final hidden states [R, H], with their gradient: what a sampler computes
    from `head_logits`, whoever holds which part of them. `groups`, `truncation`: as of `kernels.ops.linear_logprob`."""
    of_rows = (targets, temperature, config.leaves, groups, truncation, config.vocab_size)
    return config.ops.linear_logprob(hidden, head, *of_rows)
