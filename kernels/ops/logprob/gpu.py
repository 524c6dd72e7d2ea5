"""GPU log-probabilities.

z = logits * (1 / temperature). A leaf of the vocabulary is walked in tiles of 128 columns from its start. The node of a tile
is (m, s): m the maximum of z, s the sum of 2^((z - m) log2 e) folded by halves over the 128 columns (missing ones are +0).
Tiles of a leaf merge in one ascending chain, leaves up the tree.

`linear` never holds logits: the matmul's epilogue leaves one node a tile. `backward` computes the logits again, leaves their
gradient in bf16 (each leaf of the vocabulary padded to whole tiles with zeros) and multiplies that twice.
"""

import torch
import triton
import triton.language as tl

from kernels.device import UnsupportedError
from kernels.gpu.arithmetic import LOG2_E, fold, log_f32
from kernels.ops.matmul import grouped, many_rows, order
from kernels.ops.matmul.gpu import contract
from kernels.ops.matmul.ring import BK, reachable
from kernels.tree import leaf_bounds

TILE = 128
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def tile_nodes(logits, inverse, nodes, R, stride, width, tiles, ROWS: tl.constexpr, TILE: tl.constexpr):
    """nodes [R, leaves * tiles, 2] of logits [R, leaves * width]."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0)
    column = tile % tiles * TILE + tl.arange(0, TILE)
    there = row < R
    inside = there[:, None] & (column[None, :] < width)
    x = tl.load(logits + row[:, None] * stride + (tile // tiles * width + column)[None, :], mask=inside, other=0.0)
    t = tl.load(inverse + row, mask=there, other=1.0)
    z = tl.where(inside, x * t[:, None], float("-inf"))
    top = tl.max(z, 1)
    safe = tl.where(there, top, 0.0)
    total = fold(tl.exp2((z - safe[:, None]) * LOG2_E))
    node = nodes + (row * tl.num_programs(0) + tile) * 2
    tl.store(node, top, mask=there)
    tl.store(node + 1, total, mask=there)


@triton.jit
def merge(m, s, m1, s1):
    top = tl.maximum(m, m1)
    left = tl.exp2((m - top) * LOG2_E)
    right = tl.exp2((m1 - top) * LOG2_E)
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


def _merged(tiles: torch.Tensor, leaves: int) -> torch.Tensor:
    rows, count = tiles.shape[0], tiles.shape[1] // leaves
    out = tiles.new_empty(rows, leaves, 2)
    merge_tiles[(triton.cdiv(rows * leaves, 64),)](tiles, out, rows * leaves, count, 64, num_warps=2, **_EXACT)
    return out


def nodes(logits: torch.Tensor, temperature: torch.Tensor, leaves: int) -> torch.Tensor:
    rows, vocab = logits.shape
    width = vocab // leaves
    count = triton.cdiv(width, TILE)
    tiles = logits.new_empty(rows, leaves * count, 2)
    if rows == 0:
        return tiles.new_empty(0, leaves, 2)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    height = 16 if rows >= 16 else 1
    tile_nodes[(leaves * count, triton.cdiv(rows, height))](
        logits,
        1.0 / temperature,
        tiles,
        rows,
        logits.stride(0),
        width,
        count,
        height,
        TILE,
        num_warps=4 if height > 1 else 1,
        **_EXACT,
    )
    return _merged(tiles, leaves)


def logprob(nodes: torch.Tensor, picked: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, leaves, _ = nodes.shape
    out, lse = nodes.new_empty(rows), nodes.new_empty(rows)
    if rows:
        root_logprob[(triton.cdiv(rows, 64),)](
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


def _rows(
    x: torch.Tensor, temperature: torch.Tensor, targets: torch.Tensor, **more: torch.Tensor
) -> dict[str, torch.Tensor]:
    inverse = 1.0 / temperature
    return {"inverse": inverse, "target": targets, "lse": inverse, "scale": inverse, "picked": inverse} | more


def linear(
    x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor, leaves: int
) -> tuple[torch.Tensor, torch.Tensor]:
    (rows, n), vocab = x.shape, head.shape[0]
    if rows == 0:
        return temperature.new_empty(0), temperature.new_empty(0)
    if not _fused(x, head, leaves):
        logits = contract(x, head, leaf_bounds(n, leaves), torch.float32)
        return logprob(nodes(logits, temperature, leaves), logits.gather(1, targets[:, None])[:, 0], temperature)
    count = triton.cdiv(vocab // leaves, TILE)
    tiles, picked = temperature.new_empty(rows, leaves * count, 2), temperature.new_empty(rows)
    many_rows.launch(
        x,
        head,
        picked,
        rows,
        vocab,
        leaves,
        epilogue=1,
        parts=leaves,
        nodes=tiles,
        rows=_rows(x, temperature, targets, picked=picked),
    )
    return logprob(_merged(tiles, leaves), picked, temperature)


@triton.jit
def gradient(logits, d_logits, inverse, lse, target, scale, width, padded, BLOCK: tl.constexpr):
    """d_logits [R, leaves * padded] = scale (1[target] - e^(z - lse)), zeros past the end of a leaf."""
    row = tl.program_id(0).to(tl.int64)
    leaf = tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    v = leaf * width + column
    z = tl.load(logits + row * width * tl.num_programs(1) + v, mask=inside, other=0.0) * tl.load(inverse + row)
    p = tl.exp2((z - tl.load(lse + row)) * LOG2_E)
    g = tl.load(scale + row)
    d = tl.where(v == tl.load(target + row), g * (1.0 - p), -(g * p))
    to = d_logits + (row * tl.num_programs(1) + leaf) * padded + column
    tl.store(to, tl.where(inside, d, 0.0).to(d_logits.dtype.element_ty), mask=column < padded)


def backward(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor,
    leaves: int,
    groups: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    (rows, n), vocab = x.shape, head.shape[0]
    width = vocab // leaves
    padded = triton.cdiv(width, TILE) * TILE
    scale = d_logprob.float() * (1.0 / temperature)
    d_logits = x.new_empty(rows, leaves * padded)
    row = _rows(x, temperature, targets, lse=lse, scale=scale)
    if fused := _fused(x, head, leaves) and rows > 0:
        many_rows.launch(x, head, d_logits, rows, vocab, leaves, epilogue=2, parts=leaves, rows=row)
    elif rows:
        logits = contract(x, head, leaf_bounds(n, leaves), torch.float32)
        gradient[(rows, leaves, triton.cdiv(padded, 1024))](
            logits, d_logits, row["inverse"], lse, targets, scale, width, padded, 1024, **_EXACT
        )
    dx = x.new_empty(rows, n)
    if fused and n % 8 == 0:
        many_rows.launch(d_logits, head, dx, rows, n, leaves, b_mn=True, apart=padded)
    elif rows:
        flat = d_logits.view(rows, leaves, padded)[:, :, :width].reshape(rows, vocab)
        dx = order.contract(flat, head.T, leaf_bounds(vocab, leaves)).to(x.dtype)
    if groups is None:
        return dx, None
    if rows == 0:
        return dx, head.new_zeros(head.shape, dtype=torch.float32)
    dw = head.new_empty(head.shape, dtype=torch.float32)
    for i in range(leaves):
        part, to = d_logits[:, i * padded : i * padded + width], dw[i * width : (i + 1) * width]
        if reachable(part) and reachable(x):
            grouped.launch(part, x, groups, to)
        else:
            to.copy_(contract(part.T, x.T, groups, torch.float32))
    return dx, dw
