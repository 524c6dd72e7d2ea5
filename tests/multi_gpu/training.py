"""What one FSDP2 rank does on its own card: it trains a small model and returns what it ended with."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.weights.initial import initial
from tests.bits import sha256
from tests.model.shapes import WIDE
from tests.trainer.batches import random_batch
from trainer.trainer import Trainer, TrainerConfig


def work(sequences: int = 16) -> tuple[str, list[Any]]:
    """(SHA-256 of the weights after three steps, the norm of each gradient)."""
    world = dist.get_world_size()
    how = TrainerConfig(1, sequences // 2 // world, dtype=torch.bfloat16)
    trainer = Trainer(WIDE, how, init_device_mesh("cuda", (world,)), initial(WIDE, 0))
    norms = []
    for step in range(3):
        batch = random_batch(WIDE, sequences, seed=step, longest=100)
        norms.append(trainer.step(batch, "policy", lr=1e-2).grad_norm)
    return sha256(w for _, w in trainer.weights()), norms
