"""The trainer on a card: what is not finite stops it by name, and what is written is what another layout reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.bits import assert_same_bits
from tests.model.shapes import TINY, random_weights
from tests.trainer.batches import random_batch
from tests.trainer.test_optimizer import spoiled
from trainer import folder
from trainer.checkpoint import Checkpoint, complete, folder_name, read, shard_name, verify
from trainer.loss import LikelihoodLoss, PolicyLoss
from trainer.optimizer import TrainerError
from trainer.trainer import Trainer, TrainerConfig
from trainer.writer import ShardWriter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TIED = replace(TINY, tied=True)
LR = 1e-2


@pytest.fixture(scope="module")
def card(mesh: DeviceMesh) -> DeviceMesh:
    return init_device_mesh("cuda", (1,))


def trainer_on(card: DeviceMesh, source: Checkpoint | None = None, **how: Any) -> Trainer:
    config = TrainerConfig(1, **{"micro_leaves": 2} | how, dtype=torch.bfloat16)
    return Trainer(TIED, config, card, source or random_weights(TIED))


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [w.cpu() for _, w in trainer.weights()]


@pytest.mark.parametrize("offload", ["none", "all"])
@pytest.mark.parametrize("kind", ["advantage nan", "gradient overflows", "recorded log-prob -inf", "temperature nan"])
def test_what_is_not_finite_is_named_and_leaves_no_trace(kind: str, offload: str, card: DeviceMesh) -> None:
    batches = [random_batch(TIED, 8, seed=i) for i in range(2)]
    trainer, spared = trainer_on(card, offload=offload), trainer_on(card)
    for each in (trainer, spared):
        each.step(batches[0], PolicyLoss(), LR)
    held = weights(trainer)
    bad, message = spoiled(kind, batches[1])
    with pytest.raises(TrainerError, match=f"^step 2: {message} .* is not finite.*; the weights were not touched$"):
        trainer.step(bad, PolicyLoss(), LR)
    assert_same_bits(weights(trainer), held)
    for each in (trainer, spared):
        each.step(batches[1], PolicyLoss(), LR)
    assert_same_bits(weights(trainer), weights(spared))


@pytest.mark.parametrize("how", [{"offload": "all"}, {"checkpointing": "layer", "micro_leaves": 8}])
def test_a_checkpoint_goes_on_in_another_layout(how: dict[str, Any], card: DeviceMesh, tmp_path: Path) -> None:
    """Copied to the host while the next step runs, written by the thread, read back: the third step has the same bits."""
    batches = [random_batch(TIED, 8, seed=i) for i in range(3)]
    trainer, writer = trainer_on(card), ShardWriter()
    for batch in batches[:2]:
        trainer.step(batch, LikelihoodLoss(), LR)
    temporary = folder.temporary(tmp_path / folder_name(2))
    copies = {name: rows.to("cpu", copy=True) for name, rows in trainer.shard().items()}
    writer.start(temporary / shard_name(0, 1), copies)
    trainer.step(batches[2], LikelihoodLoss(), LR)
    file = writer.result(wait=True)
    assert file is not None
    complete(temporary, tmp_path / folder_name(2), TIED, 2, "", [file], {}, {})
    checkpoint = read(tmp_path / folder_name(2))
    verify(checkpoint)
    other = trainer_on(card, checkpoint, **how)
    other.step(batches[2], LikelihoodLoss(), LR)
    assert other.optimizer.steps == 3
    assert_same_bits(weights(other), weights(trainer))
