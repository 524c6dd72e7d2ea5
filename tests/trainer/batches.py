"""Batches of random sequences, and the trainer's log-probs and gradients without FSDP. Imported by the ranks."""

import numpy as np
import torch

from kernels.model import Layout, ModelConfig, trained
from trainer.batch import Batch
from trainer.model import TrainerModel
from trainer.recompute import Checkpointing


def random_batch(config: ModelConfig, sequences: int, seed: int = 0, longest: int = 20) -> Batch:
    """Lengths, responses, temperatures, advantages of both signs and unequal weights, all random."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, sequences)
    responses = np.array([random.integers(1, n) for n in lengths])
    total = int(responses.sum())
    return Batch(
        token_ids=random.integers(0, config.vocab_size, int(lengths.sum())),
        lengths=lengths,
        responses=responses,
        logprobs=(-4 + random.standard_normal(total) * 0.3).astype(np.float32),
        advantages=random.standard_normal(total).astype(np.float32),
        weights=(random.uniform(0.5, 1.5, total) / total).astype(np.float32),
        temperatures=random.uniform(0.5, 2.0, total).astype(np.float32),
    )


def plain_model(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    checkpointing: Checkpointing = "none",
) -> TrainerModel:
    """The trainer's model as an ordinary module on one rank."""
    model = TrainerModel(config, dtype, checkpointing)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            named[name].copy_(tensor)
        if config.tied:
            model.head.copy_(weights["embed"])
    return model


def token_logprobs(model: TrainerModel, batch: Batch, leaf_sequences: int = 1) -> torch.Tensor:
    """float32 [R], the whole batch as one micro-batch."""
    groups = [leaf_sequences] * (batch.sequences // leaf_sequences)
    rows = torch.from_numpy(batch.response_rows())
    row_groups = torch.from_numpy(np.concatenate([[0], np.cumsum(batch.responses)])[::leaf_sequences].copy())
    layout = Layout.packed(batch.lengths.tolist(), groups)
    temperatures = torch.from_numpy(batch.temperatures)
    return model(torch.from_numpy(batch.token_ids), layout, rows, row_groups, temperatures, batch.truncation)


def gradients(config: ModelConfig, weights: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """Of -sum weight * advantage * logprob to every parameter, a tied head's added to the embedding's."""
    model = plain_model(config, weights)
    loss = token_logprobs(model, batch) * torch.from_numpy(batch.advantages) * torch.from_numpy(batch.weights)
    (-loss.sum()).backward()
    named = dict(model.named_parameters())
    out = {p.name: named[p.name].grad for p in trained(config)}
    if config.tied:
        out["embed"] = out["embed"] + model.head.grad
    return out
