"""A run's hash is the recorded one on every path that torch, MKL, numpy and libm can take here. On another CPU they take
another one; here a variable chooses.

Not to be had: a torch for x86-64 without MKL. Its wheels hold MKL; those for other processors do not, and run this test too.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.cpu import build
from tests.bits import sha256
from tests.rl.recorded import recorded
from tests.rl.small_run import OWN, SQUARES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NUMPY = import_module("numpy._core._multiarray_umath" if hasattr(np, "_core") else "numpy.core._multiarray_umath")
# What ATen can be told to use: it does not ask whether the CPU can.
ATEN = {"AVX512": ("default", "avx2", "avx512"), "AVX2": ("default", "avx2")}
ATEN_PATHS = ATEN.get(torch.backends.cpu.get_cpu_capability(), ("default",))
# MKL asks this before it looks at what the CPU can do; the answer is that of a CPU that is not Intel's.
NOT_INTEL = "int mkl_serv_intel_cpu_true(void) { return 0; }\n"

PLAIN = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "NPY_DISABLE_CPU_FEATURES": " ".join(NUMPY.__cpu_dispatch__),
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA",
    "OMP_NUM_THREADS": "1",
}
NARROW = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": ATEN_PATHS[:2][-1], "OMP_NUM_THREADS": "2"}
WIDE = {"MKL_ENABLE_INSTRUCTIONS": "AVX512", "ATEN_CPU_CAPABILITY": ATEN_PATHS[-1], "OMP_NUM_THREADS": "3"}
PATHS = {
    "plain": ("float32", PLAIN),
    "plain, bfloat16": ("bfloat16", PLAIN),
    "AVX2": ("float32", NARROW),
    "AVX-512": ("float32", WIDE),
    "not Intel": ("float32", {"LD_PRELOAD": "", "OMP_NUM_THREADS": "1"}),
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_has_the_recorded_hash(name: str, tmp_path: Path) -> None:
    dtype, path = PATHS[name]
    found = stages(dtype, path | {"LD_PRELOAD": not_intel(tmp_path)} if "LD_PRELOAD" in path else path)
    expected = recorded()[f"small run, {dtype}"]
    if path is PLAIN and torch.backends.mkl.is_available():
        exact = np.sqrt(SQUARES.double().numpy()).astype(np.float32)
        assert found[OWN] != sha256([torch.from_numpy(exact)]), "the path was not taken: no run could have differed"
    first = [what for what, h in expected.items() if found[what] != h][:1]
    assert not first, f"{name}: {first[0]} are {found[first[0]]}, recorded {expected[first[0]]}"


def test_drafted_tokens_leave_the_recorded_hash() -> None:
    assert recorded()["small run, float32"].items() <= stages("float32", {}, "drafts").items()


def stages(dtype: str, path: dict[str, str], *further: str) -> dict[str, str]:
    """What `tests.rl.small_run` prints, in a process that starts on this path."""
    chosen = {variable for _, p in PATHS.values() for variable in p}
    done = subprocess.run(
        [sys.executable, "-m", "tests.rl.small_run", dtype, *further],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in chosen} | path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def not_intel(folder: Path) -> str:
    """A library to be loaded before torch."""
    source, library = folder / "not_intel.c", folder / "not_intel.so"
    source.write_text(NOT_INTEL)
    subprocess.run([build._compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return str(library)
