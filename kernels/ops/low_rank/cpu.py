"""CPU merge: the chain over the rank is one leaf of a matmul (see ops/matmul/cpu.c); the rest is one IEEE operation each."""

import torch

from kernels.ops.matmul import cpu as matmul


def merge(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Computes w + scale (b a): w [N, K], a [r, K], b [N, r] -> [N, K], rounded once to `dtype`."""
    chain = matmul.contract(b, a.T, [0, a.shape[0]], torch.float32)
    return (w.float() + scale * chain).to(dtype)
