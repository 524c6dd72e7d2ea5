"""Memory of the host."""

import psutil


def available_memory() -> int:
    """Returns the bytes of this machine that a process could have."""
    return int(psutil.virtual_memory().available)
