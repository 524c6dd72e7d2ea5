"""Facts of this machine that decide which kernels run, and what was recorded of such cards."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kernels.device import family_of
from kernels.gpu.card import KNOWN, card_of

RECORDED = Path(__file__).with_name("recorded.json")
KEYS = ("card", "capability", "family")
HASHES = ("ops", "run")


def facts(device: str) -> dict[str, Any]:
    """Returns card, capability and family of the kernels, driver and versions; of a CPU, without those of a card."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cpu":
        return {"card": "CPU", "capability": "", "family": "cpu", "processor": platform.machine(), **versions}
    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    return {
        "card": card.name,
        "capability": ".".join(map(str, card.capability)),
        "family": family_of(card),
        "multiprocessors": card.multiprocessors,
        "shared_memory": card.shared_memory,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "driver": driver(),
        "triton": metadata.version("triton"),
        **versions,
    }


def driver() -> str:
    """Returns the version of the driver; "unknown" where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    return lines[0] if lines else "unknown"


def compiled_for(found: dict[str, Any]) -> str:
    """Says whether the kernels are compiled ahead, in the tests, for such a card."""
    if found["family"] == "cpu":
        return "in the C compiler of this machine, when an op is first called"
    known = {".".join(map(str, card.capability)) for card in KNOWN.values()}
    how = "in the tests, without a card" if found["capability"] in known else "here alone: the tests have no such card"
    return f"{how}; the kernels of a run when it starts, kept in Triton's cache"


def recorded(path: Path = RECORDED) -> list[dict[str, Any]]:
    """Returns the lines that were recorded."""
    return list(json.loads(path.read_text())["lines"])


def judge(line: dict[str, Any], lines: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Compares a line with those of its family: returns what to say, and whether it has the bits of every one of its own
    capability. Cards of another capability may have others: nobody has shown that their instructions round alike."""
    said, holds = [], True
    family = [other for other in lines if other["family"] == line["family"]]
    if not family:
        said.append(f"nothing is recorded of the family {line['family']}")
    for other in family:
        same = {name: line[name] == other[name] for name in HASHES if line.get(name) and other.get(name)}
        own = other["capability"] == line["capability"]
        holds = holds and (all(same.values()) or not own)
        words = ", ".join(f"{name} {'the same' if equal else 'OTHER'}" for name, equal in same.items())
        said.append(f"against {other['card']} ({other['capability'] or 'any'}): {words or 'nothing to compare'}")
    if not any(other["capability"] == line["capability"] for other in family):
        said.append(
            "no such card is recorded: a pull request that adds the line to kernels/doctor/recorded.json is welcome"
        )
    return said, holds
