"""`python -m kernels.bench`: the ops (specs.py)."""

import sys

from kernels.bench.specs import main
from kernels.host.command import interruptible

if __name__ == "__main__":
    with interruptible():
        sys.exit(main())
