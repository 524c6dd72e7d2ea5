"""The library that the system compiler builds: its bits do not depend on the instruction set or the optimiser, and
building it is safe."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from kernels import contract
from kernels.cpu import BuildError
from kernels.cpu import build as builder
from kernels.spec import OpSpec, all_specs
from tests.bits import sha256

CPU = torch.device("cpu")
SPECS = {spec.name: spec for spec in all_specs()}
REPOSITORY = Path(builder.__file__).parents[2]
# x86-64 has no fma: every fused multiply-add is a call to libm. -O0 and -O1: nothing is vectorised, little is inlined.
TARGETS = {
    "x86-64": ("-march=x86-64",),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64-v4": ("-march=x86-64-v4",),
    "native-O1": ("-march=native", "-O1"),
    "v3-O0": ("-march=x86-64-v3", "-O0"),
}
NEEDS = {
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "v3-O0": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512vl", "avx512bw", "avx512dq"},
}


@cache
def library(target: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(builder.build(TARGETS[target])))


def digest(spec: OpSpec) -> str:
    """Of the outputs and gradients of every case."""
    outputs = []
    for dtype in spec.dtypes:
        for seed, case in enumerate(spec.cases):
            inputs = spec.make(case, torch.Generator().manual_seed(seed), CPU, dtype)
            outputs += contract.outputs_and_gradients(spec, inputs)
    return sha256(outputs)


native = cache(lambda name: digest(SPECS[name]))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("target", TARGETS)
def test_bits_do_not_depend_on_the_instruction_set(target: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := NEEDS.get(target, set()) - set(builder._processor().split()):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    expected = native(name)
    other = library(target)
    assert other._name != builder.library()._name, "the same file: nothing would be compared"
    used = []
    monkeypatch.setattr(builder, "library", lambda: used.append(target) or other)
    assert digest(SPECS[name]) == expected
    assert used or name in ("store_rows", "dequantize_blocks")  # a copy, a product


def test_the_digest_sees_one_bit() -> None:
    spec = SPECS["square_rows"]
    inputs = spec.make(spec.cases[1], torch.Generator().manual_seed(0), CPU, torch.float32)
    outputs = spec.outputs(inputs)
    changed = outputs[0].clone()
    changed.view(torch.int32)[-1] ^= 1
    assert sha256(outputs) != sha256([changed])


# The cache and the compiler -------------------------------------------------------------------------------------------

_CHILD = """
import torch, kernels.ops as ops
from kernels.cpu import library
torch.set_num_threads(1)
print(library()._name, ops.square_rows(torch.arange(40.0)[None]).item())
"""

# Leaves a file, and compiles when there are two of them.
_SLOW_COMPILER = """#!/bin/sh
if [ "$1" != --version ]; then
    touch "{gate}/$$"
    i=0
    while [ "$(ls "{gate}" | wc -l)" -lt 2 ] && [ $i -lt 200 ]; do sleep 0.05; i=$((i + 1)); done
fi
exec {real} "$@"
"""


def child(cache_home: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(cache_home), "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_that_build_at_once(tmp_path: Path) -> None:
    """A compiler that waits until both have started makes them overlap for sure."""
    real, gate = builder._compiler(), tmp_path / "gate"
    gate.mkdir()
    slow = tmp_path / "cc"
    slow.write_text(_SLOW_COMPILER.format(gate=gate, real=real))
    slow.chmod(0o755)
    processes = [child(tmp_path / "cache", CC=str(slow)) for _ in range(2)]
    results = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert len(list(gate.iterdir())) == 2, "the builds did not overlap"
    assert results[0][0] == results[1][0] and results[0][0].endswith(" 20540.0\n")
    assert len(list((tmp_path / "cache" / "samebit").iterdir())) == 1, "a temporary file was left behind"


def test_the_cache_is_used_and_keyed_by_what_goes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: runs.append(command) or run(command, **kw))
    first = builder.build(("-march=native", "-O0"))
    compiled = len(runs)
    assert first.exists() and builder.build(("-march=native", "-O0")) == first
    assert len(runs) == compiled + 1, "the second build asks for the version and compiles nothing"
    assert builder.build(("-march=native", "-O0", "-DOTHER")) != first
    monkeypatch.setattr(builder, "_processor", lambda: "another")
    assert builder.build(("-march=native", "-O0")) != first


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(BuildError) as error:
        call()
    assert "\n" not in str(error.value) and 10 < len(str(error.value)) < 500
    return str(error.value)


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "")
    assert "compiler" in one_line(builder.build)


def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "could not build" in one_line(lambda: builder.build(("-march=no-such-processor",)))
    assert not list((tmp_path / "samebit").iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME" in one_line(builder.build)
