"""Runs in block-scaled FP8: what is refused, what a plan and a run's identity say, and one hash for every layout."""

import json
import re
from pathlib import Path

import pytest
import torch

from kernels.weights.folder import ModelFolder
from rl.compose import check
from rl.identity import difference, identity
from rl.model import model_config
from rl.plan import make_plan
from tests.rl.command import SHORT, call, command, summary
from trainer.export import main as export

SHAPE = (
    "model.format=fp8_block",
    "model.leaves=2",
    "model.hf.hidden_size=256",
    "model.hf.intermediate_size=256",
    "model.hf.num_hidden_layers=2",
    "model.hf.num_attention_heads=4",
    "model.hf.num_key_value_heads=4",
    "model.hf.head_dim=64",
)
SMALL = (
    *SHAPE,
    *SHORT,
    "warmup.sequences=32",
    "algorithm.prompts_per_step=4",
    "trainer.leaf_sequences=4",
    "trainer.micro_leaves=2",
    "eval.problems=16",
    "data.problems=2000",
)
LAYOUTS = (
    (),
    (
        *(
            "cluster.placement=split",
            "rollout.tp=1",
            "rollout.replicas=2",
            "rollout.page_size=3",
            "rollout.prefix_cache=false",
        ),
        *("rollout.prefill_chunk=2", "rollout.max_batch_tokens=9", "rollout.max_running=3"),
        *("trainer.world_size=1", "trainer.checkpointing=layer", "trainer.offload=all", "trainer.micro_leaves=1"),
    ),
)

BAD = {
    ("model.format=fp8_block",): "hidden_size 128 in model.leaves=8 are 16 each, which is not whole blocks of 128",
    ("model.format=fp8",): "model.format='fp8': input should be 'auto', 'plain', 'fp8_block' or 'fp8_block_ue8m0'",
    (
        *SHAPE,
        "model.dtype=float32",
    ): "model.format=fp8_block quantizes activations of bfloat16, and model.dtype is float32",
    (*SHAPE, "numerics=fast"): "model.format=fp8_block with numerics=fast",
    (
        "model=moe_tiny",
        "model.format=fp8_block",
    ): "experts are not quantized yet; a qwen3_moe takes plain weights",
    (*SHAPE, "model.leaves=4"): "hidden_size 256 in model.leaves=4 are 64 each, .* this model takes at most 2 leaves",
}


@pytest.mark.parametrize("keys", BAD, ids=lambda keys: " ".join(keys)[-40:])
def test_refused_in_one_line(keys: tuple[str, ...], tmp_path: Path) -> None:
    message = call(*keys, "logger=none", f"out_dir={tmp_path}").error()
    assert re.search(BAD[keys], message), message


def test_the_format_decides_the_dtype_and_is_part_of_the_run() -> None:
    config, plain = check(SHAPE)[0], check([*SHAPE, "model.format=plain"])[0]
    assert (config.dtype, plain.dtype) == (torch.bfloat16, torch.float32)
    assert check([*SHAPE, "model.format=auto"])[0].model.format == "plain"
    mine, theirs = identity(config), identity(check([*SHAPE, "model.format=fp8_block_ue8m0"])[0])
    assert difference(theirs, mine) == "model.format=fp8_block_ue8m0 there, model.format=fp8_block here"
    older = {key: value for key, value in identity(plain).items() if key != "model.format"}
    assert not difference(older, identity(plain)), "a run of an earlier version goes on"
    assert difference(older, mine)


def test_the_plan_knows_the_bytes() -> None:
    found = []
    for format in ("plain", "fp8_block"):
        config = check([*SHAPE, f"model.format={format}", "model.dtype=bfloat16"])[0]
        plan = make_plan(config, model_config(config, 64), 8)
        found.append(plan.weights_bytes)
        assert plan.disk_bytes == make_plan(check([*SHAPE, "model.dtype=bfloat16"])[0], plan.model, 8).disk_bytes
    layer = 4 * 256 * 256 + 2 * 256 * 256 + 256 * 256  # numbers of its projections
    assert found[0] - found[1] == (2 * layer - 2 * 4 * layer // 128**2) // 2  # two layers, two ranks


@pytest.mark.slow
def test_every_layout_is_one_run(tmp_path: Path) -> None:
    """And what it leaves says how it is computed."""
    found = []
    for number, layout in enumerate(LAYOUTS):
        folder = tmp_path / str(number)
        with command(*SMALL, *layout, f"out_dir={folder}", cwd=tmp_path) as running:
            outcome = running.finish(1800)
            assert outcome.code == 0, outcome
            running.assert_nothing_left()
        found.append(summary(folder))
        assert found[-1]["tokens_nonzero"] == 0 and found[-1]["tokens_compared"] > 60
        model = ModelFolder(folder / "model")
        assert model.format == "fp8_block" and model.contract and model.contract.dtype == "bfloat16"
    for key in ("weights_sha256", "tokens_compared", "eval_accuracy_before", "eval_accuracy_after"):
        assert found[0][key] == found[1][key], key
    export([str(tmp_path / "0"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["samebit"]
    assert fields["format"] == "fp8_block" and ModelFolder(tmp_path / "out").model().format == "fp8_block"
