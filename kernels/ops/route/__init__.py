"""Chooses the experts of each token and weights them."""

import torch

from kernels.device import UnsupportedError, same_device


def route(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k experts of each token with the largest logits, a tie going to the lower id, in ascending id, and their
    weights.

    logits float32 [T, E], unrounded -> (ids int32 [T, k], weights float32 [T, k]). With e_j = exp(logit_j - max):
    weight_i = e_i / sum_j e_j over all experts, or, where `normalize` (`norm_topk_prob`), over the chosen ones. The sum has the
    order of the experts: E, padded with zeros to a power of two, folded by halves. A logit that is NaN is chosen before all
    others and makes every weight NaN.

    Gradient: of the logits, through the weights; the choice has none. Invariant to T and to the position of a row.
    Raises UnsupportedError unless 0 < k <= E.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise UnsupportedError(f"route: logits {logits.dtype} {tuple(logits.shape)} must be float32 [tokens, experts]")
    if not 0 < k <= logits.shape[1]:
        raise UnsupportedError(f"route: {k} experts of {logits.shape[1]} for each token")
    return _Route.apply(logits, k, normalize)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, k, normalize):  # type: ignore[no-untyped-def]
        ids, weights = same_device("route", logits).forward(logits.contiguous(), k, normalize)
        ctx.save_for_backward(logits, ids, weights)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(ids)
        return ids, weights

    @staticmethod
    def backward(ctx, _, d_weights):  # type: ignore[no-untyped-def]
        logits, ids, weights = ctx.saved_tensors
        implementation = same_device("route", logits, d_weights)
        return implementation.backward(logits, ids, weights, d_weights.contiguous(), ctx.normalize), None, None
