"""The command runs and counts; what it measures is no test."""

import json
from pathlib import Path

import pytest

from kernels.bench.schedule import main, soak


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    few = ["--running", "16", "--prompt", "64", "--steps", "8", "--requests", "30"]
    assert main([*few, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["rows"][0]["running"] == 16 and figures["rows"][0]["decode_ms"] > 0
    assert figures["soak"]["requests"] == 30 and figures["soak"]["pages_leaked"] == 0
    assert "0 pages leaked" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_soak_leaks_no_page(seed: int) -> None:
    counted = soak(400, seed)
    assert counted["pages_leaked"] == 0 and counted["requests"] == 400
    assert min(counted[event] for event in ("stop", "length", "abort", "preemptions", "tokens_from_cache")) > 0
