"""The AdamW update (Loshchilov and Hutter 2019, algorithm 2)."""

import torch

from kernels.device import UnsupportedError, same_device
from kernels.scalars import one_minus_power


def adamw(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    """Updates in place, on float32 tensors of one shape: with g = grad * grad_scale,

        m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        w = w (1 - lr * weight_decay) - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)

    step counts from 1; the betas in 0 .. 1. Elementwise: invariant to how the tensor is sharded. A scalar reaches the kernel as
    the nearest float32, 1 - b^step of the exact power.
    """
    if not weight.shape == grad.shape == first.shape == second.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (weight, grad, first, second))
        raise UnsupportedError(f"adamw: weight, gradient and moments differ in shape: {shapes}")
    corrections = tuple(one_minus_power(beta, step) for beta in betas)
    same_device("adamw", weight, grad, first, second).update(
        weight, grad, first, second, grad_scale, lr, *betas, eps, weight_decay, *corrections
    )
