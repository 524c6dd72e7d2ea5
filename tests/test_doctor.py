"""The doctor's facts, its verdict, and what it computes on a CPU."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.doctor import __main__ as doctor
from kernels.doctor import checks, facts
from kernels.gpu.card import KNOWN, Card

LINE = {"card": "X", "capability": "8.6", "family": "portable", "ops": "a", "run": "b"}


def test_a_line_is_judged_by_its_own_capability() -> None:
    """Another card's bits are told, and are no fault."""
    same, other = dict(LINE, card="Y"), dict(LINE, card="Z", capability="9.0", run="c")
    said, holds = facts.judge(LINE, [same, other, dict(LINE, family="hopper", ops="z")])
    assert holds and "against Y (8.6): ops the same, run the same" in said and len(said) == 2
    assert "ops the same, run OTHER" in said[1]
    said, holds = facts.judge(LINE, [dict(LINE, ops="z")])
    assert not holds and "ops OTHER" in said[0]
    said, holds = facts.judge(dict(LINE, run=""), [dict(LINE, ops="", run="q")])
    assert holds and "nothing to compare" in said[0]
    said, holds = facts.judge(LINE, [])
    assert holds and "nothing is recorded" in said[0] and "recorded.json" in said[1]


def test_recorded_lines_have_all_that_a_judge_reads() -> None:
    lines = facts.recorded()
    assert {line["family"] for line in lines} == {"cpu", "hopper", "portable"}
    for line in lines:
        assert {*facts.KEYS, *facts.HASHES} <= line.keys() and (line["run"] or line["ops"])


def test_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of a card without one: it is compiled for in the tests, or it is not."""
    card: Card = KNOWN[86]
    monkeypatch.setattr(facts, "card_of", lambda device: card)
    monkeypatch.setattr(facts.metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=22 << 30))
    found = facts.facts("cuda")
    assert found["card"] == "A10" and found["capability"] == "8.6" and found["memory_gib"] == 22.0
    assert found["family"] == "portable" and "in the tests" in facts.compiled_for(found)
    assert "here alone" in facts.compiled_for(found | {"capability": "8.7"})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, ops: Any = ([], "a"), sampler: Any = ()) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "of_ops", lambda device, say: ops)
    monkeypatch.setattr(doctor, "of_sampler", lambda device, family, say: list(sampler))
    monkeypatch.setattr(doctor, "of_run", lambda device, family, say: ([], "b"))
    monkeypatch.setattr(doctor, "recorded", lambda: [dict(LINE, family="cpu", capability="", ops="a")])
    return doctor.main(list(arguments))


def test_exit_codes_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(monkeypatch, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["line"]["ops"] == "a" and report["line"]["run"] == "b" and report["holds"]
    assert run(monkeypatch, "--quick") == 0
    out = capsys.readouterr().out
    assert "the CPU is tested" in out and "all that was checked holds" in out and "line for" not in out
    assert run(monkeypatch, ops=([], "z")) == 1 and "NOT as it should be" in capsys.readouterr().out
    assert run(monkeypatch, sampler=["rollout.verify ended with 1: no"]) == 1
    assert "WRONG: rollout.verify ended with 1: no" in capsys.readouterr().out
    assert run(monkeypatch, "--facts") == 0 and "torch" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--device", "cuda")
    assert end.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_a_check_that_fails_is_told_in_one_line(tmp_path: Any) -> None:
    (line,) = checks._run(["rollout.verify", "--mode=none"])
    assert line.startswith("rollout.verify ended with 2: samebit: error:")


def test_ops_on_a_cpu_have_the_recorded_hash() -> None:
    """Said of every op in the order of their names; the same on every CPU."""
    wrong, found = checks.of_ops("cpu", lambda text: None)
    (line,) = [line for line in facts.recorded() if line["family"] == "cpu"]
    assert not wrong and found == line["ops"], f"the ops' hash is {found}: another order of a sum, or another op"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--quick"]) == 0, capsys.readouterr().out
