"""GPU rms_norm; the sum of squares in the GPU's row order (kernels.ops.reduce.portable), the rest as cpu.c has it."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done
from kernels.ops.reduce.portable import LANES


@triton.jit
def inverse_rms(x, at, n, eps, there, ROWS: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr):
    """Computes 1 / sqrt(mean(x^2) + eps) of the rows that begin at `at`: -> float32 [ROWS]."""
    i = tl.arange(0, LANES)
    lane = tl.zeros((ROWS, LANES), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        c = chunk * LANES + i
        a = tl.load(x + at[:, None] + c[None, :], mask=there[:, None] & (c < n)[None, :], other=0.0).to(tl.float32)
        lane = tl.fma(a, a, lane)
    one = tl.full((ROWS,), 1.0, tl.float32)
    return tl.div_rn(one, tl.sqrt_rn(tl.div_rn(fold(lane), one * n) + eps))


@triton.jit
def norm_chunks(
    x,
    delta,
    total,
    weight,
    y,
    at,
    to,
    n,
    eps,
    there,
    lane,
    CHUNK: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Norms chunk CHUNK and those after it: the way down sums squares, the way back writes, so that a row is read once, and
    no load waits for a store. ADD: the row is x + delta, rounded, which is also written to `total`."""
    c = CHUNK * LANES + tl.arange(0, LANES)
    inside = there[:, None] & (c < n)[None, :]
    a = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        b = tl.load(delta + to[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        a = (a + b).to(total.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + c, mask=c < n, other=0.0).to(tl.float32)
    lane = tl.fma(a, a, lane)
    if CHUNK + 1 < CHUNKS:
        inverse = norm_chunks(
            x, delta, total, weight, y, at, to, n, eps, there, lane, CHUNK + 1, ADD, ROWS, LANES, CHUNKS
        )
    else:
        one = tl.full((ROWS,), 1.0, tl.float32)
        inverse = tl.div_rn(one, tl.sqrt_rn(tl.div_rn(fold(lane), one * n) + eps))
    if ADD:
        tl.store(total + to[:, None] + c[None, :], a.to(total.dtype.element_ty), mask=inside)
    tl.store(y + to[:, None] + c[None, :], (a * inverse[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)
    return inverse


@early
@triton.jit
def forward_kernel(
    x,
    delta,
    total,
    weight,
    y,
    rows,
    n,
    xt,
    xh,
    eps,
    ADD: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Norms ROWS rows, where ADD of x + delta, which is stored too."""
    previous_done()
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = r // HEADS * xt + r % HEADS * xh
    lane = tl.zeros((ROWS, LANES), tl.float32)
    norm_chunks(x, delta, total, weight, y, at, r * n, n, eps, r < rows, lane, 0, ADD, ROWS, LANES, CHUNKS)


@triton.jit
def backward_kernel(
    x,
    weight,
    d_y,
    d_total,
    d_x,
    d_rows,
    rows,
    n,
    xt,
    xh,
    eps,
    ADD: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Computes the gradient to ROWS rows of x, and each row's part of the gradient to the weight."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = r < rows
    at = r // HEADS * xt + r % HEADS * xh
    inverse = inverse_rms(x, at, n, eps, there, ROWS, LANES, CHUNKS)
    i = tl.arange(0, LANES)
    lane = tl.zeros((ROWS, LANES), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        c = chunk * LANES + i
        inside = there[:, None] & (c < n)[None, :]
        a = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(d_y + r[:, None] * n + c[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + c, mask=c < n, other=0.0).to(tl.float32)
        dw = g * (a * inverse[:, None])
        tl.store(d_rows + r[:, None] * n + c[None, :], dw, mask=inside)
        lane = tl.fma(dw, tl.broadcast_to(w[None, :], dw.shape), lane)
    mean = tl.div_rn(fold(lane), tl.zeros((ROWS,), tl.float32) + n)
    for chunk in tl.static_range(CHUNKS):
        c = chunk * LANES + i
        inside = there[:, None] & (c < n)[None, :]
        a = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(d_y + r[:, None] * n + c[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + c, mask=c < n, other=0.0).to(tl.float32)
        dx = inverse[:, None] * tl.fma(-(a * inverse[:, None]), tl.broadcast_to(mean[:, None], a.shape), g * w[None, :])
        dx = dx.to(d_x.dtype.element_ty)
        if ADD:  # rounded twice, as by the two ops one after the other
            more = tl.load(d_total + r[:, None] * n + c[None, :], mask=inside, other=0.0).to(tl.float32)
            dx = (more + dx.to(tl.float32)).to(d_x.dtype.element_ty)
        tl.store(d_x + r[:, None] * n + c[None, :], dx, mask=inside)


def _plan(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, tuple[int, int], dict[str, int]]:
    """Returns (x, rows, n, rows of a token, their strides, tile): rows of [T, heads, n] may be a slice of a wider tensor."""
    n = x.shape[-1]
    x = x if x.dim() in (2, 3) and x.stride(-1) == 1 else x.contiguous().view(-1, n)
    heads = x.shape[1] if x.dim() == 3 else 1
    lanes = min(LANES, triton.next_power_of_2(n))
    height = max(1, 1024 // lanes)
    tile = {"HEADS": heads, "ROWS": height, "LANES": lanes, "CHUNKS": triton.cdiv(n, lanes)}
    return x, x.numel() // n, n, heads, (x.stride(0), x.stride(1) if x.dim() == 3 else 0), tile


def _warps(rows: int) -> int:
    """Many rows fill the card with one warp each; few are done sooner by four."""
    return 1 if rows >= 2048 else 4


def _forward(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, warps: int | None):  # type: ignore[no-untyped-def]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if delta is None else torch.empty_like(y)
    x, rows, n, _, strides, tile = _plan(x)
    if rows:
        given = (y, y) if delta is None else (delta.contiguous(), total)
        run(
            forward_kernel,
            (cdiv(rows, tile["ROWS"]),),
            x,
            *given,
            weight,
            y,
            rows,
            n,
            *strides,
            eps,
            delta is not None,
            *tile.values(),
            num_warps=warps or (2 if tile["CHUNKS"] > 1 else _warps(rows)),  # a row of some chunks fills two warps
            enable_fp_fusion=False,
        )
    return y, total


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float, *, warps: int | None = None) -> torch.Tensor:
    """Scales the rows of x by weight / sqrt(mean(x^2) + eps), in float32, and rounds once to x's dtype."""
    return _forward(x, None, weight, eps, warps)[0]


def add_forward(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, *, warps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds delta to x, rounded to their dtype, and norms the sum; returns (normed, sum)."""
    return _forward(x, delta, weight, eps, warps)


def backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    eps: float,
    d_total: torch.Tensor | None = None,
    *,
    warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dx in the dtype of x, plus d_total if that is given; each row's contribution to the gradient of the weight in
    float32)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_rows = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    x, rows, n, _, strides, tile = _plan(x)
    if rows:
        run(
            backward_kernel,
            (cdiv(rows, tile["ROWS"]),),
            x,
            weight,
            dy.contiguous(),
            dx if d_total is None else d_total.contiguous(),
            dx,
            d_rows,
            rows,
            n,
            *strides,
            eps,
            d_total is not None,
            *tile.values(),
            num_warps=warps or _warps(rows),
            enable_fp_fusion=False,
        )
    return dx, d_rows
