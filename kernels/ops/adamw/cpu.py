"""CPU AdamW: see cpu.c."""

import torch

from kernels.cpu import call


def update(w: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *scalars: float) -> None:
    call("adamw", w, grad.contiguous(), m, v, w.numel(), *(float(s) for s in scalars))
