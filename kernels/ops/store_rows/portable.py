"""GPU store_rows: one launch for both."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, heads_contiguous
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done


@early
@triton.jit
def store_kernel(keys, values, slots, new_keys, new_values, width, kt, vt, BLOCK: tl.constexpr):
    """Writes BLOCK columns of one token's new key and value."""
    previous_done()
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = tl.load(slots + t) * width + i
    tl.store(keys + to, tl.load(new_keys + t * kt + i, mask=i < width), mask=i < width)
    tl.store(values + to, tl.load(new_values + t * vt + i, mask=i < width), mask=i < width)


def store(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
) -> None:
    """Writes new keys and values [T, KV, D] to the rows `slots` of the pools, in place."""
    tokens, width = new_keys.shape[0], keys.shape[1] * keys.shape[2]
    new_keys, new_values = heads_contiguous(new_keys), heads_contiguous(new_values)
    if tokens:
        run(
            store_kernel,
            (tokens, cdiv(width, 1024)),
            keys,
            values,
            slots.contiguous(),
            new_keys,
            new_values,
            width,
            new_keys.stride(0),
            new_values.stride(0),
            1024,
        )
