"""Matrix products of rows that are sorted by expert, each with its expert's matrix."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.dispatch import Slots

STRIPE = 8
"""Rows of a fused [gate; up] matrix stand in turns of so many, gate first: a thread of a tensor core's tile then holds both."""

TILE = 128
"""Rows that an expert's are padded to, at most: a tile of the largest kernel."""


def expert_matmul(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Computes y[s, n] = sum_k x[s, k] w[e N + n, k], e the expert of row s: one chain in ascending k (one leaf: no rank ever
    holds a part of it), rounded once to the dtype of x.

    x [capacity, K] as `gather` lays it out, w [experts * N, K]; a float32 w against a bfloat16 x is a master weight. Rows that
    are nobody's hold anything, in x and in y.

    Gradients: dx one chain over n; dw float32, over the rows of an expert, one leaf for each group of tokens (`slots.bounds`);
    an expert that no token chose has a gradient of +0. Invariant to the routing of other tokens, to `align`, and dw to the
    split of the batch into aligned sets of groups.
    """
    _check(x, w, slots)
    if x.shape[0] != slots.capacity:
        raise UnsupportedError(f"expert_matmul: {x.shape[0]} rows for {slots.capacity} slots")
    if not torch.is_grad_enabled():
        return same_device("experts", x, w).product(x, w.to(x.dtype), slots)
    return _ExpertMatmul.apply(x, w, slots)


def gated_experts(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Computes swiglu(expert_matmul(gather(x, slots), w, slots)) in one call, to the same bits, where no gradient is asked for.

    x [T, K] rows of tokens, w [experts * 2 I, K] in stripes of gate and up -> [capacity, I]."""
    _check(x, w, slots)
    return same_device("experts", x, w).gated(x, w.to(x.dtype), slots)


def _check(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or w.shape[0] % slots.experts:
        raise UnsupportedError(
            f"experts: x {tuple(x.shape)} and w {tuple(w.shape)} must be [rows, K] and [{slots.experts} experts * N, K]"
        )
    if x.dtype not in (torch.float32, torch.bfloat16) or w.dtype not in (x.dtype, torch.float32):
        raise UnsupportedError(
            f"experts: x is {x.dtype} and w is {w.dtype}; both must be float32 or bfloat16, w not narrower"
        )


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        ctx.slots, ctx.w_dtype = slots, gradient_dtype(w)
        return same_device("experts", x, w).product(x, w.to(x.dtype), slots)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        implementation, dy = same_device("experts", x, w), dy.to(x.dtype).contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = implementation.input_gradient(dy, w.to(x.dtype), ctx.slots)
        if ctx.needs_input_grad[1]:
            dw = implementation.weight_gradient(dy, x, ctx.slots).to(ctx.w_dtype)
        return dx, dw, None
