"""The recipe of exact against inexact, as far as it goes without its runs: what it would run, what it draws, and what fails."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from recipes.why import __main__ as why
from recipes.why.record import ARMS, CURVES, Run, write
from rl.compose import check
from rl.data import open_source
from rl.model import model_config
from rl.plan import make_plan


def test_every_run_is_one_that_can_be_planned(tmp_path: Path) -> None:
    asked = why.arguments(["--out", str(tmp_path), "--threads", "3", "steps=7"])
    assert asked.seeds == [0, 1, 2, 3, 4]
    for arm in ARMS:
        (config,) = check(why.overrides(asked, arm, 2))
        assert (config.numerics, config.seed, config.steps, config.rollout.threads) == (arm, 2, 7, 3)
        assert config.algorithm.mini_batches * config.algorithm.update_epochs == 8
    source = open_source(config)
    longest = max(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    most = max(len(source.encode_solution(p)) for p in source.train)
    assert 24 < most <= config.rollout.max_new_tokens  # responses are longer than the main job's, and fit
    assert source.train[0].prompt.count(",") == 3 and "\n" not in source.train[0].prompt
    make_plan(config, model_config(config, len(source.tokenizer)), longest)


def leave(folder: Path, arm: str, seed: int, steps: int, broken: bool = False) -> Run:
    """What a run leaves: of a fast one a gap, and at times a value that is not finite."""
    run = Run(arm, seed, folder / f"{arm}-{seed}")
    run.folder.mkdir()
    rows: list[dict[str, Any]] = [{"step": 1, "phase": "warmup", "policy/loss": 1.0}]
    for step in range(1, steps + 1):
        gap = 0.0 if arm == "exact" else 1e-3 * step
        values = dict.fromkeys(CURVES, gap) | {"reward/mean": step / 10 + seed, "policy/entropy": 2.0}
        values["policy/grad_norm"] = None if broken and step == 2 else 1.0
        rows.append({"step": step + 1, "phase": "grpo", "grpo/step": step, **values})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_what_is_there_is_drawn_and_what_is_not_is_left_out(tmp_path: Path) -> None:
    runs = [leave(tmp_path, "exact", 0, 4), leave(tmp_path, "exact", 1, 2), leave(tmp_path, "fast", 0, 4, broken=True)]
    write([*runs, Run("fast", 1, tmp_path / "fast-1")], tmp_path)
    rows = json.loads((tmp_path / "why.json").read_text())
    steps = {(r["numerics"], r["seed"]): len(r["step"]) for r in rows}
    assert steps == {("exact", 0): 4, ("exact", 1): 2, ("fast", 0): 4, ("fast", 1): 0}
    assert rows[0]["divergence/logprob_abs_diff_max"] == [0.0] * 4 and rows[2]["policy/grad_norm"][1] is None
    drawn = ElementTree.parse(tmp_path / "why.svg").getroot()
    texts = ["".join(t.itertext()) for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"numerics=exact: 2 runs", "numerics=fast: 1 run", *(title for title, *_ in CURVES.values())} <= {*texts}
    assert "×" in texts and "step; last mean: exact 0; fast 0.004" in texts
    lines = list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 6 * (3 + 2) + 1  # of every run, of every arm's mean, and a line that a value cuts
    write([Run("exact", 9, tmp_path / "none")], tmp_path)
    assert (tmp_path / "why.svg").read_text().count("nothing yet") == 6


def test_a_run_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, int]] = []

    def run(asked: why.Asked, arm: str, seed: int) -> str:
        if (arm, seed) == ("exact", 0):
            raise OSError("no room")
        done.append((arm, seed))
        return "exit code 1: it stopped" if (arm, seed) == ("fast", 1) else ""

    monkeypatch.setattr(why, "run", run)
    assert why.main(["--out", str(tmp_path / "out"), "--seeds", "0", "1", "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert sorted(done) == [("exact", 1), ("fast", 0), ("fast", 1)]
    assert "exact, seed 0: FAILED: OSError: no room" in said and "fast, seed 1: FAILED: exit code 1" in said
    assert said.endswith("2 of 4 runs finished\n") and (tmp_path / "out" / "why.svg").exists()


def test_a_finished_run_is_passed_over_and_a_wrong_key_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = why.arguments(["--out", str(tmp_path), "--seeds", "0"])
    there = why.folder(asked, "fast", 0)
    there.mkdir()
    (there / "summary.json").write_text("{}")
    assert why.run(asked, "fast", 0) == ""
    with pytest.raises(SystemExit, match="2"):
        why.main(["--out", str(tmp_path), "step=3"])
    err = capsys.readouterr().err
    assert "unknown key 'step'" in err and len(err.splitlines()) == 1
