"""Log-probabilities in plain Triton. `nodes.py` says what is kept for the gradient, and in which order everything is summed.

Logits are in memory, one leaf of the vocabulary and `at_once` rows at a time. Rows that draw from a part of the vocabulary have
all of theirs there, fewer rows at a time; those that are not kept become -inf, whose exponential is 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from kernels.device import UnsupportedError
from kernels.gpu.launch import cdiv
from kernels.ops.logprob.portable.nodes import TILE, Exponentials, logit_gradient, logprob, merged, nodes, tiles_of
from kernels.ops.matmul.portable import contract
from kernels.ops.truncate import Truncation, exclude_padding, truncate
from kernels.tree import leaf_bounds

__all__ = ["backward", "linear", "logprob", "nodes"]

LOGITS = 80 * 2**20
"""Of one leaf of the vocabulary, in memory at once."""
Contract = Callable[..., torch.Tensor]


def linear(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    keep: bool = False,
    truncation: Truncation | None = None,
    vocabulary: int | None = None,
    contract: Contract = contract,
) -> tuple[torch.Tensor, torch.Tensor, Exponentials | None]:
    """Returns (log-probability, log-sum-exp) of each target, and, where `keep`, what its gradient needs. `contract`: the
    matmul of a family."""
    if x.dtype != torch.bfloat16 or head.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"log-prob on a GPU takes bfloat16, got {x.dtype} and {head.dtype}: set the model's dtype"
        )
    rows, vocab = x.shape[0], head.shape[0]
    if rows == 0:
        return temperature.new_empty(0), temperature.new_empty(0), None
    vocabulary = vocab if vocabulary is None else vocabulary
    kept = room(x, vocab, leaves, keep)
    if truncation is None or len(truncation) < rows:
        step = at_once(vocab // leaves)
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            whole_rows(contract, x, head, targets, temperature, leaves, vocabulary, kept, part)
    if truncation is not None:
        for some in truncation.parts():
            truncated_rows(contract, x, head, targets, temperature, leaves, some, vocabulary, kept)
    return *logprob(merged(kept.nodes, leaves), kept.picked, temperature), kept if keep else None


def at_once(width: int) -> int:
    """Returns the number of rows whose logits of a leaf of so many columns are in memory at once, 8,192 at most."""
    return min(8192, max(128, LOGITS // width // 128 * 128))


def room(x: torch.Tensor, vocab: int, leaves: int, keep: bool) -> Exponentials:
    """Makes room for what a forward pass computes of the rows of x; without `keep` none for the exponentials."""
    rows, count = x.shape[0], leaves * cdiv(vocab // leaves, TILE)
    values = x.new_empty(rows if keep else 0, count * TILE)
    return Exponentials(
        values, x.new_empty(rows, count, 2, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    )


def whole_rows(
    contract: Contract,
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    vocabulary: int,
    to: Exponentials,
    part: slice,
) -> None:
    """Computes the rows `part`, one leaf of the vocabulary after the other."""
    width, count = head.shape[0] // leaves, to.nodes.shape[1] // leaves
    bounds, target = leaf_bounds(x.shape[1], leaves), targets[part]
    for leaf in range(leaves):
        logits = contract(x[part], head[leaf * width : (leaf + 1) * width], bounds, torch.float32)
        exclude_padding(logits, vocabulary, leaf * width)
        local = target - leaf * width
        own = logits.gather(1, local.clamp(0, width - 1)[:, None])[:, 0]
        to.picked[part] = torch.where((local >= 0) & (local < width), own, to.picked[part])
        tiles, columns = slice(leaf * count, (leaf + 1) * count), slice(leaf * count * TILE, (leaf + 1) * count * TILE)
        some = to.values.new_empty(len(logits), count * TILE) if len(to.values) else None
        to.nodes[part, tiles] = tiles_of(logits, temperature[part], 1, some)
        if some is not None:
            to.values[part, columns] = some


def truncated_rows(
    contract: Contract,
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    part: Truncation,
    vocabulary: int,
    to: Exponentials,
) -> None:
    """Computes the rows of `part`."""
    rows = part.rows
    logits = contract(x[rows], head, leaf_bounds(x.shape[1], leaves), torch.float32)
    exclude_padding(logits, vocabulary)
    truncate(logits, temperature[rows], replace(part, rows=torch.arange(len(part), device=rows.device)))
    to.picked[rows] = logits.gather(1, targets[rows][:, None])[:, 0]
    some = to.values.new_empty(len(part), to.values.shape[1]) if len(to.values) else None
    to.nodes[rows] = tiles_of(logits, temperature[rows], leaves, some)
    if some is not None:
        to.values[rows] = some


def backward(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor,
    leaves: int,
    groups: torch.Tensor | None,
    kept: Exponentials | None,
    truncation: Truncation | None = None,
    vocabulary: int | None = None,
    told: Callable[[Sequence[torch.Tensor]], None] | None = None,
    contract: Contract = contract,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the gradients to x and head. `kept` is used up: a second gradient of one forward passes None, and the
    exponentials are computed again. `told`: is shown the gradient of the logits, bfloat16, leaf by leaf: [R, V / leaves]
    each."""
    (rows, n), vocab = x.shape, head.shape[0]
    if rows == 0:
        if told:
            told(x.new_empty(0, vocab).chunk(leaves, 1))
        return x.new_empty(0, n), None if groups is None else head.new_zeros(head.shape, dtype=torch.float32)
    if kept is None:
        kept = linear(x, head, targets, temperature, leaves, True, truncation, vocabulary, contract)[2]
    assert kept is not None
    d_logits = logit_gradient(kept, targets, temperature, lse, d_logprob, vocab, leaves)
    width, padded = vocab // leaves, d_logits.shape[1] // leaves
    d = d_logits.view(rows, leaves, padded)[:, :, :width]
    if told:
        told(d.unbind(1))
    dx = contract(d.reshape(rows, vocab), head.T, leaf_bounds(vocab, leaves), x.dtype)
    if groups is None:
        return dx, None
    dw = head.new_empty(head.shape, dtype=torch.float32)
    for leaf in range(leaves):
        dw[leaf * width : (leaf + 1) * width] = contract(d[:, leaf].T, x.T, groups, torch.float32)
    return dx, dw
