"""GPU norm_rope: the operations of rms_norm/gpu.py and rope/gpu.py one by one, on a row that stays in registers."""

import torch
import triton
import triton.language as tl

from kernels.device import UnsupportedError
from kernels.gpu.arithmetic import fold
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run


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
        run(
            norm_rope_kernel,
            (cdiv(rows, height),),
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


@triton.jit
def turned_back(d, at, there, cosine, sine, HALF: tl.constexpr):
    """Both halves of the heads at `at`, turned by minus the angle, rounded."""
    i = tl.arange(0, HALF)
    low = tl.load(d + at[:, None] + i[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    high = tl.load(d + at[:, None] + HALF + i[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    turn = sine * -1.0
    a = tl.fma(low, cosine, -(high * turn)).to(d.dtype.element_ty)
    b = tl.fma(high, cosine, low * turn).to(d.dtype.element_ty)
    return a, b


@triton.jit
def norm_rope_backward_kernel(
    x,
    q_weight,
    k_weight,
    cosine,
    sine,
    position,
    d_q,
    d_k,
    d_x,
    q_rows,
    k_rows,
    rows,
    xt,
    xh,
    qt,
    qh,
    kt,
    kh,
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
    is_q = h < HEADS
    at = tl.load(position + t, mask=there, other=0).to(tl.int64)
    c = tl.load(cosine + at[:, None] * HALF + i[None, :], mask=there[:, None], other=0.0)
    s = tl.load(sine + at[:, None] * HALF + i[None, :], mask=there[:, None], other=0.0)
    of_q, also_q = turned_back(d_q, t * qt + h * qh, there & is_q, c, s, HALF)
    of_k, also_k = turned_back(d_k, t * kt + (h - HEADS) * kh, there & (is_q == 0), c, s, HALF)
    low = tl.where(is_q[:, None], of_q, of_k)
    high = tl.where(is_q[:, None], also_q, also_k)
    if NORM:
        source = x + (t * xt + h * xh)[:, None] + i[None, :]
        a = tl.load(source, mask=there[:, None], other=0.0).to(tl.float32)
        b = tl.load(source + HALF, mask=there[:, None], other=0.0).to(tl.float32)
        w = tl.where(is_q[:, None], tl.load(q_weight + i)[None, :], tl.load(k_weight + i)[None, :]).to(tl.float32)
        v = tl.where(is_q[:, None], tl.load(q_weight + HALF + i)[None, :], tl.load(k_weight + HALF + i)[None, :]).to(
            tl.float32
        )
        g = low.to(tl.float32)
        f = high.to(tl.float32)
        zero = tl.zeros((ROWS, HALF), tl.float32)
        one = tl.full((ROWS,), 1.0, tl.float32)
        n = one * (2 * HALF)
        squares = tl.fma(a, a, zero) + tl.fma(b, b, zero)  # the first fold of a row of 2 HALF lanes, here and below
        inverse = tl.div_rn(one, tl.sqrt_rn(tl.div_rn(fold(squares), n) + eps))[:, None]
        dw = g * (a * inverse)
        dv = f * (b * inverse)
        to_q = q_rows + ((t * HEADS + h) * (2 * HALF))[:, None] + i[None, :]
        to_k = k_rows + ((t * KV_HEADS + h - HEADS) * (2 * HALF))[:, None] + i[None, :]
        tl.store(to_q, dw, mask=(there & is_q)[:, None])
        tl.store(to_q + HALF, dv, mask=(there & is_q)[:, None])
        tl.store(to_k, dw, mask=(there & (is_q == 0))[:, None])
        tl.store(to_k + HALF, dv, mask=(there & (is_q == 0))[:, None])
        mean = tl.div_rn(fold(tl.fma(dw, w, zero) + tl.fma(dv, v, zero)), n)
        mean = tl.broadcast_to(mean[:, None], (ROWS, HALF))
        low = (inverse * tl.fma(-(a * inverse), mean, g * w)).to(d_x.dtype.element_ty)
        high = (inverse * tl.fma(-(b * inverse), mean, f * v)).to(d_x.dtype.element_ty)
    to = d_x + (r * (2 * HALF))[:, None] + i[None, :]
    tl.store(to, low, mask=there[:, None])
    tl.store(to + HALF, high, mask=there[:, None])


def backward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """(dx in the dtype of x; each head's contribution to the gradients of the weights, float32 [T, heads, head_dim] and
    [T, kv_heads, head_dim])."""
    tokens, D = x.shape[0], x.shape[2]
    x, dq, dk = (t if t.stride(2) == 1 else t.contiguous() for t in (x, dq, dk))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_rows = None
    if weights is not None:
        d_rows = tuple(torch.empty(d.shape, dtype=torch.float32, device=x.device) for d in (dq, dk))
    rows, height = tokens * x.shape[1], max(1, 512 // D)
    if rows:
        run(
            norm_rope_backward_kernel,
            (cdiv(rows, height),),
            x,
            *((w.contiguous() for w in weights) if weights else (x, x)),
            *(t.contiguous() for t in table),
            positions.contiguous(),
            dq,
            dk,
            dx,
            *(d_rows or (dx, dx)),
            rows,
            *(stride for t in (x, dq, dk) for stride in t.stride()[:2]),
            eps,
            weights is not None,
            dq.shape[1],
            dk.shape[1],
            D // 2,
            height,
            num_warps=1 if rows >= 2048 else 4,
            enable_fp_fusion=False,
        )
    return dx, d_rows
