"""The policy loss: exact where the sampler's log-probs are the trainer's, clipped as in the paper elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bits import assert_same_bits
from trainer.loss import LikelihoodLoss, LossRows, PolicyLoss

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
LOGPROBS = st.floats(-60, 0, width=32)
FACTORS = st.floats(-1e4, 1e4, width=32)


def rows(logprobs: torch.Tensor, advantages: torch.Tensor) -> LossRows:
    nothing = torch.zeros(len(logprobs), dtype=torch.int64)
    return LossRows(logprobs, advantages, nothing, nothing)


def naive(logprob: float, rollout: float, advantage: float, clip: PolicyLoss) -> tuple[float, float]:
    """(loss, its derivative) in float64: -min(ratio A, clip(ratio) A)."""
    x = torch.tensor(logprob, dtype=torch.float64, requires_grad=True)
    ratio = torch.exp(x - rollout)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip.low, 1 + clip.high) * advantage)
    loss.backward()
    return loss.item(), x.grad.item()


@PROPERTY
@given(drawn=st.lists(st.tuples(LOGPROBS, FACTORS, st.floats(0, 1, width=32)), min_size=1, max_size=8))
def test_equal_log_probs_give_exactly_the_policy_gradient(drawn: list[tuple[float, float, float]]) -> None:
    """The ratio is 1.0, so the loss is -A and the gradient -A * weight: bits, no tolerance."""
    logprobs, advantages, weights = (torch.tensor(column) for column in zip(*drawn, strict=True))
    logprobs.requires_grad_()
    losses, clipped = PolicyLoss()(logprobs, rows(logprobs.detach().clone(), advantages))
    assert not clipped.any()
    assert_same_bits(losses, -advantages)
    (losses * weights).sum().backward()
    assert_same_bits(logprobs.grad + 0.0, -advantages * weights + 0.0)  # -0 and 0 are the same gradient


@PROPERTY
@given(LOGPROBS, st.floats(-1, 1, width=32), FACTORS, st.floats(0.05, 0.9), st.floats(0.05, 2))
def test_clipping_is_that_of_the_paper(logprob: float, gap: float, advantage: float, low: float, high: float) -> None:
    clip = PolicyLoss(low, high)
    x = torch.tensor([logprob], requires_grad=True)
    rollout = torch.tensor([logprob - gap])
    ratio = torch.exp(x.detach().double() - rollout.double()).item()
    if min(abs(ratio - 1 - high), abs(ratio - 1 + low)) < 1e-5:
        return  # rounding decides which side of a bound this is
    losses, clipped = clip(x, rows(rollout, torch.tensor([advantage])))
    losses.sum().backward()
    loss, slope = naive(x.item(), rollout.item(), advantage, clip)
    assert losses.item() == pytest.approx(loss, rel=2e-6, abs=1e-30)
    assert x.grad.item() == pytest.approx(slope, rel=2e-6, abs=1e-30)
    assert clipped.item() == (ratio > 1 + high if advantage >= 0 else ratio < 1 - low)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped", "slope"),
    [
        (1.5, 2.0, True, 0.0),  # too far up, and more would be rewarded: stop
        (1.5, -2.0, False, 3.0),  # too far up, and it is punished: come back
        (0.5, 2.0, False, -1.0),
        (0.5, -2.0, True, 0.0),
        (1.25, 2.0, False, -2.5),  # inside 1 + high, outside 1 + low
        (1.0, 0.0, False, 0.0),
    ],
)
def test_both_sides_of_the_clip(ratio: float, advantage: float, clipped: bool, slope: float) -> None:
    x = torch.tensor([0.0], requires_grad=True)
    losses, mask = PolicyLoss(0.2, 0.28)(x, rows(-torch.tensor([ratio]).log(), torch.tensor([advantage])))
    losses.sum().backward()
    assert mask.item() == clipped
    assert x.grad.item() == pytest.approx(slope, rel=1e-6)
    bound = 1.28 if advantage > 0 else 0.8
    assert losses.item() == pytest.approx(-(bound if clipped else ratio) * advantage, rel=1e-6)


def test_likelihood() -> None:
    x = torch.tensor([-1.5, -0.0, -60.0], requires_grad=True)
    losses, clipped = LikelihoodLoss()(x, rows(x.detach(), torch.ones(3)))
    assert not clipped.any()
    assert_same_bits(losses, torch.tensor([1.5, 0.0, 60.0]))
    losses.sum().backward()
    assert_same_bits(x.grad, -torch.ones(3))
