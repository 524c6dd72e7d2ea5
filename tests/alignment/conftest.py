"""Fresh memory is NaN, so an unwritten output cannot pass."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those at Qwen3-8B's widths hold gigabytes of the card each: they take turns (pytest-xdist with --dist loadgroup)."""
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("gpu") and "0.6B" not in item.name:
            item.add_marker(pytest.mark.xdist_group("large"))


@pytest.fixture(scope="package", autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
