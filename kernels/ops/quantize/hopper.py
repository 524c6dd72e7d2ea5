"""GPU quantization to block-scaled FP8: the operations of cpu.c one by one, so the bits are the CPU's. The card rounds to e4m3
as cpu.c does (to nearest even, at most 448). It is among Hopper's kernels, as the one op that reads it is; cards before 8.9
know no e4m3.

The scales of rows lie in columns: those of a block, which a product reads together, are contiguous, with room for a whole
tile's after them."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done

_BLOCK, _FP8 = 128, torch.float8_e4m3fn
ROOM = 128
"""Rows of a tile of a product, at most."""


@triton.jit
def divided(a, b):
    """Computes a / b as IEEE 754 has it, subnormals too: `tl.div_rn` takes them for zeros."""
    return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def scale_of(most, POWER_OF_TWO: tl.constexpr):
    """Returns (scale, whether the block is finite) of the largest |x|, given by its bits, which ascend as |x| does, and are
    above those of infinity for NaN."""
    a = most.to(tl.float32, bitcast=True)
    scale = tl.maximum(divided(a, tl.full(a.shape, 448.0, tl.float32)), 1.1754943508222875e-38)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale, most < 0x7F800000


@triton.jit
def e4m3(x, scale, finite):
    """Returns the byte of x / scale, or of NaN."""
    near = divided(x, scale).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(finite, near, 0x7F)


@triton.jit
def stored_scale(scale, finite):
    """Returns the scale, or the NaN of a block that is not finite."""
    return tl.where(finite, scale.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """Returns the bits of |x|, float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@early
@triton.jit
def rows_kernel(
    x, xt, xk, q, s, T, columns, apart, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Quantizes BLOCKS blocks of ROWS rows."""
    previous_done()
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = b[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = r.to(tl.int64)[:, None, None]
    inside = (r < T)[:, None] & (b < columns)[None, :]
    there = inside[:, :, None]
    a = tl.load(x + at * xt + k.to(tl.int64)[None, :, :] * xk, mask=there, other=0.0).to(tl.float32)
    scale, finite = scale_of(tl.max(magnitude(a), 2), POWER_OF_TWO)
    byte = e4m3(a, tl.broadcast_to(scale[:, :, None], (ROWS, BLOCKS, 128)), finite[:, :, None])
    tl.store(q + at * (columns * 128) + k[None, :, :], byte, mask=there)
    tl.store(s + b[None, :] * apart + r[:, None], stored_scale(scale, finite), mask=inside)


@triton.jit
def blocks_kernel(x, xn, xk, q, s, columns, POWER_OF_TWO: tl.constexpr):
    """Quantizes one block of 128 x 128."""
    n = (tl.program_id(0) * 128 + tl.arange(0, 128)).to(tl.int64)[:, None]
    k = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    a = tl.load(x + n * xn + k.to(tl.int64) * xk).to(tl.float32)
    most = tl.max(tl.max(magnitude(a), 1, keep_dims=True), 0, keep_dims=True)
    scale, finite = scale_of(most, POWER_OF_TWO)
    byte = e4m3(a, tl.broadcast_to(scale, (128, 128)), finite)
    tl.store(q + n * (columns * 128) + k, byte)
    one = tl.program_id(0) * columns + tl.program_id(1) + tl.zeros((1, 1), tl.int32)
    tl.store(s + one, stored_scale(scale, finite))


@triton.jit
def dequantize_kernel(q, qn, qk, s, sn, sk, y, columns):
    """Computes value x scale of one block of 128 x 128."""
    n = (tl.program_id(0) * 128 + tl.arange(0, 128)).to(tl.int64)[:, None]
    k = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    scale = tl.load(s + tl.program_id(0) * sn + tl.program_id(1) * sk)
    value = tl.load(q + n * qn + k.to(tl.int64) * qk).to(tl.float32)
    tl.store(y + n * (columns * 128) + k, (value * scale).to(tl.bfloat16))


def rows(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes blocks of 1 x 128: x [T, K] bfloat16 -> (values e4m3 [T, K], scales float32 [T, K / 128])."""
    T, K = x.shape
    columns = K // _BLOCK
    values = torch.empty(T, K, dtype=torch.uint8, device=x.device)
    scales = _empty_columns(T, columns, x.device)
    if T:
        height, width = (1, 4) if T < 64 else (8, 4)
        grid = cdiv(T, height), cdiv(columns, width)
        given = x, *x.stride(), values, scales, T, columns, scales.stride(1), power_of_two
        run(rows_kernel, grid, *given, height, width, num_warps=height, enable_fp_fusion=False)
    return values.view(_FP8), scales


def blocks(w: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes blocks of 128 x 128: w [N, K] bfloat16 -> (values e4m3 [N, K], scales float32 [N / 128, K / 128])."""
    (N, K), grid = w.shape, tuple(n // _BLOCK for n in w.shape)
    values = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*grid, dtype=torch.float32, device=w.device)
    if values.numel():
        given = w, *w.stride(), values, scales, grid[1], power_of_two
        run(blocks_kernel, grid, *given, num_warps=8, enable_fp_fusion=False)
    return values.view(_FP8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Computes values x scales of blocks of 128 x 128: [N, K] and [N / 128, K / 128] -> [N, K] bfloat16."""
    y = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    if values.numel():
        given = values, *values.stride(), scales, *scales.stride(), y, scales.shape[1]
        run(dequantize_kernel, tuple(scales.shape), *given, num_warps=8, enable_fp_fusion=False)
    return y


def _empty_columns(rows: int, blocks: int, device: torch.device) -> torch.Tensor:
    return torch.empty(blocks, cdiv(rows, ROOM) * ROOM, dtype=torch.float32, device=device)[:, :rows].T


def column_scales(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales of rows [M, K / 128] as a product reads them: in columns, with room for a whole tile's after the last row,
    which holds anything. A copy where they do not lie so, as those of `rows` do."""
    M, blocks = scales.shape
    apart, room = scales.stride(1), cdiv(M, ROOM) * ROOM
    end = scales.storage_offset() + (blocks - 1) * apart + room
    if scales.stride(0) == 1 and apart >= room and end * scales.itemsize <= scales.untyped_storage().nbytes():
        return scales
    return _empty_columns(M, blocks, scales.device).copy_(scales)
