"""A warm start by pairs: it learns them, ends in one hash wherever it was stopped, and refuses what makes no pair."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernels.model import saved
from rl.compose import check
from rl.config import RunConfig
from rl.data import Problem, open_source
from rl.errors import UserError
from rl.frozen import preference_model
from rl.model import model_config
from rl.plan import make_plan
from rl.preferences import Preferences, check_preferences
from rl.report import read_lines
from tests.rl.command import command
from tests.rl.documented import undocumented

RUN = (
    *("data=dataset", "data.path=pairs.jsonl", "data.question=prompt", "data.vocab_size=300", "logger=none"),
    *("reward=judge.py:longer", "warmup.kind=dpo", "warmup.steps=8", "warmup.sequences=16", "warmup.lr=1e-3"),
    "warmup.beta=0.5",
    *("algorithm=reinforce_plus_plus", "algorithm.prompts_per_step=4", "algorithm.group_size=4", "eval.problems=4"),
    *("trainer.leaf_sequences=2", "trainer.micro_leaves=1", "model.hf.num_hidden_layers=1", "rollout.pages=256"),
    *("steps=1", "checkpoint.every=2", "checkpoint.keep=9"),
)


def write(folder: Path, **changed: Any) -> None:
    """Rows as TRL has them: a text, and messages of the assistant, of each kind."""
    rows = []
    for i in range(64):
        right, wrong = f"it is {i % 7}", f"no {i % 5}"
        if i % 2:
            rows.append({"prompt": f"what of {i}?", "chosen": right, "rejected": wrong})
        else:
            turns = {k: [{"role": "assistant", "content": v}] for k, v in (("chosen", right), ("rejected", wrong))}
            rows.append({"prompt": f"what of {i}?", **turns})
    rows[5] |= changed
    (folder / "judge.py").write_text("def longer(problem, text):\n    return float(len(text))\n")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(folder: Path, *keys: str) -> RunConfig:
    return check([*RUN, f"data.path={folder / 'pairs.jsonl'}", *keys])[0]


def finish(folder: Path, *keys: str) -> None:
    with command(*RUN, *keys, cwd=folder) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome


@pytest.mark.slow
def test_it_learns_the_pairs_and_goes_on_in_another_layout(tmp_path: Path) -> None:
    write(tmp_path)
    finish(tmp_path, "out_dir=whole", "trainer.world_size=1")
    rows = read_lines(tmp_path / "whole" / "metrics.jsonl")
    taught = [row for row in rows if "preference/margin" in row]
    assert len(taught) == 8 and not undocumented({name for row in rows for name in row})
    assert taught[0]["preference/margin"] == 0 and taught[0]["policy/loss"] == pytest.approx(0.6931472)
    assert taught[-1]["preference/accuracy"] == 1 and taught[-1]["policy/loss"] < 0.5
    parts = tmp_path / "parts"
    finish(
        tmp_path, "out_dir=elsewhere", "resume=whole/checkpoints/step-00000004", "trainer.world_size=2", "rollout.tp=1"
    )
    finish(tmp_path, f"out_dir={parts}", "trainer.world_size=4", "trainer.checkpointing=layer")
    hashes = [
        json.loads((tmp_path / x / "summary.json").read_text())["weights_sha256"]
        for x in ("whole", "elsewhere", "parts")
    ]
    assert len(set(hashes)) == 1


def test_a_batch_of_pairs(tmp_path: Path) -> None:
    """The chosen answer of each pair, then the rejected one; each row weighs 1 / pairs."""
    write(tmp_path)
    config = config_of(tmp_path)
    source = open_source(config)
    asked: list[Any] = []

    def frozen(batch: Any) -> Any:
        asked.append(batch)
        return batch.logprobs - 1

    lessons = Preferences(config.warmup, source, 0, 50, 0, SimpleNamespace(frozen_logprobs=frozen))
    batch = lessons.batch(0)
    assert batch.sequences == 16 and lessons.stream.cursor == 8 and len(asked) == 1
    assert (batch.weights == 1 / 8).all() and (batch.reference == -1).all()
    ends = batch.lengths.cumsum()
    answers = [
        source.tokenizer.decode(batch.token_ids[e - n : e].tolist()) for e, n in zip(ends, batch.counts, strict=True)
    ]
    assert all(a.startswith("it is") for a in answers[0::2]) and all(a.startswith("no") for a in answers[1::2])


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"chosen": 3}, "no text field 'chosen', which warmup.chosen names"),
        ({"rejected": None}, "no text field 'rejected', which warmup.rejected names"),
        ({"chosen": "same", "rejected": "same"}, "the chosen and the rejected answer are the same text"),
    ],
)
def test_rows_that_make_no_pair(changed: dict[str, Any], line: str, tmp_path: Path) -> None:
    write(tmp_path)
    config = config_of(tmp_path)
    row = {"chosen": "a", "rejected": "b"} | changed
    problems = [Problem("pairs.jsonl:6", "", (1,), "", "", row)]
    with pytest.raises(UserError, match=re.escape(f"pairs.jsonl:6: {line}")):
        check_preferences(config, problems)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            ("trainer.leaf_sequences=1",),
            "warmup.kind=dpo with trainer.leaf_sequences=1 and warmup.sequences=16: both must be",
        ),
        (("warmup.sequences=15",), "both must be even"),
    ],
)
def test_leaves_hold_whole_pairs(keys: tuple[str, ...], line: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, *keys)
    with pytest.raises(UserError, match=re.escape(line)):
        preference_model(config, model_config(config, 300))


def test_where_it_does_not_belong(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape("warmup.kind=dpo with data.kind=reasoning_gym: its rows must hold pairs")
    ):
        check_preferences(check(["warmup.kind=dpo"])[0], [])
    assert preference_model(check(["warmup.kind=dpo", "warmup.steps=0"])[0], None) is None  # type: ignore[arg-type]


def test_the_plan_counts_the_reference(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    model = model_config(config, 300)
    more, less = (make_plan(c, model, 20).trainer.state for c in (config, config_of(tmp_path, "warmup.steps=0")))
    assert more - less == 4 * sum(p.elements for p in saved(model)) // config.trainer.world_size
