"""Which implementation of an op runs: the one of the tensor's device, or an error."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import torch

_MODULE = {"cpu": "cpu", "cuda": "gpu"}


def stand_in(device_type: str, module: str) -> None:
    """Sends tensors of `device_type` to the implementations in `module` for the rest of this process, which must run none of
    them: gpu/ahead.py compiles what they would launch."""
    _MODULE[device_type] = module
    implementation.cache_clear()


class UnsupportedError(RuntimeError):
    """An op, shape, dtype or device that has no exact implementation. There is no fallback."""


CAPABILITIES = {(9, 0): "Hopper"}
"""Of the cards that have GPU kernels."""


def check_cards() -> None:
    """Raises UnsupportedError, which names card or version, unless every visible card can run the GPU kernels."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "device=cuda: torch sees no CUDA device: use device=cpu, or install a torch for this driver"
        )
    for card in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(card), torch.cuda.get_device_capability(card)
        if (major, minor) not in CAPABILITIES:
            known = ", ".join(f"{a}.{b} ({family})" for (a, b), family in CAPABILITIES.items())
            raise UnsupportedError(
                f"card {card} is {name} of compute capability {major}.{minor}; the GPU kernels are for {known}: use "
                f"device=cpu, or hide that card with CUDA_VISIBLE_DEVICES"
            )
    import_module("kernels.gpu.dialect")  # refuses a Triton that it does not know


def choose_device(asked: str, say: Callable[[str], None]) -> str:
    """cpu or cuda. `auto`: the GPU where there is one; `say` is told why a card that is there is not used."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return "cpu"
    try:
        check_cards()
    except UnsupportedError as error:
        if asked != "auto":
            raise
        say(f"using the CPU: {error}")
        return "cpu"
    return "cuda"


@cache
def implementation(op: str, device_type: str) -> ModuleType:
    """The module `kernels.ops.<op>.<cpu|gpu>`."""
    name = f"kernels.ops.{op}.{_MODULE.get(device_type, device_type)}"
    if device_type not in _MODULE or find_spec(name) is None:
        have = [d for d, m in _MODULE.items() if find_spec(f"kernels.ops.{op}.{m}")]
        raise UnsupportedError(
            f"{op} has no exact implementation for device {device_type!r}; it runs on {', '.join(have)}"
        )
    return import_module(name)


def same_device(op: str, *tensors: torch.Tensor) -> ModuleType:
    """The implementation for tensors that must all be on one device."""
    kinds = {t.device for t in tensors}
    if len(kinds) != 1:
        raise UnsupportedError(f"{op}: tensors on {sorted(map(str, kinds))}; put them on one device")
    return implementation(op, tensors[0].device.type)


def gradient_dtype(weight: torch.Tensor) -> torch.dtype:
    """Of the gradient that an op returns for `weight`: float32 for a float32 master, and for a copy of it that was rounded
    beforehand and says so (`Tensor.grad_dtype`). To be asked in the forward pass: what autograd saved has forgotten it."""
    return (weight.grad_dtype or weight.dtype) if weight.is_leaf else weight.dtype


def check_groups(op: str, groups: torch.Tensor, rows: int) -> None:
    """UnsupportedError unless `groups` are int64 offsets 0 <= ... <= rows, ascending, of at least one group."""
    offsets = groups.tolist()
    ascending = all(a <= b for a, b in pairwise(offsets))
    if groups.dtype != torch.int64 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != rows or not ascending:
        raise UnsupportedError(
            f"{op}: groups must be int64 offsets that ascend from 0 to the {rows} rows, got {groups.dtype} {offsets[:8]} "
            f"that end at {offsets[-1] if offsets else None}"
        )
