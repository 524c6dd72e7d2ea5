"""Block-scaled FP8 (e4m3): what a projection's weights and activations are rounded to, and back."""

from dataclasses import dataclass

import torch

from kernels.device import UnsupportedError, same_device

FP8 = torch.float8_e4m3fn
BLOCK = 128
"""Columns that share a scale in a row of activations; rows and columns that share one in a weight."""
LARGEST = 448.0
"""The largest number of e4m3."""


@dataclass(frozen=True)
class Quantized:
    """Holds a matrix as e4m3 `values` [R, K] and float32 `scales`, [R, K / 128] of rows or [R / 128, K / 128] of blocks: an
    element is value x scale of its block."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """Returns [R, K]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Returns where both tensors lie."""
        return self.values.device


def quantize_rows(x: torch.Tensor, power_of_two: bool = False) -> Quantized:
    """Quantizes activations: each row in blocks of 128 columns.

    x [T, K] bfloat16, K a multiple of 128 -> values e4m3 [T, K], scales float32 [T, K / 128]. Of one block, a = max |x|:

        s = max(a / 448, 2^-126)                        one IEEE float32 division; 2^-126 of a block of zeros
        s = the smallest power of two that is >= it     with `power_of_two`
        q = e4m3(x / s)                                 one IEEE float32 division; to nearest even, at most 448; with its sign

    A block of which any x is infinite or NaN is NaN throughout: s has the bits 0x7fc00000, every q 0x7f. Subnormals count.
    Both devices have the same bits. A block knows nothing of the others.

    Raises UnsupportedError for another dtype or shape."""
    _check("quantize_rows", x, (torch.bfloat16,))
    return Quantized(*same_device("quantize", x).rows(x, power_of_two))


def quantize_blocks(w: torch.Tensor, power_of_two: bool = False) -> Quantized:
    """Quantizes a weight in blocks of 128 x 128, each as `quantize_rows` does a block.

    w [N, K] bfloat16, or float32 masters, which are rounded to bfloat16 first, as publication does; N and K multiples of 128
    -> values e4m3 [N, K], scales float32 [N / 128, K / 128].

    Raises UnsupportedError for another dtype or shape."""
    _check("quantize_blocks", w, (torch.bfloat16, torch.float32))
    if w.shape[0] % BLOCK:
        raise UnsupportedError(f"quantize_blocks: {w.shape[0]} rows are not whole blocks of {BLOCK}")
    return Quantized(*same_device("quantize", w).blocks(w.to(torch.bfloat16), power_of_two))


def dequantize_blocks(w: Quantized) -> torch.Tensor:
    """Computes value x scale of every element of a weight in float32, rounded once to bfloat16: -> [N, K] bfloat16."""
    values, scales = w.values, w.scales
    blocks = tuple(n // BLOCK for n in values.shape)
    if (
        values.dtype != FP8
        or scales.dtype != torch.float32
        or scales.shape != blocks
        or any(n % BLOCK for n in w.shape)
    ):
        raise UnsupportedError(
            f"dequantize_blocks: values {values.dtype} {tuple(values.shape)} and scales {scales.dtype} {tuple(scales.shape)} "
            f"must be {FP8} [N, K] and float32 [N / {BLOCK}, K / {BLOCK}]"
        )
    return same_device("quantize", values, scales).dequantize(values, scales)  # type: ignore[no-any-return]


def _check(op: str, t: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.dim() != 2 or t.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise UnsupportedError(f"{op}: {t.dtype} {tuple(t.shape)} must be a matrix of {wanted}")
    if t.shape[1] % BLOCK:
        raise UnsupportedError(f"{op}: {t.shape[1]} columns are not whole blocks of {BLOCK}")
