"""What holds for every test."""

import ctypes
import os

# Threads that wait must not spin: with fewer free cores than threads they take ten to a thousand times as long. OpenMP reads
# this when torch is loaded, here and in every process that a test starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from kernels.gpu.card import ALL_FAMILIES, choose_family


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--family", default="auto", choices=("auto", *ALL_FAMILIES), help="of the kernels that GPU tests run"
    )


def pytest_configure(config: pytest.Config) -> None:
    choose_family(config.getoption("--family"))


_dict_of_thread = ctypes.pythonapi.PyThreadState_GetDict
_dict_of_thread.restype = ctypes.c_void_p


@pytest.fixture(autouse=True)
def _no_group_stays_with_the_thread():  # type: ignore[no-untyped-def]
    """DTensor keeps process groups among the thread's own variables. Ray forks in another thread, and its child would then end
    those groups and hang, or crash: a test that starts Ray in this process comes after one that trained in it."""
    yield
    if address := _dict_of_thread():
        own = ctypes.cast(address, ctypes.py_object).value
        for key in [k for k, v in own.items() if type(v).__name__ == "PyCapsule"]:
            del own[key]
