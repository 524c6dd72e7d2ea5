"""Causal attention over paged keys: one op for training, prefill, chunked prefill and decoding."""

from dataclasses import dataclass

import torch

from kernels.device import UnsupportedError, same_device


@dataclass(frozen=True)
class Pages:
    """Says where the keys of each query token lie. Position p of sequence s is row table[s, p // size] * size + p % size."""

    table: torch.Tensor  # int32 [sequences, pages of the longest]; lines contiguous
    size: int  # tokens of a page
    sequence: torch.Tensor  # int32 [T], the sequence of each query token
    position: torch.Tensor  # int32 [T], its absolute position: keys 0 .. position are attended
    starts: torch.Tensor  # int64 [sequences + 1], query tokens of each sequence
    packed: bool = False  # the identity table of Layout.packed: keys of sequence s are rows starts[s] .. starts[s + 1]


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """Computes o[t] = softmax(scale q[t] . k[0..position]) v, grouped heads, rounded once to the dtype of q.

    q [T, heads, head_dim]; keys, values [rows, kv_heads, head_dim], rows addressed through `pages`; heads a multiple of
    kv_heads. Keys are walked in blocks of KEY_BLOCK from position 0, splits of KEY_SPLIT merge in ascending order
    (kernels.tree); online softmax of Milakov and Gimelshein 2018, algorithm 3, in powers of two.

    Gradients (to q, keys and values) are defined where the keys are the activations of the same tokens: the identity page
    table of `Layout.packed`. Each sequence's is a sum of its own (queries ascending), so it is independent of the batch.

    Invariant to batch, position in it, page layout, chunk of the query, and shard of the heads.
    """
    _, heads, head_dim = q.shape
    if heads % keys.shape[1] or keys.shape != values.shape or keys.shape[2] != head_dim:
        raise UnsupportedError(f"attention: q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}")
    if head_dim % 16 or head_dim > 512:
        raise UnsupportedError(f"attention: head_dim {head_dim} must be a multiple of 16 and at most 512")
    if not torch.is_grad_enabled():
        return same_device("attention", q, keys, values).forward(q, keys, values, pages, scale)[0]
    return _Attention.apply(q, keys, values, pages, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, keys, values, pages, scale):  # type: ignore[no-untyped-def]
        out, lse = same_device("attention", q, keys, values).forward(q, keys, values, pages, scale)
        ctx.save_for_backward(q, keys, values, out, lse)
        ctx.pages, ctx.scale = pages, scale
        return out

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        q, keys, values, out, lse = ctx.saved_tensors
        if not ctx.pages.packed or keys.shape[0] != q.shape[0]:
            raise UnsupportedError("attention: gradients need the identity page table (Layout.packed)")
        backward = same_device("attention", q, d_out).backward
        return (*backward(q, keys, values, out, lse, d_out, ctx.pages.starts, ctx.scale), None, None)
