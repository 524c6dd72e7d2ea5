"""The benchmark: what it refuses to time, and what it writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.bench import card_rows, cards, specs, timer
from kernels.host.command import Parser
from kernels.spec import Inputs, OpSpec, all_specs, as_tuple

CPU = torch.device("cpu")
SPECS = {spec.name: spec for spec in all_specs()}


def small(spec: OpSpec) -> OpSpec:
    return replace(spec, bench=(spec.cases[0] | {"ragged": 0} if "ragged" in spec.cases[0] else spec.cases[0],))


def by_batch(inputs: Inputs) -> torch.Tensor:
    """Right to a few ulp, and not the same for every number of rows."""
    return SPECS["square_rows"].run(inputs) * (1 + 1e-7 * len(inputs["x"]))


def by_alignment(inputs: Inputs) -> torch.Tensor:
    return SPECS["square_rows"].run(inputs) * (1 + 1e-6 * (inputs["x"].data_ptr() % 64))


@pytest.mark.parametrize(("run", "broken"), [(by_batch, "units"), (by_alignment, "storage offset")])
def test_an_op_whose_contract_fails_is_not_timed(run, broken, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    spec = small(replace(SPECS["square_rows"], run=run))
    assert any(broken in what for what in specs.broken_claims(spec, spec.cases[1], CPU, torch.float32))
    monkeypatch.setattr(specs, "all_specs", lambda: (spec,))
    monkeypatch.setattr(specs, "time_op", lambda *_: pytest.fail("it was timed"))
    assert specs.main([]) == 1
    assert "square_rows is not timed" in capsys.readouterr().out


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.name)
def test_every_op_and_its_vendor_run(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "_SAMPLES", 1)
    monkeypatch.setattr(specs, "_SAMPLE_SECONDS", 0)
    dtype = spec.dtypes[0]
    assert specs.broken_claims(spec, spec.cases[1], CPU, dtype) == []
    timings = list(specs.time_op(spec, small(spec).bench[0], CPU, dtype))
    assert [t.direction for t in timings][:1] == ["forward"]
    assert all(t.milliseconds > 0 and t.vendor_milliseconds > 0 and t.ratio > 0 for t in timings)
    inputs = spec.make(small(spec).bench[0], torch.Generator().manual_seed(0), CPU, dtype)
    # It draws other noise or numbers, steps a copy, gives no mask, has other scales or none.
    others = "matmul_fp8", "quantize_rows", "quantize_blocks", "dequantize_blocks"
    if spec.name not in ("gumbel_argmax", "normal", "adamw", "kept_tokens", *others):
        expected = as_tuple(spec.vendor(inputs))[0]
        expected = expected.squeeze(-1) if spec.name == "vocab_logprob" else expected
        torch.testing.assert_close(spec.outputs(inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(SPECS["rms_norm"])
    monkeypatch.setattr(specs, "all_specs", lambda: (spec,))
    assert specs.main(["--json", str(tmp_path / "bench.json"), "--threads", "2"]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["threads"] == 2 and written["torch"] == torch.__version__ and written["processor"]
    assert [t["direction"] for t in written["timings"]] == ["forward", "backward"]
    assert {"op", "case", "dtype", "milliseconds", "vendor_milliseconds", "ratio", "speed", "unit"} <= set(
        written["timings"][0]
    )


def test_an_unknown_op_is_an_error_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        specs.main(["--op", "conv"])
    assert "conv" in capsys.readouterr().err


# The table of the GPU kernels -----------------------------------------------------------------------------------------


def timed(size: str, ours: float, group: str | None = None, target: float | None = None, **theirs: float):  # type: ignore[no-untyped-def]
    baselines = theirs or {"cuBLAS": 10.0}
    return timer.Result("matmul", "o", size, group, target, ours, baselines, 1.0, "TFLOP/s", 0)


def test_the_geometric_mean_of_a_group_and_its_target() -> None:
    low, high = timed("M 1", 20.0, "matmul, M <= 64"), timed("M 8", 5.0, "matmul, M <= 64")
    other = timed("M 128", 10.0, "matmul, M 128 and 256")
    few, many = cards.means([low, other, timed("alone", 1.0), high])
    assert few.group == "matmul, M <= 64" and few.ratio == pytest.approx(1.0) and few.target == 1.05
    assert many.ratio == pytest.approx(1.0) and many.target == 0.95
    assert cards.met(few.ratio, few.target) is False and cards.met(many.ratio, many.target) is True
    assert cards.met(0.1, None) is None and cards.met(0.8999, 0.90) is False


def test_the_baseline_is_the_fastest() -> None:
    row = timed("n", 8.0, None, 0.8, cuDNN=10.0, flash=6.0)
    assert row.baseline == "flash" and row.ratio == pytest.approx(0.75)


def test_every_row_has_a_target_or_a_group_and_a_name_of_its_own() -> None:
    rows = card_rows.rows()
    assert len({(r.op, r.case, r.size) for r in rows}) == len(rows)
    assert {r.group for r in rows if r.group} == set(cards.TARGETS)
    assert all((r.group is None) != (r.target is None) for r in rows if r.op != "attention_decode")
    assert all(r.work > 0 and r.claim for r in rows)


def gpu_run(monkeypatch: pytest.MonkeyPatch, outcomes: dict, path: Path) -> int:  # type: ignore[type-arg]
    """The command, with what each row's timing would give in place of a GPU."""

    def outcome(row: timer.Row) -> timer.Result | None:
        if isinstance(given := outcomes[row.size], Exception):
            raise given
        return given

    rows = [timer.Row("matmul", "o", size, "its bits", 1.0, "TFLOP/s", lambda: None) for size in outcomes]  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(cards, "rows", lambda: rows)
    monkeypatch.setattr(cards, "measure", outcome)
    monkeypatch.setattr(cards, "ceilings", lambda: {"copy TB/s": 3.0})
    monkeypatch.setattr(Parser, "require", lambda parser, device, family="auto": None)
    return specs.main(["--device", "cuda", "--workers", "0", "--json", str(path)])


def test_the_table_and_the_json_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    group = "matmul, M <= 64"
    outcomes = {"M 1": timed("M 1", 5.0, group), "M 8": timed("M 8", 20.0, group), "n": timed("n", 1500.0, None, 0.9)}
    assert gpu_run(monkeypatch, outcomes, tmp_path / "gpu.json") == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["ratio"] for row in written["rows"]] == pytest.approx([2.0, 0.5, 1 / 150])
    assert [row["met"] for row in written["rows"]] == [None, None, False]
    assert written["means"] == [{"group": group, "ratio": pytest.approx(1.0), "target": 1.05, "met": False}]
    assert written["torch"] == torch.__version__ and written["ceilings"] == {"copy TB/s": 3.0}
    out = capsys.readouterr().out
    assert "geometric mean" in out and group in out and "1.50 ms" in out and "0 of 2 targets met, 0 rows failed" in out


def test_a_row_without_its_claim_or_that_raises_fails_the_run(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    outcomes = {"wrong": None, "raises": RuntimeError("no kernel"), "n": timed("n", 5.0, None, 0.9)}
    assert gpu_run(monkeypatch, outcomes, tmp_path / "gpu.json") == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["size"] for row in written["rows"]] == ["n"]
    assert ["lacks its bits" in f or "no kernel" in f for f in written["failed"]] == [True, True]
    assert "2 rows failed" in capsys.readouterr().out


def test_without_a_card_it_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        specs.main(["--device", "cuda"])
    assert "error: --device cuda: device=cuda: torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_row_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(timer, "_SLICE_SECONDS", 1e-4)
    monkeypatch.setattr(timer, "_ROTATED", 1e6)
    for graph in (True, False):
        row = card_rows.matmul_row("tiny", 16, 512, 1024, 8, "matmul, M <= 64", graph=graph)
        result = timer.measure(row)
        assert result and result.microseconds > 0 and result.baseline == "cuBLAS" and result.ratio > 0
        wrong = replace(row, build=lambda row=row: replace(row.build(), holds=lambda: False))
        assert timer.measure(wrong) is None
