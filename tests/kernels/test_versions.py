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
from kernels.device import MODULES, UnsupportedError, check_cards, choose_device, family_of
from kernels.gpu.card import KNOWN, Card

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


def show(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Lets torch see one card of this name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("Tesla T4", (7, 5)),
        ("NVIDIA H300", (9, 1)),
        ("NVIDIA B20", (10, 1)),
        ("Thor", (11, 0)),
        ("NVIDIA R100", (13, 0)),
    ],
)
def test_a_card_without_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> None:
    show(monkeypatch, name, capability)
    at = r"\.".join(map(str, capability))
    with pytest.raises(UnsupportedError, match=rf"card 0 is {name} of compute capability {at}; .* 8\.0, .* 9\.0"):
        check_cards()
    said: list[str] = []
    assert choose_device("auto", said.append) == "cpu" and name in said[0]
    with pytest.raises(UnsupportedError):
        choose_device("cuda", said.append)


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "portable"), ((8, 9), "portable"), ((9, 0), "hopper"), ((10, 0), "portable"), ((12, 0), "portable")],
)
def test_a_card_runs_the_kernels_of_its_family(capability: tuple[int, int], family: str) -> None:
    assert family_of(Card("a card", capability, 1, 1)) == family
    assert MODULES[family][-1] == "portable"


@pytest.mark.parametrize("known", KNOWN.values(), ids=lambda card: card.name)
def test_no_tile_of_a_b200_is_one_that_triton_gives_tcgen05(known: Card) -> None:
    """Which it does for 4 or 8 warps and a multiple of 64 rows; other cards have the warps that were asked for."""
    for rows in (16, 32, 64, 128, 192):
        for warps in (1, 2, 4, 8, 16):
            given = known.warps(warps, rows)
            if known.capability[0] == 10 and rows % 64 == 0:
                assert given not in (4, 8) and given in (warps, warps // 2, 2 * warps)
            else:
                assert given == warps


def test_fp8_is_refused_where_no_card_has_its_bits() -> None:
    """By name, as mma.sync would have other bits than wgmma; on a Hopper card that runs the portable kernels too."""
    code = """
import torch
from kernels.device import UnsupportedError, implementation, stand_in
from kernels.gpu.card import KNOWN, choose_family
choose_family("portable")
for capability in (80, 90):
    stand_in("cpu", KNOWN[capability])
    for op in ("quantize", "matmul_fp8"):
        try:
            print(implementation(op, torch.device("cpu")))
        except UnsupportedError as error:
            print(error)
"""
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    says = "has no exact implementation for Portable cards; it runs on cpu, hopper"
    assert lines == [f"{op} {says}" for _ in range(2) for op in ("quantize", "matmul_fp8")]


def test_a_process_stays_with_a_family() -> None:
    """Another one is refused, and a card that has no kernels has none in any family."""
    code = """
from kernels.gpu.card import Card, choose_family
choose_family("auto")
choose_family("portable")
choose_family("portable")
print(*(Card("a card", capability, 1, 1).family for capability in ((7, 5), (8, 6), (9, 0), (11, 0))))
for name in ("hopper", "auto", "ampere"):
    try:
        choose_family(name)
    except ValueError as error:
        print(error)
"""
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert lines[0] == "None portable portable None"
    assert len(lines) == 4 and all("portable" in line for line in lines[1:]) and "no family 'ampere'" in lines[3]


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
