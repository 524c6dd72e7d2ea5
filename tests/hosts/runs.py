"""The small run whose hash is recorded, on hosts."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from rl.prove import SMALL
from tests.hosts.namespaces import SHARED, Host, Hosts
from tests.rl.command import Outcome

RECORDED = json.loads((Path(__file__).parents[1] / "rl" / "recorded_runs.json").read_text())["cpu float32"]
RUN = (
    *SMALL,
    "cluster.address=auto",
    "trainer.world_size=2",
    "rollout.tp=1",
    "rollout.replicas=2",
    "cluster.timeout=900",
)
LONG = (*RUN, "warmup.steps=5000")
LONG_ONES = pytest.mark.skipif(
    os.environ.get("SAMEBIT_HOSTS") != "all", reason="takes minutes: SAMEBIT_HOSTS=all runs it too"
)
PATIENCE = 1800.0  # seconds for a whole run: this machine may be busy


def ended(running: subprocess.Popen[str], timeout: float = PATIENCE) -> Outcome:
    out, err = running.communicate(timeout=timeout)
    return Outcome(running.returncode, out, err)


def run(host: Host, name: str, *overrides: str, env: dict[str, str] | None = None) -> Outcome:
    """A whole run whose driver is on `host`, in the shared folder."""
    return ended(host.train(*RUN, f"out_dir={SHARED / name}", *overrides, env=env))


def sha256(net: Hosts, name: str) -> str:
    return str(json.loads((net.shared / name / "summary.json").read_text())["weights_sha256"])


def begun(host: Host, name: str, *overrides: str, line: str = "warm start 1") -> subprocess.Popen[str]:
    """A run that has said `line`."""
    running = host.train(*LONG, f"out_dir={SHARED / name}", *overrides)
    assert running.stdout is not None
    for said in running.stdout:
        if said.startswith(line):
            return running
    raise AssertionError(ended(running))


def wait_for_checkpoint(net: Hosts, name: str, step: int, running: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    rows = net.shared / name / "metrics.jsonl"
    while not rows.exists() or rows.read_text().count('"policy/') < step:
        assert running.poll() is None and time.monotonic() < until, ended(running)
        time.sleep(0.2)
