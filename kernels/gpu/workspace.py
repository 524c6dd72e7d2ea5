"""Arrival counters: the last block to finish its part of a tile adds the parts, then sets the counter back to zero."""

import torch
from triton.runtime import driver

from kernels.device import UnsupportedError

_SIZE = 1 << 16
_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Returns zeroed int32 counters of the current stream. Kernels of one stream run one after another, so they share them."""
    key = (device, driver.active.get_current_stream(device.index))
    if count > _SIZE:
        raise UnsupportedError(f"a launch needs {count} arrival counters and has {_SIZE}: split the batch")
    if key not in _counters:
        if torch.cuda.is_current_stream_capturing():
            base = [c for (d, _), c in _counters.items() if d == device]
            if not base:
                raise UnsupportedError("run the op once on this device before it is captured in a CUDA graph")
            return base[0]
        _counters[key] = torch.zeros(_SIZE, dtype=torch.int32, device=device)
    return _counters[key]
