"""Says how large the learning rate of a step is."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.ops import cos_sin

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Computes the learning rate of step 1, 2, ... `steps`: with x = step - 1 - warmup and n = steps - warmup

        lr step / warmup                  up to step `warmup`: the first step is not lost
        lr                                then, or
        lr (1 - x / n)                    linear
        lr (1 + cos(pi x / n)) / 2        cosine, as lr cos(pi x / 2 n)^2, which keeps its digits near the end

    as torch's schedulers. Every operation is IEEE 754's or the project's own cosine, so that all machines have one result.
    """

    lr: float
    kind: Kind
    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        if step <= self.warmup:
            return self.lr * (step / self.warmup)
        if self.kind == "constant":
            return self.lr
        done = (step - 1 - self.warmup) / (self.steps - self.warmup)
        if self.kind == "linear":
            return self.lr * (1 - done)
        cosine, _ = cos_sin(torch.tensor([math.pi / 2 * done], dtype=torch.float64))
        return self.lr * (cosine.item() * cosine.item())
