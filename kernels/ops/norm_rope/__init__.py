"""What heads of queries and keys pass before attention: a norm (in families that have one), then rope, in one pass; and
the table that rope reads."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.norm_rope import cpu as host
from kernels.ops.reduce import sum_rows
from kernels.scalars import root_of_power

Table = tuple[torch.Tensor, torch.Tensor]


class Stored(NamedTuple):
    """Says where keys go on their way, as `store_rows` would put them, and the values beside them."""

    keys: torch.Tensor  # [rows, kv_heads, head_dim], contiguous: row slots[t] is written
    values: torch.Tensor  # the same
    slots: torch.Tensor  # int64 [T], each below `rows` and used once
    new_values: torch.Tensor  # [T, kv_heads, head_dim]


@dataclass(frozen=True)
class RopeScaling:
    """Stretches low frequencies as Llama 3.1 does (rope_type "llama3" of Hugging Face configs): wavelengths above
    original_positions / low are `factor` times as long, those below original_positions / high stay, and between them the
    frequency is interpolated linearly in original_positions / wavelength."""

    factor: float
    low: float
    high: float
    original_positions: int

    def __call__(self, frequency: float) -> float:
        """In float64, one IEEE 754 operation after another."""
        turns = self.original_positions * frequency / (2 * math.pi)  # within the original context
        kept = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


def rope_table(
    positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (cosine, sine), float32 [positions, head_dim / 2] on the CPU, of position * theta^(-2 i / head_dim), the
    frequencies scaled by `scaling`.

    Every device reads the bits that the host made, and every host makes the same: a frequency is the float64 nearest to the
    power, an angle the float64 nearest to the product, and `cos_sin` rounds once.
    """
    frequencies = [root_of_power(theta, i, head_dim) for i in range(0, head_dim, 2)]
    if scaling:
        frequencies = [scaling(f) for f in frequencies]
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return cos_sin(angles)


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the float32 nearest to cos and sin of float64 angles in 0 .. 2^40, of any shape, on the CPU.

    Computed to 2^-74 of the value: only one that lies closer than that to half-way between two float32 could be rounded the
    other way, and then on every machine. Elementwise: invariant to everything.
    """
    if angles.dtype != torch.float64:
        raise UnsupportedError(f"cos_sin takes angles in float64, got {angles.dtype}")
    return host.cos_sin(angles)


def norm_rope(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: Table,
    positions: torch.Tensor,
    kv_heads: int,
    *,
    groups: torch.Tensor | None = None,
    stored: Stored | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (q, k) = rope(rms_norm(heads of x)), rounded after the norm and after rope, as by two ops one after the
    other: the outputs and the gradients have their bits. Rope: (a, b) -> (a cos - b sin, b cos + a sin) for the halves
    a, b of each head.

    x [T, heads + kv_heads, head_dim], the query heads first (a slice of the fused projection; the last dimension contiguous);
    weights: of the query norm and the key norm, each [head_dim], or None for no norm, with eps and groups as in
    rms_norm; table: (cosine, sine) [P, head_dim / 2] from `rope_table`; positions int32 [T], each below P -> [T, heads,
    head_dim], [T, kv_heads, head_dim]. Rope's is rotary position embedding (Su et al. 2021, section 3.2), halves convention of
    Hugging Face. `stored`: also does store_rows(keys, values, slots, k, new_values), where no gradient is asked for.

    Invariant to batch, position in it, and shard of the heads.
    """
    if x.dim() != 3 or x.shape[2] != 2 * table[0].shape[1] or not 0 < kv_heads < x.shape[1]:
        raise UnsupportedError(
            f"norm_rope: x {tuple(x.shape)} with {kv_heads} key heads against a table for head_dim {2 * table[0].shape[1]}"
        )
    trained = weights is not None and any(w.requires_grad for w in weights)
    if groups is None and trained and torch.is_grad_enabled():
        raise UnsupportedError("norm_rope: the weights need gradients, so `groups` must say where each group ends")
    if stored is None:
        return _NormRope.apply(x, *(weights or (None, None)), eps, *table, positions, kv_heads, groups)
    _check_stored(x, kv_heads, stored)
    rounded = None if weights is None else (weights[0].to(x.dtype), weights[1].to(x.dtype))
    op = same_device("norm_rope", x, table[0], positions, *stored)
    return op.forward(x, rounded, eps, table, positions, kv_heads, stored)


def _check_stored(x: torch.Tensor, kv_heads: int, stored: Stored) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UnsupportedError("norm_rope: what is stored has no gradient, and x asks for one")
    keys, values, _, new_values = stored
    rows = (kv_heads, x.shape[2])
    if keys.shape != values.shape or keys.shape[1:] != rows or new_values.shape != (len(x), *rows):
        raise UnsupportedError(
            f"norm_rope: {len(x)} keys of {rows} and values {tuple(new_values.shape)} into {tuple(keys.shape)}, "
            f"{tuple(values.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()) or {keys.dtype, values.dtype, new_values.dtype} != {
        x.dtype
    }:
        raise UnsupportedError(f"norm_rope: a {keys.dtype} cache must be contiguous and take {x.dtype} rows")


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q_weight, k_weight, eps, cosine, sine, positions, kv_heads, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, q_weight, k_weight, cosine, sine, positions, groups)
        ctx.eps, ctx.kv_heads = eps, kv_heads
        ctx.weight_dtype = None if q_weight is None else gradient_dtype(q_weight)
        rounded = None if q_weight is None else (q_weight.to(x.dtype), k_weight.to(x.dtype))
        op = same_device("norm_rope", x, cosine, positions)
        return op.forward(x, rounded, eps, (cosine, sine), positions, kv_heads)

    @staticmethod
    def backward(ctx, dq, dk):  # type: ignore[no-untyped-def]
        x, q_weight, k_weight, cosine, sine, positions, groups = ctx.saved_tensors
        rounded = None if q_weight is None else (q_weight.to(x.dtype), k_weight.to(x.dtype))
        op = same_device("norm_rope", x, dq, dk)
        dx, d_rows = op.backward(x, rounded, ctx.eps, (cosine, sine), positions, dq, dk)
        if d_rows is None or groups is None:
            return dx, *(None,) * 8
        d_weights = (sum_rows(d.flatten(0, 1), groups * d.shape[1]).to(ctx.weight_dtype) for d in d_rows)
        return dx, *d_weights, *(None,) * 6
