"""On a GPU: what saves memory changes no bit, and the plan is within 15% of what is measured. Qwen3-8B's widths, few layers."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kernels.model import Parameter, trained
from kernels.model.known import QWEN3_8B
from tests.bits import sha256
from tests.trainer.batches import suffix_rows
from trainer.batch import Batch
from trainer.loss import LikelihoodLoss
from trainer.memory import trainer_memory
from trainer.optimizer import AdamWConfig
from trainer.trainer import Trainer, TrainerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("large"),  # as tests/alignment/conftest.py says
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MODEL = replace(QWEN3_8B, vocab_size=16384, layers=2, max_positions=4096)
SEQUENCES, LENGTH = 8, 512
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"micro_leaves": 8},
    "accumulated": {"micro_leaves": 2},
    "tokens": {"micro_tokens": 4 * LENGTH},
    "selective": {"micro_leaves": 8, "checkpointing": "selective"},
    "layer": {"micro_leaves": 8, "checkpointing": "layer"},
    "moments on the host": {"micro_leaves": 4, "offload": "optimizer"},
    "all on the host": {"micro_leaves": 2, "offload": "all", "checkpointing": "layer"},
}


@pytest.fixture(scope="module")
def card() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


def weights() -> Iterator[tuple[Parameter, torch.Tensor]]:
    generator = torch.Generator("cuda").manual_seed(0)
    for p in trained(MODEL):
        shape = p.shape
        yield p, torch.randn(shape, device="cuda", generator=generator) * 0.02 if p.columns else torch.ones(shape)


def batch(seed: int) -> Batch:
    random, rows = np.random.default_rng(seed), SEQUENCES * LENGTH // 2
    zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    ids = random.integers(0, MODEL.vocab_size, SEQUENCES * LENGTH)
    lengths = np.full(SEQUENCES, LENGTH)
    return Batch.of(ids, lengths, suffix_rows(lengths, lengths // 2), advantages=zeros, weights=ones / rows)


def measured(mesh: DeviceMesh, moments: torch.dtype = torch.float32, **way: Any) -> tuple[str, int, int]:
    """(SHA-256 of the weights after two steps, with the card handed over between them; peak of the second; planned)."""
    config = TrainerConfig(1, **{"micro_leaves": 1} | way, optimizer=AdamWConfig(moments=moments), dtype=torch.bfloat16)
    gc.collect()  # the trainer before: FSDP2's hooks are cycles
    before = torch.cuda.memory_allocated()
    trainer = Trainer(MODEL, config, mesh, weights())
    trainer.step(batch(0), LikelihoodLoss(), 1e-4)
    trainer.offload()
    assert torch.cuda.memory_allocated() - before < 2**28 or config.offload == "all"
    trainer.onload()
    peak = trainer.step(batch(1), LikelihoodLoss(), 1e-4).peak_bytes - before
    parts = trainer.cut(batch(1))
    tokens = max(part.leaves for part in parts) * LENGTH
    planned = trainer_memory(
        MODEL,
        dtype=torch.bfloat16,
        device="cuda",
        world_size=1,
        checkpointing=config.checkpointing,
        offload=config.offload,
        moments=moments,
        tokens=tokens,
        rows=tokens // 2,
        micro_batches=len(parts),
    )
    return sha256(w for _, w in trainer.weights()), peak, planned.peak


def test_what_saves_memory_changes_no_bit_and_is_planned(card: DeviceMesh) -> None:
    told = {name: measured(card, **way) for name, way in WAYS.items()}
    assert len({digest for digest, _, _ in told.values()}) == 1, told
    for name, (_, peak, planned) in told.items():
        assert abs(planned / peak - 1) < 0.15, f"{name}: {peak / 2**30:.2f} GiB measured, {planned / 2**30:.2f} planned"


def test_rounded_moments_on_card_and_host(card: DeviceMesh) -> None:
    here = measured(card, torch.bfloat16, micro_leaves=8)
    there = measured(card, torch.bfloat16, micro_leaves=8, offload="optimizer")
    assert here[0] == there[0] and there[1] < here[1]
