"""The trainer's forward and the sampler's over the same tokens: equal in every op, and where one side's weight is another, the
op that it is read by is named."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from kernels.model import ModelConfig, Parameter, saved
from rl.replay.command import between, sides
from rl.replay.parting import Parting
from rl.replay.sides import Model
from tests.model.shapes import EIGHT, SHAPES, TINY, random_weights
from trainer.batch import Batch

MIXTURE = next(config for config in SHAPES.values() if config.experts)
QUIET = Console(quiet=True)


def batch_of(config: ModelConfig, seed: int = 0) -> Batch:
    """Sequences of one turn and of several, of other lengths and temperatures; one was given whole."""
    random = np.random.default_rng(seed)
    lengths, rows, temperatures, first = [], [], [], 0
    for i in range(6):
        length = int(random.integers(3, 40))
        prompt = int(random.integers(1, length))
        mine = [p for p in range(prompt, length) if i % 3 or p % 5 < 3] if i != 4 else []
        rows += [first + p for p in mine]
        temperatures += [0.5 + 0.25 * i] * len(mine)
        lengths.append(length)
        first += length
    ids = random.integers(0, config.vocab_size, first)
    filters = {"top_k": np.full(len(rows), 3), "temperatures": np.array(temperatures, np.float32)}
    return Batch.of(ids, np.array(lengths), np.array(rows), **filters)


def replayed(
    config: ModelConfig, dtype: torch.dtype = torch.float32, changed: str = "", batch: Batch | None = None
) -> Parting:
    """Replays a batch; the sampler's weight `changed` differs in one bit of one element."""

    def sampler() -> Iterator[tuple[Parameter, torch.Tensor]]:
        for parameter, whole in random_weights(config):
            if parameter.name == changed:
                whole = whole.clone()
                whole.view(-1)[0] *= 1.5
            yield parameter, whole

    def trainer() -> Iterable[tuple[Parameter, torch.Tensor]]:
        return random_weights(config)

    model = Model(config, dtype)
    batch = batch or batch_of(config)
    return between(*sides(model, trainer, sampler, batch), batch, config.layers, QUIET)


@pytest.mark.parametrize("config", [TINY, EIGHT, MIXTURE, *[c for c in SHAPES.values() if c.family.qkv_bias][:1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_differs(config: ModelConfig, dtype: torch.dtype) -> None:
    found = replayed(config, dtype)
    ops = before(config, (config.layers, "log-prob")) + 1
    batch = batch_of(config)
    computed = len(batch.token_ids) - batch.sequences  # the last token of each follows nothing on the sampler's side
    assert found.stage is None and found.ops == ops and found.where == "nowhere"
    assert found.rows == computed * (ops - 1) + len(batch.rows)
    assert found.told(("trainer", "sampler")) == [
        f"0 of {found.rows:,} rows differ in {config.layers} layers, {ops} ops"
    ]


OF_LAYER = {
    "attn_norm": "attn_norm", "qkv": "qkv", "q_norm": "rope", "k_norm": "rope", "o": "o", "mlp_norm": "mlp_norm",
    "gate_up": "gate_up", "down": "down", "router": "router", "experts_gate_up": "experts", "experts_down": "experts",
}  # fmt: skip


@pytest.mark.parametrize("config", [TINY, MIXTURE], ids=["dense", "mixture"])
def test_a_weight_that_differs_is_named_by_its_layer_and_op(config: ModelConfig) -> None:
    for parameter in saved(config):
        found = replayed(config, changed=parameter.name)
        *layer, name = parameter.name.rsplit(".", 1)
        outer = {"embed": (-1, "embedding"), "norm": (config.layers, "norm"), "head": (config.layers, "log-prob")}
        expected = (int(layer[0].split(".")[-1]), OF_LAYER[name]) if layer else outer[name]
        if parameter.name == "embed" and not (batch_of(config).token_ids == 0).any():
            continue
        assert found.stage == expected, (parameter.name, found)
        assert found.equal == before(config, expected) and 0 < found.stage_rows <= found.rows
        lines = found.told(("trainer", "sampler"))
        assert f"trainer and sampler part at {found.where}: sequence " in lines[1]
        assert "there " in lines[2] and lines[2].count("(0x") == 2, lines


def before(config: ModelConfig, stage: tuple[int, str]) -> int:
    dense = ["attn_norm", "qkv", "rope", "attention", "o", "mlp_norm", "gate_up", "swiglu", "down"]
    sparse = ["attn_norm", "qkv", "rope", "attention", "o", "mlp_norm", "router", "route", "experts"]
    stages = [(-1, "embedding")]
    for i in range(config.layers):
        stages += [(i, op) for op in (sparse if config.sparse(i) else dense)]
    return [*stages, (config.layers, "norm"), (config.layers, "log-prob")].index(stage)


def test_one_row_of_many_is_found() -> None:
    """A token that one sequence alone has: the first row that differs is its own."""
    batch = batch_of(TINY)
    ids = np.where(batch.token_ids == 0, 1, batch.token_ids)
    ids[int(batch.lengths[:3].sum()) + 1] = 0
    found = replayed(TINY, changed="embed", batch=replace(batch, token_ids=ids))
    assert (found.stage, found.sequence, found.position, found.stage_rows) == ((-1, "embedding"), 3, 1, 1)
    assert found.equal == 0 and "element 0 is trainer " in found.element


def test_the_contrast_parts_where_torch_sums_otherwise() -> None:
    """numerics=fast: one side's matmuls have other shapes than the other's, and the trainer's attention is torch's."""
    config = replace(SHAPES.get("wide", TINY), numerics="fast")
    found = replayed(config)
    assert (
        found.stage is not None and found.stage[0] in (0, 1) and found.stage[1] in ("qkv", "attention", "o", "gate_up")
    )
    assert "reprs" not in found.element and found.differing > found.stage_rows
