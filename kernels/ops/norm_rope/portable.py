"""Norm and rope in plain Triton: the operations of rms_norm/portable.py and of cpu.c one by one, on a row that stays in
registers."""

import torch
import triton
import triton.language as tl

from kernels.device import UnsupportedError
from kernels.gpu.arithmetic import fold
from kernels.gpu.launch import heads_contiguous
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done

_EXACT = {"enable_fp_fusion": False}


@triton.jit
def heads_of_token(ROWS: tl.constexpr):
    """Returns the token of this program, and which of its heads."""
    return tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)


@triton.jit
def angle(cosine, sine, position, t, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Returns that of token t, read once for ROWS heads."""
    at = tl.load(position + t).to(tl.int64) * HALF + tl.arange(0, HALF)
    c = tl.broadcast_to(tl.load(cosine + at)[None, :], (ROWS, HALF))
    return c, tl.broadcast_to(tl.load(sine + at)[None, :], (ROWS, HALF))


@triton.jit
def weight_of(q_weight, k_weight, is_q, HALF: tl.constexpr):
    """Returns both halves of the weight of each head."""
    i = tl.arange(0, HALF)
    low = tl.where(is_q, tl.load(q_weight + i)[None, :], tl.load(k_weight + i)[None, :])
    high = tl.where(is_q, tl.load(q_weight + HALF + i)[None, :], tl.load(k_weight + HALF + i)[None, :])
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def inverse_rms(a, b, eps):
    """Computes 1 / sqrt(mean(x^2) + eps) of rows whose halves are a and b [ROWS, HALF]."""
    zero = tl.zeros(a.shape, tl.float32)
    one = tl.full((a.shape[0],), 1.0, tl.float32)
    squares = tl.fma(a, a, zero) + tl.fma(b, b, zero)  # the first fold of a row of 2 HALF lanes
    return tl.div_rn(one, tl.sqrt_rn(tl.div_rn(fold(squares), one * (2 * a.shape[1])) + eps))[:, None]


@early
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
    keys,
    values,
    slots,
    new_values,
    xt,
    xh,
    vt,
    vh,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
):
    """Norms and rotates ROWS rows of query and key heads. STORE: the keys also go to a row of `keys`, and what stands beside
    them in new_values to the same row of `values`."""
    previous_done()
    t, h = heads_of_token(ROWS)
    is_q = (h < HEADS)[:, None]
    i = tl.arange(0, HALF)
    if STORE:
        of_row = ((tl.load(slots + t) * KV_HEADS + h - HEADS) * (2 * HALF))[:, None] + i[None, :]
        beside = new_values + t * vt + ((h - HEADS) * vh)[:, None] + i[None, :]
        v_low = tl.load(beside, mask=is_q == 0)
        v_high = tl.load(beside + HALF, mask=is_q == 0)
    source = x + t * xt + (h * xh)[:, None] + i[None, :]
    a = tl.load(source).to(tl.float32)
    b = tl.load(source + HALF).to(tl.float32)
    c, s = angle(cosine, sine, position, t, HALF, ROWS)
    if NORM:
        inverse = inverse_rms(a, b, eps)
        w, v = weight_of(q_weight, k_weight, is_q, HALF)
        a = (a * inverse * w).to(x.dtype.element_ty).to(tl.float32)
        b = (b * inverse * v).to(x.dtype.element_ty).to(tl.float32)
    low = tl.fma(a, c, -(b * s)).to(x.dtype.element_ty)
    high = tl.fma(b, c, a * s).to(x.dtype.element_ty)
    to_q = q + ((t * HEADS + h) * (2 * HALF))[:, None] + i[None, :]
    to_k = k + ((t * KV_HEADS + h - HEADS) * (2 * HALF))[:, None] + i[None, :]
    tl.store(to_q, low, mask=is_q)
    tl.store(to_q + HALF, high, mask=is_q)
    tl.store(to_k, low, mask=is_q == 0)
    tl.store(to_k + HALF, high, mask=is_q == 0)
    if STORE:
        tl.store(keys + of_row, low, mask=is_q == 0)
        tl.store(keys + of_row + HALF, high, mask=is_q == 0)
        tl.store(values + of_row, v_low, mask=is_q == 0)
        tl.store(values + of_row + HALF, v_high, mask=is_q == 0)


def _grid(tokens: int, heads: int, D: int) -> tuple[tuple[int, int], int]:
    """Returns (grid, heads of a program: as many as divide them, up to 1,024 elements)."""
    height = min(heads & -heads, max(1, 1024 // D))
    return (tokens, heads // height), height


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    kv_heads: int,
    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms the heads of x [T, H + KV, D] where `weights` are given, then rotates them: -> q [T, H, D], k [T, KV, D]. `stored`
    (keys, values, slots, new values): where k and the values go too."""
    tokens, heads, D = x.shape[0], x.shape[1] - kv_heads, x.shape[2]
    if D & (D - 1):
        raise UnsupportedError(f"norm_rope on a GPU: head_dim {D} must be a power of two, as its attention's")
    x = x if x.stride(2) == 1 else x.contiguous()
    q, k = x.new_empty(tokens, heads, D), x.new_empty(tokens, kv_heads, D)
    keys, values, slots, new_values = stored or (k, k, positions, k)
    new_values = heads_contiguous(new_values)
    if tokens:
        grid, height = _grid(tokens, x.shape[1], D)
        run(
            norm_rope_kernel,
            grid,
            x,
            *((w.contiguous() for w in weights) if weights else (x, x)),
            *(t.contiguous() for t in table),
            positions.contiguous(),
            q,
            k,
            keys,
            values,
            slots.contiguous(),
            new_values,
            x.stride(0),
            x.stride(1),
            new_values.stride(0),
            new_values.stride(1),
            eps,
            weights is not None,
            heads,
            kv_heads,
            D // 2,
            height,
            stored is not None,
            num_warps=4,
            **_EXACT,
        )
    return q, k


@triton.jit
def turned_back(d, at, there, cosine, sine, HALF: tl.constexpr):
    """Returns both halves of the heads at `at`, turned by minus the angle, rounded."""
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
    """Computes the gradient to ROWS rows of x, and each row's part of the gradient to the norms' weights."""
    t, h = heads_of_token(ROWS)
    is_q = h < HEADS
    i = tl.arange(0, HALF)
    c, s = angle(cosine, sine, position, t, HALF, ROWS)
    of_q, also_q = turned_back(d_q, t * qt + h * qh, is_q, c, s, HALF)
    of_k, also_k = turned_back(d_k, t * kt + (h - HEADS) * kh, is_q == 0, c, s, HALF)
    is_q = is_q[:, None]
    low = tl.where(is_q, of_q, of_k)
    high = tl.where(is_q, also_q, also_k)
    if NORM:
        source = x + t * xt + (h * xh)[:, None] + i[None, :]
        a = tl.load(source).to(tl.float32)
        b = tl.load(source + HALF).to(tl.float32)
        inverse = inverse_rms(a, b, eps)
        w, v = weight_of(q_weight, k_weight, is_q, HALF)
        g = low.to(tl.float32)
        f = high.to(tl.float32)
        dw = g * (a * inverse)
        dv = f * (b * inverse)
        to_q = q_rows + ((t * HEADS + h) * (2 * HALF))[:, None] + i[None, :]
        to_k = k_rows + ((t * KV_HEADS + h - HEADS) * (2 * HALF))[:, None] + i[None, :]
        tl.store(to_q, dw, mask=is_q)
        tl.store(to_q + HALF, dv, mask=is_q)
        tl.store(to_k, dw, mask=is_q == 0)
        tl.store(to_k + HALF, dv, mask=is_q == 0)
        zero = tl.zeros((ROWS, HALF), tl.float32)
        n = tl.full((ROWS,), 2.0 * HALF, tl.float32)
        mean = tl.div_rn(fold(tl.fma(dw, w, zero) + tl.fma(dv, v, zero)), n)  # the first fold of a row, as above
        mean = tl.broadcast_to(mean[:, None], (ROWS, HALF))
        low = (inverse * tl.fma(-(a * inverse), mean, g * w)).to(d_x.dtype.element_ty)
        high = (inverse * tl.fma(-(b * inverse), mean, f * v)).to(d_x.dtype.element_ty)
    to = d_x + ((t * (HEADS + KV_HEADS) + h) * (2 * HALF))[:, None] + i[None, :]
    tl.store(to, low)
    tl.store(to + HALF, high)


def backward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Returns (dx in the dtype of x; each head's contribution to the gradients of the weights, float32 [T, heads, head_dim] and
    [T, kv_heads, head_dim])."""
    tokens, D = x.shape[0], x.shape[2]
    x, dq, dk = (t if t.stride(2) == 1 else t.contiguous() for t in (x, dq, dk))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_rows = None
    if weights is not None:
        d_rows = tuple(torch.empty(d.shape, dtype=torch.float32, device=x.device) for d in (dq, dk))
    if tokens:
        grid, height = _grid(tokens, x.shape[1], D)
        run(
            norm_rope_backward_kernel,
            grid,
            x,
            *((w.contiguous() for w in weights) if weights else (x, x)),
            *(t.contiguous() for t in table),
            positions.contiguous(),
            dq,
            dk,
            dx,
            *(d_rows or (dx, dx)),
            *(stride for t in (x, dq, dk) for stride in t.stride()[:2]),
            eps,
            weights is not None,
            dq.shape[1],
            dk.shape[1],
            D // 2,
            height,
            num_warps=4,
            **_EXACT,
        )
    return dx, d_rows
