"""The table of whole steps: which steps count, what speaks against it, and what stands beside it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.bench import step as bench
from kernels.bench.step import MODES, Row, Theirs, against, cards, of_steps, overrides_of
from kernels.model.known import BENCH
from rl.compose import check
from rl.prove import SMALL

ROW = Row("synchronous", {"step": 2.0, "train": 1.0}, 100.0, 50.0, "a" * 64, 0)


def config(*keys: str) -> Any:
    return check([*SMALL, *keys])[0]


def test_modes_differ_in_two_keys() -> None:
    assert {mode: overrides_of(mode, 2) for mode in MODES} == {
        "synchronous": ["rollout.speculate=off", "algorithm.lag=0"],
        "speculating": ["rollout.speculate=auto", "algorithm.lag=0"],
        "overlapping": ["rollout.speculate=off", "algorithm.lag=2"],
        "both": ["rollout.speculate=auto", "algorithm.lag=2"],
    }


def test_first_and_last_steps_do_not_count() -> None:
    metrics: list[dict[str, Any]] = [{"eval/accuracy": 0.5}]
    for step in range(1, 8):
        seconds = 2.0 if step in (4, 5) else 100.0
        metrics.append(
            {"grpo/step": step, "time/step": seconds, "time/spans": [], "speed/step_tokens_per_s": 30.0 * step}
        )
        metrics[-1] |= {"time/sample": 1.0} if step == 4 else {}  # a step may have drawn nothing
    row = of_steps("both", config("cluster.placement=split"), metrics, {"weights_sha256": "ab", "tokens_nonzero": 0}, 2)
    row_of_one = of_steps("both", config(), metrics, {"weights_sha256": "ab", "tokens_nonzero": 0}, 1)
    assert row.seconds == {"step": 2.0, "sample": 0.5} and row.tokens == 270 and row.tokens_per_s == 135
    assert row_of_one.seconds["step"] > 2


def test_speed_is_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sizes = "trainer.world_size=2", "rollout.tp=1", "rollout.replicas=2"
    assert cards(config(*sizes)) == 1
    assert (
        cards(config(*sizes, "device=cuda")) == 2
        and cards(config(*sizes, "device=cuda", "cluster.placement=split")) == 4
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"sha256": "b" * 64}, "speculating ended with other weights than synchronous: bbb"),
        ({"differing": 3}, "3 log-probs of the sampler are not the trainer's"),
        ({}, ""),
    ],
)
def test_what_speaks_against_the_rows(other: dict[str, Any], said: str) -> None:
    overlapping = replace(ROW, mode="overlapping", sha256="c" * 64)  # other samples: another run
    assert against([ROW, replace(ROW, mode="speculating", **other), overlapping]).startswith(said) or not said
    assert bool(against([ROW, replace(ROW, mode="speculating", **other), overlapping])) == bool(said)


def test_a_step_of_transformers_trains_on_every_sequence() -> None:
    section = SimpleNamespace(checkpointing="layer", world_size=2, leaf_sequences=1, micro_leaves=4, micro_tokens=None)
    run: Any = SimpleNamespace(
        trainer=section, device="cpu", dtype=torch.float32, algorithm=SimpleNamespace(prompts_per_step=4, group_size=3)
    )
    theirs = Theirs(replace(BENCH, layers=1), run, 9)
    assert theirs.ids.shape == (6, 9) and theirs.micro == 4
    before = [p.detach().clone() for p in theirs.model.parameters()]
    theirs.step()
    assert all((a != b).any() for a, b in zip(before, theirs.model.parameters(), strict=True))
    section.micro_tokens = 20
    assert Theirs(replace(BENCH, layers=1), run, 9).micro == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["algorithm.lag=2"], "the benchmark itself chooses rollout.speculate, algorithm.lag"),
        (["+steps=3"], "the benchmark itself chooses"),
        (["rollout.tp=x"], "rollout.tp='x': input should be a valid integer"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_all_modes_of_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [key for key in SMALL if key.partition("=")[0] not in bench.CHOSEN]
    more = [
        "warmup.steps=20",
        "cluster.placement=split",
        "trainer.world_size=1",
        "rollout.tp=1",
        "trainer.micro_leaves=4",
    ]
    bench.main(["--steps", "1", "--json", str(tmp_path / "rows.json"), *own, *more])
    told = json.loads((tmp_path / "rows.json").read_text())
    assert [row["mode"] for row in told["rows"]] == list(MODES) and told["transformers_seconds"] > 0
    hashes = [row["sha256"] for row in told["rows"]]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    for row in told["rows"]:
        assert row["seconds"]["step"] > 0 and row["tokens_per_s"] > 0 and row["differing"] == 0
    out = capsys.readouterr().out
    assert all(mode in out for mode in MODES) and "for the old log-probs" in out
