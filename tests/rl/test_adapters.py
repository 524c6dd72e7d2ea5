"""Runs of adapters: what the section says, what a plan counts, and that a run stopped and gone on with ends in one hash."""

import shutil
from pathlib import Path

import pytest
import torch

from kernels.model import ConfigError, costs, trained
from kernels.weights.adapters import load_merged, read
from kernels.weights.folder import ModelFolder
from rl.adapters import adapted_model
from rl.compose import check
from rl.config import RunConfig
from rl.errors import UserError
from rl.identity import difference, identity
from rl.keys import renewed
from rl.model import model_config
from rl.plan import make_plan
from rl.report import read_lines
from tests.bits import assert_same_bits
from tests.rl.command import Outcome, call, command, summary
from trainer.export import main as export

RUN = (
    "warmup.steps=2",
    "warmup.sequences=64",
    "adapter.rank=4",
    "algorithm.prompts_per_step=8",
    "eval.problems=16",
    "trainer.leaf_sequences=8",
    "trainer.micro_leaves=1",
    "trainer.lr=1e-3",
    "model.hf.num_hidden_layers=2",
    "data.problems=2000",
    "rollout.pages=256",
    "checkpoint.every=1",
    "checkpoint.keep=1",
    "logger=none",
)
VOCABULARY = 32


def config_of(*keys: str) -> RunConfig:
    return check(keys)[0]


def test_the_ranks_of_the_targets() -> None:
    assert config_of().adapter.ranks == ()
    assert config_of("adapter.rank=4").adapter.ranks == (("attention", 4), ("mlp", 4))
    one = config_of("adapter.rank={attention:2,mlp:8}", "adapter.rslora=true", "adapter.alpha=3")
    adapter = adapted_model(one, model_config(one, VOCABULARY)).adapter
    assert adapter and adapter.ranks == (("attention", 2), ("mlp", 8)) and adapter.rslora and adapter.alpha == 3


BAD = {
    ("adapter.rank=-1",): "adapter.rank=-1: input should be greater than or equal to 0",
    ("adapter.rank={attention:0,mlp:1}",): "adapter.rank.attention=0: input should be greater than 0",
    ("adapter.rank={attention:4}",): "rank names ['attention'], targets ['attention', 'mlp']",
    ("adapter.targets=[heads]",): "adapter.targets.0='heads': input should be 'attention' or 'mlp'",
    ("adapter.targets=[experts]",): "input should be 'attention' or 'mlp'",
    ("adapter.targets=[]",): "targets must name each of attention, mlp at most once, and one at least",
    ("adapter.targets=[mlp,mlp]",): "targets must name each of attention, mlp at most once, and one at least",
    ("adapter.alpha=0",): "adapter.alpha=0",
    ("adapter.dropout=0.1",): "adapter.dropout is not supported: a weight that is merged has no dropout",
    ("adapter.lora_alpha=3",): "did you mean adapter.alpha?",
}


@pytest.mark.parametrize("keys", BAD)
def test_a_section_that_cannot_be_is_one_line(keys: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        config_of(*(key.replace("adapter.dropout", "+adapter.dropout") for key in keys))
    assert BAD[keys] in str(error.value) and "\n" not in str(error.value)


def test_what_a_model_cannot_have_is_refused() -> None:
    wide = config_of("adapter.rank=1000")
    with pytest.raises(ConfigError, match=r"rank 1000 is above .* the width of layers.0.qkv"):
        adapted_model(wide, model_config(wide, VOCABULARY))
    critic = config_of("adapter.rank=4", "algorithm=ppo")
    with pytest.raises(UserError, match=r"adapter\.rank=4 with algorithm=ppo: its critic is trained whole"):
        adapted_model(critic, model_config(critic, VOCABULARY))


def test_the_section_decides_bits_and_older_runs_have_none() -> None:
    whole, adapted = config_of(), config_of("adapter.rank=4")
    for key in ("adapter.rank=5", "adapter.alpha=1", "adapter.targets=[mlp]", "adapter.rslora=true"):
        other = config_of("adapter.rank=4", key) if "rank" not in key else config_of(key)
        assert key.partition("=")[0] in difference(identity(adapted), identity(other))
    older = whole.model_dump(mode="json")
    del older["adapter"]
    assert renewed(older)["adapter"] == whole.model_dump(mode="json")["adapter"]
    theirs = {key: value for key, value in identity(whole).items() if not key.startswith("adapter.")}
    assert difference(theirs, identity(whole)) == ""
    assert "adapter.rank=0 there, adapter.rank=4 here" in difference(theirs, identity(adapted))


def test_the_plan_counts_adapters_alone() -> None:
    """On one card of 80 GB, with no offload: two copies of the weights in bfloat16, and next to nothing that is trained."""
    config = config_of("+recipe=lora_qwen3_8b", "data.path=unused")
    model = model_config(config, None)
    plan, full = (
        make_plan(c, model, 512)
        for c in (config, config_of("+recipe=lora_qwen3_8b", "data.path=unused", "adapter.rank=0"))
    )
    adapted = adapted_model(config, model)
    assert plan.adapter_parameters == costs.adapter_count(adapted) == 87_293_952
    assert costs.trained_elements(adapted) == sum(p.held for p in trained(adapted)) == plan.adapter_parameters
    assert plan.trainer.state < 30 * 2**30 and plan.trainer_bytes < 62 * 2**30 < 100 * 2**30 < full.trainer_bytes
    assert plan.checkpoint_bytes == 12 * plan.adapter_parameters
    warm = make_plan(config_of("+recipe=lora_qwen3_8b", "data.path=unused", "warmup.steps=1"), model, 512)
    assert warm.trainer_bytes == full.trainer_bytes, "a warm start trains the whole model"


def test_the_plan_says_it() -> None:
    said = call("dry_run=true", "adapter.rank=4", "logger=none")
    shown = " ".join(said.out.replace("│", " ").split())
    assert said.code == 0 and "of adapters, rank of attention 4, mlp 4" in shown


def finish(folder: Path, *keys: str) -> Outcome:
    with command(*RUN, *keys, cwd=folder) as running:
        return running.finish()


@pytest.mark.slow
def test_a_run_of_adapters_is_one_hash_and_leaves_what_peft_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """After a warm start of the whole model; stopped, gone on with in another layout and another folder."""
    whole = finish(tmp_path, "steps=3", "out_dir=whole", "trainer.world_size=1")
    assert whole.code == 0, whole
    assert summary(tmp_path / "whole")["tokens_nonzero"] == 0
    assert finish(tmp_path, "steps=2", "out_dir=parts", "trainer.world_size=2").code == 0
    shutil.move(tmp_path / "parts" / "base", tmp_path / "kept")
    missing = finish(tmp_path, "steps=3", "out_dir=parts", "trainer.world_size=1")
    assert "base is missing: it holds the weights under the adapters of " in missing.error(2)
    shutil.move(tmp_path / "kept", tmp_path / "parts" / "base")
    resumed = finish(
        tmp_path, "steps=3", "out_dir=other", "resume=parts", "rollout.tp=1", "trainer.checkpointing=layer"
    )
    assert resumed.code == 0, resumed
    digests = [summary(tmp_path / name)["weights_sha256"] for name in ("whole", "other")]
    assert digests[0] == digests[1]
    rows = [r for r in read_lines(tmp_path / "whole" / "metrics.jsonl") if "align/differing_tokens" in r]
    assert all(row["align/differing_tokens"] == 0 for row in rows)

    export([str(tmp_path / "whole"), str(tmp_path / "merged"), "--merge"])
    assert f"weights sha256 {digests[0]}" in capsys.readouterr().out
    export([str(tmp_path / "whole"), str(tmp_path / "again")])
    config, base = ModelFolder(tmp_path / "merged").model(), tmp_path / "whole" / "base"
    exported = dict(load_merged(config, tmp_path / "merged", {}, torch.float32))
    for folder in ("whole/adapter", "again"):
        merged = load_merged(config, base, read(tmp_path / folder, config), torch.float32)
        for parameter, tensor in merged:
            assert_same_bits(tensor, exported[parameter], parameter.name)
