"""Log-probabilities over a vocabulary that may be sharded."""

from collections.abc import Sequence

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.low_rank import LowRank, low_rank_gradients_by_leaf
from kernels.ops.truncate import Truncation


def vocab_nodes(logits: torch.Tensor, temperature: torch.Tensor, leaves: int) -> torch.Tensor:
    """Returns the leaves of a log-sum-exp: (max z, sum e^(z - max)) of each equal part of the vocabulary, z = logits /
    temperature.

    logits float32 [R, V], temperature float32 [R] -> float32 [R, leaves, 2]. A shard holds consecutive leaves; the nodes
    of all shards, side by side in rank order, go to `vocab_logprob`.
    """
    if logits.shape[1] % leaves:
        raise UnsupportedError(f"log-prob: a vocabulary of {logits.shape[1]} is not divisible by {leaves} leaves")
    return same_device("logprob", logits, temperature).nodes(logits, temperature, leaves)


def vocab_logprob(
    nodes: torch.Tensor, picked: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (log-probability, log-sum-exp) of the token whose logit is `picked`: nodes merge up the tree to (m, s), then
    (picked / temperature - m) - ln s, and m + ln s.

    nodes float32 [R, leaves, 2], picked and temperature float32 [R] -> two float32 [R].
    """
    return same_device("logprob", nodes, picked).logprob(nodes, picked, temperature)


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
    """Computes log softmax(x head^T / temperature)[target] for each row, with its gradient to x and head.

    x [R, n], head [V, n] (a float32 head against a bfloat16 x is a master weight, as in matmul), targets int64 [R],
    temperature float32 [R] -> float32 [R]. The logits are float32 roots of the matmul tree, never rounded to bfloat16: the
    same numbers the sampler draws from. `groups`: int64 row offsets [G + 1]. Rows of `truncation` take the softmax over the
    tokens that their filters keep (a target that is not kept: -inf); which these are is a constant to the gradient. Rows of the
    head from `vocabulary` on (default V) stand for no token, as in `exclude_padding`, and have a gradient of zeros. `low_rank`:
    what was merged into the head, which then has no gradient itself; a and b have theirs (`with_low_rank_gradient`).

    Invariant to the number and position of rows; equal to the vocabulary-sharded path above.
    """
    if head.shape[0] % leaves:
        raise UnsupportedError(f"log-prob: a vocabulary of {head.shape[0]} is not divisible by {leaves} leaves")
    vocabulary = head.shape[0] if vocabulary is None else vocabulary
    if not 0 < vocabulary <= head.shape[0]:
        raise UnsupportedError(f"log-prob: a vocabulary of {vocabulary} in a head of {head.shape[0]} rows")
    learned = head.requires_grad or low_rank is not None
    if groups is None and learned and torch.is_grad_enabled():
        raise UnsupportedError("log-prob: the head needs a gradient, so `groups` must say where each group ends")
    keep = torch.is_grad_enabled() and (x.requires_grad or learned)
    truncation = truncation if truncation is not None and len(truncation) else None
    a, b, scale = low_rank or (None, None, 0.0)
    return _LinearLogprob.apply(
        x, head, a, b, scale, targets, temperature, leaves, groups, keep, truncation, vocabulary
    )


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, head, a, b, scale, targets, temperature, leaves, groups, keep, truncation, vocabulary):  # type: ignore[no-untyped-def]
        op = same_device("logprob", x, head)
        of_rows = (targets, temperature, leaves, keep, truncation, vocabulary)
        logprob, lse, ctx.kept = op.linear(x, head.to(x.dtype), *of_rows)
        ctx.save_for_backward(x, head, a, b, targets, temperature, lse, groups)
        ctx.leaves, ctx.truncation, ctx.head_dtype = leaves, truncation, gradient_dtype(head)
        ctx.vocabulary, ctx.scale = vocabulary, scale
        ctx.low_rank_dtypes = None if a is None else (gradient_dtype(a), gradient_dtype(b))
        return logprob

    @staticmethod
    def backward(ctx, d_logprob):  # type: ignore[no-untyped-def]
        x, head, a, b, targets, temperature, lse, groups = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # used up: a second backward through this graph computes it again
        of_low_rank: list[torch.Tensor | None] = [None, None]

        def low_rank(d_logits: Sequence[torch.Tensor]) -> None:
            both = low_rank_gradients_by_leaf(d_logits, x, a, b, ctx.scale, groups)
            of_low_rank[:] = [d.to(dtype) for d, dtype in zip(both, ctx.low_rank_dtypes, strict=True)]

        dx, d_head = same_device("logprob", x, head).backward(
            x,
            head.to(x.dtype),
            targets,
            temperature,
            lse,
            d_logprob,
            ctx.leaves,
            groups.contiguous() if ctx.needs_input_grad[1] else None,
            kept,
            ctx.truncation,
            ctx.vocabulary,
            None if a is None else low_rank,
        )
        return dx, None if d_head is None else d_head.to(ctx.head_dtype), *of_low_rank, *[None] * 8
