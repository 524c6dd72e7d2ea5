"""GPU embedding. The gradient has the order of cpu.c: a chain over the tokens of an id in a leaf, and the tree over leaves with
+0 for a leaf that never uses the id. Its bits are the CPU's."""

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import cdiv, launch, next_power_of_2
from kernels.gpu.overlap import early, previous_done


@early
@triton.jit
def gather_kernel(ids, weight, y, first_id, vocab, n, BLOCK: tl.constexpr):
    """Copies BLOCK columns of one token's row; an id of another shard gives +0, and -0 becomes +0."""
    previous_done()
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(ids + t) - first_id
    inside = (v >= 0) & (v < vocab)
    row = tl.load(weight + v * n + i, mask=inside & (i < n), other=0.0)
    tl.store(y + t * n + i, (row.to(tl.float32) + 0.0).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def scatter_kernel(d_y, order, first, leaf, d_weight, n, leaves, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the gradient of one id over its tokens: a chain in each leaf, and the tree over leaves."""
    v = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(first + v)
    end = tl.load(first + v + 1)
    root = tl.zeros((BLOCK,), tl.float32)
    if at < end:
        level = tl.arange(0, LEVELS)
        parked = tl.zeros((LEVELS, BLOCK), tl.float32)  # a binary counter: one row a level
        for j in range(0, leaves):
            node = tl.zeros((BLOCK,), tl.float32)
            here = at < end
            while here:
                token = tl.load(order + at)
                if tl.load(leaf + token) == j:
                    node = node + tl.load(d_y + token * n + i, mask=i < n, other=0.0).to(tl.float32)
                    at += 1
                    here = at < end
                else:
                    here = False
            open_ = True
            for up in tl.static_range(LEVELS):
                full = (j >> up) % 2 == 1
                waiting = tl.sum(tl.where(level[:, None] == up, parked, 0.0), 0)
                parked = tl.where((level[:, None] == up) & (open_ & (not full)), node[None, :], parked)
                node = tl.where(open_ & full, waiting + node, node)
                open_ = open_ & full
        for up in tl.static_range(LEVELS):
            waiting = tl.sum(tl.where(level[:, None] == up, parked, 0.0), 0)
            root = tl.where((leaves >> up) % 2 == 1, waiting + root, root)
    tl.store(d_weight + v * n + i, root, mask=i < n)


def gather(ids: torch.Tensor, weight: torch.Tensor, first_id: int) -> torch.Tensor:
    """Copies the rows of weight [V, N] for ids [T]; an id outside first_id .. first_id + V - 1 gives +0, and -0 becomes +0."""
    n = weight.shape[1]
    y = weight.new_empty(ids.numel(), n)
    if ids.numel():
        launch(
            gather_kernel,
            (ids.numel(), cdiv(n, 1024)),
            ids.contiguous(),
            weight.contiguous(),
            y,
            first_id,
            weight.shape[0],
            n,
            1024,
        )
    return y


def scatter(dy: torch.Tensor, ids: torch.Tensor, groups: torch.Tensor, vocab: int) -> torch.Tensor:
    """Returns float32 [vocab, n]; ids int64 [T]. An id outside this shard's vocabulary adds to no row."""
    (T, n), leaves = dy.shape, groups.numel() - 1
    ordered, order = torch.sort(ids, stable=True)
    first = torch.searchsorted(ordered, torch.arange(vocab + 1, device=ids.device))
    leaf = torch.searchsorted(groups[1:].contiguous(), torch.arange(T, device=ids.device), right=True)
    dw = dy.new_empty(vocab, n, dtype=torch.float32)
    levels = next_power_of_2(max(2, leaves.bit_length()))
    launch(scatter_kernel, (vocab, cdiv(n, 1024)), dy.contiguous(), order, first, leaf, dw, n, leaves, levels, 1024)
    return dw
