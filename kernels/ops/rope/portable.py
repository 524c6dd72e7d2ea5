"""GPU rope: the operations of cpu.c one by one, so the bits are the CPU's."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, launch, next_power_of_2


@triton.jit
def rope_kernel(
    x,
    cosine,
    sine,
    position,
    y,
    rows,
    xt,
    xh,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (i < HALF)[None, :]
    at = tl.load(position + r // HEADS, mask=r < rows, other=0).to(tl.int64)
    c = tl.load(cosine + at[:, None] * HALF + i[None, :], mask=inside, other=0.0)
    turn = tl.load(sine + at[:, None] * HALF + i[None, :], mask=inside, other=0.0) * sign
    source = x + (r // HEADS * xt + r % HEADS * xh)[:, None] + i[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    to = y + r[:, None] * (2 * HALF) + i[None, :]
    tl.store(to, tl.fma(a, c, -(b * turn)).to(y.dtype.element_ty), mask=inside)
    tl.store(to + HALF, tl.fma(b, c, a * turn).to(y.dtype.element_ty), mask=inside)


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, positions: torch.Tensor, sign: float
) -> torch.Tensor:
    tokens, heads, D = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = x.new_empty(tokens, heads, D)
    rows, width = tokens * heads, next_power_of_2(D // 2)
    height = max(1, 1024 // width)
    if rows:
        launch(
            rope_kernel,
            (cdiv(rows, height),),
            x,
            cosine,
            sine,
            positions,
            y,
            rows,
            x.stride(0),
            x.stride(1),
            float(sign),
            heads,
            D // 2,
            width,
            height,
            enable_fp_fusion=False,
        )
    return y
