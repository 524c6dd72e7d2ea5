"""`python -m rl.evaluate MODEL [key=value ...]`: evaluates a model that is there (rl/evaluation/command.py)."""

import sys

from kernels.host.command import interruptible
from rl.evaluation.command import main

if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
