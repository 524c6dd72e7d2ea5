"""`python -m rl.replay FOLDER`: computes a kept batch again and says where sampler and trainer part (rl/replay/command.py)."""

import sys

from kernels.host.command import interruptible
from rl.replay.command import main

if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
