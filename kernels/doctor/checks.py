"""What the doctor computes: each check returns what is wrong, and the hash that belongs in a line of recorded.json."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from kernels import contract
from kernels.scratch import scratch
from kernels.spec import OpSpec, all_specs

Say = Callable[[str], None]
MINUTES = 15
"""Most of a process that is started; a first run compiles."""


def of_ops(device: str, say: Say) -> tuple[list[str], str]:
    """Checks the quick part of every op's contract (batch, position, neighbours, shards) on its second case, in each dtype of
    the device, and hashes outputs and gradients."""
    wrong, digest = [], hashlib.sha256()
    specs = [spec for spec in all_specs() if spec.runs_on(torch.device(device))]
    for i, spec in enumerate(specs, 1):
        say(f"op {i} of {len(specs)}: {spec.name}")
        wrong += _of_op(spec, torch.device(device), digest)
    return wrong, digest.hexdigest()


def _of_op(spec: OpSpec, device: torch.device, digest: "hashlib._Hash") -> list[str]:
    wrong = []
    for dtype in spec.dtypes_on(device):
        generator = torch.Generator().manual_seed(0)
        inputs = spec.make(spec.cases[min(1, len(spec.cases) - 1)], generator, device, dtype)
        for tensor in contract.outputs_and_gradients(spec, inputs):
            digest.update(f"{spec.name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for what, actual, expected in contract.quick(spec, inputs, generator):
            if not contract.same_bits(actual, expected):
                wrong.append(f"{spec.name}, {dtype}: {what}: other bits")
    return wrong


def of_sampler(device: str, family: str, say: Say) -> list[str]:
    """Compares the sampler's log-probs with the trainer's, for a tiny model of random weights."""
    say("sampler against trainer")
    command = ["rollout.verify", "--mode=trainer", "--trials=4", "--new=8", f"--device={device}", f"--family={family}"]
    return _run([*command, "--dtype=bfloat16"] if device == "cuda" else command)


def of_run(device: str, family: str, say: Say) -> tuple[list[str], str]:
    """Does a small run, from its warm start to its last step, and returns the hash of the trained weights."""
    say("a small run: a minute or two")
    with scratch() as folder:
        rows = folder / "rows.json"
        asked = [f"device={device}", f"kernels.family={family}", "--first=1", f"--json={rows}"]
        wrong = _run(["rl.prove", *asked])
        return wrong, json.loads(rows.read_text())[0]["sha256"] if not wrong else ""


def _run(command: list[str]) -> list[str]:
    try:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return [f"{command[0]} was not done after {MINUTES} minutes"]
    if done.returncode == 0:
        return []
    lines = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
    return [f"{command[0]} ended with {done.returncode}: {lines[-1]}"]
