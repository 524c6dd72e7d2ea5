"""What one trainer rank does in the test of sharding: it trains in several ways and returns what it ended with."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.model import Adapter
from kernels.model.experts import Experts
from kernels.weights.initial import initial
from tests.bits import sha256
from tests.model.shapes import FP8, SHAPES, TINY, random_weights
from tests.trainer.batches import random_batch
from trainer.batch import Batch, Rows, StepReport
from trainer.loss import (
    LikelihoodLoss,
    Loss,
    PolicyLoss,
    PreferenceLoss,
    RegularisedLoss,
    SequencePolicyLoss,
    ValueLoss,
    WeightedLikelihoodLoss,
)
from trainer.optimizer import AdamWConfig, TrainerError
from trainer.trainer import Trainer, TrainerConfig

STEPS = 3
LONGEST = 20  # tokens of a sequence
REFERENCE = replace(TINY, layers=TINY.layers + 1, tied=True)  # of another shape than the policy
MIXED = replace(SHAPES["experts"], experts=Experts(8, 2, 24, False, 1, (1,)))
# name -> (model, weights, leaf_sequences, sequences a step, dtype, dtype of the moments if not float32)
RUNS: dict[str, tuple] = {
    "untied, 8 leaves of 2": (TINY, lambda c: random_weights(c), 2, 16, torch.float32),
    "tied, 8 leaves of 1": (replace(TINY, tied=True), lambda c: random_weights(c), 1, 8, torch.float32),
    "bfloat16, 8 leaves of 1": (replace(TINY, tied=True), lambda c: random_weights(c), 1, 8, torch.bfloat16),
    "12 leaves, initial weights, odd widths": (
        replace(TINY, hidden_size=40, intermediate_size=56, leaves=8, vocab_size=96, layers=1, rms_eps=1e-5),
        lambda c: initial(c, 3),
        1,
        12,
        torch.float32,
    ),
    "37 ids in 8 leaves": (
        replace(TINY, leaves=8, vocab_size=37, layers=1),
        lambda c: initial(c, 3),
        1,
        8,
        torch.float32,
    ),
    "experts, a dense layer, 8 leaves of 2": (MIXED, lambda c: random_weights(c), 2, 16, torch.float32),
    "experts, bfloat16, 8 leaves of 1": (SHAPES["experts"], lambda c: random_weights(c), 1, 8, torch.bfloat16),
    "moments in bfloat16, 8 leaves of 1": (TINY, lambda c: random_weights(c), 1, 8, torch.float32, torch.bfloat16),
    "fp8_block, 8 leaves of 1": (replace(FP8, layers=1), lambda c: random_weights(c), 1, 8, torch.bfloat16),
    "fp8_block_ue8m0, adapters, 8 leaves of 1": (
        replace(FP8, layers=1, format="fp8_block_ue8m0", adapter=Adapter((("attention", 4),), 8.0)),
        lambda c: random_weights(c),
        1,
        8,
        torch.bfloat16,
    ),
    "adapters, 8 leaves of 2": (
        replace(TINY, adapter=Adapter((("attention", 4), ("mlp", 3)), 8.0)),
        lambda c: random_weights(c),
        2,
        16,
        torch.float32,
    ),
    "adapters, tied, bfloat16, 8 leaves of 1": (
        replace(TINY, tied=True, adapter=Adapter((("attention", 4),), 8.0, True)),
        lambda c: random_weights(c),
        1,
        8,
        torch.bfloat16,
    ),
    "adapters of experts, a dense layer, 8 leaves of 1": (
        replace(MIXED, adapter=Adapter((("experts", 2), ("mlp", 3)), 8.0)),
        lambda c: random_weights(c),
        1,
        8,
        torch.float32,
    ),
    "an adapter of the head, 37 ids, 8 leaves of 1": (
        replace(TINY, leaves=8, vocab_size=37, layers=1, adapter=Adapter((("mlp", 2), ("head", 3)), 8.0)),
        lambda c: random_weights(c),
        1,
        8,
        torch.float32,
    ),
}
LOSSES: dict[str, Loss] = {  # of runs whose policy loss is another
    "sequence ratios, 8 leaves of 2": SequencePolicyLoss(0.01, 0.01),
    "clipped weights, 8 leaves of 1": WeightedLikelihoodLoss(0.01, 0.01),
    "a reference and entropy, 8 leaves of 2": RegularisedLoss(PolicyLoss(), 1.0, "k3", 0.1),
    "pairs, 8 leaves of 2": PreferenceLoss(0.5),
    "a critic, 8 leaves of 2": ValueLoss(0.02),
}
RUNS |= {name: (TINY, lambda c: random_weights(c), int(name[-1]), 8 * int(name[-1]), torch.float32) for name in LOSSES}
RUNS["a critic, 8 leaves of 2"] = (replace(TINY, head="value"), *RUNS["a critic, 8 leaves of 2"][1:])
LEAVES = {name: sequences // leaf for name, (_, _, leaf, sequences, *_) in RUNS.items()}


def ways(name: str, world: int) -> dict[str, dict[str, Any]]:
    """Every size of micro-batch that fits, and what else may change memory and speed alone."""
    out: dict[str, dict[str, Any]] = {
        f"micro_leaves={n}": {"micro_leaves": n} for n in (1, 2, 4, 8) if LEAVES[name] % (n * world) == 0
    }
    longest = LONGEST * RUNS[name][2]
    for budget in (longest, 2 * longest, 5 * longest // 2):
        out[f"micro_tokens={budget}"] = {"micro_tokens": budget}
    out["checkpointing=selective"] = {
        "checkpointing": "selective",
        "micro_leaves": 2 if LEAVES[name] % (2 * world) == 0 else 1,
    }
    out["checkpointing=layer"] = {"checkpointing": "layer"}
    out["offload=optimizer"] = {"offload": "optimizer"}
    out["offload=all"] = {"offload": "all", "micro_tokens": longest}
    for replicas in (2, 4):
        if replicas <= world:  # with 4 ranks of 4: each holds the whole model
            out[f"replicas={replicas}"] = {"replicas": replicas}
            out[f"replicas={replicas}, offload=all"] = {"replicas": replicas, "offload": "all", "micro_tokens": longest}
    return out


def trainer_config(name: str, way: dict[str, Any]) -> TrainerConfig:
    _, _, leaf, _, dtype, *moments = RUNS[name]
    adamw = AdamWConfig(moments=moments[0] if moments else torch.float32)
    how = {"micro_leaves": 1, "router_aux_loss_coef": 0.3} | way  # of a model that has experts
    return TrainerConfig(leaf, **how, optimizer=adamw, dtype=dtype)


def train(name: str, world: int, way: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """(SHA-256 of the weights after three steps, what was reported)."""
    config, weights, _, sequences, *_ = RUNS[name]
    trainer = Trainer(config, trainer_config(name, way), init_device_mesh("cpu", (world,)), weights(config))
    trainer.optimizer._passage.piece = 1000  # several pieces a tensor
    if isinstance(LOSSES.get(name), RegularisedLoss | PreferenceLoss):
        trainer.freeze(REFERENCE, random_weights(REFERENCE))
    told = []
    for step in range(STEPS):
        batch = random_batch(config, sequences, seed=step, longest=LONGEST)
        loss = LOSSES.get(name, PolicyLoss()) if step < 2 else LikelihoodLoss()
        if config.head == "value":
            said = in_order(trainer.forward(batch), world)
            batch = replace(batch, values=said + batch.logprobs / 100, returns=batch.advantages)
        if trainer.frozen:
            batch = replace(batch, reference=in_order(trainer.frozen_logprobs(batch), world))
        remembers = step == 1 and config.head != "value"  # of a policy
        if remembers:
            trainer.remember()
        report = merged(trainer.step(batch, loss, lr=1e-2), world)
        if remembers:  # by now the weights are others
            assert in_order(trainer.past_logprobs(batch), world).tobytes() == report.logprobs.tobytes(), (name, way)
        told.append(
            {
                "logprobs": hashlib.sha256(report.logprobs.tobytes()).hexdigest(),
                "counts": report.counts.tolist() == batch.counts.tolist(),
                "sequences": report.sequences.tolist() == list(range(sequences)),
                "grad_norm": report.grad_norm,
                "clipped": report.clipped,
                "loss": round(report.loss, 9),
                "step": report.step,
                "choices": report.routing and report.routing.choices.tolist(),
            }
        )
        trainer.offload()
        trainer.onload()
    return sha256(w for _, w in trainer.weights()), told


def in_order(rows: Rows, world: int) -> np.ndarray:
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, rows)
    return Rows.merge(parts).values


def merged(report: StepReport, world: int) -> StepReport:
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, report)
    return StepReport.merge(parts)


def heavy(batch: Batch, weight: float) -> Batch:
    """The last sequence's tokens weigh this much: log-probs stay what they are."""
    weights = batch.weights.copy()
    weights[-int(batch.counts[-1]) :] = weight
    return replace(batch, weights=weights)


def fail(world: int) -> dict[str, Any]:
    """Errors that only one rank can see reach every rank."""
    config, mesh = TINY, init_device_mesh("cpu", (world,))
    out: dict[str, Any] = {}
    batch = random_batch(config, 2 * world, seed=0)
    trainer = Trainer(config, TrainerConfig(2, 1), mesh, random_weights(config))
    before = sha256(w for _, w in trainer.weights())
    out["gradient"] = error_of(lambda: trainer.step(heavy(batch, 1e25), LikelihoodLoss(), 1e-2))
    out["loss"] = error_of(lambda: trainer.step(heavy(batch, float("inf")), LikelihoodLoss(), 1e-2))
    # a token that occurs in the last sequence only, and whose embedding is no number
    ids = batch.token_ids % (config.vocab_size - 1)
    ids[-int(batch.counts[-1])] = config.vocab_size - 1
    ids[-int(batch.counts[-1]) - 1] = config.vocab_size - 1
    bad = ((p, broken_row(w) if p.name == "embed" else w) for p, w in random_weights(config))
    broken = Trainer(config, TrainerConfig(2, 1), mesh, bad)
    held = sha256(w for _, w in broken.weights())
    out["logprob"] = error_of(lambda: broken.step(replace(batch, token_ids=ids), LikelihoodLoss(), 1e-2))
    out["untouched"] = (
        sha256(w for _, w in trainer.weights()) == before and sha256(w for _, w in broken.weights()) == held
    )
    return out


def broken_row(embedding: torch.Tensor) -> torch.Tensor:
    embedding[-1] = float("nan")
    return embedding


def error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except TrainerError as error:
        return str(error)
    return "no error"


def work() -> dict[str, Any]:
    world = dist.get_world_size()
    out: dict[str, Any] = {"failures": fail(world)}
    for name in RUNS:
        for way, how in ways(name, world).items():
            out[name, way] = train(name, world, how)
    return out
