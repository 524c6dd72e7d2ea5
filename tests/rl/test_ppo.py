"""PPO whole: the critic is sharded, saved and brought back with the policy, counted by the plan, and changes with no layout."""

import json
from pathlib import Path

import pytest

from kernels.model import trained
from rl.compose import check
from rl.model import critic_model, model_config
from rl.plan import make_plan
from rl.report import read_lines
from tests.rl.command import command
from tests.rl.documented import undocumented
from trainer.checkpoint import folders, read

RUN = (
    *("algorithm=ppo", "algorithm.prompts_per_step=8", "algorithm.mini_batches=2", "algorithm.critic_lr=3e-3"),
    *("algorithm.kl_coef=0.1", "algorithm.kl_in=reward", "warmup.steps=3", "warmup.sequences=64", "eval.problems=16"),
    *("trainer.leaf_sequences=8", "trainer.micro_leaves=1", "trainer.lr=1e-3", "model.hf.num_hidden_layers=2"),
    *("data.problems=2000", "rollout.pages=256", "checkpoint.every=1", "checkpoint.keep=1", "logger=none"),
)


def finish(folder: Path, *keys: str) -> None:
    with command(*RUN, *keys, cwd=folder) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome


@pytest.mark.slow
def test_one_hash_wherever_it_was_stopped(tmp_path: Path) -> None:
    finish(tmp_path, "steps=4", "out_dir=whole", "trainer.world_size=1")
    rows = [row for row in read_lines(tmp_path / "whole" / "metrics.jsonl") if "reward/mean" in row]
    assert not undocumented({name for row in rows for name in row})
    assert all(row["divergence/tokens_nonzero"] == 0 for row in rows)
    assert all(row["critic/grad_norm_max"] > 0 for row in rows[1:])
    finish(tmp_path, "steps=2", "out_dir=parts", "trainer.world_size=2", "trainer.offload=optimizer")
    (newest,) = folders(tmp_path / "parts" / "checkpoints")
    config = check(list(RUN))[0]
    assert read(newest).optimizer_steps == 4, "two updates a step, of both models"
    finish(
        tmp_path,
        "steps=4",
        "out_dir=parts",
        "trainer.world_size=1",
        "trainer.micro_leaves=2",
        "cluster.placement=split",
    )
    ends = [json.loads((tmp_path / x / "summary.json").read_text()) for x in ("whole", "parts")]
    assert ends[0]["weights_sha256"] == ends[1]["weights_sha256"]
    again = [row for row in read_lines(tmp_path / "parts" / "metrics.jsonl") if "reward/mean" in row]
    told = [[row["critic/grad_norm_max"] for row in some] for some in (rows, again)]
    assert told[0] == told[1] and config.algorithm.critic is not None


def test_the_plan_counts_the_critic() -> None:
    """A second set of masters and moments on each rank and in each checkpoint."""
    plans = []
    for name in ("reinforce_plus_plus", "ppo"):
        config = check([f"algorithm={name}", "model.hf.vocab_size=64"])[0]
        model = model_config(config, None)
        plans.append(make_plan(config, model, 20))
    without, plan = plans
    body = sum(p.elements for p in trained(critic_model(model)) if p.saved)
    assert plan.trainer.state - without.trainer.state == 12 * body // config.trainer.world_size
    assert plan.checkpoint_bytes - without.checkpoint_bytes == 12 * body
    assert plan.trainer.peak - without.trainer.peak >= 12 * body // config.trainer.world_size
