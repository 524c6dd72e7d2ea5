"""Builds the C sources into one shared library, keeps it in a cache, and calls it.

The key of the cache is everything that goes in: sources, flags, compiler version and processor. A build is written to a
temporary name and renamed, so processes that start together do not read half a library.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from kernels.device import UnsupportedError
from kernels.scratch import scratch

_ROOT = Path(__file__).resolve().parent.parent
# What makes bits independent of compiler and machine is -ffp-contract=off and the absence of -ffast-math; the rest is speed.
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")

_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "int64_t": torch.int64,
    "int32_t": torch.int32,
    "uint32_t": torch.int32,
    "uint8_t": torch.uint8,
}
_SERIAL = 32768  # elements below which waking threads costs more than it saves


class BuildError(RuntimeError):
    """Says that the C compiler is missing or failed; the message is one line."""


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C compiler (cc, gcc or clang) found: the CPU kernels need one")


def _sources() -> list[Path]:
    return [_ROOT / "cpu/environment.c", *sorted(_ROOT.glob("ops/*/cpu.c"))]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        return next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return platform.processor() or platform.machine()


def build(target: tuple[str, ...] = ("-march=native",)) -> Path:
    """Returns the path of the library for instruction set `target`, built if the cache has none. Bits do not depend on
    `target`."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    digest = hashlib.sha256("\0".join((version, _processor(), *_FLAGS, *target)).encode())
    for path in (*_sources(), *sorted(_ROOT.glob("**/*.h"))):
        digest.update(path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "samebit"
    library = folder / f"kernels-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = held.enter_context(scratch(folder)) / library.name
        except OSError as error:
            raise BuildError(f"cannot write the kernel cache {folder}: {error.strerror}; set XDG_CACHE_HOME") from None
        command = [compiler, *_FLAGS, *target, f"-I{_ROOT / 'cpu'}", *map(str, _sources()), "-o", str(made), "-lm"]
        # Apple's clang has no OpenMP; threads decide no bit, so the library is then built for one.
        for attempt in ((*command, "-fopenmp"), command):
            result = subprocess.run(attempt, capture_output=True, text=True)
            if result.returncode == 0:
                os.replace(made, library)
                return library
    reason = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
    raise BuildError(f"{compiler} could not build the CPU kernels: {reason}")


@cache
def library() -> ctypes.CDLL:
    """Loads the shared library, building it first where the cache holds none."""
    return ctypes.CDLL(str(build()))


@cache
def _prototypes() -> dict[str, list[tuple[str, torch.dtype | type]]]:
    """Returns (parameter, dtype of the tensor or type of the scalar) of every C function, read from its definition."""
    found = {}
    for path in _sources():
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for name, parameters in re.findall(r"^(?:void|int) (\w+)\(([^)]*)\)\s*\{", text, re.MULTILINE):
            kinds: list[tuple[str, torch.dtype | type]] = []
            for parameter in parameters.split(","):
                kind, star, label = re.fullmatch(r"\s*(?:const )?(\w+) (\*?)(\w+)\s*", parameter).groups()  # type: ignore[union-attr]
                kinds.append((label, _DTYPES[kind] if star else float if kind == "float" else int))
            found[name] = kinds[:-1]  # the last one is the number of threads
    return found


def call(name: str, *args: torch.Tensor | int | float, strided: bool = False) -> None:
    """Runs C function `name`: a tensor is passed as its address (contiguous, unless `strided`), a scalar as int64 or
    float32, and the number of threads last. Every argument is checked against the definition. Raises UnsupportedError for
    another dtype or layout, and where this thread does not compute as IEEE 754 says; MemoryError where the function does."""
    raw: list[object] = []
    elements = 0
    for (label, kind), arg in zip(_prototypes()[name], args, strict=True):
        if isinstance(arg, torch.Tensor):
            if arg.device.type != "cpu" or arg.dtype != kind or not (strided or arg.is_contiguous()):
                what = f"{'a' if strided else 'a contiguous'} CPU tensor of {kind}"
                got = f"{arg.dtype} {tuple(arg.shape)} with strides {arg.stride()} on {arg.device}"
                raise UnsupportedError(f"{name}: {label} must be {what}, got {got}")
            elements += arg.numel()
            raw.append(ctypes.c_void_p(arg.data_ptr()))
        elif kind is float:
            raw.append(ctypes.c_float(arg))
        elif kind is int and isinstance(arg, int):
            raw.append(ctypes.c_int64(arg))
        else:
            raise UnsupportedError(f"{name}: {label} must be {kind}, got {arg!r}")
    if not library().is_ieee():
        raise UnsupportedError(
            f"{name}: this thread flushes subnormals to zero or does not round to nearest; undo torch.set_flush_denormal, or "
            f"find the library that was built with -ffast-math"
        )
    function = getattr(library(), name)
    function.restype = ctypes.c_int if name == "matmul" else None
    threads = torch.get_num_threads() if elements > _SERIAL else 1
    if function(*raw, ctypes.c_int64(threads)):
        raise MemoryError(f"{name}: out of memory")
