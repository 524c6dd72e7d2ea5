"""A card that has no kernels is refused in one line by every command, before anything starts."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rl.command import ON_CARD, SHORT, call

CARDS = [("Tesla T4", (7, 5)), ("NVIDIA H300", (9, 1)), ("Thor", (11, 0))]
COMMANDS = {
    "rollout.serve": ["device=cuda", "port=0"],
    "rollout.verify": ["--device", "cuda"],
    "rl.evaluate": [".", "device=cuda"],
    "rl.prove": ["device=cuda"],
    "rl.replay": [".", "--device", "cuda"],
    "rl.bench_publish": ["device=cuda"],
    "kernels.bench": ["--device", "cuda"],
    "kernels.doctor": ["--device", "cuda"],
    "kernels.collectives.bench": ["--ranks", "1"],
    "rollout.bench": ["--device", "cuda"],
    "trainer.bench": ["--device", "cuda"],
    "trainer.score": ["model", "batch.npz", "out.npy", "--device", "cuda"],
    "recipes.multi_gpu": [],
    "recipes.multi_gpu.engine": [],
}
MAINS = {
    "rl.evaluate": "rl.evaluation.command",
    "rl.replay": "rl.replay.command",
    "rl.bench_publish": "kernels.bench.publication",
    "kernels.bench": "kernels.bench.specs",
    "kernels.doctor": "kernels.doctor.__main__",
    "kernels.collectives.bench": "kernels.bench.collectives",
    "rollout.bench": "kernels.bench.serving",
    "trainer.bench": "kernels.bench.training",
    "recipes.multi_gpu": "recipes.multi_gpu.__main__",
}


EVALUATED = SimpleNamespace(
    device="cuda",
    model=SimpleNamespace(path="."),
    kernels=SimpleNamespace(family="auto"),
    eval=SimpleNamespace(sets={}),
)


@pytest.fixture(params=CARDS, ids=lambda card: card[0])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The only card that torch sees (two of it): its name and what it is."""
    name, capability = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    return name, ".".join(map(str, capability))


def ended(main: Callable[..., Any], arguments: list[str]) -> object:
    """The exit code of a command's `main`, whether it takes arguments or reads them."""
    try:
        takes = main.__code__.co_argcount > 0
        return main(arguments) if takes else main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_the_card(
    name: str, card: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name]])
    module = import_module(MAINS.get(name, name))
    if name == "rl.replay":
        monkeypatch.setattr(module, "one", lambda folder: SimpleNamespace(device="cuda", family="auto"))
    if name == "rl.evaluate":
        monkeypatch.setattr(module, "read_config", lambda model, overrides: EVALUATED)
    assert ended(module.main, COMMANDS[name]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert f"is {card[0]} of compute capability {card[1]}" in line and "device=cpu" in line
    assert not list(tmp_path.iterdir())


def test_a_run_refuses_the_card(card: tuple[str, str], tmp_path: Path) -> None:
    said = call(*ON_CARD, *SHORT, f"out_dir={tmp_path / 'run'}").error()
    assert f"is {card[0]} of compute capability {card[1]}" in said and not (tmp_path / "run").exists()
