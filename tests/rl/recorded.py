"""Hashes of whole runs that are committed: a run has them in every layout and on every machine of its device type.

python -m tests.rl.recorded ROWS.json   adds those of `rl.prove --json ROWS.json`; only for a change of bits that is meant
"""

import json
import sys
from pathlib import Path

import pytest

from rl.compose import check
from rl.data import open_source
from rl.identity import CONTENT, identity
from rl.prove import SMALL

RECORDED = Path(__file__).with_name("recorded_runs.json")


def problems(device: str) -> str:
    """The checksum of what the small run trains on: another version of reasoning-gym may draw other problems."""
    (config,) = check([*SMALL, f"device={device}"])
    return str(identity(config, open_source(config))[CONTENT])


def assert_recorded(device: str, dtype: str, sha256: str) -> None:
    recorded = json.loads(RECORDED.read_text())
    if recorded["problems"] != problems(device):
        pytest.skip("the hashes are of other problems: reasoning-gym draws others in this version")
    if (name := f"{device} {dtype}") not in recorded:
        pytest.skip(f"nothing is recorded of {name}; this run has {sha256}")
    assert sha256 == recorded[name], "other bits than those recorded"


def main(path: str) -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for row in json.loads(Path(path).read_text()):
        recorded[f"{row['device']} {row['layout']['dtype']}"] = row["sha256"]
        recorded["problems"] = problems(row["device"])
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
