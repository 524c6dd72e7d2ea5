"""CPU quantization: see cpu.c."""

import torch

from kernels.cpu import call

_BLOCK, _FP8 = 128, torch.float8_e4m3fn


def rows(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes blocks of 1 x 128: x [T, K] bfloat16 -> (values e4m3 [T, K], scales float32 [T, K / 128])."""
    return _quantize(x, 1, power_of_two)


def blocks(w: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes blocks of 128 x 128: w [N, K] bfloat16 -> (values e4m3 [N, K], scales float32 [N / 128, K / 128])."""
    return _quantize(w, _BLOCK, power_of_two)


def _quantize(x: torch.Tensor, height: int, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    (T, K) = x.shape
    values = torch.empty(T, K, dtype=torch.uint8)
    scales = torch.empty(T // height, K // _BLOCK)
    call("quantize", x.float().contiguous(), values, scales, T // height, K // _BLOCK, height, int(power_of_two))
    return values.view(_FP8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Computes values x scales of blocks of 128 x 128: [N, K] and [N / 128, K / 128] -> [N, K] bfloat16."""
    (N, K), (n, k) = values.shape, scales.shape
    wide = values.float().view(n, _BLOCK, k, _BLOCK) * scales[:, None, :, None]
    return wide.view(N, K).to(torch.bfloat16)
