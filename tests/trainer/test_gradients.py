"""Gradients against float64 autograd of transformers' model, in units of float32 eps x the largest of each tensor."""

import numpy as np
import pytest
import torch

from kernels.model import ModelConfig, trained
from kernels.weights.files import to_hf
from tests.bits import assert_same_bits
from tests.model.hugging_face import in_files, reference, units
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.trainer.batches import gradients, plain_model, random_batch, token_logprobs
from trainer.batch import Batch

BOUND = 96.0


def reference_loss(hf: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """-sum weight * advantage * logprob in float64, each sequence on its own."""
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(batch.sequences):
        one = batch.take(i, i + 1)
        ids = torch.from_numpy(one.token_ids)
        n = len(one.rows)
        logits = hf(ids[None]).logits[0, -n - 1 : -1].double() / torch.from_numpy(one.temperatures).double()[:, None]
        logprobs = logits.log_softmax(1).gather(1, ids[-n:, None])[:, 0]
        loss = loss - (logprobs * torch.from_numpy(one.advantages * one.weights).double()).sum()
    return loss


def reference_gradients(config: ModelConfig, weights: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    hf = reference(config, weights, torch.float64)
    reference_loss(hf, batch).backward()
    named = in_files(config, {n: p.grad for n, p in hf.named_parameters()})
    return {p.name: p.from_files(torch.cat([named[n] for n in to_hf(p, weights[p.name])])) for p in trained(config)}


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_transformers_in_float64(name: str) -> None:
    config = SHAPES[name]
    weights = {p.name: w for p, w in random_weights(config)}
    batch = random_batch(config, 6, seed=1, longest=80)
    actual, expected = gradients(config, weights, batch), reference_gradients(config, weights, batch)
    assert actual.keys() == expected.keys()
    assert all(not actual[p.name][sum(p.stored) :].any() for p in trained(config)), "padding has a gradient"
    errors = {n: units(actual[n], g) for n, g in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < BOUND, f"{worst}: {errors[worst]:.1f} units"


def test_the_bound_sees_a_wrong_weight_of_one_token() -> None:
    weights = {p.name: w for p, w in random_weights(TINY)}
    batch = random_batch(TINY, 6, seed=1, longest=80)
    expected = reference_gradients(TINY, weights, batch)
    batch.weights[7] *= 1.01
    errors = [units(g, expected[n]) for n, g in gradients(TINY, weights, batch).items()]
    assert max(errors) > 10 * BOUND


def test_a_gradient_of_one_sequence_is_independent_of_the_batch() -> None:
    """With all weights of the others zero, their tokens add +0 or nothing: the bits of the sequence alone."""
    weights = {p.name: w for p, w in random_weights(TINY)}
    batch = random_batch(TINY, 4, seed=2)
    rows = np.repeat(np.arange(4), batch.counts)
    for i in range(4):
        batch_i = Batch(**(vars(batch) | {"weights": np.where(rows == i, batch.weights, np.float32(0))}))
        alone, inside = gradients(TINY, weights, batch.take(i, i + 1)), gradients(TINY, weights, batch_i)
        for name in alone:
            assert_same_bits(inside[name] + 0.0, alone[name] + 0.0, f"sequence {i}, {name}")


def test_log_probs_ignore_what_is_not_a_response() -> None:
    """Weights and temperatures are per response token, and rows are the tokens before them."""
    weights = {p.name: w for p, w in random_weights(TINY)}
    batch = random_batch(TINY, 5, seed=3)
    model = plain_model(TINY, weights)
    whole = token_logprobs(model, batch).detach()
    hf = reference(TINY, weights, torch.float64)
    at = np.concatenate([[0], np.cumsum(batch.counts)])
    for i in range(batch.sequences):
        ids = torch.from_numpy(batch.token_ids[sum(batch.lengths[:i]) :][: batch.lengths[i]])
        temperature = torch.from_numpy(batch.temperatures[at[i] : at[i + 1]]).double()
        n = len(temperature)
        logits = hf(ids[None]).logits[0, -n - 1 : -1] / temperature[:, None]
        expected = logits.log_softmax(1).gather(1, ids[-n:, None])[:, 0]
        assert units(whole[at[i] : at[i + 1]], expected.detach()) < BOUND
