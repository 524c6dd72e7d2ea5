"""GPU swiglu: the operations of cpu.c one by one, so the bits are the CPU's."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import exp_f32
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done


@triton.jit
def silu_times(gate, up):
    """Computes silu(gate) up of two float32."""
    return tl.div_rn(gate, 1.0 + exp_f32(-gate)) * up


@triton.jit
def halves(x, r, i, n, STRIPE: tl.constexpr):
    """Reads columns i of one row's gate and up, as float32: (where gate's stand in x, gate, up). Up's are a stripe further."""
    j = r * 2 * n + i + i // STRIPE * STRIPE
    gate = tl.load(x + j, mask=i < n, other=0.0).to(tl.float32)
    return j, gate, tl.load(x + j + STRIPE, mask=i < n, other=0.0).to(tl.float32)


@early
@triton.jit
def forward_kernel(x, y, n, STRIPE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes silu(gate) up of BLOCK columns of one row."""
    previous_done()
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, gate, up = halves(x, r, i, n, STRIPE)
    tl.store(y + r * n + i, silu_times(gate, up).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def backward_kernel(x, d_y, d_x, n, STRIPE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the gradients to gate and up of BLOCK columns of one row."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    j, gate, up = halves(x, r, i, n, STRIPE)
    g = tl.load(d_y + r * n + i, mask=inside, other=0.0).to(tl.float32)
    one = tl.full((BLOCK,), 1.0, tl.float32)
    sigma = tl.div_rn(one, 1.0 + exp_f32(-gate))
    d_gate = g * up * sigma * tl.fma(gate, 1.0 - sigma, one)
    tl.store(d_x + j, d_gate.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_x + j + STRIPE, (g * (gate * sigma)).to(d_x.dtype.element_ty), mask=inside)


def forward(x: torch.Tensor, stripe: int) -> torch.Tensor:
    """Computes silu(gate) up in float32, rounded once: x [T, 2 N], gate and up in turns of `stripe` columns -> [T, N]."""
    rows, n = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, n)
    if rows:
        run(forward_kernel, (rows, cdiv(n, 1024)), x.contiguous(), y, n, stripe, 1024, enable_fp_fusion=False)
    return y


def backward(x: torch.Tensor, dy: torch.Tensor, stripe: int) -> torch.Tensor:
    """Computes the gradient to x [T, 2 N] from dy [T, N], in x's dtype."""
    rows, n = x.shape[0], x.shape[1] // 2
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows:
        grid = rows, cdiv(n, 1024)
        run(backward_kernel, grid, x.contiguous(), dy.contiguous(), dx, n, stripe, 1024, enable_fp_fusion=False)
    return dx
