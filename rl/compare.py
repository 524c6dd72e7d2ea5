"""`python -m rl.compare RUN_A RUN_B`: finds where two runs part (rl/comparison/command.py)."""

import sys

from kernels.host.command import interruptible
from rl.comparison.command import main

if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
