"""Token embedding, vocabulary-sharded."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device


def embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    *,
    first_id: int = 0,
    groups: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Computes y[t] = weight[ids[t] - first_id] + 0, and +0 where the id belongs to another shard; in `out_dtype`
    (default: that of the weight).

    ids int64 [T]; weight [V, n], the rows first_id .. first_id + V of the vocabulary -> [T, n]. The added zero turns -0
    into +0, so that the tree over shards (one row, the others zero) has the bits of the unsharded gather. The gradient sums
    over the tokens of an id with one leaf for each group of sequences (`groups`: int64 token offsets [G + 1]).

    Invariant to batch, position and shard.
    """
    if ids.dim() != 1 or weight.dim() != 2:
        raise UnsupportedError(
            f"embedding: ids {tuple(ids.shape)} and weight {tuple(weight.shape)} must be [T] and [V, n]"
        )
    if groups is None and weight.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("embedding: the weight needs a gradient, so `groups` must say where each group ends")
    return _Embedding.apply(ids, weight, first_id, groups, out_dtype or weight.dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, first_id, groups, out_dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids, groups)
        ctx.first_id, ctx.vocab, ctx.dtype = first_id, weight.shape[0], gradient_dtype(weight)
        return same_device("embedding", ids, weight).gather(ids, weight, first_id).to(out_dtype) + 0.0

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        ids, groups = ctx.saved_tensors
        dw = same_device("embedding", ids, dy).scatter(dy, ids - ctx.first_id, groups, ctx.vocab)
        return None, dw.to(ctx.dtype), None, None, None
