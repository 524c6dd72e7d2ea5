"""The load-balancing loss and what a step reports of its routers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.model import Layout
from kernels.model.experts import Experts
from tests.bits import sha256
from tests.model.hugging_face import units
from tests.model.shapes import SHAPES, random_weights
from tests.trainer.batches import plain_model, random_batch
from tests.trainer.ranks import MIXED
from trainer.loss import PolicyLoss
from trainer.routing import Routing, RoutingReport
from trainer.trainer import Trainer, TrainerConfig


def loss_by_torch(logits: torch.Tensor, groups: list[int], experts: Experts, coefficient: float) -> torch.Tensor:
    """Of one layer, float64: E sum_e c_e / T P_e in the mean over leaves."""
    parts = []
    for start, stop in itertools.pairwise(groups):
        spread = logits[start:stop].softmax(1)
        chosen = spread.topk(experts.chosen, 1).indices
        counts = torch.bincount(chosen.flatten(), minlength=experts.count).double()
        parts.append(experts.count * (counts / (stop - start) * spread.mean(0)).sum())
    return coefficient * torch.stack(parts).mean()


def test_its_gradient_is_that_of_torch() -> None:
    experts = Experts(8, 2, 24)
    config = replace(SHAPES["experts"], layers=1, experts=experts)
    groups = [0, 5, 6, 31]
    logits = torch.randn(31, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = Routing(config, experts, 0.1, 3, "cpu")
    routing.begin(torch.tensor(groups))
    share = torch.zeros(31, 2, requires_grad=True)
    ids = logits.detach().topk(2, 1).indices.sort(1).values.int()
    out = routing.told(0, ids, logits, share)
    out.sum().backward()
    exact = logits.detach().double().requires_grad_()
    loss_by_torch(exact, groups, experts, 0.1).backward()
    assert units(logits.grad, exact.grad) < 32  # type: ignore[arg-type]
    assert (share.grad == 1).all() and torch.equal(out, share)


def test_without_a_coefficient_nothing_is_attached() -> None:
    routing = Routing(MIXED, MIXED.experts, 0.0, 1, "cpu")  # type: ignore[arg-type]
    routing.begin(torch.tensor([0, 3]))
    share = torch.zeros(3, 2, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 7], [0, 7]], dtype=torch.int32)
    assert routing.told(0, ids, torch.zeros(3, 8), share) is share
    routing.end(3)
    report = routing.report()
    assert report.choices.tolist() == [[2, 2, 0, 0, 0, 0, 0, 2], [0] * 8] and report.tokens == 3
    metrics = report.metrics()
    assert metrics["moe/tokens_per_expert_min"] == 0 and metrics["moe/tokens_per_expert_max"] == 2
    assert metrics["moe/dropped_tokens"] == 0
    assert metrics["moe/router_entropy"] == pytest.approx(np.log(8))
    assert metrics["moe/tokens_per_expert_cv"] == pytest.approx(np.std([2, 2, 2] + [0] * 5) / 0.75)


def test_a_dropped_choice_would_show() -> None:
    assert RoutingReport(np.array([[3, 2]]), 1, 6, 0.0).metrics()["moe/dropped_tokens"] == 1


@pytest.mark.parametrize("checkpointing", ["none", "selective", "layer"])
def test_a_layer_that_is_computed_again_is_counted_once(checkpointing: str, mesh: DeviceMesh) -> None:
    batch = random_batch(MIXED, 4, seed=2)
    trainer = Trainer(MIXED, TrainerConfig(1, 2, checkpointing=checkpointing), mesh, random_weights(MIXED))  # type: ignore[arg-type]
    report = trainer.step(batch, PolicyLoss(), 1e-3).routing
    assert report is not None and report.tokens == len(batch.token_ids)
    assert report.choices.sum(1).tolist() == [2 * report.tokens, 0]  # the second layer is dense


def test_it_evens_out_the_router(mesh: DeviceMesh) -> None:
    """Trained on it alone, the choices spread; without it they stay as they are."""
    config = replace(MIXED, experts=Experts(8, 2, 24, True))
    weights = {p.name: w for p, w in random_weights(config)}
    for name in ("layers.0.router", "layers.1.router"):
        weights[name][:2] += 0.3 * weights["layers.0.mlp_norm"][:32]  # two experts that most tokens like
    batch = random_batch(config, 8, seed=3)
    batch = replace(batch, advantages=np.zeros_like(batch.advantages))
    spread = {}
    for coefficient in (0.0, 1.0):
        how = TrainerConfig(1, 8, router_aux_loss_coef=coefficient)
        trainer = Trainer(config, how, mesh, ((p, weights[p.name].clone()) for p, _ in random_weights(config)))
        for _ in range(12):
            report = trainer.step(batch, PolicyLoss(), 1e-2)
        spread[coefficient] = report.routing.metrics()["moe/tokens_per_expert_cv"]  # type: ignore[union-attr]
    assert spread[1.0] < 0.7 * spread[0.0], spread


def test_a_coefficient_of_zero_is_the_run_without_it(mesh: DeviceMesh) -> None:
    def run(**more: float) -> str:
        trainer = Trainer(MIXED, TrainerConfig(1, 2, **more), mesh, random_weights(MIXED))  # type: ignore[arg-type]
        for step in range(2):
            trainer.step(random_batch(MIXED, 4, seed=step), PolicyLoss(), 1e-2)
        return sha256(w for _, w in trainer.weights())

    assert run() == run(router_aux_loss_coef=0.0) != run(router_aux_loss_coef=0.1)


def test_the_choices_of_the_trainer_are_those_of_the_model() -> None:
    """What is told is what the forward pass computes with: the same ids when it is asked twice."""
    model, batch, told = plain_model(MIXED, {p.name: w for p, w in random_weights(MIXED)}), random_batch(MIXED, 3), []

    def routed(layer: int, ids: torch.Tensor, logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        told.append((layer, sha256([ids])))
        return share

    layout = Layout.packed(batch.lengths.tolist(), [1] * 3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model.hidden(torch.from_numpy(batch.token_ids), layout, routed)
    assert told[: len(told) // 2] == told[len(told) // 2 :] and {layer for layer, _ in told} == {0}
