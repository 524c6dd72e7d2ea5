"""AdamW with clipping against torch's in float64, and steps that must leave no trace."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.model import ModelConfig
from tests.bits import assert_same_bits, sha256
from tests.model.hugging_face import EPS
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.trainer.batches import gradients, random_batch
from trainer.batch import Batch
from trainer.loss import LikelihoodLoss, PolicyLoss
from trainer.optimizer import AdamWConfig
from trainer.trainer import Trainer, TrainerConfig, TrainerError

LR = 1e-2


def trainer_for(config: ModelConfig, mesh: DeviceMesh, **optimizer: Any) -> Trainer:
    return Trainer(config, TrainerConfig(1, 2, AdamWConfig(**optimizer)), mesh, random_weights(config))


def step(trainer: Trainer, batch: Batch, lr: float = LR) -> float:
    """One likelihood step, for which no log-probs need to be recorded."""
    return trainer.step(batch, LikelihoodLoss(), lr).grad_norm


@pytest.mark.parametrize("name", ["tiny", "tied", "experts"])
@pytest.mark.parametrize("grad_clip", [0.01, 1e6])
def test_adamw_is_torchs_in_float64(name: str, grad_clip: float, mesh: DeviceMesh) -> None:
    config = SHAPES[name]
    trainer = trainer_for(config, mesh, grad_clip=grad_clip)
    truth = {p.name: w.double().requires_grad_() for p, w in random_weights(config)}
    groups = [
        {"params": [w for w in truth.values() if w.dim() > 1], "weight_decay": 0.1},
        {"params": [w for w in truth.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-8)
    for i in range(4):
        batch = random_batch(config, 4, seed=i)
        weights = {p.name: w.clone() for p, w in trainer.weights()}
        ones = replace(batch, advantages=np.ones_like(batch.advantages))
        for n, g in gradients(config, weights, ones).items():
            truth[n].grad = g.double()
        norm = torch.nn.utils.clip_grad_norm_(truth.values(), grad_clip).item()
        reference.step()
        told = step(trainer, batch)
        assert abs(told / norm - 1) < 32 * EPS
        assert (norm > grad_clip) == (grad_clip < 1), "the case is not the one that it claims"
        for p, w in trainer.weights():
            error = (w.double() - truth[p.name].detach()).abs().max().item()
            assert error < 16 * EPS * float(w.abs().max()) * (i + 1), f"step {i}, {p.name}: {error}"
    assert trainer.optimizer.steps == 4


def test_weight_decay_spares_the_norms_and_lr_zero_changes_nothing(mesh: DeviceMesh) -> None:
    trainer = trainer_for(TINY, mesh)
    batch = random_batch(TINY, 4)
    silent = replace(batch, weights=np.zeros_like(batch.weights))
    before = {p.name: w.clone() for p, w in trainer.weights()}
    assert step(trainer, silent) == 0.0
    for p, w in trainer.weights():
        factor = 1 - LR * 0.1 if p.columns else 1.0
        assert torch.allclose(w, before[p.name] * factor, rtol=4 * EPS, atol=0), p.name
    held = [w.clone() for _, w in trainer.weights()]
    step(trainer, batch, lr=0.0)
    assert_same_bits([w for _, w in trainer.weights()], held)


def test_the_clip_scales_to_the_asked_norm(mesh: DeviceMesh) -> None:
    """A norm below the limit changes no bit; above it, only the direction counts (but for eps)."""
    batch = random_batch(TINY, 4)
    ends = {}
    for clip in (1e3, 1e6):
        trainer = trainer_for(TINY, mesh, grad_clip=clip)
        assert step(trainer, batch) < 1e3
        ends[clip] = sha256(w for _, w in trainer.weights())
    assert len(set(ends.values())) == 1
    clipped = trainer_for(TINY, mesh, grad_clip=1e-4)
    step(clipped, batch)
    assert sha256(w for _, w in clipped.weights()) not in ends.values()


def test_reset_forgets_moments_and_count(mesh: DeviceMesh) -> None:
    first, second = random_batch(TINY, 4, seed=0), random_batch(TINY, 4, seed=1)
    trainer = trainer_for(TINY, mesh)
    step(trainer, first)
    middle = [(p, w.clone()) for p, w in trainer.weights()]
    trainer.optimizer.reset()
    assert trainer.optimizer.steps == 0
    step(trainer, second)
    fresh = Trainer(TINY, TrainerConfig(1, 2), mesh, middle)
    step(fresh, second)
    assert_same_bits([w for _, w in trainer.weights()], [w for _, w in fresh.weights()])


def test_rounded_moments_are_those_of_float32_rounded(mesh: DeviceMesh) -> None:
    """After the first step, both of them; the weights do not see it yet."""
    batch = random_batch(TINY, 4)
    wide, narrow = trainer_for(TINY, mesh), trainer_for(TINY, mesh, moments=torch.bfloat16)
    for trainer in (wide, narrow):
        step(trainer, batch)
    assert_same_bits([w for _, w in narrow.weights()], [w for _, w in wide.weights()])
    for actual, expected in zip(narrow.optimizer.all_moments(), wide.optimizer.all_moments(), strict=True):
        assert expected.any()
        assert_same_bits(actual, expected.bfloat16())


def test_a_step_that_was_cut_off_leaves_nothing_to_the_next(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first of two micro-batches."""
    trainer, spared = trainer_for(TINY, mesh), trainer_for(TINY, mesh)
    cut_off, batch = random_batch(TINY, 4, seed=0), random_batch(TINY, 4, seed=1)
    backward, calls = trainer._backward, []

    def once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise InterruptedError
        return backward(*args)

    monkeypatch.setattr(trainer, "_backward", once)
    with pytest.raises(InterruptedError):
        step(trainer, cut_off)
    assert step(trainer, batch) == step(spared, batch)
    assert_same_bits([w for _, w in trainer.weights()], [w for _, w in spared.weights()])


def spoiled(kind: str, batch: Batch) -> tuple[Batch, str]:
    """A batch that must not reach the weights, and what the error says."""
    last = np.arange(len(batch.advantages)) == len(batch.advantages) - 1
    nan, inf = np.float32(np.nan), np.float32(np.inf)
    changed = {
        "advantage inf": {"advantages": np.where(last, inf, batch.advantages)},
        "advantage nan": {"advantages": np.where(last, nan, batch.advantages)},
        "gradient overflows": {
            "weights": np.full_like(batch.weights, 2e38),
            "advantages": np.ones_like(batch.advantages),
        },
        "squares overflow": {"weights": batch.weights * np.float32(1e25)},
        "recorded log-prob -inf": {
            "logprobs": np.where(last, -inf, batch.logprobs),
            "advantages": -abs(batch.advantages),
        },
        "temperature nan": {"temperatures": np.where(last, nan, batch.temperatures)},
        "temperature 0": {"temperatures": np.where(last, np.float32(0), batch.temperatures)},
    }[kind]
    log_prob, loss, gradient = (
        r"the log-prob of response token \d+ on rank 0",
        "the loss on rank 0",
        "the norm of the gradient",
    )
    message = {"temperature": log_prob, "gradient": gradient, "squares": gradient}.get(kind.split()[0], loss)
    return replace(batch, **changed), message


@pytest.mark.parametrize("name", ["tiny", "tied", "experts"])
@pytest.mark.parametrize(
    "kind",
    [
        "advantage inf",
        "advantage nan",
        "gradient overflows",
        "squares overflow",
        "recorded log-prob -inf",
        "temperature nan",
        "temperature 0",
    ],
)
def test_what_is_not_finite_leaves_no_trace(name: str, kind: str, mesh: DeviceMesh) -> None:
    """The error names the step; weights, moments and count are untouched, and the next step is that of a trainer that
    never saw the bad batch."""
    config = SHAPES[name]
    batches = [random_batch(config, 8, seed=i) for i in range(2)]
    trainer, spared = trainer_for(config, mesh), trainer_for(config, mesh)
    trainer.step(batches[0], PolicyLoss(), LR)
    spared.step(batches[0], PolicyLoss(), LR)
    held = [w.clone() for _, w in trainer.weights()]
    bad, message = spoiled(kind, batches[1])
    with pytest.raises(TrainerError, match=f"^step 2: {message} .*; the weights were not touched$"):
        trainer.step(bad, PolicyLoss(), LR)
    assert_same_bits([w for _, w in trainer.weights()], held)
    assert trainer.optimizer.steps == 1
    reports = [t.step(batches[1], PolicyLoss(), LR) for t in (trainer, spared)]
    assert reports[0].grad_norm == reports[1].grad_norm and reports[0].step == 2
    assert_same_bits([w for _, w in trainer.weights()], [w for _, w in spared.weights()])


def test_the_tensor_is_named(mesh: DeviceMesh) -> None:
    """A last norm of 1e-30 over a head of 1e30: ordinary logits, and one gradient alone whose squares overflow."""
    scale = {"norm": 1e-30, "head": 1e30}
    weights = [(p, w * scale.get(p.name, 1.0)) for p, w in random_weights(TINY)]
    trainer = Trainer(TINY, TrainerConfig(1, 2), mesh, weights)
    with pytest.raises(TrainerError, match=r"the norm of the gradient of norm is not finite in float32"):
        step(trainer, random_batch(TINY, 4))
