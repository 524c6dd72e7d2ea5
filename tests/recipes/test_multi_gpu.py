"""The command for several GPUs, as far as it goes without one: what it would run is a run, and what it writes is what ran."""

import json
import time
from pathlib import Path

import pytest

from recipes.multi_gpu.command import run
from recipes.multi_gpu.parts import PLACEMENTS, Row, Setting, _kill_one, kill_command, learned, phases, recipe_command
from recipes.multi_gpu.problems import coin, write_problems
from recipes.multi_gpu.record import markdown
from rl.compose import check
from rl.config import RunConfig
from rl.data import open_source
from rl.identity import identity
from rl.model import model_config
from rl.plan import make_plan


def planned(command: list[str], cards: int) -> RunConfig:
    """The config of an `rl.train` command line that fits its data and its cards."""
    assert command[0] == "rl.train"
    (config,) = check(command[1:])
    source = open_source(config)
    longest = max(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    make_plan(config, model_config(config, len(source.tokenizer)), longest)
    assert (
        config.device == "cuda" and max(config.trainer.world_size, config.rollout.tp * config.rollout.replicas) <= cards
    )
    return config


@pytest.mark.parametrize(("cards", "layers"), [(2, 4), (2, 36), (4, 36), (8, 36)])
def test_every_run_is_one_that_can_be_planned(cards: int, layers: int, tmp_path: Path) -> None:
    write_problems(tmp_path, 40)
    setting = Setting(tmp_path, tmp_path, cards, layers, 2, 8, 64, tmp_path, 10.0, 0.0, True)
    recipes = {
        (placement, numerics): planned(recipe_command(setting, placement, numerics, tmp_path / "out"), cards)
        for placement in PLACEMENTS
        for numerics in ("exact", "fast")
    }
    assert {config.numerics for (_, numerics), config in recipes.items() if numerics == "fast"} == {"fast"}
    exact = [identity(config) for (_, numerics), config in recipes.items() if numerics == "exact"]
    assert exact[0] == exact[1] and recipes["colocated", "exact"] != recipes["split", "exact"]
    one, all_ = (planned(kill_command(setting, ranks, tmp_path / "out"), cards) for ranks in (1, cards))
    assert identity(one) == identity(all_) and one.trainer.world_size == 1 and all_.trainer.world_size == cards


def test_a_command_and_its_end(tmp_path: Path) -> None:
    assert run(["json.tool", "--no-such"], tmp_path / "log", 60).code == 2
    assert "unrecognized" in (tmp_path / "log").read_text()
    hanging = run(["http.server", "0", "--bind", "127.0.0.1"], tmp_path / "log", 1.0)
    assert hanging.code is None and 1 <= hanging.seconds < 20


def test_the_first_step_is_not_timed(tmp_path: Path) -> None:
    assert phases(tmp_path) == {}
    names = ("handover", "sample", "score", "train", "publish")
    rows = [{"step": i, "grpo/step": i, **{f"time/{name}": float(i) for name in names}} for i in range(1, 4)]
    evaluation, half = {"step": 4, "eval/accuracy": 0.5}, '{"step": 5, "gr'
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, evaluation]) + half)
    assert phases(tmp_path) == dict.fromkeys(names, 2.5)


def test_a_rank_is_killed_in_a_step_that_can_be_resumed(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, 2, 4, 3, 8, 64, tmp_path, 20.0, time.monotonic() + 20, True)
    row = _kill_one(setting, ["tests.recipes.pretend", str(tmp_path / "run")], tmp_path / "run", "TrainerRank")
    assert row.ok and row.figures["it says"] == "samebit: error: trainer rank 0 failed: it died"
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    assert steps > 3 and row.case == f"trainer rank killed in step {steps + 1}"
    nobody = _kill_one(setting, ["tests.recipes.pretend", str(tmp_path / "other")], tmp_path / "other", "RolloutRank")
    assert not nobody.ok, "there was no such rank"


def test_a_run_without_a_gradient_shows_nothing(tmp_path: Path) -> None:
    row = {"grpo/step": 1, "time/train": 1.0, "policy/grad_norm": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert not learned(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row | {"policy/grad_norm": 0.1}) + "\n")
    assert learned(tmp_path)
    assert {coin(None, text) for text in "abcdefgh"} == {0.0, 1.0}


def test_the_record_names_what_failed() -> None:
    rows = [
        Row("recipe", "colocated", True, 10.0, "python -m rl.train x", {"step, s": 1.5, "weights": "a|b"}),
        Row("kill", "trainer rank", False, 40.0, "python -m rl.train y", {}, "not done after 40 s: waiting"),
    ]
    page = markdown(rows, {"command": "python -m recipes.multi_gpu", "cards": "2 x H"})
    assert "1 of 2 rows hold. **kill, trainer rank: not done after 40 s: waiting**" in page
    assert "| colocated | yes | 1.5 | a\\|b | 10 |" in page and "| trainer rank | **no** | 40 |" in page
    assert page.count("python -m rl.train x") == 1 and "| cards | 2 x H |" in page
