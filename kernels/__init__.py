"""Everything that decides a bit: the tree, the ops, the collectives and the one model.

Refuses a torch that the kernels were not tested with, and a machine without one: one line and exit code 2, as for any bad
input.
"""

import sys
from importlib.metadata import version

from kernels.packages import check_needed

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)
"""What pyproject.toml asks for, and why: each was tested, and brings a Triton that is in gpu/dialect.py."""


def _check_torch(found: str) -> str | None:
    """Returns what is wrong with a version of torch; None if nothing is."""
    if OLDEST_TORCH <= tuple(int(part) for part in found.split(".")[:2]) <= NEWEST_TORCH:
        return None
    least, most = (".".join(map(str, v)) for v in (OLDEST_TORCH, NEWEST_TORCH))
    return f"torch {found} is not one that samebit was tested with ({least} to {most}): pip install 'torch>={least},<={most}.9'"


check_needed("kernels")
if _problem := _check_torch(version("torch")):
    print(f"samebit: error: {_problem}", file=sys.stderr)
    sys.exit(2)
