"""GPU log-probabilities.

z = logits * (1 / temperature). A leaf of the vocabulary is walked in tiles of 128 columns from its start. The node of a tile
is (m, s): m the maximum of z, s the sum of 2^((z - m) log2 e) folded by halves over the 128 columns (missing ones are +0).
Tiles of a leaf merge in one ascending chain, leaves up the tree.

`linear` never holds logits: the matmul's epilogue leaves one node a tile and, where a gradient will be asked for, the
exponentials e = 2^((z - m) log2 e), rounded to bf16 (each leaf of the vocabulary padded to whole tiles with zeros). `backward`
turns them in place into the gradient of the logits, again bf16, and multiplies that twice:

    d[v] = -(g (e[v] 2^((m - lse) log2 e)))        d[target] = g (1 - 2^((z[target] - lse) log2 e)), z in float32

Rows that draw from a part of the vocabulary have their logits in memory, a few rows at a time: those that are not kept become
-inf, whose exponential is 0, and what is left for the gradient looks like that of any other row. Of a head with rows that stand
for no token, the tile that both kinds share is computed again without them; tiles of nothing else are (-inf, 0).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.device import UnsupportedError
from kernels.gpu.arithmetic import LOG2_E, fold, log_f32
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.ops.matmul import grouped, many_rows, order
from kernels.ops.matmul.gpu import contract
from kernels.ops.matmul.ring import BK, reachable
from kernels.ops.truncate import Truncation, exclude_padding, truncate
from kernels.tree import leaf_bounds

TILE = 128
_EXACT = {"enable_fp_fusion": False}


class Exponentials(NamedTuple):
    """What `linear` keeps for the gradient. `backward` uses up `values`."""

    values: torch.Tensor  # bf16 [R, leaves * tiles * TILE]
    nodes: torch.Tensor  # float32 [R, leaves * tiles, 2]
    picked: torch.Tensor  # float32 [R]: the target's logit


@triton.jit
def finite(m):
    """m, or 0 where every logit is -inf: none of the tokens may be drawn, and the node is (-inf, 0)."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def tile_nodes(
    logits, inverse, nodes, values, R, stride, width, tiles, KEEP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """nodes [R, leaves * tiles, 2] of logits [R, leaves * width], and where KEEP the exponentials."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0)
    column = tile % tiles * TILE + tl.arange(0, TILE)
    there = row < R
    inside = there[:, None] & (column[None, :] < width)
    x = tl.load(logits + row[:, None] * stride + (tile // tiles * width + column)[None, :], mask=inside, other=0.0)
    t = tl.load(inverse + row, mask=there, other=1.0)
    z = tl.where(inside, x * t[:, None], float("-inf"))
    top = tl.max(z, 1)
    safe = tl.where(there, finite(top), 0.0)
    e = tl.exp2((z - safe[:, None]) * LOG2_E)
    node = nodes + (row * tl.num_programs(0) + tile) * 2
    tl.store(node, top, mask=there)
    tl.store(node + 1, fold(e), mask=there)
    if KEEP:
        to = values + (row[:, None] * tl.num_programs(0) + tile) * TILE + tl.arange(0, TILE)[None, :]
        tl.store(to, e.to(values.dtype.element_ty), mask=there[:, None])


@triton.jit
def merge(m, s, m1, s1):
    top = tl.maximum(m, m1)
    safe = finite(top)
    left = tl.exp2((m - safe) * LOG2_E)
    right = tl.exp2((m1 - safe) * LOG2_E)
    return top, tl.fma(s, left, s1 * right)


@triton.jit
def merge_tiles(nodes, leaf_nodes, count, tiles, BLOCK: tl.constexpr):
    """One ascending chain over the tiles of each of `count` leaves."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    node = nodes + at * tiles * 2
    m = tl.load(node, mask=there, other=0.0)
    s = tl.load(node + 1, mask=there, other=1.0)
    for i in range(1, tiles):
        m1 = tl.load(node + 2 * i, mask=there, other=0.0)
        s1 = tl.load(node + 2 * i + 1, mask=there, other=1.0)
        m, s = merge(m, s, m1, s1)
    tl.store(leaf_nodes + at * 2, m, mask=there)
    tl.store(leaf_nodes + at * 2 + 1, s, mask=there)


@triton.jit
def subtree(node, there, LEAVES: tl.constexpr):
    if LEAVES == 1:
        return tl.load(node, mask=there, other=0.0), tl.load(node + 1, mask=there, other=1.0)
    else:
        m, s = subtree(node, there, LEAVES // 2)
        m1, s1 = subtree(node + LEAVES, there, LEAVES // 2)
        return merge(m, s, m1, s1)


@triton.jit
def root_logprob(nodes, picked, inverse, out, lse, R, LEAVES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < R
    m, s = subtree(nodes + row * LEAVES * 2, there, LEAVES)
    ln = log_f32(s)
    z = tl.load(picked + row, mask=there, other=0.0) * tl.load(inverse + row, mask=there, other=1.0)
    tl.store(out + row, (z - m) - ln, mask=there)
    tl.store(lse + row, m + ln, mask=there)


def merged(tiles: torch.Tensor, leaves: int) -> torch.Tensor:
    """The nodes [R, leaves, 2] of the leaves, from those of their tiles."""
    rows, count = tiles.shape[0], tiles.shape[1] // leaves
    out = tiles.new_empty(rows, leaves, 2)
    run(merge_tiles, (cdiv(rows * leaves, 64),), tiles, out, rows * leaves, count, 64, num_warps=2, **_EXACT)
    return out


def tiles_of(logits: torch.Tensor, temperature: torch.Tensor, leaves: int, keep: torch.Tensor | None) -> torch.Tensor:
    """The nodes [R, leaves * tiles, 2] of float32 logits [R, V]; their exponentials go to `keep`, if that is given."""
    rows, vocab = logits.shape
    width = vocab // leaves
    count = cdiv(width, TILE)
    tiles = logits.new_empty(rows, leaves * count, 2)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    height = 16 if rows >= 16 else 1
    run(
        tile_nodes,
        (leaves * count, cdiv(rows, height)),
        logits,
        1.0 / temperature,
        tiles,
        tiles if keep is None else keep,
        rows,
        logits.stride(0),
        width,
        count,
        keep is not None,
        height,
        TILE,
        num_warps=4 if height > 1 else 1,
        **_EXACT,
    )
    return tiles


def nodes(logits: torch.Tensor, temperature: torch.Tensor, leaves: int) -> torch.Tensor:
    if logits.shape[0] == 0:
        return logits.new_empty(0, leaves, 2)
    return merged(tiles_of(logits, temperature, leaves, None), leaves)


def logprob(nodes: torch.Tensor, picked: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, leaves, _ = nodes.shape
    out, lse = nodes.new_empty(rows), nodes.new_empty(rows)
    if rows:
        run(
            root_logprob,
            (cdiv(rows, 64),),
            nodes.contiguous(),
            picked.contiguous(),
            1.0 / temperature,
            out,
            lse,
            rows,
            leaves,
            64,
            num_warps=2,
            **_EXACT,
        )
    return out, lse


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
    """(log-probability, log-sum-exp) of each target, and, where `keep`, what its gradient needs."""
    (rows, n), vocab = x.shape, head.shape[0]
    vocabulary = vocab if vocabulary is None else vocabulary
    if rows == 0:
        return temperature.new_empty(0), temperature.new_empty(0), None
    fused, count = _fused(x, head, leaves), cdiv(vocab // leaves, TILE)
    cut = 0 if truncation is None else len(truncation)
    values = x.new_empty(rows, leaves * count * TILE) if keep else None
    tiles, picked = temperature.new_empty(rows, leaves * count, 2), temperature.new_empty(rows)
    if cut < rows and fused:
        many_rows.launch(
            x,
            head,
            picked if values is None else values,
            rows,
            vocab,
            leaves,
            epilogue=1 if values is None else 2,
            parts=leaves,
            vocabulary=many_rows.Vocabulary(1.0 / temperature, targets.contiguous(), picked, tiles),
        )
        _exclude_padding(x, head, temperature, leaves, vocabulary, values, tiles)
    elif cut < rows:
        logits = contract(x, head, leaf_bounds(n, leaves), torch.float32)
        exclude_padding(logits, vocabulary)
        picked = logits.gather(1, targets[:, None])[:, 0]
        tiles = tiles_of(logits, temperature, leaves, values)
    if truncation is not None:
        for part in truncation.parts():
            _truncated_rows(x, head, targets, temperature, leaves, part, vocabulary, values, tiles, picked)
    kept = None if values is None else Exponentials(values, tiles, picked)
    return *logprob(merged(tiles, leaves), picked, temperature), kept


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


def _truncated_rows(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    part: Truncation,
    vocabulary: int,
    values: torch.Tensor | None,
    tiles: torch.Tensor,
    picked: torch.Tensor,
) -> None:
    """Writes the rows of `part` in the last three."""
    rows = part.rows
    logits = contract(x[rows], head, leaf_bounds(x.shape[1], leaves), torch.float32)
    exclude_padding(logits, vocabulary)
    truncate(logits, temperature[rows], replace(part, rows=torch.arange(len(part), device=rows.device)))
    picked[rows] = logits.gather(1, targets[rows][:, None])[:, 0]
    some = None if values is None else values.new_empty(len(part), values.shape[1])
    tiles[rows] = tiles_of(logits, temperature[rows], leaves, some)
    if values is not None:
        values[rows] = some


@triton.jit
def gradient(
    values, nodes, picked, inverse, lse, target, scale, width, tiles, total, TILES: tl.constexpr, TILE: tl.constexpr
):
    """values [R, total tiles of TILE]: exponentials -> scale (1[target] - e^(z - lse)), zeros past the end of a leaf."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    there = tile < total
    column = (tile % tiles)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    v = (tile // tiles)[:, None] * width + column
    at = values + row * total * TILE + tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    e = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    m = tl.load(nodes + (row * total + tile) * 2, mask=there, other=0.0)
    l, g = tl.load(lse + row), tl.load(scale + row)
    z = tl.load(picked + row) * tl.load(inverse + row)
    own = g * (1.0 - tl.exp2((z - l) * LOG2_E))
    d = -(g * (e * tl.exp2((m - l) * LOG2_E)[:, None]))
    d = tl.where(v == tl.load(target + row), own, d)
    tl.store(at, tl.where(column < width, d, 0.0).to(values.dtype.element_ty), mask=there[:, None])


def logit_gradient(
    kept: Exponentials,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor,
    vocab: int,
    leaves: int,
) -> torch.Tensor:
    """bf16 [R, leaves * tiles * TILE], in place of `kept.values`."""
    total, inverse = kept.nodes.shape[1], 1.0 / temperature
    run(
        gradient,
        (len(targets), cdiv(total, 16)),
        *kept,
        inverse,
        lse,
        targets.contiguous(),
        d_logprob.float() * inverse,
        vocab // leaves,
        total // leaves,
        total,
        16,
        TILE,
        num_warps=8,
        **_EXACT,
    )
    return kept.values


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`kept` is used up: a second gradient of one forward passes None, and the exponentials are computed again."""
    (rows, n), vocab = x.shape, head.shape[0]
    if rows == 0:
        return x.new_empty(0, n), None if groups is None else head.new_zeros(head.shape, dtype=torch.float32)
    if kept is None:
        kept = linear(x, head, targets, temperature, leaves, True, truncation, vocabulary)[2]
    d_logits = logit_gradient(kept, targets, temperature, lse, d_logprob, vocab, leaves)
    width = vocab // leaves
    padded = d_logits.shape[1] // leaves
    if _fused(x, head, leaves):
        dx = x.new_empty(rows, n)
        many_rows.launch(d_logits, head, dx, rows, n, leaves, b_mn=True, apart=padded)
    else:
        flat = d_logits.view(rows, leaves, padded)[:, :, :width].reshape(rows, vocab)
        dx = order.contract(flat, head.T, leaf_bounds(vocab, leaves)).to(x.dtype)
    if groups is None:
        return dx, None
    dw = head.new_empty(head.shape, dtype=torch.float32)
    for i in range(leaves):
        part, to = d_logits[:, i * padded : i * padded + width], dw[i * width : (i + 1) * width]
        if reachable(x):
            grouped.launch(part, x, groups, to)
        else:
            to.copy_(contract(part.T, x.T, groups, torch.float32))
    return dx, dw
