"""Matrix product of block-scaled FP8 on the tree."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.matmul import input_gradient, weight_gradient
from kernels.ops.quantize import BLOCK, Quantized, dequantize_blocks, quantize_blocks, quantize_rows
from kernels.tree import leaf_bounds


def matmul_fp8(
    x: torch.Tensor,
    w: torch.Tensor | Quantized,
    leaves: int,
    *,
    groups: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    power_of_two: bool = False,
) -> torch.Tensor:
    """Computes y[m, n] = sum_k X[m, k] W[n, k] of the quantized X = quantize_rows(x) and W = quantize_blocks(w), summed on the
    tree of `leaves` leaves over k.

    x [M, K] bfloat16, w [N, K] bfloat16 or a float32 master, or quantized already; N and each leaf of K are whole blocks of
    128. y [M, N] in `out_dtype`, float32 or bfloat16 (default), rounded once at the root. With values q and scales s, in a
    leaf, for each block b of 128 columns from the left, in float32:

        d   = sum of qx[m, k] qw[n, k] over the block, from zero      products are exact; the order inside is the device's own
        acc = fma(d, sx[m, b] * sw[n / 128, b], acc)                  acc from zero; the product of the scales is rounded

    and leaves meet as in `kernels.ops.matmul`: a row-parallel shard passes its slice of K with leaves / size and
    out_dtype=float32. Order inside a block: on a CPU one fma per k, ascending; on a GPU the tensor core's.

    Gradients are straight-through, in bfloat16: dx[m, k] = sum_n dy[m, n] D[n, k] on the tree of `leaves` leaves over n, D the
    dequantized W; dw[n, k] = sum_m dy[m, n] x[m, k], of x as it was given, one leaf for each group of sequences (`groups`:
    int64 token offsets [G + 1]; required where w needs a gradient); float32 for a master.

    Invariant as `kernels.ops.matmul` is, to slices of N and of K in whole blocks.

    Raises TreeError where `leaves` does not divide K (or N, for dx); UnsupportedError for other dtypes or shapes.
    """
    _check(x, w, leaves, out_dtype or x.dtype)
    if not torch.is_grad_enabled():
        held = w if isinstance(w, Quantized) else quantize_blocks(w, power_of_two)
        return _forward(x, held, leaves, out_dtype or x.dtype, power_of_two)  # an autograd node costs 6 us on the host
    if isinstance(w, Quantized):
        return _MatmulQuantized.apply(x, w.values, w.scales, leaves, out_dtype or x.dtype, power_of_two)
    if groups is None and w.requires_grad:
        raise UnsupportedError(
            "matmul_fp8: w needs a gradient, so `groups` must say where each group of sequences ends"
        )
    return _Matmul.apply(x, w, leaves, groups, out_dtype or x.dtype, power_of_two)


def _check(x: torch.Tensor, w: torch.Tensor | Quantized, leaves: int, out_dtype: torch.dtype) -> None:
    if x.dim() != 2 or len(w.shape) != 2 or x.shape[1] != w.shape[1]:
        raise UnsupportedError(f"matmul_fp8: x {tuple(x.shape)} and w {tuple(w.shape)} must be [M, K] and [N, K]")
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"matmul_fp8: the output is {out_dtype}; it must be float32 or bfloat16")
    leaf = leaf_bounds(x.shape[1], leaves, "contraction length")[1]
    if leaf % BLOCK:
        raise UnsupportedError(
            f"matmul_fp8: {x.shape[1]} columns in {leaves} leaves are {leaf} each, which is not whole blocks of {BLOCK}"
        )


def _forward(x: torch.Tensor, w: Quantized, leaves: int, out_dtype: torch.dtype, power_of_two: bool) -> torch.Tensor:
    bounds = leaf_bounds(x.shape[1], leaves, "contraction length")
    rows = quantize_rows(x, power_of_two)
    implementation = same_device("matmul_fp8", rows.values, rows.scales, w.values, w.scales)
    return implementation.contract(rows.values, rows.scales, w.values, w.scales, bounds, out_dtype)  # type: ignore[no-any-return]


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, leaves, groups, out_dtype, power_of_two):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w, groups)
        ctx.leaves, ctx.power_of_two, ctx.w_dtype = leaves, power_of_two, gradient_dtype(w)
        return _forward(x, quantize_blocks(w, power_of_two), leaves, out_dtype, power_of_two)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w, groups = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            held = dequantize_blocks(quantize_blocks(w, ctx.power_of_two))
            dx = input_gradient(dy.to(x.dtype), held, ctx.leaves)
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(dy.to(x.dtype), x, groups).to(ctx.w_dtype)
        return dx, dw, None, None, None, None


class _MatmulQuantized(torch.autograd.Function):
    """The same of a weight that is quantized already, and has no gradient."""

    @staticmethod
    def forward(ctx, x, values, scales, leaves, out_dtype, power_of_two):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, scales)
        ctx.leaves, ctx.dtype = leaves, x.dtype
        return _forward(x, Quantized(values, scales), leaves, out_dtype, power_of_two)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        held = dequantize_blocks(Quantized(*ctx.saved_tensors))
        return input_gradient(dy.to(ctx.dtype), held, ctx.leaves), None, None, None, None, None
