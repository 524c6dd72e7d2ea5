"""Half a run alone: what it samples, what it trains, and what a kept batch says of a difference."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from rl.alone import check_alone
from rl.compare import main as compare
from rl.compose import check
from rl.config import RunConfig
from rl.errors import UserError
from rl.replay import kept
from rl.replay.command import main as replay
from tests.rl.command import command

SHORT = ("steps=2", "warmup.steps=2", "eval.problems=8", "logger=none", "checkpoint.every=0", "algorithm.prompts_per_step=8",
         "trainer.leaf_sequences=8", "trainer.micro_leaves=4", "data.problems=500", "save_model=false")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps both batches, one that samples alone, and one that trains alone on what the first kept."""
    folder = tmp_path_factory.mktemp("alone")
    halves = {
        "full": ("align.keep_batches=[1,2]",),
        "sampled": ("mode=rollout_only",),
        "trained": ("mode=train_only", "batches=full"),
    }
    for name, own in halves.items():
        with command(*SHORT, *own, f"out_dir={name}", cwd=folder) as running:
            outcome = running.finish()
            assert outcome.code == 0, outcome
    return folder


def test_training_alone_on_what_a_run_kept_ends_with_its_hash(runs: Path) -> None:
    full, alone = (json.loads((runs / name / "summary.json").read_text()) for name in ("full", "trained"))
    assert alone["weights_sha256"] == full["weights_sha256"]
    assert (alone["tokens_compared"], alone["tokens_nonzero"]) == (full["tokens_compared"], 0)
    assert alone["eval_accuracy_after"] is None


def test_sampling_alone_draws_what_a_run_draws(runs: Path) -> None:
    """Of the first step; the weights of a second are others."""
    one, other = (kept.read(runs / name / "batches" / "00000001") for name in ("full", "sampled"))
    for name in ("token_ids", "rows", "logprobs", "advantages"):
        assert np.array_equal(getattr(one.batch, name), getattr(other.batch, name)), name
    assert other.trainer_logprobs is None and one.trainer_logprobs is not None and one.differing == 0
    assert len(kept.folders(runs / "sampled")) == 2


def test_a_kept_batch_is_computed_again(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        replay([str(runs / "full"), "--sequences", "8", "--json", str(tmp_path / "found.json"), "--threads", "1"])
    assert end.value.code == 0 and "0 of " in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["where"] == "nowhere"


def test_two_runs_that_kept_a_batch_are_compared_by_op(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        compare([str(runs / "full"), str(runs / "full")])
    assert end.value.code == 0 and "replay       step 1: 0 of " in capsys.readouterr().out
    other = tmp_path / "other"
    (other / "batches").mkdir(parents=True)
    (other / "config.yaml").write_text((runs / "full" / "config.yaml").read_text())
    (other / "metrics.jsonl").write_text("")
    (other / "completions.jsonl").write_text("")
    there = other / "batches" / "00000002"
    there.mkdir()
    for file in (runs / "full" / "batches" / "00000002").rglob("*"):
        into = there / file.relative_to(runs / "full" / "batches" / "00000002")
        into.mkdir() if file.is_dir() else into.write_bytes(file.read_bytes())
    (path,) = (there / "model").glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    save_file(tensors, path)
    with pytest.raises(SystemExit) as end:
        compare([str(runs / "full"), str(other)])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "replay       step 2: A and B part at layer 1, down: sequence " in said
    assert said.endswith("the runs part\n")


def config_with(*overrides: str) -> RunConfig:
    (config,) = check([*SHORT, *overrides])
    return config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("mode=train_only",), "mode=train_only trains on what a run kept: set batches=RUN"),
        (("batches=x",), "mode=full does not read batches"),
        (("mode=train_only", "batches=/no/where"), "batches=/no/where: there is none of step 1"),
        (("mode=train_only", "batches=RUN", "steps=3"), "there is none of step 3"),
        (("mode=train_only", "batches=RUN", "trainer.leaf_sequences=48"), "64 sequences a step are no multiple"),
        (("mode=train_only", "batches=DAMAGED"), "holds a damaged batch"),
    ],
)
def test_halves_that_do_not_fit(overrides: tuple[str, ...], said: str, runs: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "batches" / "00000001"
    damaged.mkdir(parents=True)
    (damaged / "batch.json").write_text((runs / "full" / "batches" / "00000001" / "batch.json").read_text())
    (damaged / "batch.npz").write_bytes(b"PK\3\4 no more")
    paths = {"RUN": str(runs / "full"), "DAMAGED": str(tmp_path)}
    config = config_with(*(o.replace("RUN", paths["RUN"]).replace("DAMAGED", paths["DAMAGED"]) for o in overrides))
    with pytest.raises((UserError, ValueError)) as error:
        check_alone(config, 10**6)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_batch_without_weights_says_how_to_get_them(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "run" / "batches" / "00000002"
    bare.mkdir(parents=True)
    for name in ("batch.json", "batch.npz"):
        (bare / name).write_bytes((runs / "full" / "batches" / "00000002" / name).read_bytes())
    for arguments, what in (
        ([str(bare)], "align.keep_batches=[2] keeps them"),
        ([str(tmp_path / "none")], "keeps no batch"),
    ):
        with pytest.raises(SystemExit) as end:
            replay(arguments)
        err = capsys.readouterr().err
        assert end.value.code == 2 and what in err and len(err.splitlines()) == 1, err
