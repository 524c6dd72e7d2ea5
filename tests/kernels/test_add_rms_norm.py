"""The residual add inside a norm changes no bit."""

import pytest
import torch

from kernels.ops import add_rms_norm, rms_norm
from tests.bits import assert_same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_residual_add_is_the_add_and_the_norm(device: torch.device, dtype: torch.dtype) -> None:
    """Outputs and gradients, through the norm alone, the sum alone, and both."""
    generator = torch.Generator().manual_seed(0)
    x, delta, dy, ds = (torch.randn(37, 1500, generator=generator).to(dtype).to(device) for _ in range(4))
    weight = torch.randn(1500, generator=generator).to(device)
    groups = torch.tensor([0, 10, 37], device=device)

    def fused(x, delta, weight):  # type: ignore[no-untyped-def]
        return add_rms_norm(x, delta, weight, 1e-6, groups=groups)

    def unfused(x, delta, weight):  # type: ignore[no-untyped-def]
        total = x + delta
        return rms_norm(total, weight, 1e-6, groups=groups), total

    for seeds in ((dy, None), (None, ds), (dy, ds)):
        results = []
        for op in (fused, unfused):
            leaves = [t.detach().clone().requires_grad_() for t in (x, delta, weight)]
            outputs = op(*leaves)
            pairs = [(y, g) for y, g in zip(outputs, seeds, strict=True) if g is not None]
            torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
            results.append([y.detach() for y in outputs] + [t.grad for t in leaves])
        for name, a, b in zip(("norm", "sum", "dx", "d delta", "dw"), *results, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert_same_bits(a, b, f"{name} from {[s is not None for s in seeds]}")
