"""`python -m rl.compare`: the first place where two runs part."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.compare import main
from rl.comparison.runs import Difference, compare

CONFIG = "seed: 0\nsteps: 3\nout_dir: {name}\ntrainer: {{lr: 0.5, world_size: 2}}\n"
LOGPROBS = [float(np.float32(-x / 7)) for x in range(1, 5)]


def completion(step: int, **changed: Any) -> dict[str, Any]:
    row = {"step": step, "prompt": "1+1=", "completion": "2", "answer": "2", "reward": 1.0, "tokens": [4, 5, 6, 7]}
    return row | {"logprobs": list(LOGPROBS), "trainer_logprobs": list(LOGPROBS)} | changed


def rows(steps: int = 3) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": 0, "phase": "warmup", "policy/loss": 0.1, "time/train": 1.0}]
    found += [
        {"step": i, "phase": "grpo", "policy/loss": 0.1 * i, "divergence/by_gap": {"0": i}, "time/train": i / 7}
        for i in range(1, steps + 1)
    ]
    return [*found, {"step": steps + 1, "phase": "grpo", "eval/accuracy": 0.5}]


def run(folder: Path, metrics: list[dict], completions: list[dict], config: str = CONFIG) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.format(name=folder.name))
    for name, found in (("metrics", metrics), ("completions", completions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert not (out and err)
    return end.value.code, out or err


def test_equal_runs_of_other_layouts_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", rows(), [completion(1), completion(1), completion(2)])
    other = [row | {"time/train": 9.0} for row in rows(5)]
    layout = CONFIG.replace("world_size: 2", "world_size: 4").replace("steps: 3", "steps: 5")
    b = run(tmp_path / "b", other, [completion(1), completion(1)], layout)
    code, out = said(capsys, a, b)
    assert code == 0 and out.splitlines() == [
        "layout       steps: 3 | 5, trainer.world_size: 2 | 4 (decides no bit)",
        "metrics      all 5 rows are equal",
        "completions  all 2 completions are equal",
        "checkpoints  all 0 of the same step are equal",
        "nothing differs",
    ]


@given(
    step=st.integers(1, 3),
    token=st.integers(0, 3),
    bit=st.integers(0, 22),
    side=st.sampled_from(["logprobs", "trainer_logprobs"]),
)
def test_one_bit_of_one_log_prob_is_found(step: int, token: int, bit: int, side: str, tmp_path_factory: Any) -> None:
    folder, other = tmp_path_factory.mktemp("runs"), np.array(LOGPROBS, np.float32)
    before = int(other.view(np.uint32)[token])
    other.view(np.uint32)[token] ^= np.uint32(1 << bit)
    changed = [completion(i, **({side: other.tolist()} if i == step else {})) for i in (1, 2, 3)]
    a, b = run(folder / "a", rows(), [completion(i) for i in (1, 2, 3)]), run(folder / "b", rows(), changed)
    found = compare(a, b)
    assert found.apart and found.equal_completions == step - 1 and found.completion is not None
    who = "the sampler" if side == "logprobs" else "the trainer"
    assert found.completion.where == f"step {step} completion 0, token {token}: log-prob of {who}"
    assert f"0x{before:08x}" in found.completion.a and f"0x{before ^ 1 << bit:08x}" in found.completion.b


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("tokens", [4, 5, 9, 7], "step 2 completion 0, token 2"),
        ("tokens", [4, 5, 6], "step 2 completion 0, token 3"),
        ("prompt", "1+2=", "step 2 completion 0: prompt"),
        ("reward", 0.0, "step 2 completion 0: reward"),
    ],
)
def test_the_first_completion_that_differs(name: str, value: Any, where: str, tmp_path: Path) -> None:
    a = run(tmp_path / "a", rows(), [completion(1), completion(2), completion(3)])
    b = run(tmp_path / "b", rows(), [completion(1), completion(2, **{name: value}), completion(3, reward=7.0)])
    found = compare(a, b)
    assert found.completion is not None and found.completion.where == where and found.equal_completions == 1


def test_the_first_metric_and_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = rows()
    changed[2]["new/metric"] = 1.0
    changed[2]["policy/loss"] = 0.20000000000000007
    a, b = run(tmp_path / "a", rows(), []), run(tmp_path / "b", changed, [], CONFIG.replace("lr: 0.5", "lr: 0.25"))
    code, out = said(capsys, a, b)
    assert code == 1 and "setting      trainer.lr: 0.5 | 0.25\n" in out
    assert "metrics      2 rows are equal, then grpo step 2: policy/loss: 0.2 | 0.20000000000000007\n" in out
    code, out = said(capsys, a, b, "--json")
    found = {"where": "grpo step 2: policy/loss", "a": 0.2, "b": 0.20000000000000007}
    assert code == 1 and json.loads(out)["metrics"] == found


def test_checkpoints_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (run(tmp_path / name, rows(), []) for name in "ab")
    for folder, names in ((a, (10, 20, 30)), (b, (20, 30, 40))):
        for step in names:
            (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    class Read:
        def __init__(self, folder: Path) -> None:
            same = folder.name.endswith("20")
            self.weights_sha256 = ("same" if same else folder.parts[-3]) * 20

    monkeypatch.setattr("rl.comparison.runs.read", Read)
    found = compare(a, b)
    assert found.equal_checkpoints == 1
    assert found.checkpoint == Difference("weights of step-00000030 (SHA-256)", "a" * 16, "b" * 16)


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path / "a", rows(), [])
    code, err = said(capsys, a, tmp_path / "b")
    assert code == 2 and f"{tmp_path / 'b'} holds no run" in err
    broken = run(tmp_path / "c", [], [])
    (broken / "metrics.jsonl").write_text("no json\n")
    code, err = said(capsys, a, broken)
    assert code == 2 and "metrics.jsonl:1" in err
    (broken / "config.yaml").write_text("[")
    assert said(capsys, a, broken)[0] == 2
