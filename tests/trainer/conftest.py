"""Poisoned memory and two threads, as in tests/kernels, and a mesh of one rank in this process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.kernels.conftest import poisoned_memory

__all__ = ["mesh", "poisoned_memory"]


@pytest.fixture(scope="package")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
