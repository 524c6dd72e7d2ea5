"""Compiles GPU kernels side by side, without running them, for a card that need not be there.

A `Source` names a function that calls ops. Some processes call it with the CPU standing in for the GPU, so that every launch
arrives here with the types, constants and alignments that it would have on a card; the process that claims a launch compiles
it. Triton leaves what it compiled on disk, where the processes of a run then find it.
"""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kernels.gpu.card import Card, choose_family
from kernels.scratch import scratch


class CompileError(RuntimeError):
    """Says in one line why a process that compiles ended."""


@dataclass(frozen=True)
class Source:
    """Names a function to call in every process: `module:function`, and its arguments, which json can hold."""

    name: str
    arguments: dict[str, Any]

    def call(self) -> None:
        """Calls it in this process."""
        module, _, function = self.name.partition(":")
        getattr(importlib.import_module(module), function)(**self.arguments)


@dataclass(frozen=True)
class Compiled:
    """Describes one variant of a kernel. `shared`: bytes of shared memory; `registers` of a thread; `stack`: bytes of
    it that spill, -1 where the tool that tells is not there; `products`: kinds of matrix instruction in it. `error`: why it
    does not compile."""

    kernel: str
    seconds: float
    shared: int = 0
    registers: int = -1
    stack: int = -1
    ptx: str = ""
    products: tuple[str, ...] = ()
    error: str = ""


class _Driver:
    """Answers what Triton asks of a driver before it launches, for a card that is not there."""

    def __init__(self, card: Card) -> None:
        from triton.backends.compiler import GPUTarget

        major, minor = card.capability
        self.target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(current_device=lambda: 0, synchronize=lambda: None)


def compile_ahead(
    source: Source,
    card: Card,
    workers: int,
    report: Callable[[Compiled, int], None],
    each_kernel_once: bool = False,
    path: str = "",
    family: str = "auto",
) -> list[Compiled]:
    """Compiles what `source` launches on `card`, which need not be there, in `workers` processes, and returns a row for each
    variant. `report(row, known)` is called as each is done; `known`: variants found so far.
    `each_kernel_once`: the first variant of each kernel alone. `path`: folders to put before PYTHONPATH (another Triton)."""
    with scratch() as folder:
        order = {"source": asdict(source), "card": asdict(card), "once": each_kernel_once, "folder": str(folder)}
        order["family"] = family
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        paths = [path, *(p for p in sys.path if p), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        command = [sys.executable, "-m", "kernels.gpu.ahead", json.dumps(order)]
        log = (folder / "log").open("w+")
        running = [
            subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) for _ in range(workers)
        ]
        try:
            done = _gather(running, folder, report)
            if any(process.returncode for process in running):
                log.seek(0)
                lines = log.read().splitlines()
                errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
                raise CompileError(f"compiling ahead failed: {(errors or lines or ['no word'])[-1]}")
            return done
        finally:
            log.close()
            for process in running:
                process.kill()
                process.wait()


def _gather(running: list[Any], folder: Path, report: Callable[[Compiled, int], None]) -> list[Compiled]:
    done: list[Compiled] = []
    read: set[str] = set()

    def collect() -> None:
        for file in folder.glob("*.json"):
            if file.name not in read:
                read.add(file.name)
                row = json.loads(file.read_text())
                done.append(Compiled(**{**row, "products": tuple(row["products"])}))
                report(done[-1], sum(1 for _ in folder.glob("*.claim")))

    while any(process.poll() is None for process in running):
        collect()
        time.sleep(0.05)
    collect()
    return done


def _work(order: dict[str, Any]) -> None:
    """Calls the source in this process and compiles the launches that no other process has claimed."""
    from triton.runtime import driver

    given = order["card"]
    card = Card(**{**given, "capability": tuple(given["capability"])})
    driver.set_active(_Driver(card))
    choose_family(order["family"])
    import torch

    from kernels import device
    from kernels.gpu.launch import handed_to

    torch.set_num_threads(1)
    torch.cuda.is_current_stream_capturing = lambda: False  # asked of a driver that is not there
    device.stand_in("cpu", card)
    folder = Path(order["folder"])

    def take(launch: Any) -> None:
        from kernels.gpu.launch import described, name_of

        what = name_of(launch.kernel) if order["once"] else repr(described(launch))
        claim = folder / hashlib.sha256(what.encode()).hexdigest()
        try:
            os.close(os.open(claim.with_suffix(".claim"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        row = json.dumps(asdict(_compiled(launch)))
        claim.with_suffix(".part").write_text(row)
        claim.with_suffix(".part").rename(claim.with_suffix(".json"))

    with handed_to(take):
        Source(**order["source"]).call()


def _compiled(launch: Any) -> Compiled:
    from kernels.gpu.launch import compile_only, name_of

    start = time.perf_counter()
    try:
        kernel = compile_only(launch)
    except Exception as error:
        deepest = list(_chain(error))[-1]
        text = f"{type(deepest).__name__}: {str(deepest)[-1000:]}"
        return Compiled(name_of(launch.kernel), time.perf_counter() - start, error=text)
    seconds = time.perf_counter() - start
    registers, stack = _resources(kernel.asm["cubin"])
    text = kernel.asm["ptx"]
    ptx = hashlib.sha256(text.encode()).hexdigest()[:16]
    wrong = hasty(text) if launch.options.get("launch_pdl") else ""
    found = products(text)
    return Compiled(name_of(launch.kernel), seconds, kernel.metadata.shared, registers, stack, ptx, found, wrong)


def products(ptx: str) -> tuple[str, ...]:
    """Returns the kinds of matrix instruction in a kernel, in order: mma.sync and its shape, wgmma, tcgen05."""
    shapes = re.findall(r"^\s*(?:@%p\d+ )?(mma\.sync)\S*?\.(m\d+n\d+k\d+)\.", ptx, re.M)
    others = re.findall(r"\b(wgmma|tcgen05)\.mma", ptx)
    return tuple(sorted({*map(".".join, shapes), *others}))


def hasty(ptx: str) -> str:
    """Says what a kernel that is launched early touches before it waits for the kernels before it; nothing where it is right.
    Where warps have parts of their own, whose order in the text says little, a wait must be there."""
    found = re.search(r"^.*griddepcontrol\.wait", ptx, re.M)
    if not found:
        return "it is launched early and does not wait for the kernels before it (kernels.gpu.overlap.previous_done)"
    touches = re.search(
        r"\b(ld\.global|st\.global|atom\.|red\.|cp\.async\.(?!bulk\.prefetch))\S*", ptx[: found.start()]
    )
    if touches and "setmaxnreg" not in ptx:
        return f"it is launched early, and {touches[0]} stands before its wait for the kernels before it"
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _resources(cubin: bytes) -> tuple[int, int]:
    """Returns (registers, bytes of stack) by cuobjdump, which Triton brings; -1 where it does not."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not os.access(tool, os.X_OK):
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
