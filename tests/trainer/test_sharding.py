"""World size, the cut into micro-batches and host memory change no bit: three steps at 1, 2 and 4 FSDP2 ranks, one SHA-256."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.bits import sha256
from tests.collectives.processes import run_ranks
from tests.model.shapes import TINY, random_weights
from tests.trainer.batches import random_batch
from tests.trainer.ranks import LOSSES, RUNS, STEPS, fail, train, ways, work
from trainer.loss import Loss, PolicyLoss, PreferenceLoss, SequencePolicyLoss, WeightedLikelihoodLoss
from trainer.model import batch_logprobs
from trainer.trainer import Trainer, TrainerConfig


@cache  # not fixtures: two parametrised ones in a test would be set up again and again
def ranks(world: int) -> list[dict[Any, Any]]:
    return run_ranks(world, work)


@cache
def single(name: str) -> tuple[str, list[dict[str, Any]]]:
    """One rank that takes one leaf at a time."""
    return train(name, 1, {"micro_leaves": 1})


@pytest.mark.parametrize("name", RUNS)
def test_one_step_is_not_none(name: str, mesh: DeviceMesh) -> None:
    digest, told = single(name)
    config, weights, *_ = RUNS[name]
    assert digest != sha256(w for _, w in weights(config))
    assert len({t["grad_norm"] for t in told}) == STEPS and all(t["grad_norm"] > 0 for t in told)
    if not isinstance(LOSSES.get(name), PreferenceLoss):  # which clips nothing
        assert any(t["clipped"] for t in told[:2]), "no token was clipped"
    assert all(t["counts"] and t["sequences"] for t in told)
    assert [t["step"] for t in told] == [1, 2, 3]


@pytest.mark.parametrize("name", RUNS)
def test_the_way_changes_no_bit(name: str, mesh: DeviceMesh) -> None:
    for way, how in ways(name, 1).items():
        assert train(name, 1, how) == single(name), f"{name}, {way}"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_world_size_changes_no_bit(name: str, world: int, mesh: DeviceMesh) -> None:
    for way in ways(name, world):
        for rank in range(world):
            assert ranks(world)[rank][name, way] == single(name), f"{name}: rank {rank} of {world}, {way}"


def test_the_leaf_size_is_part_of_the_run(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits above are not equal because sums are exact: leaves of 1 and of 2 sequences end in other weights."""
    config, weights, _, sequences, dtype, *_ = RUNS["untied, 8 leaves of 2"]
    monkeypatch.setitem(RUNS, "16 leaves of 1", (config, weights, 1, sequences, dtype))
    assert train("16 leaves of 1", 1, {"micro_leaves": 1})[0] != single("untied, 8 leaves of 2")[0]


def test_the_head_sums_over_the_same_leaves(mesh: DeviceMesh) -> None:
    """Its rows are those of the responses: a leaf of theirs ends with the sequence that ends one of the tokens."""
    trainer = Trainer(TINY, TrainerConfig(2, 2), mesh, random_weights(TINY))
    batch, seen = random_batch(TINY, 4, seed=5), []
    trainer.model.register_forward_pre_hook(lambda model, given: seen.append(given))
    trainer.step(batch, PolicyLoss(), lr=1e-3)
    (_, layout, rows, row_groups, *_), *more = seen
    assert not more and len(rows) == len(batch.rows)
    assert layout.groups.tolist() == [0, *np.cumsum(batch.lengths)[1::2]]
    assert row_groups.tolist() == [0, *np.cumsum(batch.counts)[1::2]]


def test_the_policy_losses_are_one_on_the_first_update(mesh: DeviceMesh) -> None:
    """Where the log-probs are the sampler's, all have the same gradient, to the bit; a second update on the batch tells them
    apart."""
    losses: dict[str, Loss] = {
        "grpo": PolicyLoss(),
        "gspo": SequencePolicyLoss(),
        "cispo": WeightedLikelihoodLoss(),
    }
    batch, ends = random_batch(TINY, 4, seed=5), dict[str, list[str]]()
    for name, loss in losses.items():
        trainer = Trainer(TINY, TrainerConfig(2, 2), mesh, random_weights(TINY))
        with torch.no_grad():
            sampled = batch_logprobs(trainer.model, batch, 2, "cpu").numpy()
        ends[name] = []
        for _ in "12":
            trainer.step(replace(batch, logprobs=sampled), loss, lr=1e-2)
            ends[name].append(sha256(w for _, w in trainer.weights()))
    first, second = ([end[i] for end in ends.values()] for i in (0, 1))
    assert len(set(first)) == 1 and len(set(second)) == 3


def test_rounded_moments_are_another_run(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNS, "whole", RUNS["moments in bfloat16, 8 leaves of 1"][:5])
    assert train("whole", 1, {})[0] != single("moments in bfloat16, 8 leaves of 1")[0]


def check_failures(failures: dict[str, Any], world: int) -> None:
    assert "step 1: the norm of the gradient of " in failures["gradient"]
    assert "the weights were not touched" in failures["gradient"]
    assert f"the loss on rank {world - 1} is " in failures["loss"]
    assert f"on rank {world - 1} is nan; the weight embed is not finite; the weights were not" in failures["logprob"]
    assert failures["untouched"]


@pytest.mark.parametrize("world", [2, 4])
def test_an_error_of_one_rank_is_raised_on_all(world: int) -> None:
    """Nobody is left waiting in a collective, and nobody updates."""
    for rank in range(world):
        check_failures(ranks(world)[rank]["failures"], world)
        assert ranks(world)[rank]["failures"] == ranks(world)[0]["failures"]


def test_an_error_on_one_rank_alone(mesh: DeviceMesh) -> None:
    check_failures(fail(1), 1)
