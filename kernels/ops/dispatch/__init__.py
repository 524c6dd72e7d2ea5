"""Sorts the choices of tokens by expert: rows of one expert lie together, in ascending token.

A permutation and integers: no bit of a value is decided here but by the sum of `gather`'s gradient.
"""

from dataclasses import dataclass

import torch

from kernels.device import UnsupportedError, same_device


@dataclass(frozen=True)
class Loose:
    """Says where rows stand that are read once and by few: nobody sorts them, so that one kernel routes and places them.

    With a `stride`, those of expert e begin at e * stride, `counts[e]` of them in any order; `starts`, `bounds` and
    `block_expert` of the slots say nothing. With `each`, the number of choices a token, choice c of all stands alone at row
    c * align, and `block_expert[c]` is its expert, -1 if that is another rank's."""

    stride: int = 0
    counts: torch.Tensor | None = None  # int32 [experts]
    each: int = 0


@dataclass(frozen=True)
class Slots:
    """Says where the choices of T tokens stand among the rows of this rank's experts. The rows of expert e begin at starts[e],
    a multiple of `align`, and there is no host that knows how many there are: `capacity` rows are enough for any routing."""

    of: torch.Tensor  # int32 [T, k]: the row of each choice; -1: an expert of another rank
    token: torch.Tensor  # int32 [capacity]: whose each row is; -1: nobody's
    starts: torch.Tensor  # int32 [experts + 1]: the last one is the number of rows in use
    bounds: torch.Tensor  # int64 [experts, G + 1]: rows of each group of tokens, a leaf of the gradient
    block_expert: torch.Tensor  # int32 [capacity / align]: the expert of each `align` rows that are in use
    align: int
    first: int  # the first of this rank's experts
    experts: int
    loose: Loose = Loose()

    @property
    def capacity(self) -> int:
        """Counts the rows that are held, used or not."""
        return self.token.numel()


def capacity(tokens: int, k: int, experts: int, align: int) -> int:
    """Counts rows that are enough for `tokens` x `k` choices among `experts`, those of each rounded up to `align`."""
    choices = tokens * min(k, experts)
    full = choices + min(experts, choices) * (align - 1)
    return max(align, min(full, experts * -(-tokens // align) * align) // align * align)


def dispatch(ids: torch.Tensor, first: int, experts: int, align: int, groups: torch.Tensor) -> Slots:
    """Finds the rows of the choices `ids` int32 [T, k] (ascending for each token, as `route` gives them) among experts
    first .. first + experts - 1. `groups`: int64 token offsets [G + 1] of the gradient's leaves."""
    if ids.dim() != 2 or ids.dtype != torch.int32:
        raise UnsupportedError(f"dispatch: ids {ids.dtype} {tuple(ids.shape)} must be int32 [tokens, k]")
    rows = capacity(ids.shape[0], ids.shape[1], experts, align)
    return same_device("dispatch", ids, groups).dispatch(ids.contiguous(), first, experts, align, groups, rows)


def route_and_dispatch(
    logits: torch.Tensor, k: int, normalize: bool, first: int, experts: int, align: int
) -> tuple[torch.Tensor, torch.Tensor, Slots]:
    """Does `route` and `dispatch` in one call, where no gradient is asked for; returns (ids, weights, slots), the slots without
    bounds of groups. Rows may stand elsewhere (`Loose`), which no sum of a row depends on."""
    tokens = logits.shape[0]
    room = capacity(tokens, k, experts, align)
    implementation = same_device("dispatch", logits)
    return implementation.route_and_dispatch(logits.contiguous(), k, normalize, first, experts, align, room)


def gather(x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Copies rows[s] = x[slots.token[s]]: x [T, n] -> [capacity, n]; a row that is nobody's holds anything.

    Gradient: dx[t] = the sum of d_rows over the rows of token t, in ascending expert, from zero, in float32, rounded once."""
    return _Gather.apply(x, slots)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slots):  # type: ignore[no-untyped-def]
        ctx.slots = slots
        return same_device("dispatch", x, slots.of).gather(x.contiguous(), slots)

    @staticmethod
    def backward(ctx, d_rows):  # type: ignore[no-untyped-def]
        return same_device("dispatch", d_rows, ctx.slots.of).gather_backward(d_rows.contiguous(), ctx.slots), None
