"""The command that proves: its choice of layouts, its verdict, and two real runs of which one is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl import prove
from rl.compose import ROOT
from rl.prove import BY_TOKENS, Layout, Row, against, few, main, product
from tests.rl.recorded import assert_recorded

PLAIN = Layout("float32", 1, 4, "none", "none", 1, 1, "colocated", False)


def row(layout: Layout, sha256: str = "a" * 64, differing: int = 0) -> Row:
    return Row(layout, "cpu", sha256, 10, differing, 1.0, "" if sha256 else "trainer rank 0 failed", "")


@pytest.mark.parametrize(
    ("device", "cards", "dtypes"),
    [
        ("cpu", 0, {"float32", "bfloat16"}),
        ("cuda", 1, {"bfloat16"}),
        ("cuda", 2, {"bfloat16"}),
        ("cuda", 8, {"bfloat16"}),
    ],
)
def test_a_few_layouts_cover_every_value(
    device: str, cards: int, dtypes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    chosen, whole = few(device), product(device)
    assert len(set(whole)) == len(whole) and 4 <= len(chosen) / len(dtypes) <= 5
    assert set(chosen) <= set(whole) and {lay.dtype for lay in chosen} == dtypes
    for dtype in dtypes:
        for field, values in prove.AXES.items():
            if field != "dtype":
                possible = values if cards != 1 or field != "placement" else ("colocated",)
                assert {getattr(lay, field) for lay in chosen if lay.dtype == dtype} == set(possible), (dtype, field)
    assert all(lay.other().world_size != lay.world_size and lay.other().offload != lay.offload for lay in whole)
    split = [lay for lay in whole if lay.placement == "split"]
    assert len(whole) - len(split) == 1296 * len(dtypes)
    if device == "cuda":
        assert all(lay.world_size + lay.tp * lay.replicas <= cards for lay in split) and bool(split) == (cards > 1)


def test_verdict() -> None:
    other = replace(PLAIN, tp=2)
    bfloat16 = replace(PLAIN, dtype="bfloat16")
    assert against([row(PLAIN), row(other), row(bfloat16, "b" * 64)]) == ""
    assert against([row(PLAIN), row(other, "b" * 64)]) == "the hashes differ: the layout changed the run"
    assert against([row(PLAIN), row(other, "")]).startswith("1 of 2 runs did not reach their end, and show nothing: ")
    assert against([row(PLAIN, ""), row(other, "")]).startswith("2 of 2 runs did not")
    assert against([row(PLAIN), row(other, "", differing=1)]) == "1 log-probs of the sampler are not the trainer's"


def test_exit_code_of_runs_that_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    rows = [row(PLAIN), row(replace(PLAIN, tp=2), "b" * 64), row(replace(PLAIN, tp=4), "")]
    monkeypatch.setattr(prove, "few", lambda _: [r.layout for r in rows])
    monkeypatch.setattr(prove, "prove", lambda *_: iter(rows))
    with pytest.raises(SystemExit) as end:
        main(["--json", str(tmp_path / "rows.json")])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and err == "samebit: error: the hashes differ: the layout changed the run\n"
    assert "aaaaaaaa" in out and "bbbbbbbb" in out and "failed" in out
    assert [r["sha256"] for r in json.loads((tmp_path / "rows.json").read_text())] == ["a" * 64, "b" * 64, ""]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["stpes=2"], "unknown key 'stpes'"),
        (["rollout.tp=2"], "rollout.tp=2: the proof itself chooses"),
        (["trainer.micro_tokens=9"], "trainer.micro_tokens=9: the proof itself chooses"),
        (["--sample", "0"], "--sample=0: must be in 1 .. 5184"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--json"], "expected one argument"),
        (["--json", "/does/not/exist/x.json"], "/does/not/exist/x.json: no such folder"),
        (["model.hf.num_key_value_heads=2"], "rollout.tp=4 does not divide the model's 2 key-value heads"),
        (["algorithm.prompts_per_step=3"], "no multiple of"),
    ],
)
def test_bad_input(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "prove", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as end:
        main(arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("samebit: error: ") and part in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_two_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    other = Layout("float32", 2, BY_TOKENS, "layer", "optimizer", 2, 1, "split", True)
    monkeypatch.setattr(prove, "few", lambda _: [PLAIN, other])
    main(["--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    assert "all equal: the layout changed no bit" in out and re.search(r"layouts 2/2  [0-9a-f]{16}", out)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(r["differing"] == 0 and r["compared"] > 100 for r in rows)
    assert rows[0]["sha256"] == rows[1]["sha256"]
    assert_recorded("cpu float32", rows[0]["sha256"])


def test_a_signal_ends_it_as_an_interrupt_does(tmp_path: Path) -> None:
    """One line, and the folder of its runs is removed."""
    words = [sys.executable, "-m", "rl.prove", "--sample", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(words, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, **pipes)
    try:
        assert running.stdout is not None and "layouts" in running.stdout.readline()
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert (running.returncode, err.splitlines()[-1]) == (143, "samebit: error: ended by SIGTERM")
    assert not list(tmp_path.glob("samebit-*"))
