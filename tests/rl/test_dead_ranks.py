"""A rank that raises in the middle of its work ends the run within seconds, with its own error: the others wait in a
collective, or meet a broken connection."""

import contextlib
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rl.cluster import cluster
from rl.compose import check
from rl.memory import OutOfMemory
from rl.prepare import prepare
from rl.train import train
from tests.model.shapes import TINY
from tests.rl.command import SHORT, call
from tests.rl.faults import break_in
from tests.trainer.batches import random_batch
from trainer.loss import LikelihoodLoss

pytestmark = pytest.mark.slow

SMALL = (*SHORT, "steps=1", "warmup.steps=0", "eval.problems=4", "checkpoint.every=0", "trainer.micro_leaves=1")


def test_an_exception_and_an_allocation(tmp_path: Path) -> None:
    config = check([*SMALL, "out_dir=unused"])[0]
    with cluster(config, prepare(config).model) as (rollout, trainer):
        on_these = partial(train, start=lambda *_: contextlib.nullcontext((rollout, trainer)))
        break_in(rollout.engines[0][1].actor, "engine", "step", 2, "raises")
        start = time.monotonic()
        line = call(*SMALL, f"out_dir={tmp_path / 'run'}", train=on_these).error(code=1)
        assert line == "rollout engine 0 rank 1 failed: ValueError: boom in the middle"
        assert time.monotonic() - start < 30
        # that engine is lost, the trainer is whole: a step of its own
        trainer.onload()
        break_in(trainer.ranks[1].actor, "trainer", "_backward", 2, "allocates")
        start = time.monotonic()
        with pytest.raises(OutOfMemory, match=r"^trainer rank 1 ran out of memory: \d+\.\d GiB asked for"):
            trainer.step(random_batch(replace(TINY, vocab_size=16), 256, longest=6), LikelihoodLoss(), 0.0)
        assert time.monotonic() - start < 30
