"""Matrix products of rows sorted by expert, as torch multiplies: its grouped matmul on a GPU, one matmul an expert on a CPU."""

from itertools import pairwise

import torch

from kernels.device import gradient_dtype
from kernels.inexact.matmul import product
from kernels.ops.dispatch import Slots


def expert_matmul(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Computes y and its gradients as in `kernels.ops.expert_matmul`, without its order."""
    return _ExpertMatmul.apply(x, w, slots)


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        ctx.slots, ctx.w_dtype = slots, gradient_dtype(w)
        return _rows(x, _of_experts(w.to(x.dtype), slots).transpose(1, 2), slots)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        slots, dy = ctx.slots, dy.to(x.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _rows(dy, _of_experts(w.to(x.dtype), slots), slots)
        if ctx.needs_input_grad[1]:
            dw = _weights(_owned(dy, slots), _owned(x, slots), slots).to(ctx.w_dtype).view(w.shape)
        return dx, dw, None


def _of_experts(w: torch.Tensor, slots: Slots) -> torch.Tensor:
    return w.view(slots.experts, -1, w.shape[1])


def _owned(rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Zeros for the rows that are nobody's, which hold anything."""
    return torch.where((slots.token >= 0)[:, None], rows, 0.0)


def _rows(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """x [capacity, K], w [experts, K, N] -> [capacity, N]."""
    if x.is_cuda:
        return torch._grouped_mm(x, w, offs=slots.starts[1:])
    starts = slots.starts.tolist()
    y = x.new_zeros(slots.capacity, w.shape[2])
    for e, (first, end) in enumerate(pairwise(starts)):
        y[first:end] = x[first:end] @ w[e]
    return y


def _weights(dy: torch.Tensor, x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """The sum over the rows of each expert: [experts, N, K]; in float32 but for torch's grouped matmul, which rounds it."""
    if x.is_cuda:
        return torch._grouped_mm(dy.T, x, offs=slots.starts[1:])
    starts = slots.starts.tolist()
    return torch.stack([product(dy[a:b].T, x[a:b], torch.float32) for a, b in pairwise(starts)])
