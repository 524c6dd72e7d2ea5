"""Norm and rope in one pass change no bit."""

import pytest
import torch

from kernels.ops import norm_rope, rms_norm, rope_table
from tests.bits import assert_same_bits


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_ops_one_after_the_other(
    device: torch.device, dtype: torch.dtype, norm: bool
) -> None:
    """Of both outputs, from a slice of the fused projection."""
    generator = torch.Generator().manual_seed(0)
    wide, dq, dk = (torch.randn(37, n, 64, generator=generator).to(dtype).to(device) for n in (12, 8, 2))
    weights = [torch.randn(64, generator=generator).to(device) for _ in range(2)]
    table = tuple(t.to(device) for t in rope_table(100, 64, 1e4))
    positions = torch.randint(100, (37,), generator=generator, dtype=torch.int32).to(device)
    groups = torch.tensor([0, 10, 37], device=device)

    def one_pass(x, *w):  # type: ignore[no-untyped-def]
        return norm_rope(x[:, :10], w or None, 1e-6, table, positions, 2, groups=groups)

    def two(x, *w):  # type: ignore[no-untyped-def]
        parts = [x[:, :8], x[:, 8:10]]
        if w:
            parts = [rms_norm(p, one, 1e-6, groups=groups) for p, one in zip(parts, w, strict=True)]
        return norm_rope(torch.cat(parts, 1), None, 1e-6, table, positions, 2)

    results = []
    for op in (one_pass, two):
        leaves = [t.detach().clone().requires_grad_() for t in (wide, *(weights if norm else ()))]
        outputs = op(*leaves)
        torch.autograd.backward(outputs, (dq, dk))
        results.append([y.detach() for y in outputs] + [t.grad for t in leaves])
    for name, a, b in zip(("q", "k", "dx", "dw of q", "dw of k"), *results, strict=False):
        assert_same_bits(a, b, name)
