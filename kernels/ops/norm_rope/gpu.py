"""GPU norm_rope: the operations of rms_norm/gpu.py and rope/gpu.py one by one, on a row that stays in registers."""

import torch
import triton
import triton.language as tl

from kernels.device import UnsupportedError
from kernels.gpu.arithmetic import fold


@triton.jit
def norm_rope_kernel(
    x,
    q_weight,
    k_weight,
    cosine,
    sine,
    position,
    q,
    k,
    rows,
    xt,
    xh,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = r < rows
    t = r // (HEADS + KV_HEADS)
    h = r % (HEADS + KV_HEADS)
    i = tl.arange(0, HALF)
    source = x + (t * xt + h * xh)[:, None] + i[None, :]
    a = tl.load(source, mask=there[:, None], other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=there[:, None], other=0.0).to(tl.float32)
    is_q = (h < HEADS)[:, None]
    if NORM:
        zero = tl.zeros((ROWS, HALF), tl.float32)
        one = tl.full((ROWS,), 1.0, tl.float32)
        squares = tl.fma(a, a, zero) + tl.fma(b, b, zero)  # the first fold of a row of 2 HALF lanes
        inverse = tl.div_rn(one, tl.sqrt_rn(tl.div_rn(fold(squares), one * (2 * HALF)) + eps))[:, None]
        w = tl.where(is_q, tl.load(q_weight + i)[None, :], tl.load(k_weight + i)[None, :]).to(tl.float32)
        v = tl.where(is_q, tl.load(q_weight + HALF + i)[None, :], tl.load(k_weight + HALF + i)[None, :]).to(tl.float32)
        a = (a * inverse * w).to(x.dtype.element_ty).to(tl.float32)
        b = (b * inverse * v).to(x.dtype.element_ty).to(tl.float32)
    at = tl.load(position + t, mask=there, other=0).to(tl.int64)
    c = tl.load(cosine + at[:, None] * HALF + i[None, :], mask=there[:, None], other=0.0)
    turn = tl.load(sine + at[:, None] * HALF + i[None, :], mask=there[:, None], other=0.0)
    low = tl.fma(a, c, -(b * turn)).to(x.dtype.element_ty)
    high = tl.fma(b, c, a * turn).to(x.dtype.element_ty)
    to_q = q + ((t * HEADS + h) * (2 * HALF))[:, None] + i[None, :]
    to_k = k + ((t * KV_HEADS + h - HEADS) * (2 * HALF))[:, None] + i[None, :]
    tl.store(to_q, low, mask=there[:, None] & is_q)
    tl.store(to_q + HALF, high, mask=there[:, None] & is_q)
    tl.store(to_k, low, mask=there[:, None] & (is_q == 0))
    tl.store(to_k + HALF, high, mask=there[:, None] & (is_q == 0))


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, D = x.shape[0], x.shape[1] - kv_heads, x.shape[2]
    if D & (D - 1):
        raise UnsupportedError(f"norm_rope on a GPU: head_dim {D} must be a power of two, as its attention's")
    x = x if x.stride(2) == 1 else x.contiguous()
    q, k = x.new_empty(tokens, heads, D), x.new_empty(tokens, kv_heads, D)
    rows, height = tokens * (heads + kv_heads), max(1, 512 // D)
    if rows:
        norm_rope_kernel[(triton.cdiv(rows, height),)](
            x,
            *((w.contiguous() for w in weights) if weights else (x, x)),
            *(t.contiguous() for t in table),
            positions.contiguous(),
            q,
            k,
            rows,
            x.stride(0),
            x.stride(1),
            eps,
            weights is not None,
            heads,
            kv_heads,
            D // 2,
            height,
            num_warps=1 if rows >= 2048 else 4,
            enable_fp_fusion=False,
        )
    return q, k
