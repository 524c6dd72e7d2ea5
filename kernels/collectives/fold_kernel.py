"""The fold of `kernels.tree` over tensors on a GPU: every part is read once and the root written once."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, launch

BLOCK = 2048


@triton.jit
def root_of(x, n, inside, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Returns the root over rows FIRST .. FIRST + COUNT - 1; a power of two of them, so that half the rows are a subtree."""
    if COUNT == 1:
        return tl.load(x + FIRST * n, inside, other=0.0)
    else:
        left = root_of(x, n, inside, FIRST, COUNT // 2)
        right = root_of(x, n, inside, FIRST + COUNT // 2, COUNT // 2)
        return left + right


@triton.jit
def fold_kernel(parts, out, n, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds COUNT tensors of n elements in the tree's order and rounds the root once to the dtype of `out`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    root = root_of(parts + at, tl.cast(n, tl.int64), at < n, 0, COUNT)
    tl.store(out + at, root.to(out.dtype.element_ty), at < n)


def fold_rows(parts: torch.Tensor, out: torch.Tensor) -> None:
    """Computes out [n] = the tree sum of the rows of float32 `parts` [count, n], rounded once to the dtype of `out`."""
    count, n = parts.shape
    if n:
        launch(fold_kernel, (cdiv(n, BLOCK),), parts, out, n, count, BLOCK, num_warps=8)
