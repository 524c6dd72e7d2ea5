"""Log-probabilities of tokens over the whole vocabulary, with torch's matmuls."""

import torch

from kernels.device import gradient_dtype
from kernels.inexact.matmul import matmul, product
from kernels.ops.low_rank import LowRank, low_rank_gradients_by_leaf, with_low_rank_gradient
from kernels.ops.truncate import Truncation, exclude_padding, truncate

ROWS = 2048
"""Rows whose float32 logits are in memory at once, on a GPU."""


def linear_logprob(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    groups: torch.Tensor | None = None,
    truncation: Truncation | None = None,
    vocabulary: int | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """Computes what `kernels.ops.linear_logprob` does, without its order; logits are float32 too."""
    truncation = Truncation.none() if truncation is None else truncation
    vocabulary = head.shape[0] if vocabulary is None else vocabulary
    if x.is_cuda:
        a, b, scale = low_rank or (None, None, 0.0)
        return _LinearLogprob.apply(x, head, a, b, scale, targets, temperature, truncation, vocabulary, groups)
    logits = matmul(x, head, leaves, groups=groups, out_dtype=torch.float32)
    if low_rank and torch.is_grad_enabled():
        a, b, scale = low_rank
        assert groups is not None
        logits = with_low_rank_gradient(logits, x, a, b, scale, (len(b),), leaves, groups)
    exclude_padding(logits, vocabulary)
    truncate(logits, temperature, truncation)
    return torch.log_softmax(logits / temperature[:, None], 1).gather(1, targets[:, None])[:, 0]


class _LinearLogprob(torch.autograd.Function):
    """On a GPU, with the elementwise kernels of the exact op: exponentials are kept in bfloat16, logits are not. The vocabulary
    is one leaf."""

    @staticmethod
    def forward(ctx, x, head, a, b, scale, targets, temperature, truncation, vocabulary, groups):  # type: ignore[no-untyped-def]
        from kernels.ops.logprob import portable  # triton, which a machine without a GPU may lack

        vocab = head.shape[0]
        values = x.new_empty(len(x), -(-vocab // portable.TILE) * portable.TILE)
        tiles = [temperature.new_empty(0, values.shape[1] // portable.TILE, 2)]
        picked = [temperature.new_empty(0)]
        weight = head.to(x.dtype).T
        for first in range(0, len(x), ROWS):
            rows = slice(first, first + ROWS)
            logits = product(x[rows], weight, torch.float32)
            exclude_padding(logits, vocabulary)
            if len(truncation):
                truncate(logits, temperature[rows], truncation.take(first, first + ROWS))
            tiles.append(portable.tiles_of(logits, temperature[rows], 1, values[rows]))
            picked.append(logits.gather(1, targets[rows, None])[:, 0])
        ctx.kept = portable.Exponentials(values, torch.cat(tiles), torch.cat(picked))
        logprob, lse = portable.logprob(portable.merged(ctx.kept.nodes, 1), ctx.kept.picked, temperature)
        ctx.save_for_backward(x, head, a, b, targets, temperature, lse, groups)
        ctx.head_dtype, ctx.scale = gradient_dtype(head), scale
        return logprob

    @staticmethod
    def backward(ctx, d_logprob):  # type: ignore[no-untyped-def]
        from kernels.ops.logprob import portable

        x, head, a, b, targets, temperature, lse, groups = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # used up, as its values become the gradient of the logits
        vocab = head.shape[0]
        d_logits = portable.logit_gradient(kept, targets, temperature, lse, d_logprob, vocab, 1)[:, :vocab]
        dx = product(d_logits, head.to(x.dtype), x.dtype)
        d_head = product(d_logits.T, x, torch.float32).to(ctx.head_dtype) if ctx.needs_input_grad[1] else None
        low_rank = (None, None) if a is None else low_rank_gradients_by_leaf([d_logits], x, a, b, ctx.scale, groups)
        return dx, d_head, *low_rank, *[None] * 6
