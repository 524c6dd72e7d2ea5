"""Normally distributed numbers."""

import torch

from kernels.device import UnsupportedError
from kernels.ops.normal import cpu as host


def normal(shape: tuple[int, ...], seed: int, name: int, deviation: float = 1.0) -> torch.Tensor:
    """Returns float32 of `shape` on the CPU: `deviation` times standard normal numbers from the stream (seed, name),
    each in 0 .. 2^63 - 1. Number i is a function of the stream and of i alone.

    They are those of `numpy.random.Generator(Philox(key=[seed, name])).standard_normal(shape, float32)` of numpy 2.4 with a
    log1pf that rounds correctly. numpy keeps that stream neither from version to version nor from machine to machine: in the
    tail, one number in 4,000, it takes libm's log1pf, of which glibc 2.36 rounds every fourteenth result the other way.
    """
    if not (0 <= seed < 2**63 and 0 <= name < 2**63):
        raise UnsupportedError(f"normal: the stream ({seed}, {name}) must be two numbers in 0 .. 2^63 - 1")
    return host.normal(shape, seed, name, deviation)
