"""A frozen model says what a trainer with its weights would, bit for bit, and nothing trains it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.bits import assert_same_bits, sha256
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.trainer.batches import random_batch
from trainer.loss import PolicyLoss, RegularisedLoss
from trainer.model import batch_logprobs
from trainer.optimizer import TrainerError
from trainer.trainer import Trainer, TrainerConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["untied", "tied", "experts"])
def test_it_says_what_a_trainer_says(shape: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """Before and after steps of the policy, and however the batch is cut."""
    model = {"untied": TINY, "tied": replace(TINY, tied=True), "experts": SHAPES["experts"]}[shape]
    batch = random_batch(model, 8, seed=5)
    other = Trainer(model, TrainerConfig(2, 4, dtype=dtype), mesh, random_weights(model, seed=9))
    rounded = sha256(w.to(dtype).float() for _, w in other.weights())
    with torch.no_grad():
        expected = batch_logprobs(other.model, batch, 2, "cpu")
    policy = Trainer(model, TrainerConfig(2, 1, dtype=dtype), mesh, random_weights(model))
    with pytest.raises(TrainerError, match="no frozen model"):
        policy.frozen_logprobs(batch)
    policy.freeze(model, random_weights(model, seed=9))
    for _ in "12":
        rows = policy.frozen_logprobs(batch)
        assert_same_bits(torch.from_numpy(rows.values), expected)
        assert (rows.sequences == np.arange(8)).all() and (rows.counts == batch.counts).all()
        policy.step(replace(batch, reference=rows.values), RegularisedLoss(PolicyLoss(), 0.5, "k2"), lr=0.1)
        policy.offload()
        with pytest.raises(TrainerError, match="onload"):
            policy.frozen_logprobs(batch)
        policy.onload()
    assert policy.frozen is not None
    assert sha256(w.float() for _, w in policy.frozen.weights()) == rounded


def test_its_weights_are_let_go_after_a_forward_pass(mesh: DeviceMesh) -> None:
    """No rank goes on holding the whole of what it gathered."""
    policy = Trainer(TINY, TrainerConfig(2, 1), mesh, random_weights(TINY))
    policy.freeze(TINY, random_weights(TINY))
    policy.frozen_logprobs(random_batch(TINY, 4))
    assert policy.frozen is not None
    assert all(hasattr(p, "placements") for p in policy.frozen.model.parameters()), "a gathered parameter stayed"
    assert not any(p.requires_grad for p in policy.frozen.model.parameters())


def test_its_part_of_the_gradient_is_that_of_the_term(mesh: DeviceMesh) -> None:
    """Far from the reference the KL term alone moves the weights towards it."""
    batch = replace(random_batch(TINY, 4, seed=1))
    policy = Trainer(TINY, TrainerConfig(2, 2), mesh, random_weights(TINY))
    policy.freeze(TINY, random_weights(TINY, seed=9))
    batch = replace(batch, reference=policy.frozen_logprobs(batch).values, advantages=0 * batch.advantages)
    loss = RegularisedLoss(PolicyLoss(), 1.0, "k2")
    found = [policy.step(batch, loss, lr=3e-3).loss for _ in range(12)]
    assert found[-1] < 0.5 * found[0]
