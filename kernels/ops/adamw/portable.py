"""GPU AdamW: the operations of cpu.c one by one, so the bits are the CPU's."""

import torch
import triton
import triton.language as tl

from kernels.device import UnsupportedError
from kernels.gpu.launch import cdiv, launch


@triton.jit
def adamw_kernel(
    w, grad, m, v, n, grad_scale, lr, beta1, beta2, eps, decay, correction1, correction2, BLOCK: tl.constexpr
):
    """Updates n elements of float32 w, m and v in place, each by itself."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    zero = tl.zeros((BLOCK,), tl.float32)
    g = tl.load(grad + i, mask=there, other=0.0) * grad_scale
    first = tl.fma(zero + beta1, tl.load(m + i, mask=there, other=0.0), (1.0 - beta1) * g)
    second = tl.fma(zero + beta2, tl.load(v + i, mask=there, other=0.0), (1.0 - beta2) * (g * g))
    down = tl.sqrt_rn(tl.div_rn(second, zero + correction2)) + eps
    step = tl.div_rn(tl.div_rn(first, zero + correction1), down)
    x = tl.load(w + i, mask=there, other=0.0)
    tl.store(m + i, first, mask=there)
    tl.store(v + i, second, mask=there)
    tl.store(w + i, tl.fma(zero - lr, step, x * (1.0 - lr * decay)), mask=there)


def update(w: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *scalars: float) -> None:
    """Updates contiguous float32 w, m and v in place; UnsupportedError for another dtype or layout."""
    if any(t.dtype != torch.float32 for t in (w, grad, m, v)):
        raise UnsupportedError(f"adamw works on float32 tensors, got {[str(t.dtype) for t in (w, grad, m, v)]}")
    if not (w.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
        raise UnsupportedError("adamw updates in place: the weight and its moments must be contiguous")
    n = w.numel()
    if n:
        numbers = [float(s) for s in scalars]
        launch(adamw_kernel, (cdiv(n, 1024),), w, grad.contiguous(), m, v, n, *numbers, 1024, enable_fp_fusion=False)
