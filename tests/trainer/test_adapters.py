"""Adapters: the merged weights are what is computed with, what is trained are A and B, and nothing else moves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.model import Adapter, ConfigError, ModelConfig, saved, served, trained
from kernels.ops import merge_low_rank
from kernels.weights.adapters import adapter_of, write
from tests.bits import assert_same_bits, sha256
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.trainer.batches import random_batch
from trainer.loss import PolicyLoss
from trainer.model import batch_logprobs
from trainer.rows import local_rows
from trainer.trainer import Trainer, TrainerConfig

BOTH = Adapter((("attention", 4), ("mlp", 3)), 8.0)
ALL = Adapter((("attention", 4), ("mlp", 3), ("head", 5)), 8.0)
EXPERTS = Adapter((("attention", 4), ("experts", 3), ("head", 2)), 8.0)
DTYPES = [torch.float32, torch.bfloat16]


def adapted(config: ModelConfig = TINY, adapter: Adapter = BOTH) -> ModelConfig:
    return replace(config, adapter=adapter)


def trainer_of(
    config: ModelConfig, mesh: DeviceMesh, dtype: torch.dtype = torch.float32, steps: int = 0, **how: object
) -> Trainer:
    trainer = Trainer(
        config,
        TrainerConfig(1, 2, dtype=dtype, seed=5, **how),  # type: ignore[arg-type]
        mesh,
        random_weights(config),
    )
    for step in range(steps):
        trainer.step(random_batch(config, 4, seed=step), PolicyLoss(), lr=1e-2)
    return trainer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["tiny", "tied", "qwen2", "experts", "experts, dense layers", "61 ids"])
def test_a_full_run_with_the_merged_weights_says_the_same(name: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    """The forward pass and dX are those of a full model whose weights are W'."""
    config = SHAPES[name]
    adapter = EXPERTS if config.experts else BOTH if config.tied else ALL
    trainer = trainer_of(adapted(config, adapter), mesh, dtype, steps=3)
    full = Trainer(config, TrainerConfig(1, 2, dtype=dtype), mesh, trainer.weights())
    batch = random_batch(config, 4, seed=9)
    mine, theirs = (torch.from_numpy(t.forward(batch).values) for t in (trainer, full))
    assert_same_bits(mine, theirs, name)
    assert sha256(w for _, w in trainer.weights()) != sha256(w.to(dtype) for _, w in random_weights(config)), (
        "the steps changed nothing"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_computed_with_is_merged_by_the_formula(dtype: torch.dtype, mesh: DeviceMesh) -> None:
    config = adapted()
    trainer = trainer_of(config, mesh, dtype, steps=2)
    local, frozen = local_rows(trainer.model), {p.name: w.to(dtype) for p, w in random_weights(config)}
    for parameter in served(config):
        rank = BOTH.rank(parameter)
        if not rank:
            assert_same_bits(local[parameter.name], frozen[parameter.name], parameter.name)
            continue
        held = BOTH.held_rank(parameter)
        a, b = local[f"{parameter.name}_A"], local[f"{parameter.name}_B"]
        assert held == 16 and not b[:, rank:].any() and b[:, :rank].any()
        assert not a.view(-1, held, a.shape[1])[:, rank:].any()
        parts = zip(
            frozen[parameter.name].split(parameter.sections), b.split(parameter.sections), a.split(held), strict=True
        )
        scale = BOTH.alpha / rank
        want = [merge_low_rank(w, of_a[:rank], of_b[:, :rank], scale, dtype) for w, of_b, of_a in parts]
        assert_same_bits(local[parameter.name], torch.cat(want), parameter.name)


def test_before_the_first_step_it_is_the_frozen_model(mesh: DeviceMesh) -> None:
    trainer = trainer_of(adapted(), mesh)
    for (parameter, held), (_, whole) in zip(trainer.weights(), random_weights(TINY), strict=True):
        assert_same_bits(held, whole, parameter.name)


def test_a_folder_is_trained_further(mesh: DeviceMesh, tmp_path: Path) -> None:
    """With A and B as they were written: the same merged weights, and other moments."""
    first = trainer_of(adapted(), mesh, steps=2)
    held = {p.name: t for p, t in first.adapter_tensors()}
    write(tmp_path, first.model.config, held, "")
    second = trainer_of(adapted(), mesh, adapter=str(tmp_path))
    for parameter, tensor in second.adapter_tensors():
        assert_same_bits(tensor, held[parameter.name], parameter.name)
    assert sha256(w for _, w in second.weights()) == sha256(w for _, w in first.weights())
    assert adapter_of(tmp_path, TINY) == BOTH


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["tiny", "experts"])
def test_the_gradient_is_that_of_float64(name: str, rslora: bool, mesh: DeviceMesh) -> None:
    """dA = scale B^T dW', dB = scale dW' A^T, matrix by matrix, by the gradient of a full model at W'."""
    plain, adapter = SHAPES[name], replace(EXPERTS if SHAPES[name].experts else ALL, rslora=rslora)
    config = adapted(plain, adapter)
    trainer = trainer_of(config, mesh, steps=2)
    full = Trainer(plain, TrainerConfig(1, 2), mesh, trainer.weights())
    batch = random_batch(plain, 4, seed=9)
    for one in (trainer, full):
        (batch_logprobs(one.model, batch, 1, "cpu") * torch.from_numpy(batch.advantages)).sum().backward()
    whole = {n: p.grad.to_local().double() for n, p in full.model.named_parameters()}  # type: ignore[union-attr]
    found, seen = dict(trainer.model.named_parameters()), 0
    for parameter in served(config):
        if not adapter.rank(parameter):
            assert found[parameter.name].grad is None
            continue
        a, b = (found[parameter.name + end].detach().to_local().double() for end in ("_A", "_B"))  # type: ignore[attr-defined]
        held, scale, dw = adapter.held_rank(parameter), adapter.scale(parameter), whole[parameter.name]
        want = {"_A": torch.zeros_like(a), "_B": torch.zeros_like(b)}
        for number, rows in parameter.owners(range(parameter.shape[0])):
            mine = slice(number * held, (number + 1) * held)
            want["_A"][mine] = scale * b[rows].T @ dw[rows]
            want["_B"][rows] = scale * dw[rows] @ a[mine].T
        for end, value in want.items():
            got = found[parameter.name + end].grad.to_local().double()  # type: ignore[union-attr]
            error = ((got - value).abs().max() / value.abs().max()).item()
            assert error < 64 * torch.finfo(torch.float32).eps, f"{parameter.name}{end}: {error}"
            seen += 1
    assert seen == 2 * (4 * plain.layers + 1)


@pytest.mark.parametrize("name", ["61 ids", "experts"])
def test_the_contrast_trains_them_too(name: str, mesh: DeviceMesh) -> None:
    """`numerics=fast`: near the exact adapters, and other bits."""
    config = adapted(SHAPES[name], EXPERTS if SHAPES[name].experts else ALL)
    exact, fast = (trainer_of(replace(config, numerics=n), mesh, steps=2).adapter_tensors() for n in ("exact", "fast"))
    gaps = [(a - b).abs().max().item() for (_, a), (_, b) in zip(exact, fast, strict=True)]
    assert 0 < max(gaps) < 1e-3


def test_frozen_weights_have_no_master_no_moment_and_no_gradient(mesh: DeviceMesh) -> None:
    config = adapted()
    trainer = trainer_of(config, mesh, torch.bfloat16, steps=1)
    assert {p.name for p in trained(config)} == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    names = {p.name for p in saved(config)}
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in names or name == "head" else torch.float32)
    assert not names & trainer.optimizer._moments.keys()
    assert {key.partition(".")[2] for key in trainer.shard()} == {p.name for p in trained(config)}


@pytest.mark.parametrize("rank", [1, 16, 17, 32])
def test_any_rank_up_to_the_width(rank: int, mesh: DeviceMesh) -> None:
    """A rank as large as the narrowest side spans every change of the weight."""
    adapter = Adapter((("attention", rank),), float(rank))
    adapter.check(served(TINY))
    trainer = trainer_of(adapted(adapter=adapter), mesh, steps=2)
    assert sha256(w for _, w in trainer.weights()) != sha256(w for _, w in random_weights(TINY))


def test_a_rank_of_the_width_reaches_every_weight(mesh: DeviceMesh) -> None:
    """With A = 1 and scale 1 the merged weight is W + B, to the bit, whatever B is."""
    width = TINY.hidden_size
    trainer = trainer_of(adapted(adapter=Adapter((("attention", width),), float(width))), mesh)
    local = local_rows(trainer.model)
    a, b, merged = (local[f"layers.1.qkv{end}"] for end in ("_A", "_B", ""))
    frozen = merged.clone()
    a.copy_(torch.eye(width).repeat(3, 1))
    b.normal_(generator=torch.Generator().manual_seed(3))
    assert trainer.adapters
    trainer.adapters.merge()
    assert_same_bits(merged, frozen + b, "layers.1.qkv")


def test_what_no_adapter_can_be_is_refused() -> None:
    width = min(TINY.hidden_size, TINY.kv_heads * TINY.head_dim)
    with pytest.raises(ConfigError, match=f"rank {width + 1} is above {width}, the width of layers.0.qkv"):
        Adapter((("attention", width + 1),), 1.0).check(served(TINY))
    with pytest.raises(ConfigError, match=r"head: this model has attention, mlp \(its head is its embedding"):
        Adapter((("head", 1),), 1.0).check(served(SHAPES["tied"]))
    with pytest.raises(
        ConfigError, match="adapter of mlp: this model has attention, experts, head; ask for these alone"
    ):
        Adapter((("mlp", 1),), 1.0).check(served(SHAPES["experts"]))
