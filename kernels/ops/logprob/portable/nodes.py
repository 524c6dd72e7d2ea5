"""Log-probabilities in plain Triton: the nodes of a log-sum-exp from logits, their root, and the gradient of the logits.

z = logits * (1 / temperature). A leaf of the vocabulary is walked in tiles of 128 columns from its start. The node of a tile
is (m, s): m the maximum of z, s the sum of 2^((z - m) log2 e) folded by halves over the 128 columns (missing ones are +0).
Tiles of a leaf merge in one ascending chain, leaves up the tree. What a forward pass keeps are the exponentials
e = 2^((z - m) log2 e), rounded to bf16 (each leaf of the vocabulary padded to whole tiles with zeros), and

    d[v] = -(g (e[v] 2^((m - lse) log2 e)))        d[target] = g (1 - 2^((z[target] - lse) log2 e)), z in float32
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import LOG2_E, fold, log_f32
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import early, previous_done

TILE = 128
_EXACT = {"enable_fp_fusion": False}


class Exponentials(NamedTuple):
    """Holds what a forward pass keeps for the gradient, which uses up `values`."""

    values: torch.Tensor  # bf16 [R, leaves * tiles * TILE]
    nodes: torch.Tensor  # float32 [R, leaves * tiles, 2]
    picked: torch.Tensor  # float32 [R]: the target's logit


@triton.jit
def finite(m):
    """Returns m, or 0 where every logit is -inf: none of the tokens may be drawn, and the node is (-inf, 0)."""
    return tl.where(m == float("-inf"), 0.0, m)


@early
@triton.jit
def tile_nodes(
    logits, inverse, nodes, values, R, stride, width, tiles, KEEP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Computes nodes [R, leaves * tiles, 2] of logits [R, leaves * width], and where KEEP the exponentials."""
    previous_done()
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
    """Merges two nodes (maximum, sum) of a log-sum-exp into one."""
    top = tl.maximum(m, m1)
    safe = finite(top)
    left = tl.exp2((m - safe) * LOG2_E)
    right = tl.exp2((m1 - safe) * LOG2_E)
    return top, tl.fma(s, left, s1 * right)


@early
@triton.jit
def merge_tiles(nodes, leaf_nodes, count, tiles, BLOCK: tl.constexpr):
    """Merges, in one ascending chain, the tiles of each of `count` leaves."""
    previous_done()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    node = nodes + at * tiles * 2
    m = tl.load(node, mask=there, other=0.0)
    s = tl.load(node + 1, mask=there, other=1.0)
    for i in tl.range(1, tiles, loop_unroll_factor=8):  # so that some loads are on their way at once
        m1 = tl.load(node + 2 * i, mask=there, other=0.0)
        s1 = tl.load(node + 2 * i + 1, mask=there, other=1.0)
        m, s = merge(m, s, m1, s1)
    tl.store(leaf_nodes + at * 2, m, mask=there)
    tl.store(leaf_nodes + at * 2 + 1, s, mask=there)


@triton.jit
def subtree(node, there, LEAVES: tl.constexpr):
    """Folds LEAVES nodes in memory, a power of two, into one in tree order."""
    if LEAVES == 1:
        return tl.load(node, mask=there, other=0.0), tl.load(node + 1, mask=there, other=1.0)
    else:
        m, s = subtree(node, there, LEAVES // 2)
        m1, s1 = subtree(node + LEAVES, there, LEAVES // 2)
        return merge(m, s, m1, s1)


@early
@triton.jit
def root_logprob(nodes, picked, inverse, out, lse, R, LEAVES: tl.constexpr, BLOCK: tl.constexpr):
    """Folds the nodes of BLOCK rows to the root and stores log-probs and log-sum-exps."""
    previous_done()
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < R
    m, s = subtree(nodes + row * LEAVES * 2, there, LEAVES)
    ln = log_f32(s)
    z = tl.load(picked + row, mask=there, other=0.0) * tl.load(inverse + row, mask=there, other=1.0)
    tl.store(out + row, (z - m) - ln, mask=there)
    tl.store(lse + row, m + ln, mask=there)


def merged(tiles: torch.Tensor, leaves: int) -> torch.Tensor:
    """Merges the nodes of tiles [R, leaves * tiles, 2] into those of their leaves [R, leaves, 2]."""
    rows, count = tiles.shape[0], tiles.shape[1] // leaves
    out = tiles.new_empty(rows, leaves, 2)
    run(merge_tiles, (cdiv(rows * leaves, 64),), tiles, out, rows * leaves, count, 64, num_warps=2, **_EXACT)
    return out


def tiles_of(logits: torch.Tensor, temperature: torch.Tensor, leaves: int, keep: torch.Tensor | None) -> torch.Tensor:
    """Returns the nodes [R, leaves * tiles, 2] of float32 logits [R, V]; their exponentials go to `keep`, if that is given."""
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
    """Returns the nodes [R, leaves, 2] of float32 logits [R, V]."""
    if logits.shape[0] == 0:
        return logits.new_empty(0, leaves, 2)
    return merged(tiles_of(logits, temperature, leaves, None), leaves)


def logprob(nodes: torch.Tensor, picked: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (log-probability, log-sum-exp), float32 [R] each, of the token whose logit is `picked`."""
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


@triton.jit
def gradient(
    values, nodes, picked, inverse, lse, target, scale, width, tiles, total, TILES: tl.constexpr, TILE: tl.constexpr
):
    """Overwrites values [R, total tiles of TILE] with the gradient of the logits: exponentials -> scale (1[target] - e^(z -
    lse)), zeros past the end of a leaf."""
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
    """Turns `kept.values`, in place, into the gradient of the logits: bf16 [R, leaves * tiles * TILE]."""
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
