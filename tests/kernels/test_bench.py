"""The benchmark: what it refuses to time, and what it writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.spec import Inputs, OpSpec, all_specs

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
    assert any(broken in what for what in bench.broken_claims(spec, spec.cases[1], CPU, torch.float32))
    monkeypatch.setattr(bench, "all_specs", lambda: (spec,))
    monkeypatch.setattr(bench, "time_op", lambda *_: pytest.fail("it was timed"))
    assert bench.main([]) == 1
    assert "square_rows is not timed" in capsys.readouterr().out


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.name)
def test_every_op_and_its_vendor_run(spec: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_SAMPLES", 1)
    monkeypatch.setattr(bench, "_SAMPLE_SECONDS", 0)
    dtype = spec.dtypes[0]
    assert bench.broken_claims(spec, spec.cases[1], CPU, dtype) == []
    timings = list(bench.time_op(spec, small(spec).bench[0], CPU, dtype))
    assert [t.direction for t in timings][:1] == ["forward"]
    assert all(t.milliseconds > 0 and t.vendor_milliseconds > 0 and t.ratio > 0 for t in timings)
    inputs = spec.make(small(spec).bench[0], torch.Generator().manual_seed(0), CPU, dtype)
    if spec.name not in ("gumbel_argmax", "adamw", "kept_tokens"):  # it draws other noise, steps a copy, gives no mask
        expected = spec.vendor(inputs).squeeze(-1) if spec.name == "vocab_logprob" else spec.vendor(inputs)
        torch.testing.assert_close(spec.outputs(inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(SPECS["rms_norm"])
    monkeypatch.setattr(bench, "all_specs", lambda: (spec,))
    assert bench.main(["--json", str(tmp_path / "bench.json"), "--threads", "2"]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["threads"] == 2 and written["torch"] == torch.__version__ and written["processor"]
    assert [t["direction"] for t in written["timings"]] == ["forward", "backward"]
    assert {"op", "case", "dtype", "milliseconds", "vendor_milliseconds", "ratio", "speed", "unit"} <= set(
        written["timings"][0]
    )


def test_an_unknown_op_is_an_error_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--op", "conv"])
    assert "conv" in capsys.readouterr().err
