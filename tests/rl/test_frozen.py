"""A run with a reference: stopped and gone on with in another layout it ends in one hash, and refuses another reference."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from kernels.weights.files import save
from kernels.weights.initial import initial
from rl.compose import check
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.frozen import FrozenModel, check_tokenizer, frozen_model
from rl.model import model_config
from rl.plan import make_plan
from rl.report import read_lines
from tests.rl.command import Outcome, command, summary
from tests.rl.documented import undocumented

RUN = (
    "warmup.steps=2",
    "warmup.sequences=64",
    "algorithm.prompts_per_step=8",
    "algorithm.kl_coef=0.3",
    "eval.problems=16",
    "trainer.leaf_sequences=8",
    "trainer.micro_leaves=1",
    "trainer.lr=1e-3",
    "model.hf.num_hidden_layers=2",
    "data.problems=2000",
    "rollout.pages=256",
    "checkpoint.every=1",
    "checkpoint.keep=1",
    "logger=none",
)


def finish(folder: Path, *keys: str) -> Outcome:
    with command(*RUN, *keys, cwd=folder) as running:
        return running.finish()


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_reference_alone(tmp_path: Path) -> None:
    whole = finish(tmp_path, "steps=3", "out_dir=whole", "trainer.world_size=1")
    assert whole.code == 0, whole
    rows = [row for row in read_lines(tmp_path / "whole" / "metrics.jsonl") if "reward/mean" in row]
    assert [row["policy/kl_ref"] > 0 for row in rows] == [False, True, True]
    assert not undocumented({name for row in rows for name in row})

    assert finish(tmp_path, "steps=1", "out_dir=parts", "trainer.world_size=2").code == 0
    assert sorted(p.name for p in (tmp_path / "parts" / "reference").iterdir()) == sorted(
        p.name for p in (tmp_path / "parts" / "model").iterdir()
    )
    kept = tmp_path / "parts" / "reference" / "model.safetensors"
    shutil.move(kept, tmp_path / "kept")
    shutil.copy(tmp_path / "parts" / "model" / "model.safetensors", kept)  # the trained weights, in its place
    refused = finish(tmp_path, "steps=3", "out_dir=parts", "trainer.world_size=1")
    assert "reference has other weights than the run began with: sha256 " in refused.error(2)
    shutil.move(tmp_path / "kept", kept)
    resumed = finish(
        tmp_path, "steps=3", "out_dir=elsewhere", "resume=parts", "trainer.world_size=1", "cluster.placement=split"
    )
    assert resumed.code == 0, resumed
    assert summary(tmp_path / "elsewhere")["weights_sha256"] == summary(tmp_path / "whole")["weights_sha256"]
    # A model directory with these weights is the same reference
    named = finish(
        tmp_path, "steps=3", "out_dir=parts", "algorithm.reference=elsewhere/reference", "trainer.world_size=2"
    )
    assert named.code == 0, named
    assert summary(tmp_path / "parts")["weights_sha256"] == summary(tmp_path / "whole")["weights_sha256"]


@pytest.mark.slow
def test_a_policy_comes_near_its_teacher(tmp_path: Path) -> None:
    """The teacher is a model of another shape, that another run left; one hash wherever the run was stopped."""
    shape = ("model.hf.num_hidden_layers=1", "warmup.steps=40", "warmup.sequences=128")
    assert finish(tmp_path, "algorithm.kl_coef=0", *shape, "steps=0", "out_dir=teacher", "seed=5").code == 0
    keys = ("algorithm=distillation", "algorithm.teacher=teacher/model", "algorithm.kl_coef=0", "trainer.lr=3e-3")
    whole = finish(tmp_path, *keys, "steps=12", "out_dir=whole", "trainer.world_size=1")
    assert whole.code == 0, whole
    rows = [row for row in read_lines(tmp_path / "whole" / "metrics.jsonl") if "reward/mean" in row]
    assert rows[-1]["policy/kl_ref_k1"] < 0.7 * rows[0]["policy/kl_ref_k1"]
    assert all(row["divergence/tokens_nonzero"] == 0 for row in rows)
    assert finish(tmp_path, *keys, "steps=5", "out_dir=parts", "trainer.world_size=2").code == 0
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    moved = (*keys, "algorithm.teacher=moved/model", "steps=12", "out_dir=parts", "trainer.world_size=1")
    assert finish(tmp_path, *moved, "trainer.micro_leaves=2").code == 0
    assert summary(tmp_path / "parts")["weights_sha256"] == summary(tmp_path / "whole")["weights_sha256"]


def asked(*keys: str) -> FrozenModel | None:
    config = check([*RUN, "model.hf.vocab_size=64", *keys])[0]
    return frozen_model(config, model_config(config, 20))


def test_which_model_it_is() -> None:
    assert asked("algorithm.kl_coef=0") is None
    kept, seeded = asked(), asked("warmup.steps=0", "seed=7")
    assert kept is not None and kept.source is None
    assert seeded is not None and seeded.source == 7


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("rollout.top_p=0.9",), r"rollout.top_p=0.9 with algorithm.reference: .* set rollout.top_p=1"),
        (("rollout.top_k=5",), "rollout.top_k=5 with algorithm.reference"),
        (("algorithm.reference=nowhere",), "algorithm.reference=nowhere is no folder"),
    ],
)
def test_what_it_cannot_be(keys: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=line):
        asked(*keys)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    """The policy may sample any id of its own; the other model would read past its embeddings."""
    theirs = model_config(check([*RUN, "model.hf.vocab_size=32"])[0], 20)
    save(theirs, initial(theirs, 0), tmp_path)
    with pytest.raises(UserError, match="its vocabulary of 32 is smaller than the policy's of 64"):
        asked(f"algorithm.reference={tmp_path}")
    assert asked(f"algorithm.reference={tmp_path}", "model.hf.vocab_size=32") is not None


def test_its_ids_are_the_runs(tmp_path: Path) -> None:
    """Each id must stand for the same token; what else a tokenizer says is not asked of the other model."""
    config = check([*RUN, "model.hf.vocab_size=64"])[0]
    model, mine = model_config(config, 40), of_characters(["0123 and"])
    (tmp_path / "config.json").write_text(json.dumps(model.to_hf("float32")))
    theirs = ("algorithm.reference", str(tmp_path), mine)
    with pytest.raises(UserError, match=r"algorithm.reference=.* holds no tokenizer"):
        check_tokenizer(*theirs)
    for texts, line in ((["0123 and more"], "id 10 is 'e' there and 'n' here"), (["0123 and"], "")):
        for name, content in of_characters(texts).files.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=line) if line else nullcontext():
            check_tokenizer(*theirs)


def test_the_plan_counts_it() -> None:
    """Its rows on each rank in the dtype of activations, and what is kept of it on the disk."""
    base = ("model.hf.vocab_size=64", "model.dtype=bfloat16", *RUN)
    sizes = []
    for keys in (("algorithm.kl_coef=0",), ()):
        config = check([*base, *keys])[0]
        sizes.append((make_plan(config, model_config(config, None), 20), config.trainer.world_size))
    (without, world), (plan, _) = sizes
    assert plan.trainer.state - without.trainer.state == 2 * plan.parameters // world
    assert plan.trainer.peak - without.trainer.peak >= 2 * plan.parameters // world
    assert plan.disk_bytes - without.disk_bytes == 4 * plan.parameters
