"""CPU dispatch: see cpu.c. Rows lie without a gap where `align` is 1."""

import torch

from kernels.cpu import call
from kernels.ops.dispatch import Slots
from kernels.ops.route.cpu import forward as route


def dispatch(ids: torch.Tensor, first: int, experts: int, align: int, groups: torch.Tensor, capacity: int) -> Slots:
    """Gives each choice ids [T, k] of experts first .. first + experts - 1 a row, by expert and then token; aligns each
    expert."""
    tokens, k = ids.shape
    mine = (ids >= first) & (ids < first + experts)
    expert = torch.where(mine, ids - first, experts).long()
    counts = torch.bincount(expert.flatten(), minlength=experts + 1)[:experts]
    blocks = (counts + align - 1) // align
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0) * align])
    of, token = torch.empty(tokens, k, dtype=torch.int32), torch.full((capacity,), -1, dtype=torch.int32)
    call("place", ids, of, token, starts[:-1].clone(), tokens, k, first, experts)
    leaf = torch.searchsorted(groups[1:].contiguous(), torch.arange(tokens), right=True)[:, None].expand(tokens, k)
    leaves = groups.numel() - 1
    cells = (expert * leaves + leaf.clamp(max=leaves - 1))[mine]
    sizes = torch.bincount(cells, minlength=experts * leaves)[: experts * leaves].view(experts, leaves)
    bounds = torch.cat([starts[:-1, None], starts[:-1, None] + sizes.cumsum(1)], 1)
    block_expert = torch.full((capacity // align,), -1, dtype=torch.int32)
    block_expert[: int(blocks.sum())] = torch.repeat_interleave(torch.arange(experts), blocks).int()
    return Slots(of, token, starts.int(), bounds, block_expert, align, first, experts)


def route_and_dispatch(
    logits: torch.Tensor, k: int, normalize: bool, first: int, experts: int, align: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, Slots]:
    """Routes logits [T, E] and dispatches the choices; returns ids and weights [T, k], and the slots."""
    ids, weights = route(logits, k, normalize)
    whole = torch.tensor([0, logits.shape[0]])
    return ids, weights, dispatch(ids, first, experts, align, whole, capacity)


def gather(x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Copies the rows of x [T, N] to their slots [capacity, N]; a row that is nobody's is zero."""
    rows, used = x.new_zeros(slots.capacity, x.shape[1]), slots.token >= 0
    rows[used] = x[slots.token[used].long()]
    return rows


def gather_backward(d_rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sums the rows of each token's choices, in their order, in float32: [capacity, N] -> [T, N]."""
    tokens, k = slots.of.shape
    d_x = torch.empty(tokens, d_rows.shape[1])
    call("gather_backward", d_rows.float(), slots.of, d_x, tokens, k, d_rows.shape[1])
    return d_x.to(d_rows.dtype)
