"""Poisoned memory and two threads, as in tests/kernels."""

from tests.kernels.conftest import poisoned_memory

__all__ = ["poisoned_memory"]
