"""Hashes of whole runs that are committed: a run has them in every layout and on every machine of its device type.

python -m tests.rl.recorded ROWS.json   adds those of `rl.prove --json ROWS.json`; only for a change of bits that is meant
python -m tests.rl.recorded small       those of `tests.rl.small_run`; likewise
python -m tests.rl.recorded OUT_DIR     that of the run of `test_a_small_model_learns_by_adapters`, by its folder; likewise
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rl.compose import check
from rl.data import open_source
from rl.identity import CONTENT, identity
from rl.prove import SMALL
from tests.rl.small_run import OWN

LORA = "lora_tiny, its first steps"
RECORDED = Path(__file__).with_name("recorded_runs.json")


def recorded() -> dict[str, Any]:
    """The hashes; an AssertionError where the small run has other problems than those that they are of. pyproject.toml pins
    reasoning-gym, which draws them."""
    known = json.loads(RECORDED.read_text())
    there, here = known["reasoning-gym"], version("reasoning-gym")
    assert known["problems"] == problems("cpu"), (
        f"reasoning-gym {here} draws other problems than {there}, of the record"
    )
    return known


def problems(device: str) -> str:
    """The checksum of what the small run trains on."""
    (config,) = check([*SMALL, f"device={device}"])
    return str(identity(config, open_source(config))[CONTENT])


def name_of(row: Mapping[str, Any]) -> str:
    """What the hash of a row of `rl.prove --json` is recorded under."""
    family = "" if row["family"] in ("", "hopper") else f", {row['family']}"
    return f"{row['device']} {row['layout']['dtype']}{family}"


def assert_recorded(name: str, sha256: str) -> None:
    known = recorded()
    assert name in known, f"nothing is recorded of {name}; this run has {sha256}"
    assert sha256 == known[name], f"{name}: weights {sha256}, recorded {known[name]}"


def main(what: str) -> None:
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if what == "small":
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, "-m", "tests.rl.small_run", dtype]
            stages = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            known[f"small run, {dtype}"] = {name: h for name, h in stages.items() if name != OWN}
    elif (Path(what) / "summary.json").exists():
        known[LORA] = json.loads((Path(what) / "summary.json").read_text())["weights_sha256"]
    else:
        for row in json.loads(Path(what).read_text()):
            known[name_of(row)] = row["sha256"]
    known |= {"problems": problems("cpu"), "reasoning-gym": version("reasoning-gym")}
    RECORDED.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
