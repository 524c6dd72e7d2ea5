"""`python -m rl.runs`: how runs stand, by what their folders hold."""

import json
import os
from pathlib import Path

import pytest

from rl.out_dir import claim
from rl.runs import main

ROW = {"phase": "grpo", "divergence/tokens_compared": 10.0, "divergence/tokens_nonzero": 0.0}


def run(
    folder: Path, steps: int, *, log: str = "", summary: dict | None = None, age: int = 0, differing: int = 0
) -> Path:
    """The folder of a run of 3 steps, evaluated before, and after the second; it began `age` seconds later than 1970."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"steps: {steps}\n")
    rows = [{"phase": "warmup", "step": 1}, {"phase": "grpo", "step": 1, "eval/accuracy": 0.25}]
    rows += [ROW | {"step": 1 + i, "grpo/step": i, "divergence/tokens_nonzero": differing} for i in (1, 2, 3)]
    rows[3]["eval/accuracy"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"half')
    (folder / "train.log").write_text(log)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("metrics.jsonl", "train.log", "config.yaml"):
        os.utime(folder / name, (age, age))
    return folder


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    main([*arguments, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_runs_in_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = {"eval_accuracy_before": 0.25, "eval_accuracy_after": 0.75, "weights_sha256": "ab" * 32, "seconds": 61.0}
    run(tmp_path / "sweep" / "seed=1", 3, summary=done, age=400)
    (tmp_path / "sweep" / "seed=1" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "sweep" / "seed=1" / "checkpoints" / "step-1" / "config.yaml").write_text("no run of its own")
    run(tmp_path / "killed", 9, log="12:00:00  GRPO 3/9\n", age=300, differing=2)
    run(tmp_path / "ended", 9, log="12:00  begun\n12:00  stopped by Terminated: SIGTERM\n", age=200)
    busy = run(tmp_path / "busy", 9, age=100)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_bytes(b"\xff: [")
    with claim(busy):
        rows = listed(capsys, str(tmp_path))
        assert [Path(r["folder"]).name for r in rows] == ["busy", "ended", "killed", "seed=1", "broken"]
        states = ["running", "stopped: Terminated: SIGTERM", "stopped", "finished", "stopped"]
        assert [r["state"] for r in rows] == states
    assert listed(capsys, str(busy))[0]["state"] == "stopped"
    *_, killed, finished, broken = rows
    assert (killed["step"], killed["steps"], killed["before"], killed["after"]) == (3, 9, 0.25, 0.5)
    assert (killed["compared"], killed["differing"], killed["weights"]) == (30, 6, "")
    assert (finished["after"], finished["weights"], finished["seconds"]) == (0.75, "ab" * 32, 61.0)
    assert (broken["step"], broken["steps"], broken["before"]) == (0, None, None)
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "0.250 -> 0.750" in shown and "6 of 30" in shown and "ab" * 8 in shown and "3/9" in shown


def test_nothing_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path)])
    assert capsys.readouterr().out == f"no run under {tmp_path}\n"
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "nowhere")])
    assert "nowhere: no such folder" in capsys.readouterr().err
