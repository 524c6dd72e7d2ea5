"""What the projections of a model are multiplied in: `plain`, the dtype of its activations, or a quantized format.

A projection is a matrix between norm and residual stream: q, k, v, o, gate, up, down. Embedding, head, norms, router and
attention are plain in every format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch

from kernels.ops import Quantized, matmul_fp8, quantize_blocks
from kernels.ops.quantize import BLOCK

Format = Literal["plain", "fp8_block", "fp8_block_ue8m0"]
"""A key of FORMATS, or plain."""
PLAIN: Format = "plain"


@dataclass(frozen=True)
class Quantization:
    """Says how a format quantizes weights, and multiplies with them."""

    block: int
    """Rows and columns of a weight that share a scale; every leaf is whole blocks."""
    quantize: Callable[[torch.Tensor], Quantized]
    """Of a weight [N, K]: the one place where both sides get its bits from."""
    project: Callable[..., torch.Tensor]
    """Of the signature of `kernels.ops.matmul`; a weight may be `Quantized` too."""


FORMATS: Mapping[str, Quantization] = MappingProxyType(
    {
        "fp8_block": Quantization(BLOCK, quantize_blocks, matmul_fp8),
        "fp8_block_ue8m0": Quantization(
            BLOCK, partial(quantize_blocks, power_of_two=True), partial(matmul_fp8, power_of_two=True)
        ),
    }
)
"""e4m3 with a scale for each 128 x 128 of a weight and each 128 columns of a row (`kernels.ops.quantize`); `ue8m0`: the scales
are powers of two, which that type of one byte holds."""
