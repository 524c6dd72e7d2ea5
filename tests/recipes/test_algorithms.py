"""The table of algorithms: its runs are runs, one that fails is a row, and the others go on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.algorithms import command as algorithms
from recipes.algorithms.command import CASES, Case, Row, _ready, against, markdown
from rl.algorithms import ALGORITHMS
from rl.compose import CONFIGS, ROOT, check

TINY = (
    *("steps=1", "warmup.steps=1", "warmup.sequences=64", "algorithm.prompts_per_step=8", "eval.problems=8"),
    *("data.problems=500", "model.hf.num_hidden_layers=1", "trainer.leaf_sequences=4", "rollout.pages=256"),
    *("trainer.world_size=1", "rollout.tp=1"),
)


def test_every_case_is_a_run_of_its_own(tmp_path: Path) -> None:
    """And every algorithm and every file of values is among them."""
    found = [check(Case(name, 2, tmp_path / name).arguments(3, [])[1:])[0] for name in CASES]
    assert {config.algorithm.name for config in found} == set(ALGORITHMS)
    named = {word.removeprefix("algorithm=") for words in CASES.values() for word in words if "algorithm=" in word}
    assert named == {path.stem for path in (CONFIGS / "algorithm").glob("*.yaml")}
    assert len({config.algorithm.model_dump_json() for config in found}) == len(found)
    assert all((c.seed, c.rollout.threads, c.trainer.threads) == (2, 3, 3) for c in found)
    assert len({config.out_dir for config in found}) == len(found)


def test_a_pupil_waits_for_its_teacher(tmp_path: Path) -> None:
    teacher, pupil, other = (
        Case(n, s, tmp_path / f"{n}-seed{s}") for n, s in (("grpo", 1), ("distillation", 1), ("grpo", 0))
    )
    assert f"algorithm.teacher={teacher.folder / 'model'}" in pupil.arguments(1, [])
    assert _ready([pupil, teacher], [other]) == [teacher] and _ready([pupil], [teacher]) == []
    assert _ready([pupil], [other]) == [pupil]


def made(name: str, seed: int, after: float | None, differing: int = 0, error: str = "") -> Row:
    return Row(name, seed, 0.5, after, 9, differing, 1000, "abc" * 20, 12.0, error)


def test_the_page() -> None:
    rows = [made("grpo", 0, 0.75), made("grpo", 1, None, error="it | stopped"), made("gspo", 0, 0.5)]
    page = markdown(rows, {"command": "python -m recipes.algorithms", "commit": "1234567"})
    assert "|  | seed 0 | seed 1 |\n| --- | --- | --- |\n| `grpo` | 0.750 | failed |\n| `gspo` | 0.500 |  |" in page
    assert r"| `grpo` | 1 | 0.500 to ? | 9 | 0 of 1,000 | `abcabcabcabcabca` | 12 | it \| stopped |" in page
    assert "- `gspo`: `algorithm=gspo algorithm.mini_batches=2`" in page
    assert against(rows) == "1 of 3 runs failed; grpo, seed 1: it | stopped"
    assert against([made("grpo", 0, 0.5, 3)]) == "grpo, seed 0: 3 log-probs differ"
    assert against([made("grpo", 0, 0.5)]) == ""


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "table.md")
    for arguments, line in (
        (["--out", out, "--only", "none"], "'none'"),
        (["step=3", "--out", out], "step"),
        (["--out", str(tmp_path / "no" / "t.md")], "no such folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["recipes.algorithms", *arguments])
        with pytest.raises(SystemExit) as ended:
            algorithms.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and line in said and len(said.splitlines()) == 1, said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_and_the_command_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.algorithms", *TINY, "--out", str(tmp_path / "table.md")]
    command += ["--runs", str(tmp_path / "runs"), "--only", "grpo", "gspo", "--seeds", "0", "--jobs", "2"]
    (tmp_path / "runs" / "gspo-seed0").mkdir(parents=True)
    taken = tmp_path / "runs" / "gspo-seed0" / "metrics.jsonl"
    taken.write_text("{}\n")  # of somebody else
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 1 and "1 of 2 runs failed; gspo, seed 0: out_dir=" in first.stderr, first
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(r["algorithm"], r["steps"], bool(r["error"])) for r in rows] == [("grpo", 1, False), ("gspo", 0, True)]
    taken.unlink()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and "1 runs, 1 are finished already" in second.stdout, second
    after = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert after[0] == rows[0] and all(len(r["weights_sha256"]) == 64 and r["differing"] == 0 for r in after)
    assert "| `gspo` | 0 |" in (tmp_path / "table.md").read_text()
