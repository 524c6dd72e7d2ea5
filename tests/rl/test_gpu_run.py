"""Whole runs on a GPU: one override, the Triton kernels, and one hash for every layout; what goes wrong there is named."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl.cluster import cluster
from rl.compose import check
from rl.memory import OutOfMemory
from rl.prepare import prepare
from rl.prove import main
from tests.model.shapes import TINY
from tests.rl.command import ON_CARD, SHORT, command
from tests.rl.faults import break_in
from tests.rl.recorded import assert_recorded, name_of
from tests.trainer.batches import random_batch
from trainer.loss import LikelihoodLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def run(folder: Path, *more: str) -> dict:
    with command(*ON_CARD, *SHORT, f"out_dir={folder}", *more, cwd=folder.parent) as running:
        outcome = running.finish(timeout=240)
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    return json.loads((folder / "summary.json").read_text())


def test_the_main_job_is_one_hash(tmp_path: Path) -> None:
    """TP 1 and 2, and another world size, batch and cache; ranks share one card where there is no other."""
    one = run(tmp_path / "one", "rollout.tp=1")
    two = run(tmp_path / "two", "rollout.tp=2", "trainer.world_size=1", "trainer.micro_leaves=1", "rollout.page_size=3")
    assert one["tokens_compared"] == two["tokens_compared"] > 256
    assert one["tokens_nonzero"] == two["tokens_nonzero"] == 0
    assert one["weights_sha256"] == two["weights_sha256"]
    for summary in (one, two):
        assert summary["device"] == "cuda" and "triton" in summary["versions"]


def test_every_layout_has_the_recorded_hash(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """`python -m rl.prove device=cuda`: ranks share the cards there are; one run is killed and resumed."""
    main([*ON_CARD, "--json", str(tmp_path / "rows.json")])
    assert "all equal: the layout changed no bit" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert any(row["layout"]["killed"] for row in rows) and {row["layout"]["tp"] for row in rows} == {1, 2, 4}
    assert_recorded(name_of(rows[0]), rows[0]["sha256"])


def test_pages_that_do_not_fit(tmp_path: Path) -> None:
    """Refused before a process starts, with what the card has and what the plan needs."""
    more = ("rollout.tp=1", "trainer.world_size=1", "rollout.pages=200000000", f"out_dir={tmp_path / 'run'}")
    with command(*ON_CARD, *SHORT, *more, cwd=tmp_path) as running:
        outcome = running.finish(120)
        running.assert_nothing_left()
    line = outcome.err.splitlines()[-1]
    pattern = (
        r"card 0 has [\d.]+ GiB and 1 trainer rank.* 1 rollout process\(es\) of [\d.]+ GiB need .*, lower rollout.pages"
    )
    assert outcome.code == 2 and re.search(pattern, line), line


def test_an_allocation_that_fails_in_a_step() -> None:
    """On one of two trainer ranks, while the other waits in a collective."""
    config = check([*SHORT, *ON_CARD, "rollout.tp=1", "trainer.micro_leaves=1", "out_dir=unused"])[0]
    with cluster(config, prepare(config).model) as (_, trainer):
        break_in(trainer.ranks[1].actor, "trainer", "_backward", 2, "allocates on the card")
        start = time.monotonic()
        with pytest.raises(
            OutOfMemory, match=r"^trainer rank 1 ran out of memory: \d+\.\d GiB asked for, \d+\.\d GiB free$"
        ):
            trainer.step(random_batch(replace(TINY, vocab_size=16), 256, longest=6), LikelihoodLoss(), 0.0)
        assert time.monotonic() - start < 30
