"""CPU embedding: a gather is a copy, so torch does it; the gradient is cpu.c."""

import torch

from kernels.cpu import call
from kernels.device import UnsupportedError, check_groups


def gather(ids: torch.Tensor, weight: torch.Tensor, first_id: int) -> torch.Tensor:
    """Copies the rows of weight [V, N] for ids [T]; an id outside first_id .. first_id + V - 1 gives +0, and -0 becomes +0."""
    local = ids - first_id
    inside = (local >= 0) & (local < weight.shape[0])
    rows = weight[local.clamp(0, weight.shape[0] - 1)] + 0.0
    return torch.where(inside[:, None], rows, torch.zeros((), dtype=weight.dtype))


def scatter(dy: torch.Tensor, ids: torch.Tensor, groups: torch.Tensor, vocab: int) -> torch.Tensor:
    """Returns float32 [vocab, n]; ids int64 [T], all of this shard."""
    check_groups("embedding", groups, ids.numel())
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise UnsupportedError("embedding: the gradient is defined on the whole vocabulary, not on a shard of it")
    order = torch.sort(ids, stable=True).indices
    first = torch.zeros(vocab + 1, dtype=torch.int64)
    first[1:] = torch.bincount(ids, minlength=vocab).cumsum(0)
    leaf = torch.repeat_interleave(torch.arange(groups.numel() - 1, dtype=torch.int32), groups.diff())
    dw = torch.empty(vocab, dy.shape[1])
    call("embedding_backward", dy.float().contiguous(), order, first, leaf, dw, vocab, dy.shape[1], groups.numel() - 1)
    return dw
