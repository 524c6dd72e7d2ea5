"""The losses: exact where the sampler's log-probs are the trainer's, as the papers' formulas in float64 elsewhere, and the same
bits however sequences are cut into micro-batches."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bits import assert_same_bits
from trainer.loss import (
    KlEstimator,
    LikelihoodLoss,
    Loss,
    LossRows,
    PolicyLoss,
    PreferenceLoss,
    RegularisedLoss,
    SequencePolicyLoss,
    ValueLoss,
    WeightedLikelihoodLoss,
    sequence_means,
)

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)
SEVERAL = settings(PROPERTY, max_examples=60)
LOGPROBS = st.floats(-60, 0, width=32)
FACTORS = st.floats(-1e4, 1e4, width=32)


def rows(logprobs: torch.Tensor, advantages: torch.Tensor) -> LossRows:
    nothing = torch.zeros(len(logprobs), dtype=torch.int64)
    return LossRows(logprobs, advantages, nothing, nothing, *torch.zeros(3, len(advantages)))


def naive(logprob: float, rollout: float, advantage: float, clip: PolicyLoss) -> tuple[float, float]:
    """(loss, its derivative) in float64: -min(ratio A, clip(ratio) A)."""
    x = torch.tensor(logprob, dtype=torch.float64, requires_grad=True)
    ratio = torch.exp(x - rollout)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip.low, 1 + clip.high) * advantage)
    loss.backward()
    return loss.item(), x.grad.item()


@pytest.mark.parametrize("loss", [PolicyLoss(), SequencePolicyLoss(), WeightedLikelihoodLoss()])
@PROPERTY
@given(drawn=st.lists(st.tuples(LOGPROBS, FACTORS, st.floats(0, 1, width=32)), min_size=1, max_size=8))
def test_equal_log_probs_give_exactly_the_policy_gradient(loss: Loss, drawn: list[tuple[float, float, float]]) -> None:
    """The ratio is 1.0, so the gradient is -A * weight, and the loss -A (or -A log p): bits, no tolerance."""
    logprobs, advantages, weights = (torch.tensor(column) for column in zip(*drawn, strict=True))
    logprobs.requires_grad_()
    losses, clipped = loss(logprobs, rows(logprobs.detach().clone(), advantages))
    assert not clipped.any()
    factor = logprobs if isinstance(loss, WeightedLikelihoodLoss) else 1
    assert_same_bits(losses, -advantages * factor)
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


# Whole sequences: GSPO, and CISPO beside it ---------------------------------------------------------------------------

TOKEN = st.tuples(
    LOGPROBS, st.floats(-0.0625, 0.0625, width=32)
)  # the trainer's log-prob, and by how much it is above the sampler's
SEQUENCES = st.lists(
    st.tuples(st.floats(-3, 3, width=32), st.lists(TOKEN, min_size=1, max_size=9)), min_size=1, max_size=6
)
Drawn = list[tuple[float, list[tuple[float, float]]]]


def batch(drawn: Drawn) -> tuple[torch.Tensor, LossRows]:
    """(the trainer's log-probs, the other columns) of sequences that are each worth one number."""
    counts = torch.tensor([len(tokens) for _, tokens in drawn])
    logprobs = torch.tensor([x for _, tokens in drawn for x, _ in tokens], requires_grad=True)
    gaps = torch.tensor([gap for _, tokens in drawn for _, gap in tokens])
    worth = torch.repeat_interleave(torch.tensor([a for a, _ in drawn]), counts)
    sequence = torch.repeat_interleave(torch.arange(len(drawn)), counts)
    sampled = logprobs.detach() - gaps
    beside = (sampled + 5 * gaps.flip(0), sampled + 3, sampled + 3 - 20 * gaps)
    return logprobs, LossRows(sampled, worth, torch.zeros_like(sequence), sequence, *beside)


def taken(logprobs: torch.Tensor, columns: LossRows, first: int, last: int) -> tuple[torch.Tensor, LossRows]:
    """Sequences first .. last, as a micro-batch of their own."""
    mine = (columns.sequence >= first) & (columns.sequence < last)
    part = LossRows(
        columns.logprobs[mine],
        columns.advantages[mine],
        columns.versions[mine],
        columns.sequence[mine] - first,
        columns.reference[mine],
        columns.values[mine],
        columns.returns[mine],
    )
    return logprobs.detach()[mine].requires_grad_(), part


@SEVERAL
@given(SEQUENCES, st.floats(1e-3, 0.05), st.floats(1e-3, 0.05))
def test_whole_sequences_as_in_the_paper(drawn: Drawn, low: float, high: float) -> None:
    """GSPO's equations 5 and 7 in float64, and the gradient that autograd finds of them."""
    logprobs, columns = batch(drawn)
    wide = logprobs.detach().double().requires_grad_()
    objective, counts = torch.zeros((), dtype=torch.float64), torch.bincount(columns.sequence)
    for i, (a, _) in enumerate(drawn):
        mine = columns.sequence == i
        s = torch.exp((wide[mine] - columns.logprobs[mine].double()).mean())
        if min(abs(s.item() - 1 - high), abs(s.item() - 1 + low)) < 1e-6:
            return  # rounding decides which side of a bound this is
        objective = objective + torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a) / len(drawn)
    (-objective).backward()
    losses, _ = SequencePolicyLoss(low, high)(logprobs, columns)
    weighted = losses * (1 / (len(drawn) * counts[columns.sequence]))
    weighted.sum().backward()
    assert weighted.sum().item() == pytest.approx(-objective.item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(logprobs.grad.double(), wide.grad, rtol=1e-5, atol=1e-9)


@SEVERAL
@given(SEQUENCES, st.floats(0.01, 1), st.floats(0.01, 4), st.floats(1, 40))
def test_clipped_weights_as_in_the_paper(drawn: Drawn, low: float, high: float, spread: float) -> None:
    """CISPO's objective in float64: a token that is clipped keeps the gradient of the bound."""
    logprobs, columns = batch([(a, [(x, gap * spread) for x, gap in tokens]) for a, tokens in drawn])
    wide = logprobs.detach().double().requires_grad_()
    ratio = torch.exp(wide.detach() - columns.logprobs.double())
    if (torch.minimum((ratio - 1 - high).abs(), (ratio - 1 + low).abs()) < 1e-5).any():
        return
    (-(ratio.clamp(1 - low, 1 + high) * columns.advantages.double() * wide).sum()).backward()
    losses, clipped = WeightedLikelihoodLoss(low, high)(logprobs, columns)
    losses.sum().backward()
    torch.testing.assert_close(logprobs.grad.double(), wide.grad, rtol=3e-6, atol=1e-30)
    torch.testing.assert_close(losses.double(), -wide.grad.neg() * wide, rtol=3e-6, atol=1e-30)
    assert clipped.tolist() == ((ratio > 1 + high) | (ratio < 1 - low)).tolist()


KL: dict[KlEstimator, Callable[[torch.Tensor], torch.Tensor]] = {  # Schulman 2020, of r = reference / policy
    "k1": lambda r: -r.log(),
    "k2": lambda r: r.log().square() / 2,
    "k3": lambda r: r - 1 - r.log(),
}


@pytest.mark.parametrize("estimator", KL)
@SEVERAL
@given(
    drawn=st.lists(st.tuples(LOGPROBS, st.floats(-6, 6, width=32)), min_size=1, max_size=9), coef=st.floats(0.001, 10)
)
def test_the_kl_term_as_in_the_paper(estimator: KlEstimator, drawn: list[tuple[float, float]], coef: float) -> None:
    """Estimate and gradient against float64, beside a policy loss that both have; errors in units of the largest term."""
    logprobs, gaps = (torch.tensor(column) for column in zip(*drawn, strict=True))
    logprobs.requires_grad_()
    seen = rows(logprobs.detach().clone(), torch.zeros(len(drawn)))
    seen = replace(seen, reference=logprobs.detach() - gaps)
    wide = logprobs.detach().double().requires_grad_()
    expected = coef * KL[estimator]((seen.reference.double() - wide).exp())
    expected.sum().backward()
    losses, clipped = RegularisedLoss(PolicyLoss(), coef, estimator)(logprobs, seen)
    losses.backward(torch.ones_like(losses))
    d = wide.detach() - seen.reference.double()
    largest = 8 * 2.0**-24 * coef * (1 + d.abs() + (d.square() if estimator == "k2" else (-d).exp()))
    assert ((losses.detach().double() - expected.detach()).abs() <= largest).all()
    assert ((logprobs.grad.double() - wide.grad).abs() <= largest).all()
    assert not clipped.any()


@SEVERAL
@given(st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=9), st.floats(0.001, 10))
def test_the_entropy_bonus_has_the_entropys_gradient(logits: list[float], coef: float) -> None:
    """Of the whole vocabulary, in the mean over its tokens, each drawn with its own probability: float64 autograd of -c H."""
    z = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    p = z.log_softmax(0)
    (coef * (p.exp() * p).sum()).backward()
    again = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logprobs = again.log_softmax(0).float()
    losses, clipped = RegularisedLoss(PolicyLoss(), entropy_coef=coef)(
        logprobs, rows(logprobs.detach(), torch.zeros(len(logits)))
    )
    losses.backward(p.detach().exp().float())
    assert ((again.grad - z.grad).abs() <= 64 * 2.0**-24 * coef).all() and not clipped.any()


def test_both_terms_are_added_once() -> None:
    """One slope for both, so that a row's gradient is the policy's plus it: no third sum whose order could matter."""
    x = torch.tensor([-1.5, -0.25], requires_grad=True)
    seen = replace(rows(x.detach() - 0.125, torch.tensor([1.0, -1.0])), reference=torch.tensor([-1.0, -2.0]))
    losses, _ = RegularisedLoss(PolicyLoss(), 0.5, "k2", 0.25)(x, seen)
    losses.backward(torch.ones(2))
    y = x.detach().requires_grad_()
    alone, _ = PolicyLoss()(y, seen)
    alone.backward(torch.ones(2))
    d = x.detach() - seen.reference
    assert_same_bits(x.grad, y.grad + (0.5 * d + 0.25 * x.detach()))
    assert_same_bits(losses, alone + (0.5 * (d * d * 0.5) + 0.25 * x.detach()))


@pytest.mark.parametrize(
    "loss",
    [
        PolicyLoss(),
        SequencePolicyLoss(0.001, 0.001),
        WeightedLikelihoodLoss(0.01, 0.01),
        RegularisedLoss(SequencePolicyLoss(0.001, 0.001), 0.1, "k3", 0.01),
        ValueLoss(0.2),
    ],
)
@SEVERAL
@given(SEQUENCES, st.data())
def test_the_cut_into_micro_batches_changes_no_bit(loss: Loss, drawn: Drawn, data: st.DataObject) -> None:
    """Forward and backward, wherever the cuts are: what else is in the micro-batch, and how long, is part of no sequence."""
    logprobs, columns = batch(drawn)
    whole, _ = loss(logprobs, columns)
    whole.backward(torch.ones_like(whole))
    cuts = data.draw(st.sets(st.integers(1, len(drawn))))
    bounds = sorted({0, len(drawn)} | cuts)
    losses, slopes = [], []
    for first, last in itertools.pairwise(bounds):
        mine, part = taken(logprobs, columns, first, last)
        one, _ = loss(mine, part)
        one.backward(torch.ones_like(one))
        losses.append(one.detach())
        slopes.append(mine.grad)
    assert_same_bits(torch.cat(losses), whole.detach())
    assert_same_bits(torch.cat(slopes), logprobs.grad)


VALUE = st.floats(-4, 4, width=32)


@SEVERAL
@given(st.lists(st.tuples(VALUE, VALUE, VALUE), min_size=1, max_size=9), st.sampled_from([0.0, 0.1, 0.5, 2.0]))
def test_the_values_error_as_in_the_paper(drawn: list[tuple[float, float, float]], clip: float) -> None:
    """The larger of the two squares, in float64, and the gradient that autograd finds of it."""
    values, old, returns = (torch.tensor(column) for column in zip(*drawn, strict=True))
    values.requires_grad_()
    wide = values.detach().double().requires_grad_()
    plain = (wide - returns.double()) ** 2
    near = (old.double() + (wide - old.double()).clamp(-clip, clip) - returns.double()) ** 2
    if clip and ((near - plain).abs() < 1e-5).logical_and((wide - old).abs() > clip).any():
        return  # rounding decides which of the two is larger
    expected = (torch.maximum(plain, near) if clip else plain) / 2
    expected.sum().backward()
    seen = replace(rows(torch.zeros(len(drawn)), torch.zeros(len(drawn))), values=old, returns=returns)
    losses, clipped = ValueLoss(clip)(values, seen)
    losses.backward(torch.ones_like(losses))
    torch.testing.assert_close(losses.detach().double(), expected.detach(), rtol=3e-6, atol=1e-5)
    where = ~clipped  # of a row that is clipped autograd's clamp has no gradient either, but at its very edge
    torch.testing.assert_close(values.grad.double()[where], wide.grad[where], rtol=3e-6, atol=1e-6)
    assert not values.grad[clipped].any() and (bool(clip) or not clipped.any())


PAIRS = st.lists(st.tuples(*[st.lists(TOKEN, min_size=1, max_size=9)] * 2), min_size=1, max_size=4)


def paired(drawn: list[tuple[list[tuple[float, float]], ...]], spread: float = 8) -> tuple[torch.Tensor, LossRows]:
    logprobs, columns = batch([(0.0, [(x, gap * spread) for x, gap in one]) for pair in drawn for one in pair])
    return logprobs, replace(columns, reference=columns.logprobs)


@SEVERAL
@given(PAIRS, st.floats(0.01, 2))
def test_pairs_as_in_the_paper(drawn: list[tuple[list[tuple[float, float]], ...]], beta: float) -> None:
    """DPO's equation 7 in float64, and the gradient that autograd finds of it."""
    logprobs, columns = paired(drawn)
    wide = logprobs.detach().double().requires_grad_()
    d = wide - columns.reference.double()
    margins = torch.stack([d[columns.sequence == i].sum() for i in range(2 * len(drawn))])
    expected = -torch.nn.functional.logsigmoid(beta * (margins[0::2] - margins[1::2]))
    expected.mean().backward()
    losses, clipped = PreferenceLoss(beta)(logprobs, columns)
    weighted = losses * (1 / len(drawn))
    weighted.backward(torch.ones_like(weighted))
    assert weighted.sum().item() == pytest.approx(expected.mean().item(), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(logprobs.grad.double(), wide.grad, rtol=3e-5, atol=1e-7)
    assert not clipped.any()


@SEVERAL
@given(PAIRS, st.data())
def test_the_cut_between_pairs_changes_no_bit(
    drawn: list[tuple[list[tuple[float, float]], ...]], data: st.DataObject
) -> None:
    logprobs, columns = paired(drawn)
    whole, _ = PreferenceLoss(0.3)(logprobs, columns)
    whole.backward(torch.ones_like(whole))
    bounds = sorted({0, len(drawn)} | data.draw(st.sets(st.integers(1, len(drawn)))))
    losses, slopes = [], []
    for first, last in itertools.pairwise(bounds):
        mine, part = taken(logprobs, columns, 2 * first, 2 * last)
        one, _ = PreferenceLoss(0.3)(mine, part)
        one.backward(torch.ones_like(one))
        losses.append(one.detach())
        slopes.append(mine.grad)
    assert_same_bits(torch.cat(slopes), logprobs.grad)
    assert_same_bits(torch.cat(losses), whole.detach())


def tree(leaves: list[np.float32]) -> np.float32:
    """The order as the text has it: neighbours, then neighbours of these; one that has none goes up as it is."""
    while len(leaves) > 1:
        pairs = [leaves[i : i + 2] for i in range(0, len(leaves), 2)]
        leaves = [p[0] + p[1] if len(p) == 2 else p[0] for p in pairs]
    return leaves[0]


@SEVERAL
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=40), min_size=1, max_size=5))
def test_the_mean_of_a_sequence_stands_on_the_tree(drawn: list[list[float]]) -> None:
    """Whatever stands beside it; a sequence may have no row."""
    sequence = torch.tensor([i for i, one in enumerate(drawn) for _ in one], dtype=torch.int64)
    found = sequence_means(torch.tensor([x for one in drawn for x in one], dtype=torch.float32), sequence)
    expected = [tree([np.float32(x) for x in one]) / np.float32(len(one)) for one in drawn for _ in one]
    assert_same_bits(found + 0.0, torch.tensor(np.array(expected, dtype=np.float32)) + 0.0)
