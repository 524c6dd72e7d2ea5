"""Memory that is handed over comes back with the same bits, and is really gone meanwhile; updates may pass in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

from kernels.host.pinned import host_tensor
from tests.bits import assert_same_bits
from tests.model.shapes import TINY, random_weights
from tests.trainer.batches import random_batch
from trainer.host import Passage, clear
from trainer.loss import LikelihoodLoss
from trainer.optimizer import Offload
from trainer.trainer import Trainer, TrainerConfig, TrainerError


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_a_trainer_that_handed_its_memory_over(offload: Offload, mesh: DeviceMesh) -> None:
    trainer = Trainer(TINY, TrainerConfig(1, 2, offload=offload), mesh, random_weights(TINY))
    batch = random_batch(TINY, 4)
    trainer.step(batch, LikelihoodLoss(), 1e-2)
    shard = trainer.shard()
    held = {name: rows.clone() for name, rows in shard.items()}
    trainer.offload()
    trainer.offload()  # nothing is left to hand over
    leaves = {"none": ("weight", "first", "second"), "optimizer": ("weight",), "all": ()}[offload]
    for name, rows in shard.items():
        gone = rows.untyped_storage().nbytes() == 0
        assert gone == name.startswith(leaves), name
    for use in (lambda: trainer.step(batch, LikelihoodLoss(), 1e-2), trainer.shard, lambda: list(trainer.weights())):
        if offload != "all":
            with pytest.raises(TrainerError, match=r"wait in host memory: call onload\(\) first"):
                use()
    trainer.onload()
    trainer.onload()
    assert_same_bits(list(trainer.shard().values()), list(held.values()))
    for name, rows in trainer.shard().items():
        assert rows.data_ptr() == shard[name].data_ptr(), f"{name}: another tensor"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 60))
def test_an_update_in_pieces(length: int, piece: int) -> None:
    read, written = torch.arange(float(length)), torch.ones(length)
    sizes = []

    def work(a: torch.Tensor, b: torch.Tensor) -> None:
        sizes.append(len(a))
        b += a

    passage = Passage("cpu", piece)
    passage.update([read], [written], work)
    passage.finish()
    assert_same_bits(written, torch.arange(float(length)) + 1)
    assert sum(sizes) == length and max(sizes) <= piece


def test_host_tensors_are_zeros_of_their_exact_size() -> None:
    for shape, dtype in (((3, 5), torch.float32), ((7,), torch.bfloat16), ((0, 4), torch.float32)):
        tensor = host_tensor(shape, dtype, "cpu")
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype and not tensor.any()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize
        tensor += 1
        clear([tensor], "cpu")
        assert not tensor.any()
