"""Log-probabilities of tokens over the whole vocabulary, with torch's matmuls."""

import torch

from kernels.device import gradient_dtype
from kernels.inexact.matmul import matmul, product
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
) -> torch.Tensor:
    """Computes what `kernels.ops.linear_logprob` does, without its order; logits are float32 too."""
    truncation = Truncation.none() if truncation is None else truncation
    vocabulary = head.shape[0] if vocabulary is None else vocabulary
    if x.is_cuda:
        return _LinearLogprob.apply(x, head, targets, temperature, truncation, vocabulary)
    logits = matmul(x, head, leaves, groups=groups, out_dtype=torch.float32)
    exclude_padding(logits, vocabulary)
    truncate(logits, temperature, truncation)
    return torch.log_softmax(logits / temperature[:, None], 1).gather(1, targets[:, None])[:, 0]


class _LinearLogprob(torch.autograd.Function):
    """On a GPU, with the elementwise kernels of the exact op: exponentials are kept in bfloat16, logits are not. The vocabulary
    is one leaf."""

    @staticmethod
    def forward(ctx, x, head, targets, temperature, truncation, vocabulary):  # type: ignore[no-untyped-def]
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
        ctx.save_for_backward(x, head, targets, temperature, lse)
        ctx.head_dtype = gradient_dtype(head)
        return logprob

    @staticmethod
    def backward(ctx, d_logprob):  # type: ignore[no-untyped-def]
        from kernels.ops.logprob import portable

        x, head, targets, temperature, lse = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # used up, as its values become the gradient of the logits
        vocab = head.shape[0]
        d_logits = portable.logit_gradient(kept, targets, temperature, lse, d_logprob, vocab, 1)[:, :vocab]
        dx = product(d_logits, head.to(x.dtype), x.dtype)
        d_head = product(d_logits.T, x, torch.float32).to(ctx.head_dtype) if ctx.needs_input_grad[1] else None
        return dx, d_head, None, None, None, None
