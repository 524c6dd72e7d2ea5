"""Which implementation of an op runs: the one of the tensor's device, or an error."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import torch

_MODULE = {"cpu": "cpu", "cuda": "gpu"}


class UnsupportedError(RuntimeError):
    """An op, shape, dtype or device that has no exact implementation. There is no fallback."""


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
