"""CPU AdamW: see cpu.c."""

import torch

from kernels.cpu import call


def update(w: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *scalars: float) -> None:
    """Updates float32 w, m and v in place; `scalars` are those of kernels.ops.adamw, in its order."""
    call("adamw", w, grad.contiguous(), m, v, w.numel(), *(float(s) for s in scalars))
