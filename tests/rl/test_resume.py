"""Where a run begins, and every folder it must not begin in. No process is started."""

import errno
import fcntl
import json
import os
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels.weights.beside import VERSION
from rl.checkpoints import Progress
from rl.compose import check
from rl.config import RunConfig
from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.identity import ARITHMETIC, CONTENT, ENDS, FREE, difference, identity
from rl.keys import ADDED
from rl.out_dir import LOCK, claim
from rl.report import read_lines
from rl.resume import Start, check_model, find_start, logged, prepare_logs
from rl.run.log import RunLog
from tests.model.shapes import TINY
from tests.rl.command import call
from trainer import folder
from trainer.checkpoint import complete, folder_name

BASE = ("logger=none", "data.problems=100", "steps=5")


@cache
def composed(*overrides: str) -> RunConfig:
    return check([*BASE, *overrides])[0]


def config_of(out_dir: Path, *overrides: str) -> RunConfig:
    return composed(*overrides).model_copy(update={"out_dir": str(out_dir)})


def leave(out_dir: Path, steps: tuple[int, ...], *overrides: str) -> dict[str, Any]:
    """What a run that was stopped leaves: its config, its log, and checkpoints after `steps`."""
    config = config_of(out_dir, *overrides)
    out_dir.mkdir()
    (out_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    who = identity(config) | {ARITHMETIC: VERSION}
    with RunLog(out_dir, {}, ()) as log:
        for step in range(1, 5):
            log.step(step, {})
            log.completions(step, [{"text": "x" * step}])
            if step in steps:
                final = out_dir / "checkpoints" / folder_name(step)
                temporary = folder.temporary(final)
                run = {"identity": who, "progress": asdict(Progress(step=step, log=log.positions()))}
                complete(temporary, final, TINY, step, "", [], {"tokenizer/t.json": b"{}"}, run)
    return who


def start(out_dir: Path, *overrides: str):
    config = config_of(out_dir, *overrides)
    return find_start(config, identity(config), thorough=True)


def refusal(out_dir: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        start(out_dir, *overrides)
    return str(error.value)


def test_a_new_folder(tmp_path: Path) -> None:
    for resume in ("auto", "false"):
        begin = start(tmp_path / "run", f"resume={resume}")
        assert begin.checkpoint is None and not begin.continues and begin.progress == Progress()
    assert prepare_logs(begin, tmp_path) == {}


def test_the_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave(run, (2, 3))
    begin = start(
        run, "trainer.world_size=1", "rollout.tp=4", "trainer.micro_leaves=1", "steps=9", "checkpoint.every=7"
    )
    assert begin.checkpoint is not None and begin.progress.step == 3 and begin.continues and begin.refused == ()
    with RunLog(run, {}, (), positions=prepare_logs(begin, run)) as log:
        log.step(4, {"again": True})
        log.completions(4, [{}])
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert [r["step"] for r in read_lines(run / name)] == [1, 2, 3, 4], name


def test_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave(run, ())
    begin = start(run)
    assert begin.checkpoint is None and begin.continues
    RunLog(run, {}, (), positions=prepare_logs(begin, run)).close()
    assert read_lines(run / "metrics.jsonl") == []
    leave(tmp_path / "none", (), "checkpoint.every=0")
    assert "holds a run already, and no checkpoint: choose another" in refusal(tmp_path / "none")


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "run"
    leave(run, (2, 4))
    file = run / "checkpoints" / folder_name(4) / ("checkpoint.json" if damage == "manifest" else "tokenizer/t.json")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"altered": b"{]", "truncated": b"{", "manifest": b"{"}[damage])
    begin = start(run)
    assert begin.progress.step == 2
    (reason,) = begin.refused
    assert str(file) in reason and "\n" not in reason
    if damage == "altered":
        assert "was altered: sha256" in reason
    (run / "checkpoints" / folder_name(2) / "tokenizer/t.json").unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used"):
        start(run)


@pytest.mark.parametrize(
    ("override", "there"),
    [
        ("seed=7", "0"),
        ("model.leaves=4", "8"),
        ("model.hf.num_hidden_layers=1", "3"),
        ("data.problems=200", "100"),
        ("algorithm.advantage=rloo", "grpo"),
        ("trainer.lr=0.5", "0.0001"),
        ("trainer.leaf_sequences=8", "16"),
        ("rollout.temperature=0.5", "1.0"),
        ("warmup.steps=3", "450"),
        ("reward=tests.rl.command:length", "None"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, override: str, there: str) -> None:
    run = tmp_path / "run"
    leave(run, (2,))
    before = sorted(run.rglob("*"))
    key, _, here = override.partition("=")
    for more in ((), (f"resume={run / 'checkpoints' / folder_name(2)}",)):
        line = refusal(run, override, *more)
        assert f"({key}={there} there, {key}={here} here)" in line
    assert sorted(run.rglob("*")) == before


def test_other_data_under_the_same_name(tmp_path: Path) -> None:
    who = leave(tmp_path / "run", ())
    assert "content" in difference(
        who | {"the data's content (sha256)": "a"}, who | {"the data's content (sha256)": "b"}
    )


def test_the_content_is_of_every_problem() -> None:
    """Those that are trained on and those held out: prompt, answer and what is taught."""
    config = composed()
    problem = Problem("id", "1+1=", (1, 2), "2", "1+1=2", None)
    others = [replace(problem, prompt_ids=(1, 3)), replace(problem, answer="3"), replace(problem, solution="2")]
    sources = [([problem], [problem]), *(([p], [problem]) for p in others), *(([problem], [p]) for p in others)]
    found = [identity(config, Source(*s, lambda p, t: 0.0, of_characters("x")))[CONTENT] for s in sources]  # type: ignore[arg-type]
    assert len(set(found)) == len(sources)


def test_what_a_used_folder_refuses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave(run, (2, 4))
    line = refusal(run, "resume=false")
    assert "holds a run already: choose another or remove it (resume=false)" in line
    assert call(*BASE, f"out_dir={run}", "resume=false").error() == line
    assert "steps=3: the run of" in (line := refusal(run, "steps=3")) and "has done 4 steps already" in line
    (run / "summary.json").write_text(json.dumps({"steps": 5}))
    assert "holds a run already, finished after steps=5" in refusal(run)
    assert start(run, "steps=6").progress.step == 4
    (run / "summary.json").write_text("{")
    assert "summary.json cannot be read" in refusal(run)
    (run / "config.yaml").write_text("seed: 0\n")
    assert "whose config.yaml is no config of this version" in refusal(run)


def test_a_sweep_passes_over_what_is_finished(tmp_path: Path) -> None:
    """So that the same command goes on with a sweep that was stopped in the middle."""
    for seed in (0, 1):
        leave(tmp_path / f"seed={seed}", (2, 4), f"seed={seed}")
    ran = []

    def looked_at(config: RunConfig, _: object) -> Start:
        return find_start(config, identity(config), thorough=False)

    def run(config: RunConfig, _: object) -> dict[str, Any]:
        looked_at(config, None)
        ran.append(config.seed)
        return {}

    sweep = partial(call, train=run, prepare=looked_at)
    command = ("-m", *BASE, "seed=0,1,2", f"out_dir={tmp_path}")
    (tmp_path / "seed=0" / "summary.json").write_text('{"steps": 5}')
    outcome = sweep(*command)
    assert outcome.code == 0 and ran == [1, 2], outcome
    assert f"out_dir={tmp_path / 'seed=0'} is finished" in outcome.out
    (tmp_path / "seed=1" / "summary.json").write_text('{"steps": 5}')
    assert "seed=1 holds a run already, finished" in sweep("-m", *BASE, "seed=0,1", f"out_dir={tmp_path}").error()


def test_resume_from_a_path(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    leave(run, (2, 3))
    for path, step in ((run, 3), (run / "checkpoints", 3), (run / "checkpoints" / folder_name(2), 2)):
        begin = start(other, f"resume={path}")
        assert begin.progress.step == step and not begin.continues
    other.mkdir()
    RunLog(other, {}, (), positions=prepare_logs(begin, other)).close()
    assert [r["step"] for r in read_lines(other / "metrics.jsonl")] == [1, 2]
    assert [r["step"] for r in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert start(run, f"resume={run}").continues
    older = f"resume={run / 'checkpoints' / folder_name(2)}"
    assert "is not its newest checkpoint: choose another out_dir" in refusal(run, older)
    assert "is neither a checkpoint nor a folder that holds any" in refusal(tmp_path / "x", f"resume={tmp_path}")
    assert "is neither a checkpoint" in refusal(tmp_path / "x", "resume=no/such/folder")
    assert "resume=True: must be auto, false or" in call("resume=true").error()


def test_a_run_from_a_path_that_was_stopped_before_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    """The same command begins at the path again, and does not lose what is there."""
    run, other = tmp_path / "run", tmp_path / "other"
    leave(run, (2, 3))
    leave(other, (), f"resume={run}")
    begin = start(other, f"resume={run}")
    assert begin.progress.step == 3 and not begin.continues
    prepare_logs(begin, other)
    assert (other / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert "did not begin at resume=" in refusal(other, f"resume={run / 'checkpoints'}")
    assert "another one (seed=0 there, seed=7 here)" in refusal(other, f"resume={run}", "seed=7")
    (other / "summary.json").write_text('{"steps": 5}')
    assert "did not begin at resume=" in refusal(other, f"resume={run}")


def test_another_shape_in_the_same_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave(run, (2,))
    begin = start(run)
    check_model(begin, TINY)
    with pytest.raises(UserError, match=r"step-00000002 is another: layers=2 there, layers=3 here$"):
        check_model(begin, replace(TINY, layers=3))


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_log_that_is_no_log(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    leave(run, (2, 3))
    whole = (run / name).read_bytes()
    (run / name).write_bytes(b"{" + whole)
    with pytest.raises(UserError, match=rf"{name}:1: not JSON"):
        logged(start(run), run)
    (run / name).write_bytes(whole + b"{\n")  # after the checkpoint, where it is cut off
    assert [[row["step"] for row in rows] for rows in logged(start(run), run)] == [[1, 2, 3]] * 2


def test_a_log_that_is_shorter_than_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are gone; what cannot be is that nobody is told."""
    run = tmp_path / "run"
    leave(run, (3,))
    assert logged(start(run), run) and capsys.readouterr().err == ""
    (run / "completions.jsonl").unlink()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0])
    metrics, completions = logged(start(run), run)
    assert [row["step"] for row in metrics] == [1] and completions == []
    first, second = capsys.readouterr().err.splitlines()
    assert f"metrics.jsonl has {len(lines[0])} of the {sum(map(len, lines[:3]))} bytes it had" in first
    assert "completions.jsonl has 0 of the" in second


@pytest.mark.parametrize("lost", [("config.yaml",), ("config.yaml", "checkpoints"), ("model",)])
def test_a_folder_that_says_not_whose_it_is(tmp_path: Path, lost: tuple[str, ...]) -> None:
    """Its logs would be mixed with those of the run, its checkpoints and its model replaced."""
    run = tmp_path / "run"
    if lost == ("model",):  # of a user, in a folder that was no run
        (run / "model").mkdir(parents=True)
    else:
        leave(run, (2,))
        for name in lost:
            (run / name).rename(tmp_path / name)
    held = {"checkpoints": "metrics.jsonl", "model": "model"}.get(lost[-1], "checkpoints")
    before = sorted(run.rglob("*"))
    for resume in ("resume=auto", "resume=false", f"resume={run}"):
        assert f"out_dir={run} holds {held} and no config.yaml" in refusal(run, resume)
    assert call(*BASE, f"out_dir={run}").code == 2
    assert sorted(run.rglob("*")) == before


def test_data_that_was_moved_is_the_same_run(tmp_path: Path) -> None:
    """Its content decides bits and is compared; where it lies does not. A checkpoint of an earlier version names it."""
    a, b = (identity(check(["data=gsm8k", f"data.path={path}"])[0]) for path in ("a", "b"))
    assert difference(a, b) == "" and difference(a | {"data.path": "a"}, b) == ""
    assert difference(a | {"data.marker": "a"}, b)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="is in use by another process"), claim(run):
        pass
    os.close(handle)
    with claim(run), pytest.raises(UserError, match="is in use by another process"), claim(run):
        pass
    (run / ".model.0123.tmp").mkdir(parents=True)
    (run / "mine").write_text("")
    with claim(run):
        assert {p.name for p in run.iterdir()} == {"mine", LOCK}
    assert [p.name for p in run.iterdir()] == ["mine"]
    with claim(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a").exists() and not (tmp_path / "a" / "b").exists()


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As an NFS whose server has no lock daemon: the run goes on, and says what it cannot keep out."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("rl.out_dir.fcntl.flock", refuse)
    with claim(tmp_path / "run"):
        pass
    assert "on a file system without locks (No locks available)" in capsys.readouterr().err


def test_every_key_is_of_the_run_or_free() -> None:
    """A key that is new must be sorted: this list is what decides a bit, or what the two accuracies of a run compare."""
    config = check([])[0]
    known = {k for k in identity(config) if not k.startswith(("data.", "model.", "reward", "device", "seed"))}
    assert known == {
        "mode", "numerics", "rollout.temperature", "rollout.top_k", "rollout.top_p", "rollout.min_p", "rollout.max_new_tokens",
        "rollout.carry",
        "trainer.leaf_sequences", "trainer.lr", "trainer.lr_schedule", "trainer.lr_warmup_steps",
        "trainer.betas", "trainer.eps", "trainer.weight_decay", "trainer.moments",
        "trainer.grad_clip", "trainer.router_aux_loss_coef",
        "algorithm.prompts_per_step", "algorithm.group_size", "algorithm.name", "algorithm.advantage",
        "algorithm.loss_mean", "algorithm.clip_low", "algorithm.clip_high",
        "algorithm.mini_batches", "algorithm.update_epochs",
        "algorithm.sampling_rounds", "algorithm.lag", "algorithm.overlong_buffer", "algorithm.mask_overlong",
        "adapter.rank", "adapter.alpha", "adapter.targets", "adapter.rslora",
        "algorithm.kl_coef", "algorithm.kl_estimator", "algorithm.kl_in", "algorithm.entropy_coef", "algorithm.device_map",
        "warmup.steps", "warmup.sequences", "warmup.lr", "warmup.wrong_frac",
        "warmup.kind", "warmup.beta", "warmup.chosen", "warmup.rejected",
        "eval.problems", "eval.samples", "eval.temperature",
        "environment.name", "environment.factory", "environment.max_turns", "environment.max_tokens", "environment.format",
    }  # fmt: skip
    values = check(["data=gsm8k", "data.path=x"])[0].model_dump()
    values["algorithm"] |= check(["algorithm=distillation"])[0].algorithm.model_dump()
    for name in FREE:
        section, _, key = name.partition(".")
        assert section in values and (not key or key in values[section]), name


def test_keys_of_an_earlier_version(tmp_path: Path) -> None:
    """The clip was the trainer's, there was one algorithm, and no patience: such a run goes on, and another value is
    another run."""
    leave(tmp_path / "run", (2,))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    clip = {key: config["algorithm"].pop(key) for key in ("clip_low", "clip_high")}
    config["trainer"] |= clip
    for section, key in (added.rpartition(".")[::2] for added in ADDED):
        if not section:
            del config[key]
        elif section != "data":  # these are of another kind: test_data_formats.py
            del config[section][key]
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert start(tmp_path / "run").progress.step == 2
    old = identity(check([])[0])
    for key in ("clip_low", "clip_high"):
        old[f"trainer.{key}"] = old.pop(f"algorithm.{key}")
    old = {key: value for key, value in old.items() if key not in ADDED}
    assert difference(old, identity(check([])[0])) == ""
    other = "algorithm.clip_high=0.28 there, algorithm.clip_high=0.3 here"
    assert difference(old, identity(check(["algorithm.clip_high=0.3"])[0])) == other
    assert other in refusal(tmp_path / "run", "algorithm.clip_high=0.3")


def test_steps_are_of_a_run_whose_learning_rate_falls() -> None:
    """More steps of it are another run from the first on; of a constant one they are the same, longer."""
    falls = "trainer.lr_schedule=linear"
    short, longer, constant = (
        identity(check(keys)[0]) for keys in ([falls, "steps=4"], [falls, "steps=5"], ["steps=5"])
    )
    assert difference(short, longer) == "steps=4 there, steps=5 here"
    assert difference(constant, longer).startswith("trainer.lr_schedule=constant there")
    assert "steps" not in constant


def test_auto_dtype_is_what_it_stands_for() -> None:
    a, b = (identity(check([f"model.dtype={d}"])[0]) for d in ("auto", "float32"))
    assert difference(a, b) == ""
    assert "model.dtype=float32 there" in difference(a, identity(check(["model.dtype=bfloat16"])[0]))


def test_other_ends_or_another_arithmetic_are_another_run() -> None:
    """A checkpoint that says nothing of the arithmetic is of the first version; what it read may be unknown."""
    mine = identity(check([])[0])
    for key, old, new in ((ENDS, [1], [1, 2]), (ARITHMETIC, 1, 2)):
        assert difference(mine | {key: old}, mine | {key: old}) == ""
        assert difference(mine | {key: old}, mine | {key: new}) == f"{key}={old} there, {key}={new} here"
        assert difference(mine, mine | {key: old}) == difference(mine | {key: old}, mine) == ""
    assert difference(mine, mine | {ARITHMETIC: 2}) == f"{ARITHMETIC}=1 there, {ARITHMETIC}=2 here"
