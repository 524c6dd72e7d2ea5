"""The exponential function."""

import torch

from kernels.device import UnsupportedError, same_device


def exp(x: torch.Tensor) -> torch.Tensor:
    """Computes y = e^x, with its gradient; float32 of any shape. The exponential of every other op
    (`kernels/cpu/samebit.h`), within one unit in the last place; e^0 is 1. Elementwise: invariant to everything.
    """
    if x.dtype != torch.float32:
        raise UnsupportedError(f"exp takes float32, got {x.dtype}")
    return _Exp.apply(x)


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        y = same_device("exp", x).forward(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (y,) = ctx.saved_tensors
        return dy * y
