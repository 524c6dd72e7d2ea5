"""Versions and cards that the kernels were not tested with are refused in one line that names them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kernels
from kernels import device
from kernels.device import UnsupportedError, check_cards, choose_device

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu130", "2.13.0+cpu", "2.15.1", "2.15.0a0+git1234"])
def test_tested_torch(version: str) -> None:
    assert kernels._check_torch(version) is None


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "3.0.0", "1.13.1"])
def test_other_torch(version: str) -> None:
    problem = kernels._check_torch(version)
    assert problem and version in problem and "2.11 to 2.15" in problem and "pip install" in problem


def test_pyproject_asks_for_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch_range = next(d for d in project["dependencies"] if d.startswith("torch"))
    least, below = re.findall(r"(\d+)\.(\d+)", torch_range)
    newest = kernels.NEWEST_TORCH
    assert tuple(map(int, least)) == kernels.OLDEST_TORCH and tuple(map(int, below)) == (newest[0], newest[1] + 1)


def test_another_torch_ends_a_command_in_one_line(tmp_path: Path) -> None:
    info = tmp_path / "torch-9.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['x']; import kernels"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith("samebit: error: torch 9.9.0 ") and ended.stderr.count("\n") == 1


@pytest.fixture
def a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: (8, 0))


@pytest.mark.usefixtures("a100")
def test_another_card_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"card 0 is NVIDIA A100-SXM4-80GB of compute capability 8\.0.*9\.0"):
        check_cards()


@pytest.mark.usefixtures("a100")
def test_auto_says_why_it_takes_the_cpu() -> None:
    said: list[str] = []
    assert choose_device("auto", said.append) == "cpu" and "A100" in said[0]
    with pytest.raises(UnsupportedError):
        choose_device("cuda", said.append)


def test_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", pytest.fail) == choose_device("cpu", pytest.fail) == "cpu"
    with pytest.raises(UnsupportedError, match="torch sees no CUDA device"):
        choose_device("cuda", pytest.fail)


@pytest.mark.parametrize(("version", "named"), [(None, "there is no triton"), ("3.2.0", "triton 3.2.0 is not one")])
def test_a_triton_that_is_none_or_too_old(monkeypatch: pytest.MonkeyPatch, version: str | None, named: str) -> None:
    """What the kernels are written in is of later Tritons: an older one cannot even be asked for its version there."""
    old = ModuleType("triton")
    old.__dict__["__version__"] = version
    monkeypatch.setitem(sys.modules, "triton", old if version else None)
    for name in [name for name in sys.modules if name.startswith("triton.") or name == "kernels.gpu.dialect"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UnsupportedError, match=rf"{re.escape(named)}.*pyproject\.toml"):
        check_cards()
    said: list[str] = []
    assert choose_device("auto", said.append) == "cpu" and named in said[0]
