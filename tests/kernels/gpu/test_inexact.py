"""The contrast (`numerics=fast`): the same functions as the exact ops, up to rounding."""

import pytest
import torch

from kernels.inexact import logprob as inexact
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows,width,vocabulary", [(1, 128, 32), (70, 512, 2000), (2100, 128, 288)])
def test_log_probs_and_their_gradients(rows: int, width: int, vocabulary: int) -> None:
    x = torch.randn(rows, width, device="cuda").bfloat16().requires_grad_()
    head = (torch.randn(vocabulary, width, device="cuda") / width**0.5).bfloat16().requires_grad_()
    targets, temperature = torch.randint(vocabulary, (rows,), device="cuda"), torch.rand(rows, device="cuda") + 0.5
    got = inexact.linear_logprob(x, head, targets, temperature, 1)
    scores = (x.double() @ head.double().T) / temperature[:, None]
    want = scores.log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert relative_error(got, want) < 2**-8
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), (x, head)), torch.autograd.grad(want.sum(), (x, head)), strict=True
    ):
        assert relative_error(mine, theirs) < 2**-6
