"""The command that proves: its choice of layouts, its verdict, and two real runs of which one is killed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rl import prove
from rl.prove import Layout, Row, equal, layouts, main

PLAIN = Layout("float32", 1, 4, 1, 1, False)


def row(layout: Layout, sha256: str = "a" * 64, differing: int = 0) -> Row:
    return Row(layout, sha256, 10, differing, 1.0, "" if sha256 else "trainer rank 0 failed")


def test_a_few_layouts_cover_every_value() -> None:
    few, whole = layouts(False), layouts(True)
    assert len(set(whole)) == len(whole) == 216 and len(few) < 12
    assert set(few) <= set(whole)
    for dtype in prove.DTYPES:
        mine, all_ = ([lay for lay in some if lay.dtype == dtype] for some in (few, whole))
        for field in ("world_size", "micro_leaves", "tp", "replicas", "killed"):
            assert {getattr(lay, field) for lay in mine} == {getattr(lay, field) for lay in all_}, (dtype, field)
    assert all(lay.other() != lay and lay.other().world_size != lay.world_size for lay in whole)


def test_verdict() -> None:
    other = replace(PLAIN, tp=2)
    bfloat16 = replace(PLAIN, dtype="bfloat16")
    assert equal([row(PLAIN), row(other), row(bfloat16, "b" * 64)])
    assert not equal([row(PLAIN), row(other, "b" * 64)])
    assert not equal([row(PLAIN), row(other, "")])
    assert not equal([row(PLAIN), row(other, differing=1)])


def test_exit_code_of_runs_that_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    rows = [row(PLAIN), row(replace(PLAIN, tp=2), "b" * 64), row(replace(PLAIN, tp=4), "")]
    monkeypatch.setattr(prove, "layouts", lambda _: [r.layout for r in rows])
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
        (["--nope"], "unrecognized arguments: --nope"),
        (["--json"], "expected one argument"),
        (["--json", "/does/not/exist/x.json"], "--json=/does/not/exist/x.json: no such folder"),
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
    monkeypatch.setattr(prove, "layouts", lambda _: [PLAIN, Layout("float32", 2, 1, 2, 1, True)])
    main(["steps=2", "warmup.steps=1", "--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    assert "all equal: the layout changed no bit" in out and re.search(r"layouts 2/2  [0-9a-f]{16}", out)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows[0]["sha256"] == rows[1]["sha256"] and len(rows[0]["sha256"]) == 64
    assert all(r["differing"] == 0 and r["compared"] > 100 for r in rows)
