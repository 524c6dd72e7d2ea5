"""Whole runs through the command line: what they leave, and one hash for all layouts."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from rl.config import validate
from rl.metrics import FORMULAS
from tests.rl.command import GSM8K, SHORT, call, command, summary
from tests.rl.documented import undocumented

pytestmark = pytest.mark.slow

ELSEWHERE = (  # every way to serve and to shard that must not matter, at once
    "cluster.placement=split",
    "rollout.tp=1",
    "rollout.replicas=2",
    "rollout.pages=24",
    "rollout.page_size=3",
    "rollout.prefix_cache=false",
    "rollout.prefill_chunk=2",
    "rollout.max_batch_tokens=9",
    "rollout.max_running=3",
)

SPARING = ("trainer.micro_tokens=400", "trainer.checkpointing=layer", "trainer.offload=all")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs in one command, from another folder, into a relative one, evaluated on a further set too."""
    folder = tmp_path_factory.mktemp("sweep")
    further = "eval.sets={few: {data: arithmetic, problems: 200, samples: 2}}"
    with command("-m", "seed=0,1", *SHORT, further, "out_dir=runs", cwd=folder) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    yield folder / "runs"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sweep_keeps_runs_apart(sweep: Path) -> None:
    assert sorted(p.name for p in sweep.iterdir() if p.is_dir()) == ["seed=0", "seed=1"]
    assert [yaml.safe_load((sweep / f"seed={s}/config.yaml").read_text())["seed"] for s in (0, 1)] == [0, 1]
    hashes = [summary(sweep / f"seed={s}")["weights_sha256"] for s in (0, 1)]
    assert all(len(h) == 64 for h in hashes) and hashes[0] != hashes[1]


def test_summary(sweep: Path) -> None:
    for folder in (sweep / "seed=0", sweep / "seed=1"):
        s = summary(folder)
        assert {"eval_accuracy_before", "eval_accuracy_after", "seconds", "versions"} < set(s)
        assert 0 < s["memory"]["trainer_peak_gib"] < 2 * s["memory"]["trainer_planned_gib"]
        assert s["tokens_nonzero"] == 0 and s["tokens_compared"] > 256
        assert {"python", "torch", "ray", "samebit"} <= set(s["versions"])


def test_metrics_and_completions(sweep: Path) -> None:
    rows = lines(sweep / "seed=0" / "metrics.jsonl")
    assert not undocumented({name for row in rows for name in row})
    assert [r["phase"] for r in rows] == ["warmup"] * 3 + ["grpo"] * 4  # evaluation, two steps, evaluation
    steps = [r for r in rows if "reward/mean" in r]
    assert len(steps) == 2
    evaluated = [row["grpo/step"] if "grpo/step" in row else row["step"] for row in rows if "eval/accuracy" in row]
    assert evaluated == [3, 6] == [row["step"] for row in rows if "eval/few/pass@2" in row]
    for row in steps:
        assert {name: row[name] for name in FORMULAS} == {name: ideal for name, (_, ideal) in FORMULAS.items()}
        assert all(row[f"time/{phase}"] > 0 for phase in ("sample", "score", "train", "publish"))
        assert all(
            row[f"speed/{name}"] > 0 for name in ("sample_tokens_per_s", "train_tokens_per_s", "train_tflops_per_rank")
        )
        assert "speed/train_mfu" not in row and row["memory/trainer_peak_gib"] > 0
    compared = sum(r["divergence/tokens_compared"] for r in steps)
    assert compared == summary(sweep / "seed=0")["tokens_compared"]
    for row in lines(sweep / "seed=0" / "completions.jsonl"):
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["trainer_logprobs"])
        assert row["logprobs"] == row["trainer_logprobs"]
        assert {"step", "prompt", "completion", "answer", "reward"} <= set(row)


def test_config_is_resolved(sweep: Path) -> None:
    values = yaml.safe_load((sweep / "seed=1" / "config.yaml").read_text())
    assert validate(values).out_dir == "runs/seed=1" and "${" not in json.dumps(values)


def test_report_is_self_contained(sweep: Path) -> None:
    html = (sweep / "seed=0" / "report.html").read_text()
    assert summary(sweep / "seed=0")["weights_sha256"] in html
    assert "Accuracy on further sets" in html
    assert not any(f'{attribute}="http' in html for attribute in ("src", "href"))


def test_train_log_holds_what_the_console_said(sweep: Path) -> None:
    for seed in (0, 1):
        said = [line[21:] for line in (sweep / f"seed={seed}" / "train.log").read_text().splitlines()]
        first = [line for line in said if not line.endswith(" s)")]  # without what is said of a wait that takes long
        assert first[0] == f"run {seed + 1} of 2: seed={seed}" and first[1].startswith("samebit ")
        steps = [line.split("  ")[0] for line in said if line.startswith(("warm start ", "GRPO "))]
        assert [s for s in steps if ":" not in s] == [f"warm start {i}/3" for i in (1, 2, 3)] + ["GRPO 1/2", "GRPO 2/2"]
        assert f"weights sha256 {summary(sweep / f'seed={seed}')['weights_sha256']}" in said
        assert said[-1] == f"report runs/seed={seed}/report.html"


def test_transformers_loads_the_model(sweep: Path) -> None:
    """Logits of the saved directory: ours and transformers' agree within float32 rounding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kernels.collectives import TreeGroup
    from kernels.model import Layout, decoder_layer, forward, layer_weights, outer_weights, position_table
    from kernels.weights.files import load
    from kernels.weights.folder import ModelFolder

    path = sweep / "seed=0" / "model"
    ids = AutoTokenizer.from_pretrained(path)("1+2-3=", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(torch.tensor([ids])).logits[0]
        config = ModelFolder(path).model()
        weights = {p.name: t for p, t in load(config, path)}
        outer = outer_weights(weights)
        table = position_table(config)
        layout = Layout.packed([len(ids)], [1], "cpu")

        def layer(i: int, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            return decoder_layer(config, TreeGroup(), layer_weights(weights, i), i, x, delta, layout, None, table)

        hidden = forward(config, TreeGroup(), outer, layer, torch.tensor(ids), layout, torch.float32)
    ours = hidden @ outer.head.T
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [ELSEWHERE, ("rollout.tp=4", "trainer.world_size=1", *SPARING, "save_model=false")],
    ids=["engine", "shards"],
)
def test_same_hash_for_another_layout(sweep: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    with command(*SHORT, *layout, f"out_dir={tmp_path / 'run'}", cwd=tmp_path) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    first, second = summary(sweep / "seed=0"), summary(tmp_path / "run")
    for key in ("weights_sha256", "tokens_compared", "eval_accuracy_before", "eval_accuracy_after"):
        assert first[key] == second[key], key
    assert second["tokens_nonzero"] == 0
    assert (tmp_path / "run/model").exists() == ("save_model=false" not in layout)
    if (tmp_path / "run/model").exists():
        theirs = (tmp_path / "run/model/model.safetensors").read_bytes()
        assert (sweep / "seed=0/model/model.safetensors").read_bytes() == theirs


@pytest.mark.skipif(not GSM8K.exists(), reason="no GSM8K in ../shared/data/gsm8k")
def test_two_steps_of_real_text(tmp_path: Path) -> None:
    small = ("model.hf.num_hidden_layers=1", "rollout.max_new_tokens=16", "eval.problems=4", "warmup.steps=1")
    data = f"data.path={GSM8K.resolve()}"
    with command("+recipe=gsm8k_tiny", data, *small, "logger=none", "out_dir=text", cwd=tmp_path) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    s = summary(tmp_path / "text")
    assert s["tokens_nonzero"] == 0 and s["tokens_compared"] > 64


def test_a_contrast_run_is_named_in_all_that_it_leaves_and_is_no_exact_one(tmp_path: Path) -> None:
    out_dir, short = (
        tmp_path / "run",
        ("steps=1", "warmup.steps=1", "eval.problems=8", "logger=none", "checkpoint.every=1"),
    )
    with command(*short, "numerics=fast", f"out_dir={out_dir}", cwd=tmp_path) as running:
        outcome = running.finish()
    assert outcome.code == 0, outcome
    assert outcome.out.count("numerics=fast") == 2 and not outcome.err
    s, rows = summary(out_dir), lines(out_dir / "metrics.jsonl")
    assert not undocumented({name for row in rows for name in row})
    assert s["numerics"] == "fast" and 0 < s["tokens_nonzero"] < s["tokens_compared"]
    assert {row["numerics"] for row in rows} == {"fast"}
    (step,) = (row for row in rows if "divergence/first_mismatch" in row)
    assert 0 < step["divergence/logprob_abs_diff_max"] < 1e-4
    assert step["divergence/first_mismatch"]["trainer_bits"] != step["divergence/first_mismatch"]["rollout_bits"]
    assert "Contrast run (numerics=fast)" in (out_dir / "report.html").read_text()
    error = call(*short, "steps=2", f"out_dir={out_dir}").error()
    assert "numerics=fast there, numerics=exact here" in error


def test_a_mixture_of_experts_has_one_hash(tmp_path: Path) -> None:
    """With its load-balancing loss; `transformers` reads what it leaves."""
    recipe = ("+recipe=moe_tiny", *SHORT, "trainer.router_aux_loss_coef=0.01")
    found = []
    for name, layout in (("one", ()), ("other", (*ELSEWHERE, "trainer.world_size=1", *SPARING))):
        with command(*recipe, *layout, f"out_dir={tmp_path / name}", cwd=tmp_path) as running:
            outcome = running.finish()
            assert outcome.code == 0, outcome
            running.assert_nothing_left()
        found.append(summary(tmp_path / name))
        assert found[-1]["tokens_nonzero"] == 0 and found[-1]["tokens_compared"] > 256
        steps = [row for row in lines(tmp_path / name / "metrics.jsonl") if "reward/mean" in row]
        assert [row["moe/dropped_tokens"] for row in steps] == [0, 0]
        assert all(row["moe/tokens_per_expert_max"] > row["moe/tokens_per_expert_min"] for row in steps)
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and model.config.num_experts == 16
