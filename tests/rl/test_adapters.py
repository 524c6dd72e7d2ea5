"""Runs of adapters: what the section says, what a plan counts, and that a run stopped and gone on with ends in one hash."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.model import Adapter, ConfigError, costs, trained
from kernels.weights.adapters import CONFIG, WEIGHTS, adapter_sha256, load_merged, read, write
from kernels.weights.files import save
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
from tests.model.shapes import SHAPES, random_weights
from tests.rl.command import Outcome, call, command, summary
from tests.rl.recorded import LORA, assert_recorded
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
    none, model = config_of("adapter.rank=0"), model_config(config_of(), VOCABULARY)
    assert none.adapter == config_of().adapter and none.adapter.ranks == ()
    assert adapted_model(none, model) is model, "a run of rank 0 is one without adapters"
    assert config_of("adapter.rank=4").adapter.ranks == (("attention", 4), ("mlp", 4))
    assert config_of("adapter.rank={attention:4}").adapter.ranks == (("attention", 4),)
    one = config_of("adapter.rank={attention:2,mlp:8}", "adapter.rslora=true", "adapter.alpha=3")
    adapter = adapted_model(one, model_config(one, VOCABULARY)).adapter
    assert adapter and adapter.ranks == (("attention", 2), ("mlp", 8)) and adapter.rslora and adapter.alpha == 3


BAD = {
    ("adapter.rank=-1",): "adapter.rank=-1: input should be greater than or equal to 0",
    ("adapter.rank={attention:0,mlp:1}",): "adapter.rank.attention=0: input should be greater than 0",
    (
        "adapter.rank={attention:4}",
        "adapter.targets=[attention,mlp]",
    ): "rank names ['attention'], targets ['attention', 'mlp']",
    ("adapter.targets=[heads]",): "adapter.targets.0='heads': input should be 'attention', 'mlp', 'experts' or 'head'",
    ("adapter.targets=[]",): "targets must name each of attention, mlp, experts, head at most once, and one at least",
    (
        "adapter.targets=[mlp,mlp]",
    ): "targets must name each of attention, mlp, experts, head at most once, and one at least",
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
    apart = make_plan(config_of("+recipe=lora_qwen3_8b", "data.path=unused", "adapter.publish=factors"), model, 512)
    assert plan.frozen_bytes == 0 and apart.frozen_bytes == plan.weights_bytes, "in host memory"
    assert apart.rollout_bytes == plan.rollout_bytes
    warm = make_plan(config_of("+recipe=lora_qwen3_8b", "data.path=unused", "warmup.steps=1"), model, 512)
    assert warm.trainer_bytes == full.trainer_bytes, "a warm start trains the whole model"


def test_the_plan_says_it() -> None:
    said = call("dry_run=true", "adapter.rank=4", "logger=none")
    shown = " ".join(said.out.replace("│", " ").split())
    assert said.code == 0 and "of adapters, rank of attention 4, mlp 4" in shown


@pytest.fixture
def begun(tmp_path: Path) -> tuple[str, ...]:
    """The keys of a run that trains adapters of a folder further: rank 2 of attention, 5 of the MLP."""
    adapter = Adapter((("attention", 2), ("mlp", 5)), 3.0, True)
    model = replace(SHAPES["tiny"], adapter=adapter)
    save(model, random_weights(model), tmp_path / "base", torch.float32)
    write(tmp_path / "adapter", model, {p.name: torch.ones(p.shape) for p in trained(model)}, "")
    return f"model.path={tmp_path / 'base'}", f"adapter.path={tmp_path / 'adapter'}", "warmup.steps=0"


def test_what_is_trained_further_says_what_it_is(begun: tuple[str, ...]) -> None:
    section = config_of(*begun).adapter
    assert section.ranks == (("attention", 2), ("mlp", 5)) and section.alpha == 3 and section.rslora
    agreeing = ("adapter.rank={mlp:5,attention:2}", "adapter.targets=[mlp,attention]", "adapter.alpha=3")
    assert config_of(*begun, *agreeing).adapter == section


OTHERWISE = {
    (
        "adapter.rank=2",
    ): "adapter.rank=2, and {} has {{'attention': 2, 'mlp': 5}}: leave it out, or leave out adapter.path",
    ("adapter.targets=[mlp]",): "adapter.targets=['mlp'], and {} has ['attention', 'mlp']",
    ("adapter.alpha=4",): "adapter.alpha=4.0, and {} has 3.0",
    ("adapter.rslora=false",): "adapter.rslora=False, and {} has True",
    ("adapter.rank=0",): "adapter.rank=0, and {} has",
    (
        "warmup.steps=1",
    ): "adapter.path={} with warmup.steps=1: adapters are of the weights that they were trained on; set",
    ("model.path=null",): "adapter.path={} with model.path=null",
    ("adapter.path=nowhere",): "adapter.path=nowhere is no folder",
}


@pytest.mark.parametrize("keys", OTHERWISE)
def test_a_folder_that_is_not_what_is_asked_is_one_line(keys: tuple[str, ...], begun: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        config_of(*begun, *keys)
    folder = begun[1].partition("=")[2]
    assert OTHERWISE[keys].format(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_no_run_trains_is_one_line(begun: tuple[str, ...], tmp_path: Path) -> None:
    """Parts of a target, ranks and alphas that differ inside one: what is served and not trained."""
    config, folder = replace(SHAPES["tiny"], adapter=None), tmp_path / "adapter"
    held, fields = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    v = "model.layers.1.self_attn.v_proj"
    a, b = (f"base_model.model.{v}.lora_{end}.weight" for end in "AB")
    cases: list[tuple[str, dict[str, torch.Tensor], dict[str, Any]]] = [
        (f"has adapters of attention, and none of {v}.weight", {k: t for k, t in held.items() if v not in k}, {}),
        (
            f"rank 1 of {v}.weight, and 2 of others of attention",
            held | {a: held[a][:1].clone(), b: held[b][:, :1].clone()},
            {"rank_pattern": fields["rank_pattern"] | {v: 1}},
        ),
        (f"{v}.weight is scaled by", held, {"alpha_pattern": {v: 9}}),
    ]
    for said, tensors, changed in cases:
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(fields | changed))
        read(folder, config)  # it can be served
        with pytest.raises(ConfigError) as error:
            config_of(*begun)
        assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_trained_further_is_part_of_what_a_run_is(begun: tuple[str, ...], tmp_path: Path) -> None:
    config, folder = config_of(*begun), tmp_path / "adapter"
    moved = folder.rename(tmp_path / "moved")
    other = config_of(*begun, f"adapter.path={moved}")
    assert difference(identity(config), identity(other)) == "", "it may be moved"
    before = adapter_sha256(moved)
    held = load_file(moved / WEIGHTS)
    next(iter(held.values())).view(-1)[0] = 2
    save_file(held, moved / WEIGHTS)
    assert adapter_sha256(moved) != before


def finish(folder: Path, *keys: str) -> Outcome:
    return call_in(folder, *RUN, *keys)


def call_in(folder: Path, *keys: str) -> Outcome:
    with command(*keys, cwd=folder) as running:
        return running.finish()


LEARNS = (
    "+recipe=lora_tiny",
    "data.args={min_terms:2,max_terms:2,min_digits:1,max_digits:1}",
    r'data.pattern="State the final answer to the following arithmetic problem: (\d) ([+-]) (\d) ="',
    'data.prompt="{0}{1}{2}="',
    "warmup.steps=150",
    "warmup.sequences=128",
    "warmup.wrong_frac=0.3",
    "warmup.lr=3e-3",
    "steps=12",
    "algorithm.mini_batches=4",
    "eval.problems=8",
    "trainer.micro_leaves=2",
    "checkpoint.every=0",
    "logger=none",
)
"""The recipe in a minute: sums of two digits, 175 problems in all, most of which the warm start teaches."""


@pytest.mark.slow
def test_a_small_model_learns_by_adapters(tmp_path: Path) -> None:
    """What its samples earn: 256 of them a step. (How the recipe does on problems that it never saw: recipes/README.md.)"""
    assert call_in(tmp_path, *LEARNS, "out_dir=run").code == 0
    found = summary(tmp_path / "run")
    assert found["tokens_nonzero"] == 0
    earned = [row["reward/mean"] for row in read_lines(tmp_path / "run" / "metrics.jsonl") if "reward/mean" in row]
    assert sum(earned[-3:]) / 3 > sum(earned[:3]) / 3 + 0.08, earned
    assert_recorded(LORA, found["weights_sha256"])


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
        *(tmp_path, "steps=3", "out_dir=other", "resume=parts", "rollout.tp=1", "trainer.checkpointing=layer"),
        "adapter.publish=factors",
    )
    assert resumed.code == 0, resumed
    digests = [summary(tmp_path / name)["weights_sha256"] for name in ("whole", "other")]
    assert digests[0] == digests[1]
    rows = [r for r in read_lines(tmp_path / "whole" / "metrics.jsonl") if "align/differing_tokens" in r]
    assert all(row["align/differing_tokens"] == 0 for row in rows)
    logs = [read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "other")]
    carried = [[row["publish/carried_gib"] for row in log if "publish/carried_gib" in row][-1] for log in logs]
    assert carried[1] < carried[0] / 2, "A and B are less than the weights"

    on = (f"model.path={tmp_path / 'whole/base'}", "warmup.steps=0", "adapter.rank=null")
    on = (
        *(
            key
            for key in RUN
            if key.partition("=")[0] not in ("warmup.steps", "adapter.rank", "model.hf.num_hidden_layers")
        ),
        *on,
    )
    further = [(*on, f"adapter.path={tmp_path / 'whole/adapter'}", f"out_dir={name}") for name in ("on", "stopped")]
    assert call_in(tmp_path, *further[0], "steps=2", "trainer.world_size=1").code == 0
    assert call_in(tmp_path, *further[1], "steps=1").code == 0
    assert call_in(tmp_path, *further[1], "steps=2", "trainer.world_size=1").code == 0
    ends = [summary(tmp_path / name)["weights_sha256"] for name in ("on", "stopped")]
    assert ends[0] == ends[1] != digests[0]
    other = call_in(tmp_path, *further[1], "steps=3", f"adapter.path={tmp_path / 'on/adapter'}")
    assert "the adapters that are trained further (sha256)" in other.error(2)

    export([str(tmp_path / "whole"), str(tmp_path / "merged"), "--merge"])
    assert f"weights sha256 {digests[0]}" in capsys.readouterr().out
    export([str(tmp_path / "whole"), str(tmp_path / "again")])
    config, base = ModelFolder(tmp_path / "merged").model(), tmp_path / "whole" / "base"
    exported = dict(load_merged(config, tmp_path / "merged", {}, torch.float32))
    for folder in ("whole/adapter", "again"):
        merged = load_merged(config, base, read(tmp_path / folder, config), torch.float32)
        for parameter, tensor in merged:
            assert_same_bits(tensor, exported[parameter], parameter.name)
