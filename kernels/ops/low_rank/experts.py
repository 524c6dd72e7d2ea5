"""The gradient of the adapters of a mixture's experts, each expert's from the rows that it computes."""

import torch

from kernels.device import UnsupportedError, gradient_dtype, same_device
from kernels.ops.dispatch import Slots
from kernels.ops.low_rank import nearest


def with_expert_low_rank_gradient(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, stripe: int, slots: Slots
) -> torch.Tensor:
    """Returns y = `expert_matmul`(x, w') as it is, and gives a and b their gradients through w' = w + scale b a, expert by
    expert, as `with_low_rank_gradient` does.

    y [capacity, N], x [capacity, K]. An expert has one matrix, or with a `stripe` two, whose rows stand in turns of so many: a
    [experts * matrices * r, K] has an a of each, b [experts * N, r] its rows as w' has them. u = x a^T and v = dy b are one
    leaf each, as all that an expert computes, rounded to the dtype of x, then times `scale` and rounded again; da and db,
    float32 or what the tensors ask for, sum over the rows of an expert, one leaf for each group of sequences (`slots.bounds`);
    of an expert that no token chose they are +0.

    Raises UnsupportedError where shapes do not fit.
    """
    matrices, rank = 2 if stripe else 1, b.shape[1]
    if b.shape[0] != slots.experts * y.shape[1] or a.shape != (slots.experts * matrices * rank, x.shape[1]):
        raise UnsupportedError(
            f"experts: y {tuple(y.shape)}, x {tuple(x.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} do not fit "
            f"{slots.experts} experts of {matrices} matrices"
        )
    return _ExpertLowRank.apply(y, x, a, b, scale, stripe, slots)  # type: ignore[no-any-return]


class _ExpertLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, scale, stripe, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, a, b)
        ctx.how, ctx.dtypes = (scale, stripe, slots), (gradient_dtype(a), gradient_dtype(b))
        ctx.mark_dirty(y)  # it is y itself, not a view of it, that has another gradient function now
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        da, db = expert_low_rank_gradients(dy, *ctx.saved_tensors, *ctx.how)
        return dy, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None, None, None


def expert_low_rank_gradients(
    dy: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, stripe: int, slots: Slots
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes (da, db), float32, as `with_expert_low_rank_gradient` says."""
    op, rank, scale = same_device("experts", dy, x), b.shape[1], nearest(scale)

    def scaled(rows: torch.Tensor) -> torch.Tensor:
        return (rows.float() * scale).to(x.dtype)

    of_dy, of_b = _apart(dy.to(x.dtype), stripe, 1), _apart(b.to(x.dtype), stripe, 0)
    u = [part.contiguous() for part in scaled(op.product(x, a.to(x.dtype), slots)).split(rank, 1)]
    v = [scaled(op.input_gradient(d, part, slots)) for d, part in zip(of_dy, of_b, strict=True)]
    db = _together([op.weight_gradient(d, part, slots) for d, part in zip(of_dy, u, strict=True)], stripe)
    return op.weight_gradient(torch.cat(v, 1), x, slots), db


def _apart(x: torch.Tensor, stripe: int, axis: int) -> list[torch.Tensor]:
    """Returns the two matrices whose rows stand in turns of `stripe` along `axis` of [n, m], contiguous; x itself without."""
    if not stripe:
        return [x.contiguous()]
    turns = x.unflatten(axis, (-1, 2, stripe))
    return [turns.select(axis + 1, i).flatten(axis, axis + 1).contiguous() for i in range(2)]


def _together(parts: list[torch.Tensor], stripe: int) -> torch.Tensor:
    """Undoes `_apart` along axis 0."""
    if not stripe:
        return parts[0]
    return torch.stack([part.unflatten(0, (-1, stripe)) for part in parts], 1).flatten(0, 2)
