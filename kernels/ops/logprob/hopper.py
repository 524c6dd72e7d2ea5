"""Log-probabilities on Hopper, fused with the LM head.

`linear` never holds logits: the matmul's epilogue leaves one node a tile and, where a gradient will be asked for, the
exponentials. `backward` turns them in place into the gradient of the logits, again bf16, and multiplies that twice
(portable/nodes.py says what these are).

Rows that draw from a part of the vocabulary have their logits in memory, a few rows at a time: those that are not kept become
-inf, whose exponential is 0, and what is left for the gradient looks like that of any other row. Of a head with rows that stand
for no token, the tile that both kinds share is computed again without them; tiles of nothing else are (-inf, 0).
"""

from collections.abc import Callable, Sequence

import torch

from kernels.device import UnsupportedError
from kernels.gpu.hopper.ring import BK, reachable
from kernels.ops.logprob import portable
from kernels.ops.logprob.portable.nodes import TILE, Exponentials, logit_gradient, logprob, merged, nodes, tiles_of
from kernels.ops.matmul.hopper import contract, grouped, many_rows
from kernels.ops.truncate import Truncation, exclude_padding
from kernels.tree import leaf_bounds

__all__ = ["backward", "linear", "logprob", "nodes"]


def _fused(x: torch.Tensor, head: torch.Tensor, leaves: int) -> bool:
    if x.dtype != torch.bfloat16 or head.dtype != torch.bfloat16:
        raise UnsupportedError(
            f"log-prob on a GPU takes bfloat16, got {x.dtype} and {head.dtype}: set the model's dtype"
        )
    return leaves in (1, 2, 4, 8) and x.shape[1] % (leaves * BK) == 0 and reachable(x) and reachable(head)


def linear(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    keep: bool = False,
    truncation: Truncation | None = None,
    vocabulary: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Exponentials | None]:
    """Returns (log-probability, log-sum-exp) of each target, and, where `keep`, what its gradient needs."""
    rows, vocab = x.shape[0], head.shape[0]
    if not _fused(x, head, leaves) or not rows:
        given = (x, head, targets, temperature, leaves, keep, truncation, vocabulary)
        return portable.linear(*given, contract=contract)
    vocabulary = vocab if vocabulary is None else vocabulary
    kept = portable.room(x, vocab, leaves, keep)
    if truncation is None or len(truncation) < rows:
        many_rows.launch(
            x,
            head,
            kept.values if keep else kept.picked,
            rows,
            vocab,
            leaves,
            epilogue=2 if keep else 1,
            parts=leaves,
            vocabulary=many_rows.Vocabulary(1.0 / temperature, targets.contiguous(), kept.picked, kept.nodes),
        )
        _exclude_padding(x, head, temperature, leaves, vocabulary, kept.values if keep else None, kept.nodes)
    if truncation is not None:
        for part in truncation.parts():
            portable.truncated_rows(contract, x, head, targets, temperature, leaves, part, vocabulary, kept)
    return *logprob(merged(kept.nodes, leaves), kept.picked, temperature), kept if keep else None


def _exclude_padding(
    x: torch.Tensor,
    head: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    vocabulary: int,
    values: torch.Tensor | None,
    tiles: torch.Tensor,
) -> None:
    """Writes in the last two the tiles that hold ids from `vocabulary` on, as `tiles_of` makes them of logits of -inf."""
    width = head.shape[0] // leaves
    leaf, column = divmod(vocabulary, width)
    if leaf == leaves:
        return
    first = leaf * (tiles.shape[1] // leaves) + column // TILE
    tiles[:, first:, 0], tiles[:, first:, 1] = -torch.inf, 0.0
    if values is not None:
        values[:, first * TILE :] = 0.0
    if column % TILE == 0:
        return
    start = vocabulary - column % TILE
    ids = head[start : min(start + TILE, (leaf + 1) * width)]
    logits = contract(x, ids, leaf_bounds(x.shape[1], leaves), torch.float32)
    exclude_padding(logits, vocabulary, start)
    some = None if values is None else values.new_empty(len(x), TILE)
    tiles[:, first : first + 1] = tiles_of(logits, temperature, 1, some)
    if values is not None:
        values[:, first * TILE : (first + 1) * TILE] = some


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the gradients to x and head. `kept` is used up: a second gradient of one forward passes None, and the
    exponentials are computed again. `told`: is shown the gradient of the logits, bfloat16, leaf by leaf: [R, V / leaves]
    each."""
    (rows, n), vocab = x.shape, head.shape[0]
    if not _fused(x, head, leaves) or not rows:
        given = (x, head, targets, temperature, lse, d_logprob, leaves, groups, kept, truncation, vocabulary, told)
        return portable.backward(*given, contract=contract)
    if kept is None:
        kept = linear(x, head, targets, temperature, leaves, True, truncation, vocabulary)[2]
    d_logits = logit_gradient(kept, targets, temperature, lse, d_logprob, vocab, leaves)
    width, padded = vocab // leaves, d_logits.shape[1] // leaves
    if told:
        told([d_logits[:, i * padded : i * padded + width] for i in range(leaves)])
    dx = x.new_empty(rows, n)
    many_rows.launch(d_logits, head, dx, rows, n, leaves, b_mn=True, apart=padded)
    if groups is None:
        return dx, None
    dw = head.new_empty(head.shape, dtype=torch.float32)
    for i in range(leaves):
        grouped.launch(d_logits[:, i * padded : i * padded + width], x, groups, dw[i * width : (i + 1) * width])
    return dx, dw
