"""Every kernel test runs over poisoned memory: what an op allocates and does not write comes out as NaN."""

import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from kernels.spec import OpSpec

_COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=20, **_COMMON)
settings.register_profile("brief", max_examples=4, **_COMMON)  # where each new shape is a compilation
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "brief" if torch.cuda.is_available() else "quick"))


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what a device, or the family of its card, does not run."""
    items[:] = [item for item in items if _runs_there(getattr(getattr(item, "callspec", None), "params", {}))]


def _runs_there(params: dict[str, Any]) -> bool:
    spec, device = params.get("spec"), torch.device(params.get("device", "cpu"))
    if not isinstance(spec, OpSpec):
        return True
    return spec.runs_on(device) if device.type == "cpu" or torch.cuda.is_available() else device.type in spec.devices


@pytest.fixture(scope="package", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integer); with glibc the scratch memory of C code is full of 3.4e38."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # more threads than free cores make the barriers of small ops spin
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-6, 0x80)  # M_PERTURB: malloc fills with 0x7f, the complement
    yield
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-6, 0)
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)
