"""Recipes, overrides and sweeps as configs; the plan of each."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from rl.algorithms import ALGORITHMS
from rl.compose import CONFIGS, RECIPES, check, recipe_names, sweep_name
from rl.config import RunConfig, Section, validate
from rl.data.section import DATA
from rl.errors import UserError
from tests.rl.command import GSM8K, call


def test_every_recipe_is_known() -> None:
    assert recipe_names() == sorted(p.stem for p in RECIPES.glob("*.yaml"))
    assert {"grpo_qwen3_0p6b", "grpo_qwen3_8b", "gsm8k_tiny"} <= set(recipe_names())


def sections(section: type[Section]) -> list[type[Section]]:
    below = [f.annotation for f in section.model_fields.values() if isinstance(f.annotation, type)]
    return [section, *(s for b in below if issubclass(b, Section) for s in sections(b))]


def test_the_files_hold_every_key_and_no_other() -> None:
    """The schema has no defaults: what a run does can be read in configs/."""
    algorithms = {
        get_args(c.model_fields["name"].annotation)[0]: c
        for c in get_args(RunConfig.model_fields["algorithm"].annotation)
    }
    assert set(algorithms) == set(ALGORITHMS)
    for section in (*sections(RunConfig), *DATA.values(), *algorithms.values()):
        assert all(f.is_required() for f in section.model_fields.values()), section
    values = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    assert set(values) - {"defaults", "hydra"} == set(RunConfig.model_fields) - {"model", "data"}
    files = [yaml.safe_load(path.read_text()) for path in (CONFIGS / "data").glob("*.yaml")]
    assert {file["kind"] for file in files} == set(DATA)
    for file in files:
        assert set(file) == set(DATA[file["kind"]].model_fields)
    for path in (CONFIGS / "algorithm").glob("*.yaml"):
        own = yaml.safe_load(path.read_text())
        assert values["algorithm"].keys() | own.keys() == algorithms[own["name"]].model_fields.keys(), path


def test_interface_names() -> None:
    keys = "seed=3 steps=4 out_dir=o dry_run=true rollout.tp=1 trainer.world_size=4 data=gsm8k data.path=p"
    config = check([*keys.split(), "align.policy=warn", "logger=none"])[0]
    assert (config.seed, config.steps, config.out_dir, config.dry_run) == (3, 4, "o", True)
    assert (config.rollout.tp, config.trainer.world_size, config.data.path) == (1, 4, "p")
    assert (config.align.policy, config.logger) == ("warn", ())


def test_overrides_beat_the_recipe() -> None:
    config = check(["+recipe=gsm8k_tiny", "data.path=x", "steps=7", "model.hf.num_hidden_layers=1"])[0]
    assert (config.steps, config.data.kind, config.model.hf["num_hidden_layers"]) == (7, "dataset", 1)


def test_a_sweep_is_every_combination() -> None:
    configs = check(["seed=0,1,2", "rollout.tp=choice(1,2)", "out_dir=o"], sweep=True)
    assert [(c.seed, c.rollout.tp) for c in configs] == [(s, t) for s in (0, 1, 2) for t in (1, 2)]
    assert len({c.out_dir for c in configs}) == 6 and configs[1].out_dir == "o/seed=0,rollout.tp=2"
    assert [c.seed for c in check(["seed=range(1,4)"])] == [1, 2, 3]


def test_keys_are_those_of_the_chosen_model() -> None:
    for chosen in ("model=moe_tiny", "+recipe=moe_tiny"):
        (config,) = check([chosen, "model.hf.num_experts=8"])
        assert config.model.hf["num_experts"] == 8
    with pytest.raises(UserError, match=r"unknown key 'model\.hf\.num_experts'"):
        check(["model.hf.num_experts=8"])
    with pytest.raises(UserError, match=r"unknown key 'model\.hf\.num_expert'; keys of model\.hf: .*num_experts,"):
        check(["model=moe_tiny", "model.hf.num_expert=8"])


def test_an_algorithm_brings_its_values() -> None:
    """A recipe's and a user's beat them; a name alone would leave those of another."""
    chosen = check(["+recipe=gsm8k_tiny", "data.path=x", "algorithm=dr_grpo", "algorithm.clip_high=0.3"])[0].algorithm
    assert (chosen.advantage, chosen.loss_mean, chosen.group_size, chosen.clip_high) == ("dr_grpo", "constant", 4, 0.3)
    assert check(["algorithm.name=grpo"])[0].algorithm == check([])[0].algorithm
    with pytest.raises(UserError, match=r"algorithm\.name=reinforce_plus_plus: choose algorithm=reinforce_plus_plus, "):
        check(["algorithm.name=reinforce_plus_plus"])
    with pytest.raises(UserError, match=r"'algorithm.advantage' \(a key of another algorithm=NAME\); .*baseline"):
        check(["algorithm=reinforce_plus_plus", "algorithm.advantage=grpo"])
    values = check([])[0].model_dump()
    for name, said in (
        ("trpo", "algorithm.name='trpo': must be one of 'grpo', 're"),
        (None, "algorithm.name is missing"),
    ):
        values["algorithm"] = {"name": name} if name else {}
        with pytest.raises(UserError, match=said):
            validate(values)


def test_sweep_name() -> None:
    line = ["-m", "seed=0,1", "steps=2", "+data.args.x=a,b"]
    assert sweep_name(line, ["seed=1", "steps=2", "+data.args.x=b"]) == "seed=1,+data.args.x=b"
    assert sweep_name(["-m", "model.path=/a,/b"], ["model.path=/b"]) == "model.path=_b"
    assert sweep_name(["-m", "steps=2"], ["steps=2"]) == "run"


PLANS = {
    "default": ((), ("1 rollout engine(s) x tp 2 + 2 trainer ranks on cpu",)),
    "gsm8k_tiny": (("+recipe=gsm8k_tiny", f"data.path={GSM8K.resolve()}"), ("8 prompts x group of 4",)),
    "grpo_qwen3_8b": (("+recipe=grpo_qwen3_8b",), ("8,190,735,360 parameters", "4 rollout engine(s) x tp 2", "GiB")),
    "grpo_qwen3_0p6b": (("+recipe=grpo_qwen3_0p6b",), ("596,049,920 parameters", "131,072 tokens", "32 prompts")),
}


@pytest.mark.parametrize("name", PLANS)
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "gsm8k_tiny" and not GSM8K.exists():
        pytest.skip("no GSM8K in ../shared/data/gsm8k")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    arguments, parts = PLANS[name]
    outcome = call(*arguments, "dry_run=true")
    assert outcome.code == 0 and outcome.err == ""
    rows = ("Plan", "processes", "memory, rollout process", "memory, trainer process", "KV capacity", "batch")
    for part in (*rows, *parts):
        assert part in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for order in (("-m", "seed=0,1", "dry_run=true"), ("seed=0,1", "dry_run=true", "-m")):
        outcome = call(*order, "data.problems=100")
        assert outcome.code == 0 and outcome.out.count("Plan") == 2
    assert list(tmp_path.iterdir()) == []


def test_dry_run_finds_what_does_not_fit() -> None:
    line = call("+recipe=grpo_qwen3_8b", "dry_run=true", "rollout.tp=16").error()
    assert "rollout.tp=16" in line
    assert (
        "no multiple of"
        in call(
            "+recipe=grpo_qwen3_8b", "dry_run=true", "algorithm.prompts_per_step=1", "algorithm.group_size=2"
        ).error()
    )
