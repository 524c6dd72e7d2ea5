"""Which implementation of an op runs: the one of the tensor's device, or an error."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
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
