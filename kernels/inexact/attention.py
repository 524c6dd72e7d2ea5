"""Causal attention as torch has it."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import ops
from kernels.ops.attention import Pages

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""Fastest first, on a Hopper card."""


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float) -> torch.Tensor:
    """Computes what `kernels.ops.attention` does, without its order. Packed sequences of one length go to SDPA as a batch; of
    several lengths, one by one on a CPU and to torch's flash attention on a GPU. Keys in pages, for which torch has no op,
    take the exact one."""
    if not pages.packed:
        return ops.attention(q, keys, values, pages, scale)
    sequences, longest = pages.starts.numel() - 1, pages.table.shape[1]  # both known without waiting for the device
    if sequences * longest == len(q):
        return _batched(q, keys, values, sequences, scale)
    if q.is_cuda:
        return _varlen(q, keys, values, pages.starts.int(), longest, scale)
    lengths = pages.starts.diff().tolist()
    parts = zip(q.split(lengths), keys.split(lengths), values.split(lengths), strict=True)
    return torch.cat([_batched(*part, 1, scale) for part in parts])


def _batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: int, scale: float) -> torch.Tensor:
    q, k, v = (t.unflatten(0, (sequences, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    return _Varlen.apply(q, k, v, starts, longest, scale)


class _Varlen(torch.autograd.Function):
    """torch.nn.attention.varlen takes as many key heads as query heads; the op under it takes fewer."""

    @staticmethod
    def forward(ctx, q, k, v, starts, longest, scale):  # type: ignore[no-untyped-def]
        out, lse, *rng, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, starts, *rng)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, starts, *rng = ctx.saved_tensors
        longest = ctx.longest
        gradients = torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), q, k, v, out, lse, starts, starts, longest, longest, 0.0, True, *rng, scale=ctx.scale
        )
        return *gradients, None, None, None
