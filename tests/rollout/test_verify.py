"""The users' test of exactness: it says yes where the bits are equal, and where one is not it says no, and where."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels.model import Parameter
from kernels.weights.files import save
from rollout.differences import Answer, compare, pattern
from rollout.engine import Engine
from rollout.runner import Launched
from rollout.source import Source
from rollout.verify import MODES, main
from tests.model.shapes import SHAPES, random_weights

TINY = Source.open(None)
FEW = ["--trials", "3", "--new", "6", "--threads", "1", "--device", "cpu"]
FAST = replace(TINY, config=replace(TINY.config, kv_heads=2, heads=2, layers=1))
"""Two ranks at the most."""


def flipped(weights: Iterator[tuple[Parameter, torch.Tensor]]) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """One bit of one weight, which the last rank holds."""
    for parameter, whole in weights:
        if parameter.name == "layers.0.down":
            whole = whole.clone()
            whole.view(torch.int32)[3, -1] ^= 1 << 12
        yield parameter, whole


class FlippedOnRank1(Source):
    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        return flipped(super().weights()) if dist.is_initialized() and dist.get_rank() == 1 else super().weights()


class FlippedForTheTrainer(Source):
    calls = 0

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """The sampler reads them first."""
        type(self).calls += 1
        return flipped(super().weights()) if type(self).calls > 1 else super().weights()


def as_kind(kind: type[Source]) -> Source:
    return kind(**{name: getattr(FAST, name) for name in Source.__dataclass_fields__})


def test_all_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert main([*FEW, "--json", str(path)], FAST) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["mode"] for row in rows} == set(MODES) and all(row["holds"] for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Unique samples" in line]
    assert len(lines) == len(rows)
    assert all("Unique samples: 1 " in line and line.endswith("differing bits: 0") for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_hold_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Ranks share the card where there is one."""
    source = replace(FAST, dtype=torch.bfloat16)
    assert main(["--trials", "4", "--new", "6", "--device", "cuda"], source) == 0
    out = capsys.readouterr().out
    assert all(f"\n{mode} " in out for mode in MODES) and "cuda" in out


@pytest.mark.parametrize("mode", ["mixed", "trainer"])
def test_a_model_directory(mode: str, tmp_path: Path) -> None:
    config = SHAPES["llama 3.1"]
    save(config, ((p, w.to(torch.bfloat16)) for p, w in random_weights(config)), tmp_path)
    assert main(["--model", str(tmp_path), "--leaves", str(config.leaves), *FEW, "--mode", mode]) == 0


def test_one_bit_of_one_weight_on_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FEW, "--mode", "tp"], as_kind(FlippedOnRank1)) == 1
    out = capsys.readouterr().out
    assert re.search(r"tp=1 against tp=2: (prompt|sampled) token \d+: .*\(0x[0-9a-f]{8}\) against .*\(0x", out)
    assert "NOT the same bits" in out


def test_one_bit_of_one_weight_in_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FlippedForTheTrainer.calls = 0
    path = tmp_path / "rows.json"
    assert main([*FEW, "--mode", "trainer", "--json", str(path)], as_kind(FlippedForTheTrainer)) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert not row["holds"] and row["differing_bits"] > 0 and "sampler against trainer" in row["first_difference"]
    assert row["first_difference"] in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["single", "mixed", "prefix", "radix_cache"])
def test_bits_that_depend_on_company_or_on_the_cache(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Launched.results

    def depends(self: Launched) -> tuple:
        sampled, scored = results(self)
        spans = self.spans
        cached = any(0 < s.start < s.sequence.prompt and s.start % 48 for s in spans)  # not a later chunk
        if sampled and (cached if mode == "radix_cache" else len(spans) > 1):
            token, logprob, top = sampled[-1]
            bits = torch.tensor(logprob).view(torch.int32) ^ 1
            sampled[-1] = token, float(bits.view(torch.float32)), top
        return sampled, scored

    monkeypatch.setattr(Launched, "results", depends)
    assert main([*FEW, "--mode", mode], FAST) == 1


def test_a_row_that_proves_nothing_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.pages.PagePool.match", lambda self, tokens, path=None: [])
    assert main([*FEW, "--mode", "radix_cache"], FAST) == 1
    one = replace(FAST, config=replace(FAST.config, heads=1, kv_heads=1))
    assert main([*FEW, "--mode", "tp"], one) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "/nowhere"], "/nowhere/config.json does not exist"),
        (["--new", "5000"], "--new 5000 does not fit"),
    ],
)
def test_bad_arguments(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--mode", "fast"], ["--trials", "0"], ["--trials", "-1"], ["--trials", "x"], ["--json", "/nowhere/rows"]],
)
def test_arguments_that_are_no_arguments(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"samebit: error: argument {options[0]}") and told.count("\n") == 1


def test_a_difference_has_a_place_and_both_patterns() -> None:
    a = Answer((7, 8), (-1.5, -2.0, -0.0))  # one prompt token is scored
    assert compare("m", "c", [a, a, a], "xyz").holds
    row = compare("m", "c", [a, Answer((7, 8), (-1.5, -2.0, 0.0))], "xy")
    assert (row.unique_samples, row.differing_bits, row.holds) == (1, 1, False)
    assert row.first_difference == "x against y: sampled token 1: log-prob -0.0 (0x80000000) against 0.0 (0x00000000)"
    row = compare("m", "c", [a, Answer((7, 9), a.logprobs)], "xy")
    assert (row.unique_samples, row.differing_bits) == (2, 0) and "id 8 against 9" in row.first_difference
    row = compare("m", "c", [a, Answer((7,), a.logprobs[:2])], "xy")
    assert row.unique_samples == 2 and not row.holds
    assert pattern(1.0) == 0x3F800000


def test_the_tiny_model_can_be_cut_in_eight() -> None:
    TINY.config.check_shards(8)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 of which 512.00 MiB is free."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes."),
        MemoryError(),
    ],
)
def test_memory_that_is_short(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No verdict, in one line, wherever the allocation failed."""

    def fails(self: Engine, *_: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "step", fails)
    for mode in ("single", "tp", "trainer"):
        assert main([*FEW, "--mode", mode], FAST) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("samebit: error: out of memory") and "lower --trials or --new" in line, line


def test_a_file_that_hides_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trainer.py").write_text("")
    command = [sys.executable, "-m", "rollout.verify", *FEW, "--mode", "trainer"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"samebit: error: {tmp_path / 'trainer.py'} hides the package 'trainer' of ")
