"""What a layer forgets is gone after the forward pass, and comes back with the same bits."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.bits import assert_same_bits
from tests.model.shapes import SHAPES, random_weights
from tests.trainer.batches import plain_model, random_batch, token_logprobs
from trainer.loss import LikelihoodLoss
from trainer.optimizer import Offload
from trainer.recompute import Forgetting
from trainer.trainer import Trainer, TrainerConfig


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    config = SHAPES[name]
    weights = {p.name: w for p, w in random_weights(config)}
    batch = random_batch(config, 4)
    told = {}
    for mode in ("none", "selective", "layer"):
        model = plain_model(config, weights, dtype, mode)
        logprobs = token_logprobs(model, batch)
        (logprobs * torch.from_numpy(batch.advantages)).sum().backward()
        told[mode] = [logprobs, *(p.grad for p in model.parameters())]
    assert_same_bits(told["selective"], told["none"])
    assert_same_bits(told["layer"], told["none"])


def test_selective_keeps_no_norm_no_rope_and_no_gated_product(monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = SHAPES["three layers"], []
    original = Forgetting.again

    def again(self: Forgetting, outputs: Any, function: Any, *inputs: Any) -> None:
        made.extend(weakref.ref(output) for output in outputs)
        original(self, outputs, function, *inputs)

    monkeypatch.setattr(Forgetting, "again", again)
    model = plain_model(config, {p.name: w for p, w in random_weights(config)}, checkpointing="selective")
    logprobs = token_logprobs(model, random_batch(config, 4))
    gc.collect()
    assert len(made) == 5 * config.layers  # two norms, queries, keys, the gated product
    assert not any(reference() is not None for reference in made)
    logprobs.sum().backward()


def test_an_id_that_is_used_again_is_not_taken_for_what_is_gone() -> None:
    with Forgetting() as forgetting:
        x = torch.ones(3, requires_grad=True)
        gone = torch.zeros(3)
        forgetting.again((gone,), torch.neg, x)
        forgetting._recipes[id(x)] = forgetting._recipes[id(gone)]
        y = (x * x).sum()
    y.backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(("offload", "read"), [("all", torch.bfloat16), ("none", torch.float32)])
def test_masters_are_rounded_before_they_travel_and_gradients_are_not(
    mesh: DeviceMesh, offload: Offload, read: torch.dtype
) -> None:
    """FSDP2's copies are bfloat16, so half the bytes travel; where nothing travels, the masters are read where they lie. No
    gradient passes through bfloat16."""
    config, seen = SHAPES["tiny"], {}
    how = TrainerConfig(1, 4, dtype=torch.bfloat16, offload=offload)
    trainer = Trainer(config, how, mesh, random_weights(config))
    layer = trainer.model.layers[0]
    original = layer._layer

    def spy(*args: Any) -> Any:
        for name, parameter in layer.named_parameters(recurse=False):
            seen[name] = parameter.dtype
        return original(*args)

    layer._layer = spy
    batch = random_batch(config, 4)
    for micro_batch in trainer.cut(batch):
        trainer._backward(batch.take(*micro_batch.sequences(0, 1)), LikelihoodLoss(), None)
    assert set(seen.values()) == {read} and "qkv" in seen
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad.to_local()
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float()), f"{name}: the gradient was rounded"
